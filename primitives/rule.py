"""Rules: which weights become sparse and how, for layers of a model and for tensors of a file."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from mixgrain.formats.errors import LayoutError
from mixgrain.formats.layout import Layout
from mixgrain.formats.sparse import SparseTensor
from mixgrain.formats.sparsify import KINDS, sparsify

# What becomes of one weight: the options of sparsify, or the result itself; None leaves it dense.
Choice: TypeAlias = Mapping[str, Any] | SparseTensor | None
# What stands for a choice in a rule.
Choosable: TypeAlias = str | Mapping[str, Any] | Layout | SparseTensor | None

_OPTIONS = [name for name in inspect.signature(sparsify).parameters if name != "dense"]
_DENSE = "dense"


def read_choice(op: str, given: object, options: Mapping[str, Any] | None = None) -> Choice:
    """A choice as ``sparsify`` takes it.

    Args:
        op: who asks, for messages.
        given: a kind of layout ("tile"), "n:m" ("2:4"), "dense" or None, a dict of sparsify's
            options with "kind" or "layout" among them, a Layout to sample at, or a SparseTensor.
        options: more of sparsify's options, beside a kind.

    Raises:
        LayoutError: something else; says what there is.
    """
    kinds = ", ".join(map(repr, KINDS))
    more = dict(options or {})
    if isinstance(given, Mapping):
        more = {**given, **more}
        given = more.pop("kind", None)
        if given is None and more.get("layout") is None:
            raise LayoutError(
                f"{op}: options {more!r:.80} without a kind; expected 'kind', one of {kinds} or "
                "'2:4', or 'layout' among them"
            )
    elif isinstance(given, Layout):
        more["layout"], given = given, None
    unknown = [name for name in more if name not in _OPTIONS]
    if unknown:
        raise LayoutError(
            f"{op}: option {unknown[0]!r:.80}; expected those of sparsify: {', '.join(_OPTIONS)}"
        )
    if isinstance(given, str) and given == _DENSE:
        given = None
        if more:
            raise LayoutError(f"{op}: 'dense' takes no options; given {more!r:.80}")
    if isinstance(given, SparseTensor) and more:
        raise LayoutError(f"{op}: a SparseTensor takes no options; given {more!r:.80}")
    if isinstance(given, SparseTensor) or (given is None and not more):
        return given
    if given is None:
        return more
    if isinstance(given, str) and (groups := re.fullmatch(r"(\d{1,3}):(\d{1,3})", given)):
        if "n" in more or "m" in more:
            raise LayoutError(f"{op}: {given!r} and n or m; give one of them")
        return {"kind": "nm", "n": int(groups[1]), "m": int(groups[2]), **more}
    if not isinstance(given, str) or given not in KINDS:
        raise LayoutError(
            f"{op}: {given!r:.80} given; expected a kind ({kinds}, or n:m such as '2:4'), a dict "
            "of sparsify's options, a Layout, a SparseTensor, or 'dense' or None to leave a weight "
            "dense"
        )
    return {"kind": given, **more}


def matches(glob: str, name: str) -> bool:
    """Whether a glob names a weight, by its own name or its layer's ("up" for "up.weight")."""
    return fnmatchcase(name, glob) or fnmatchcase(name.removesuffix(".weight"), glob)


def read_globs(op: str, rule: Mapping[Any, Any]) -> dict[str, Choice]:
    """The choices of a mapping of globs to choices, in its order.

    Raises:
        LayoutError: a key that is no text, or a value that is no choice.
    """
    found: dict[str, Choice] = {}
    for glob, given in rule.items():
        if not isinstance(glob, str):
            raise LayoutError(
                f"{op}: the rule names {glob!r:.80}; expected a layer's name or a glob such as "
                "'*.mlp.*'"
            )
        if glob in _OPTIONS and not isinstance(given, Mapping):
            raise LayoutError(
                f"{op}: the rule names a layer {glob!r}; options go beside the kind, as in "
                "sparsify_model(model, 'tile', prune=True, density=0.25), or in a dict behind a "
                "name: {'*.up': {'kind': 'tile', …}}"
            )
        found[glob] = read_choice(f"{op}: {glob!r}", given)
    if not found:
        raise LayoutError(f"{op}: an empty rule; expected names and what becomes of them")
    return found


def first_match(globs: Mapping[str, Choice], name: str) -> str | None:
    """The first glob that names a weight, or None."""
    return next((glob for glob in globs if matches(glob, name)), None)


def check_used(op: str, globs: Iterable[str], names: Iterable[str], what: str) -> None:
    """Raise LayoutError for the first glob that names nothing; ``what`` is "layer" or "tensor"."""
    names = list(names)
    for glob in globs:
        if not any(matches(glob, name) for name in names):
            some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            raise LayoutError(f"{op}: no {what} is called {glob!r}; there are: {some or 'none'}")
