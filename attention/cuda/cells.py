"""Layouts as cells: kept units of 64 queries × 64 keys, full or under a bit mask.

A *line* is a unit of 64 queries: 64 neighbours, or 64 gathered ones. A *key unit* likewise;
gathered key units have ids from ``PACKED`` on. A cell joins a line and a key unit. Cells of one
line may name the same key unit twice, as long as their masks keep no position twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixgrain.formats.block import BlockLayout
from mixgrain.formats.words import distinct

UNIT = 64
PACKED = 1 << 24


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells of all distinct patterns, in no particular order.

    Attributes:
        line: int64 (n,), the line of each cell.
        key: int64 (n,), its key unit.
        mask: int64 (n,), −1 = every position kept, else a row of masks.
        masks: uint8 (M, 64, 8), bit c % 8 of byte c // 8 says that column c is kept.
    """

    line: Tensor
    key: Tensor
    mask: Tensor
    masks: Tensor


def join(parts: list[Cells]) -> Cells:
    """All cells, masks one after the other; at least one part."""
    if len(parts) == 1:
        return parts[0]
    shifted, total = [], 0
    for part in parts:
        shifted.append(torch.where(part.mask < 0, -1, part.mask + total) if total else part.mask)
        total += part.masks.shape[0]
    return Cells(
        torch.cat([part.line for part in parts]),
        torch.cat([part.key for part in parts]),
        torch.cat(shifted),
        torch.cat([part.masks for part in parts]),
    )


def none(device: torch.device) -> Cells:
    """No cells."""
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    return Cells(empty, empty, empty, torch.zeros(0, UNIT, 8, dtype=torch.uint8, device=device))


def block_cells(layout: BlockLayout) -> Cells:
    """The blocks as cells, cut or joined where they are not 64 × 64; lines as ``u * nqu + row``."""
    if not layout.block_columns.numel():
        return none(layout.device)
    nqb = layout.block_shape[0]
    row = torch.repeat_interleave(
        torch.arange(layout.distinct * nqb, device=layout.device),
        layout.block_offsets.diff(),
        output_size=layout.block_columns.numel(),
    )
    column, mask = layout.block_columns.long(), layout.mask_index.long()
    if layout.size == UNIT:
        return Cells(row, column, mask, layout.masks)
    pattern, row = row // nqb, row % nqb
    nqu, nku = (-(-n // UNIT) for n in layout.shape)
    if layout.size > UNIT:
        return _cut(layout, pattern, row, column, mask, (nqu, nku))
    return _joined(layout, pattern, row, column, mask, (nqu, nku))


def _cut(
    layout: BlockLayout,
    pattern: Tensor,
    row: Tensor,
    column: Tensor,
    mask: Tensor,
    units: tuple[int, int],
) -> Cells:
    """Each block of 128 as up to four cells."""
    parts = layout.size // UNIT
    masks = layout.masks.view(-1, parts, UNIT, parts, 8).transpose(2, 3).reshape(-1, UNIT, 8)
    empty, full = (masks == 0).flatten(1).all(1), (masks == 255).flatten(1).all(1)
    kind = torch.where(
        full, -1, torch.where(empty, -2, torch.arange(len(masks), device=row.device))
    )
    kind = torch.cat([kind, kind.new_full((parts * parts,), -1)])
    at = torch.arange(parts * parts, device=row.device)
    # Index −1, a full block, finds the last ones.
    which = torch.where(mask < 0, len(masks) // parts**2, mask)
    mask = kind[which[:, None] * parts**2 + at]
    row, column = row[:, None] * parts + at // parts, column[:, None] * parts + at % parts
    line = pattern[:, None] * units[0] + row
    kept = (mask != -2) & (row < units[0]) & (column < units[1])
    return Cells(line[kept], column[kept], mask[kept], masks)


def _joined(
    layout: BlockLayout,
    pattern: Tensor,
    row: Tensor,
    column: Tensor,
    mask: Tensor,
    units: tuple[int, int],
) -> Cells:
    """Blocks of 16 or 32 that lie in one unit as one cell."""
    size, device = layout.size, row.device
    parts = UNIT // size
    wide = max(units[1], 1)
    key = (pattern * units[0] + row // parts) * wide + column // parts
    found, which = torch.unique(key, return_inverse=True)
    table = torch.cat([layout.masks, layout.masks.new_full((1, size, size // 8), 255)])
    bits = torch.zeros(len(found), parts, size, parts, size // 8, dtype=torch.uint8, device=device)
    bits[which, row % parts, :, column % parts] = table[mask]
    words = bits.view(len(found), UNIT, 8).view(torch.int64)
    kinds, kind = distinct(words)
    masks = words[kinds].view(torch.uint8).view(-1, UNIT, 8)
    full = (masks == 255).flatten(1).all(1)
    return Cells(found // wide, found % wide, torch.where(full[kind], -1, kind), masks)


def columns_of(words: Tensor) -> Tensor:
    """int64 (M,): the columns that some row keeps, of rows as words (M, 64)."""
    while words.shape[1] > 1:
        half = words.shape[1] // 2
        words = words[:, :half] | words[:, half:]
    return words[:, 0]


def register_words(masks: Tensor) -> Tensor:
    """Masks in the order in which a warpgroup holds a 64 × 64 tile of scores.

    Args:
        masks: uint8 (M, 64, 8).

    Returns:
        int32 (M, 128): bit 2j + e + 16h of thread t, with w = t // 32, g = t % 32 // 4, p = t % 4,
        says that row 16w + g + 8h keeps column 8j + 2p + e.
    """
    if not masks.shape[0]:
        return torch.zeros(0, 128, dtype=torch.int32, device=masks.device)
    words = masks.contiguous().view(torch.int64)
    # Two neighbouring bits of every byte, moved together: halves, quarters, the whole.
    bits = words >> torch.arange(0, 8, 2, device=masks.device) & 0x0303030303030303
    bits = (bits | bits >> 6) & 0x000F000F000F000F
    bits = (bits | bits >> 12) & 0x000000FF000000FF
    bits = (bits | bits >> 24) & 0xFFFF
    rows = bits.reshape(-1, 4, 2, 8, 4)
    # Words of threads, whose upper halves mean nothing.
    packed = (rows[:, :, 0] | rows[:, :, 1] << 16).view(torch.int32)
    return packed.view(-1, 128, 2)[..., 0].contiguous()
