"""Writes what is not kept by hand here: pictures, the command line reference, the API pages."""

from __future__ import annotations

import argparse
import inspect
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any, get_overloads

import numpy as np
import torch

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.formats import errors
from mixgrain.formats.layout import Layout
from mixgrain.formats.pattern import Pattern
from mixgrain.tools import cli, plot
from mixgrain.tools.picture import subject

# Between neighbouring units of a picture.
BORDER = "#9aa3ad"
# Columns of the command line's help, and of nothing else.
HELP_WIDTH = 92

# Title and opening words of each page of the API; names come from mixgrain itself.
PAGES = {
    "formats": ("Formats", "Layouts, sparse tensors, and how they are made, saved and loaded."),
    "primitives": ("Primitives", "The products and the softmax that attention is made of."),
    "attention": ("Attention", "Attention with any pattern, and what it costs."),
}
# Classes that users meet as results and arguments but do not import by name.
MET = {
    "formats": ("mixgrain.formats.layout.Layout", "mixgrain.formats.panel.PanelLayout"),
    "primitives": (
        "mixgrain.primitives.model_report.ModelReport",
        "mixgrain.primitives.model_report.ConvertedWeight",
    ),
    "attention": ("mixgrain.attention.explain.Explanation", "mixgrain.attention.explain.Part"),
}


# What users ask of a pattern; its other methods are how one is evaluated.
ASKED = "dense, nnz, density, row, block, to_layout, leading_dims, lead, device"


def write(folder: Path) -> None:
    """Writes everything into a folder; files that would not change are left alone."""
    folder.mkdir(exist_ok=True)
    for name, text in {"cli.md": command_line(), **api_pages()}.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for name, draw in PICTURES.items():
        draw(folder / f"{name}.png")


# The command line


def command_line() -> str:
    """The command line reference, as its own --help prints it."""
    os.environ["COLUMNS"], old = str(HELP_WIDTH), os.environ.get("COLUMNS")
    try:
        top = cli.parser()
        (verbs,) = (a for a in top._actions if isinstance(a, argparse._SubParsersAction))
        lines = [
            "# Command line",
            "",
            "`mixgrain`, or `python -m mixgrain`. The exit status is 0 when a command did what it"
            " was asked for, 1 when a check failed, 2 for a mistake, which one line explains, and"
            " 130 when it was interrupted. Whatever takes more than two seconds shows its progress"
            " on stderr if that is a terminal.",
            "",
        ]
        for name, verb in verbs.choices.items():
            lines += [f"## mixgrain {name}", "", "```text", verb.format_help().rstrip(), "```", ""]
    finally:
        os.environ.pop("COLUMNS") if old is None else os.environ.update(COLUMNS=old)
    return "\n".join(lines)


# The API


def api_pages() -> dict[str, str]:
    """One page for each floor, one for each public module, one for errors."""
    pages: dict[str, list[str]] = {floor: [] for floor in PAGES}
    modules: dict[str, ModuleType] = {}
    for name in mg.__all__:
        found = getattr(mg, name)
        if isinstance(found, ModuleType):
            modules[name] = found
        elif not (inspect.isclass(found) and issubclass(found, Exception)):
            home = found.__module__
            pages[home.split(".")[1]].append(directive(f"{home}.{name}", found))
    made = {}
    for floor, (title, words) in PAGES.items():
        met = [directive(path, _named(path)) for path in MET.get(floor, ())]
        made[f"api-{floor}.rst"] = page(title, words, pages[floor] + met)
    for name, module in modules.items():
        words = (inspect.getdoc(module) or "").split("\n\n")[0]
        entries = [directive(f"{module.__name__}.{x}", getattr(module, x)) for x in public(module)]
        if name == "patterns":
            entries.append(directive("mixgrain.formats.pattern.Pattern", Pattern, ASKED))
        made[f"api-{name}.rst"] = page(f"mixgrain.{name}", words, entries)
    kinds = [
        directive(f"{errors.__name__}.{name}", found)
        for name, found in vars(errors).items()
        if inspect.isclass(found)
    ]
    words = "Every error that is raised on purpose is a MixgrainError and a standard one besides."
    made["api-errors.rst"] = page("Errors", words, kinds)
    return made


def public(module: ModuleType) -> list[str]:
    """The public names of a module."""
    return list(getattr(module, "__all__", [n for n in dir(module) if not n.startswith("_")]))


def page(title: str, words: str, entries: list[str]) -> str:
    """A page of reStructuredText."""
    text = words.replace("`", "``")
    return "\n".join([title, "=" * len(title), "", text, "", *entries])


def directive(path: str, found: Any, members: str = "") -> str:
    """The autodoc directive for a class or function; all members of a class if none are named."""
    if not inspect.isclass(found):
        # Overloads are for type checkers; readers get the one signature that holds them all.
        whole = _signature(found) if get_overloads(found) else ""
        return f".. autofunction:: {path}{whole}\n"
    if issubclass(found, Exception):
        return f".. autoexception:: {path}\n"
    # What a layout has because every layout has it stands once, at Layout.
    hidden = "" if found is Layout else "   :exclude-members: live, indices, T\n"
    return f".. autoclass:: {path}\n   :members: {members}\n{hidden}"


class _Bare(str):
    """An annotation that is shown without quotes."""

    __repr__ = str.__str__


def _signature(found: Any) -> str:
    whole = inspect.signature(found)
    named = [p.replace(annotation=_Bare(p.annotation)) for p in whole.parameters.values()]
    returns = _Bare(whole.return_annotation)
    return str(whole.replace(parameters=named, return_annotation=returns))


def _named(path: str) -> Any:
    module, name = path.rsplit(".", 1)
    return getattr(__import__(module, fromlist=[name]), name)


def short_signature(
    app: object, what: str, name: str, found: Any, options: object, signature: str, returns: str
) -> tuple[str, str] | None:
    """No signature for layouts: their many index arrays are not how one is made."""
    if what == "class" and issubclass(found, Layout):
        return "", ""
    return None


def plain_text(
    app: object, what: str, name: str, found: Any, options: object, lines: list[str]
) -> None:
    """Our docstrings are text: indented drawings stay as they are, `*leading` is no emphasis."""
    made: list[str] = []
    above, literal = "", False  # the last line that is not blank; inside a drawing
    for line in lines:
        deep = line.startswith("    ")
        if line.strip() and not deep:
            literal = False
        elif deep and not literal and made and not made[-1] and not above.startswith(" "):
            made += ["::", ""]
            literal = True
        made.append(line if literal else _escaped(line))
        above = line if line.strip() else above
    lines[:] = made


def _escaped(line: str) -> str:
    line = re.sub(r"(?<![\\*`\w])\*(?=\w)", r"\\*", line)
    # "E." and "(H) int64" begin no list.
    return re.sub(r"((?:^|: )\s*)(\([A-Za-z]\) |[A-Za-z]\.(?: |$))", r"\1\\\2", line)


# Pictures


def draw_pattern(path: Path) -> None:
    """The picture of a mixed pattern, as `mixgrain show` draws it."""
    pattern = P.causal() & P.longformer(96, range(0, 2048, 64)) | P.random(0.002, 0)
    plot.write_subject(path, subject(pattern, 2048, 2048))


def draw_grain(path: Path, layout: Layout, unit: tuple[int, int], words: str) -> None:
    """The positions of one small layout: kept, held but dead, and the borders of its units."""
    rows, columns = layout.shape
    figure = plot.new_figure(6.4, 6.4 * rows / columns + 0.4)
    axes = figure.add_axes((0.02, 0.10, 0.96, 0.88))
    image = np.ones((rows, columns, 3))
    for part in layout.parts:
        kind = part.kind if part.kind in plot.COLOURS else "kept"
        row, column = (x.numpy() for x in part.indices())
        live = part.live()
        kept = np.ones(len(row), bool) if live is None else live.numpy()
        if kind == "block":  # elsewhere a dead slot names a position that is not its own
            image[row[~kept], column[~kept]] = 1 - plot.PADDING * (1 - plot.rgb(plot.COLOURS[kind]))
        image[row[kept], column[kept]] = plot.rgb(plot.COLOURS[kind])
    axes.imshow(image, extent=(0, columns, rows, 0), interpolation="nearest")
    axes.hlines(range(0, rows, unit[0]), 0, columns, color=plot.GRID, linewidth=0.7)
    axes.vlines(range(0, columns, unit[1]), 0, rows, color=BORDER, linewidth=0.9)
    plot.frame(axes, words)
    figure.savefig(path, format="png")


def weight(rows: int, columns: int) -> torch.Tensor:
    """A dense matrix whose tiles and groups differ in size, so that pruning has a choice."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=draw) * torch.rand(rows, columns, generator=draw)


def _tile(path: Path) -> None:
    s = mg.sparsify(weight(96, 192), "tile", prune=True, density=0.4)
    draw_grain(path, s.layout, (16, 16), "a 96 × 192 weight, 40% of its 16 × 16 tiles kept")


def _nm(path: Path) -> None:
    s = mg.sparsify(weight(16, 32), "nm", n=2, m=4, prune=True)
    draw_grain(path, s.layout, (1, 4), "a 16 × 32 weight, the 2 largest of every 4 neighbours kept")


def _block(path: Path) -> None:
    layout = (P.causal() & P.window(40)).to_layout("block", 128, 256, size=16)
    draw_grain(
        path, layout, (16, 16), "causal() & window(40), 128 queries × 256 keys, blocks of 16"
    )


def _row(path: Path) -> None:
    layout = P.random(0.06, 3).to_layout("row", 48, 96)
    draw_grain(path, layout, (1, 96), "random(0.06, 3), 48 queries × 96 keys")


def _mixed(path: Path) -> None:
    pattern = P.longformer(64, range(0, 2048, 128)) | P.random(0.0003, 0)
    plot.write_subject(path, subject(pattern, 2048, 2048))


PICTURES = {
    "pattern": draw_pattern,
    "tile": _tile,
    "nm": _nm,
    "block": _block,
    "row": _row,
    "mixed": _mixed,
}
