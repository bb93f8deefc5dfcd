"""Rules of the command line, GLOB=KIND[,OPTION[=VALUE]…], as those of mixgrain.sparsify_model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mixgrain.formats.errors import LayoutError
from mixgrain.primitives.rule import Choice, read_choice

_VALUES: Mapping[str, Callable[[str], object]] = {
    "density": float, "n": int, "m": int, "size": int, "axis": str,
}  # fmt: skip


def parse_rules(texts: Sequence[str], prune: bool) -> dict[str, Choice]:
    """The choices of several rules, by their globs, in their order.

    Args:
        texts: each "GLOB=KIND", KIND a layout, n:m or "dense", options behind it by commas:
            "*.up=tile,density=0.25,prune".
        prune: all of them prune, whether they say so or not.

    Raises:
        LayoutError: a rule that cannot be read; says where.
    """
    found: dict[str, Choice] = {}
    for text in texts:
        glob, equals, rest = text.partition("=")
        if not glob or not equals or not rest:
            raise LayoutError(
                f"--rule {text!r}: expected GLOB=KIND[,OPTION=VALUE…], e.g. "
                "'*.up=tile,density=0.25'"
            )
        if glob in found:
            raise LayoutError(f"--rule {text!r}: {glob!r} has a rule already; give one of them")
        kind, *given = rest.split(",")
        options: dict[str, Any] = dict(_option(text, option) for option in given)
        if prune and kind != "dense":
            options["prune"] = True
        found[glob] = read_choice(f"--rule {text!r}", kind, options)
    return found


def _option(text: str, option: str) -> tuple[str, object]:
    name, equals, value = option.partition("=")
    if option == "prune":
        return "prune", True
    try:
        if not equals:
            raise KeyError(name)
        return name, _VALUES[name](value)
    except KeyError:
        known = ", ".join(f"{name}=VALUE" for name in _VALUES)
        raise LayoutError(f"--rule {text!r}: option {option!r}; expected prune, {known}") from None
    except ValueError:
        raise LayoutError(f"--rule {text!r}: {name} is {value!r}; expected a number") from None
