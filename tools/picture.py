"""A layout as text: a picture for a terminal and a few lines that sum it up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mixgrain.formats.block import BlockLayout
from mixgrain.formats.errors import LayoutError
from mixgrain.formats.layout import Layout
from mixgrain.formats.panel import PanelLayout
from mixgrain.formats.pattern import Pattern

# More kept positions than this take longer than anybody waits for a picture.
MOST_KEPT = 1 << 26
# Lines of the picture, and pairs of characters in a line.
CELLS = 32

# What stands for a cell: all kept, blocks, panels, single entries; nothing.
GLYPHS = {"full": "██", "block": "▒▒", "panel": "||", "row": "··", "": "  "}
PLAIN_GLYPHS = {"full": "##", "block": "%%", "panel": "||", "row": "..", "": "  "}


@dataclass(frozen=True)
class Cells:
    """How many positions of each cell a part of a layout keeps.

    Attributes:
        kind: "block", "panel" or "row".
        kept: int64 (rows of cells, columns of cells), kept positions.
        held: likewise, slots: kept or dead.
    """

    kind: str
    kept: Tensor
    held: Tensor


def check_drawable(pattern: Pattern, nq: int, nk: int) -> None:
    """Raises LayoutError if the pattern keeps too much for a picture of every position."""
    kept = pattern.nnz(nq, nk)
    if kept > MOST_KEPT:
        raise LayoutError(
            f"{pattern} keeps {kept:,} positions of {nq:,} × {nk:,}, at most {MOST_KEPT:,} can be "
            "drawn; ask for fewer queries and keys"
        )


def count_cells(layout: Layout, cell: int) -> Iterator[Cells]:
    """Counts the kept positions of the first entry in cells of cell × cell, part by part."""
    down, across = (-(-n // cell) for n in layout.shape)
    for part in layout.parts:
        row, column = part.indices()
        index = (row // cell) * across + column // cell
        first, live = part.slot_entry() == 0, part.live()
        kept = first if live is None else first & live
        yield Cells(
            part.kind,
            *(
                torch.bincount(index[chosen], minlength=down * across).view(down, across)
                for chosen in (kept, first)
            ),
        )


def cell_sizes(shape: tuple[int, int], cell: int) -> Tensor:
    """How many positions each cell holds; those at the edges may hold fewer than cell²."""
    sides = [
        (torch.arange(0, n, cell) + cell).clamp(max=n) - torch.arange(0, n, cell) for n in shape
    ]
    return sides[0][:, None] * sides[1]


def draw(layout: Layout, plain: bool = False) -> str:
    """A picture of the layout's first entry, framed, at most 32 lines high, with its legend.

    Args:
        layout: Any that holds attention's positions.
        plain: Use characters of ASCII only.
    """
    glyphs = PLAIN_GLYPHS if plain else GLYPHS
    # A power of two, as block sizes are, so that cells and blocks share their borders.
    cell = 1 << max(0, -(-max(layout.shape) // CELLS) - 1).bit_length()
    sizes = cell_sizes(layout.shape, cell)
    total, most = torch.zeros_like(sizes), torch.zeros_like(sizes)
    kinds = ["", "full"]
    picture = torch.zeros_like(sizes)
    for counted in count_cells(layout, cell):
        kinds.append(counted.kind)
        picture[counted.kept > most] = len(kinds) - 1
        most = torch.maximum(most, counted.kept)
        total += counted.kept
    picture[(total == sizes) & (total > 0)] = 1
    corners, bar, side = ("++++", "-", "|") if plain else ("┌┐└┘", "─", "│")
    rows = [f"{side}{''.join(glyphs[kinds[c]] for c in row)}{side}" for row in picture.tolist()]
    bar *= 2 * picture.shape[1]
    rows = [f"{corners[0]}{bar}{corners[1]}", *rows, f"{corners[2]}{bar}{corners[3]}"]
    words = {
        "full": "all kept",
        "block": "partly, in blocks",
        "panel": "partly, in panels",
        "row": "partly, single entries",
    }
    shown = set(picture.flatten().tolist())
    legend = [f"{glyphs[k]} {words[k]}" for n, k in enumerate(kinds) if k and n in shown]
    times = "x" if plain else "×"
    return "\n".join([*rows, "   ".join([f"each cell {cell} {times} {cell}", *legend])])


def summary(layout: Layout) -> str:
    """One line for the layout and one for each of its parts."""
    lines = [repr(layout)]
    for part in layout.parts:
        padding = 1 - part.nnz / part.slots if part.slots else 0.0
        share = part.nnz / layout.nnz if layout.nnz else 0.0
        lines.append(
            f"  {_what(part):44} {part.nnz:>12,} kept ({share:6.1%} of all), {padding:5.1%} padding"
        )
    if layout.entries > 1:
        lines.append(f"  {layout.entries} entries (batch × heads); the picture shows the first")
    return "\n".join(lines)


def _what(part: Layout) -> str:
    if isinstance(part, BlockLayout):
        partial = int((part.mask_index >= 0).sum())
        count, masks = part.mask_index.numel(), part.masks.shape[0]
        return f"blocks of {part.size}: {count - partial} full, {partial} partial ({masks} masks)"
    if isinstance(part, PanelLayout):
        return f"panels: {part.panel_entry.numel()}"
    return "single entries" if part.kind == "row" else part.kind
