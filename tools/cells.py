"""Kept positions counted in the cells of a picture, without listing them where they are many.

A cell is a rectangle of positions that a picture shows as one square. Blocks count by their masks,
panels by their two lists, runs of a pattern by their two ends: none of it grows with the positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mixgrain.formats.block import BlockLayout
from mixgrain.formats.entries import unpack_bits
from mixgrain.formats.layout import Layout
from mixgrain.formats.panel import PanelLayout
from mixgrain.formats.row import RowLayout
from mixgrain.formats.runs import Runs

Cell = tuple[int, int]

# Above so many slots a part is counted by its structure, not position by position.
FEW_SLOTS = 1 << 22
MASKS_AT_ONCE = 1 << 10


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


def cell_for(shape: tuple[int, int], most: int) -> Cell:
    """Rows and columns of a cell such that at most `most` cells lie along each side.

    Powers of two, as block sizes are, so that cells and blocks share their borders; the same for
    both sides unless one is more than four times as long as the other.
    """
    cells = [1 << (max(1, -(-n // most)) - 1).bit_length() for n in shape]
    long, short = max(shape), max(1, min(shape))
    return (cells[0], cells[1]) if long > 4 * short else (max(cells), max(cells))


def pair(cell: int | Cell) -> Cell:
    """Rows and columns of a cell given as its side or as both."""
    return (cell, cell) if isinstance(cell, int) else cell


def grid(shape: tuple[int, int], cell: Cell) -> Cell:
    """How many cells lie along each side."""
    return -(-shape[0] // cell[0]), -(-shape[1] // cell[1])


def cell_sizes(shape: tuple[int, int], cell: int | Cell) -> Tensor:
    """How many positions each cell holds; those at the edges may hold fewer."""
    sides = [
        (torch.arange(0, n, c) + c).clamp(max=n) - torch.arange(0, n, c)
        for n, c in zip(shape, pair(cell), strict=True)
    ]
    return sides[0][:, None] * sides[1]


def count_cells(layout: Layout, cell: int | Cell) -> Iterator[Cells]:
    """Counts the kept positions of the first entry in cells, part by part.

    Args:
        layout: any that holds attention's positions.
        cell: rows and columns of a cell, or its side.
    """
    sides = pair(cell)
    for part in layout.parts:
        if isinstance(part, BlockLayout) and all(_fit(side, part.size) for side in sides):
            yield _block_cells(part, sides)
        elif isinstance(part, RowLayout):
            yield _row_cells(part, sides)
        elif isinstance(part, PanelLayout) and part.slots > FEW_SLOTS and not _masked(part):
            yield _panel_cells(part, sides)
        else:
            yield _slot_cells(part, sides)


def countable(layout: Layout) -> bool:
    """Whether `count_cells` needs little time and memory for a layout of the library's own."""
    return all(
        part.slots <= FEW_SLOTS * 16
        or isinstance(part, BlockLayout | RowLayout)
        or (isinstance(part, PanelLayout) and not _masked(part) and part.panels <= 1 << 10)
        for part in layout.parts
    )


def _fit(side: int, size: int) -> bool:
    return side % size == 0 or size % side == 0


def _masked(part: PanelLayout) -> bool:
    return bool((part.mask_offset >= 0).any())


def _slot_cells(part: Layout, cell: Cell) -> Cells:
    down, across = grid(part.shape, cell)
    row, column = part.indices()
    index = (row // cell[0]) * across + column // cell[1]
    first, live = part.slot_entry() == 0, part.live()
    kept = first if live is None else first & live
    counts = [
        torch.bincount(index[chosen], minlength=down * across).view(down, across)
        for chosen in (kept, first)
    ]
    return Cells(part.kind, *counts)


def _row_cells(part: RowLayout, cell: Cell) -> Cells:
    down, across = grid(part.shape, cell)
    start = part.entry[0] * part.shape[0]
    offsets = part.row_offsets[start : start + part.shape[0] + 1]
    total = torch.zeros(down * across, dtype=torch.int64)
    first, last = (int(offsets[0]), int(offsets[-1])) if part.shape[0] else (0, 0)
    for at in range(first, last, FEW_SLOTS):
        stop = min(last, at + FEW_SLOTS)
        row = torch.searchsorted(offsets, torch.arange(at, stop), right=True) - 1
        index = (row // cell[0]) * across + part.columns[at:stop].long() // cell[1]
        total += torch.bincount(index, minlength=down * across)
    counts = total.view(down, across)
    return Cells(part.kind, counts, counts)


def _panel_cells(part: PanelLayout, cell: Cell) -> Cells:
    down, across = grid(part.shape, cell)
    total = torch.zeros(down, across, dtype=torch.int64)
    for p in (part.panel_entry == part.entry[0]).nonzero().flatten().tolist():
        rows = torch.bincount(part.rows_of(p) // cell[0], minlength=down)
        columns = torch.bincount(part.cols_of(p) // cell[1], minlength=across)
        total += rows[:, None] * columns
    return Cells(part.kind, total, total)


def _block_cells(part: BlockLayout, cell: Cell) -> Cells:
    """Every block falls into one cell, or into whole pieces that each are one."""
    size, (nq, nk) = part.size, part.shape
    down, across = grid(part.shape, cell)
    high, wide = min(size, cell[0]), min(size, cell[1])
    up, left = size // high, size // wide  # pieces of a block along its sides
    rows = -(-nq // size)
    offsets = part.block_offsets[part.entry[0] * rows :][: rows + 1].long()
    chosen = slice(int(offsets[0]), int(offsets[-1]))
    row = torch.repeat_interleave(torch.arange(rows), offsets.diff())
    column = part.block_columns[chosen].long()
    # What each piece of each distinct mask keeps; row −1, the last, stands for "all".
    tables = [
        unpack_bits(masks).view(-1, up, high, left, wide).sum((2, 4))
        for masks in part.masks.split(MASKS_AT_ONCE)
    ]
    table = torch.cat([*tables, torch.full((1, up, left), high * wide)])
    which = part.mask_index[chosen].long()
    step = max(1, FEW_SLOTS // (up * left))
    kept, held = torch.zeros(2, down * across, dtype=torch.float64)
    for at in range(0, row.numel(), step):
        span = slice(at, at + step)
        top = (row[span, None, None] * up + torch.arange(up)[:, None]) * high
        side = (column[span, None, None] * left + torch.arange(left)) * wide
        inside = (nq - top).clamp(0, high) * (nk - side).clamp(0, wide)
        # Pieces beyond the edge hold nothing; they count as nothing in the last cell.
        index = (top // cell[0]).clamp(max=down - 1) * across
        index = index + (side // cell[1]).clamp(max=across - 1)
        index = index.flatten()
        for total, weight in ((kept, table[which[span]]), (held, inside)):
            total += torch.bincount(index, weight.flatten().double(), minlength=down * across)
    return Cells(part.kind, kept.long().view(down, across), held.long().view(down, across))


def run_cells(runs: Runs, rows: Tensor, weight: Tensor, nk: int, cell: Cell, down: int) -> Tensor:
    """Kept positions of some rows of a pattern in cells, float64 (down, columns of cells).

    Args:
        runs: of those rows.
        rows: int64 (R,), which they are.
        weight: float64 (R,), how many rows each stands for.
        nk: number of keys.
        cell: rows and columns of a cell.
        down: rows of cells.
    """
    across, wide = -(-nk // cell[1]), cell[1]
    # A run that starts r into a cell keeps wide − r there and wide in every cell to its right,
    # until its end takes the same off again: second differences, four numbers a run.
    line = runs.row_of_run()
    base, factor = (rows // cell[0])[line] * (across + 2), weight[line]
    total = torch.zeros(down * (across + 2), dtype=torch.float64)
    for end, sign in ((runs.lo, 1.0), (runs.hi, -1.0)):
        at = base + end // wide
        into = (end % wide).double() * factor * sign
        total += torch.bincount(at, factor * (wide * sign) - into, minlength=total.numel())
        total += torch.bincount(at + 1, into, minlength=total.numel())
    return total.view(down, across + 2).cumsum(1)[:, :across]
