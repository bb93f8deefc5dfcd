"""Row parts as the kernel that expands them to dense tiles takes them, made from ``cuda_row.part``.

A line is 64 or 128 (``tall``) rows of the result, a chunk 64 inner positions that some row of a
line has an entry at:

    4 × 6, in lines of 2 and chunks of 3        line 0: chunk 0 of a, c;  chunk 1 of b
        a . . . . b                             line 1: chunk 1 of d, e
        . c . . . .                             scattered: a c b d e, with places in their tiles
        . . . d . .                             chunks: (0, 0) (1, 2) (1, 3) and the end (0, 5) × 3
        . . . . e .                             sizes: (3, 2) (2, 1), positions and chunks
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cuda_block import longest_first, records, running
from .cuda_row import SHORT

INNER = 64  # spmm_expand_sm90: inner positions of a tile of S
# Rows behind the last chunk, which producers read ahead.
AHEAD = 3


class Table(NamedTuple):
    """The entries of a row part, or of its transpose, by line and chunk.

    Attributes:
        scattered: int32 (n, 2), slot counted from the part's first; 1 + byte of the swizzled tile.
        chunks: int32 (c + 3, 2), number along the inner side and first entry.
        bounds: int32 (E * rows + 1,), first position of each row.
    """

    scattered: Tensor
    chunks: Tensor
    bounds: Tensor


def row_bounds(items: Tensor, rows: int) -> Tensor:
    """int32 (rows + 1,): where each row starts, from the items it is cut into."""
    counts = torch.zeros(rows, dtype=torch.int64, device=items.device)
    counts.index_add_(0, items[:, 0].long(), (items[:, 1] & 0xFFFF).long())
    return running(counts)


def _keys(
    bounds: Tensor, indices: Tensor, rows: int, inner: int, tall: int
) -> tuple[Tensor, Tensor, int]:
    """Row of each position; line * chunks of a line + chunk; chunks of a line."""
    lines, across = -(-rows // tall), max(-(-inner // INNER), 1)
    row = torch.arange(len(bounds) - 1, device=bounds.device)
    line = row // rows * lines + row % rows // tall
    row = torch.repeat_interleave(row % rows % tall, bounds.diff().long())
    line = torch.repeat_interleave(line, bounds.diff().long())
    return row, line * across + indices.long() // INNER, across


def sizes(items: Tensor, indices: Tensor, entries: int, rows: int, inner: int, tall: int) -> Tensor:
    """int64 (lines, 2) on the CPU: positions and chunks of each line.

    Args:
        items: int32 (NI, 4), of ``cuda_row.part``, those of columns for the transpose.
        indices: int32 (NNZE,), inner positions, likewise.
        entries: E.
        rows: of the result, of one entry.
        inner: positions that are summed over.
        tall: rows of a line.
    """
    bounds = row_bounds(items, entries * rows)
    _, key, across = _keys(bounds, indices, rows, inner, tall)
    lines = entries * -(-rows // tall)
    positions = torch.bincount(key // across, minlength=lines)
    chunks = torch.bincount(torch.unique(key) // across, minlength=lines)
    return torch.stack([positions, chunks], 1).cpu()


def table(
    items: Tensor,
    indices: Tensor,
    order: Tensor | None,
    entries: int,
    rows: int,
    inner: int,
    tall: int,
) -> Table:
    """All entries by line, chunk and slot.

    Args:
        items: as in ``sizes``.
        indices: as in ``sizes``.
        order: slot of each position; None = positions are in the order of slots.
        entries: E.
        rows: of the result, of one entry.
        inner: positions that are summed over.
        tall: rows of a line.
    """
    bounds = row_bounds(items, entries * rows)
    row, key, across = _keys(bounds, indices, rows, inner, tall)
    place = indices.long() % INNER
    # Swizzled rows of 128 bytes: 16-byte pieces are exchanged within each row.
    byte = row * 128 + (((place // 8) ^ (row % 8)) * 8 + place % 8) * 2 + 1
    slot = torch.arange(len(key), device=key.device) if order is None else order.long()
    if order is not None:
        by_slot = torch.argsort(slot)
        slot, byte, key = slot[by_slot], byte[by_slot], key[by_slot]
    key, sorting = torch.sort(key, stable=True)
    scattered = torch.stack([slot[sorting], byte[sorting]], 1).int()
    found, counts = torch.unique_consecutive(key, return_counts=True)
    chunks = torch.zeros(len(found) + AHEAD, 2, dtype=torch.int32, device=key.device)
    chunks[: len(found), 0] = found % across
    chunks[: len(found) + 1, 1] = running(counts)
    chunks[len(found) :, 1] = len(key)
    return Table(scattered, chunks, bounds)


def taken_records(chunks: Tensor, taken: Tensor) -> Tensor:
    """The ``records`` of the lines that are taken, those of the most chunks first.

    Args:
        chunks: int64 (lines,), of each line.
        taken: bool (lines,).
    """
    order = longest_first(chunks)
    return records(running(chunks), order[taken[order.long()]]).contiguous()


def left(
    items: Tensor, splits: Tensor, taken: Tensor, rows: int, tall: int
) -> tuple[Tensor, Tensor, int]:
    """The row items and splits of the lines that are not taken, and how many items are long."""
    lines = -(-rows // tall)

    def open_(row: Tensor) -> Tensor:
        row = row.long()
        return ~taken[row // rows * lines + row % rows // tall]

    rest = items[open_(items[:, 0])].contiguous()
    long = int(((rest[:, 1] & 0xFFFF) > SHORT).sum())
    return rest, splits[open_(splits[:, 0])].contiguous(), long
