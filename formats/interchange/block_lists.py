"""Block lists, as FlexAttention, FlashAttention-4 and block-sparse attention of cuDNN take them.

For each row of blocks a count and that many block columns; partial blocks, whose elements a
``mask_mod`` decides, apart from full ones. A 6 × 6 pattern in blocks of 2 (x kept):

        x . . . . .     partial: counts [1, 2, 1]   columns [0 · ·][0 1 ·][2 · ·]
        x x . . . .     full:    counts [0, 0, 1]   columns [· · ·][· · ·][1 · ·]
        x . x . . .
        x . x x . .     what stands after a row's count (·) is 0 and never read
        . . x x x .
        . . x x x x
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..block import BlockLayout
from ..errors import LayoutError, ShapeError
from .arrays import check_within, indices
from .sources import entry_table

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Partial and full blocks of every (batch entry, head).

    Attributes:
        partial_counts: int32 (b, h, block rows).
        partial: int32 (b, h, block rows, width), rising block columns.
        full_counts: int32, like partial_counts.
        full: int32, like partial.
    """

    partial_counts: Tensor
    partial: Tensor
    full_counts: Tensor
    full: Tensor


def block_states(layout: BlockLayout, high: int, wide: int) -> Tensor:
    """uint8 (distinct, block rows, block columns): 0 empty, 1 partial, 2 full.

    Blocks are high × wide, multiples of the layout's own. One that hangs over the shape is partial,
    as FlexAttention and FlashAttention-4 have it.
    """
    (nq, nk), size, u = layout.shape, layout.size, layout.distinct
    rows, columns = -(-nq // high), -(-nk // wide)
    down, across = high // size, wide // size
    of = torch.repeat_interleave(
        torch.arange(u, device=layout.device), layout.block_offsets.diff().reshape(u, -1).sum(1)
    )
    at = (of * rows + layout.block_rows() // down) * columns
    at += layout.block_columns.long() // across
    shape = (u, rows, columns)
    touched = torch.zeros(u * rows * columns, dtype=torch.bool, device=layout.device)
    touched[at] = True
    whole = torch.bincount(at[layout.mask_index < 0], minlength=touched.numel())
    return (touched.byte() + (whole == down * across)).reshape(shape)


def listed(chosen: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Counts int32 (…, rows) and columns int32 (…, rows, width) of a bool (…, rows, columns).

    width None is the largest count, at least 1.
    """
    counts = chosen.sum(-1)
    if width is None:
        width = max(int(counts.max()) if counts.numel() else 0, 1)
    lines = chosen.flatten(0, -2)
    line, column = lines.nonzero(as_tuple=True)
    starts = counts.flatten().cumsum(0) - counts.flatten()
    out = torch.zeros(lines.shape[0], width, dtype=torch.int32, device=chosen.device)
    out[line, torch.arange(line.numel(), device=chosen.device) - starts[line]] = column.int()
    return counts.int(), out.reshape(*counts.shape, width)


def block_lists(layout: BlockLayout, high: int, wide: int, compact: bool) -> BlockLists:
    """The lists of a layout in blocks of high × wide.

    Args:
        layout: positions.
        high: rows of a block, a multiple of layout.size.
        wide: columns of a block, likewise.
        compact: lists as wide as their longest, instead of one place for every block column.
    """
    states, entry = block_states(layout, high, wide), entry_table(layout)
    width = None if compact else states.shape[2]
    partial, full = (listed(states == kind, width) for kind in (1, 2))
    return BlockLists(partial[0][entry], partial[1][entry], full[0][entry], full[1][entry])


def mask_function(layout: BlockLayout) -> tuple[MaskMod, tuple[Tensor, Tensor, Tensor]]:
    """A mask_mod that reads the bits of a layout, and the three tables it reads.

    Whatever the size of the blocks it is used in, mask_mod(b, h, q, k) is whether head h of batch
    entry b keeps key k for query q:

        row  = table[entry[b, h], q // size, k // size]
        kept = masks[row, q % size, k % size // 8] >> k % 8 & 1

    where b and h count as 0 if the layout is the same for all.

    Returns:
        mask_mod, and (entry int64 (b, h), table int32 (distinct, block rows, block columns), masks
        uint8 (2 + distinct masks, size, size / 8)), whose rows 0 and 1 keep nothing and everything.
    """
    size, entry = layout.size, entry_table(layout)
    rows, columns = layout.block_shape
    # A rectangle without elements is never asked, but a table without any cannot be indexed.
    table = torch.zeros(
        layout.distinct, max(rows, 1), max(columns, 1), dtype=torch.int32, device=layout.device
    )
    of = torch.repeat_interleave(
        torch.arange(layout.distinct, device=layout.device),
        layout.block_offsets.diff().reshape(layout.distinct, -1).sum(1),
    )
    table[of, layout.block_rows(), layout.block_columns.long()] = layout.mask_index + 2
    ends = torch.tensor([0, 255], dtype=torch.uint8, device=layout.device)
    masks = torch.cat((ends[:, None, None].expand(2, size, size // 8), layout.masks))
    batched, by_head = layout.lead[0] > 1, layout.lead[1] > 1

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        pattern = entry[b if batched else 0, h if by_head else 0]
        row = table[pattern, q_idx // size, kv_idx // size]
        byte = masks[row, q_idx % size, kv_idx % size // 8]
        return (byte >> (kv_idx % 8)) & 1 == 1

    return mask_mod, (entry, table, masks)


def check_lists(
    who: str, counts: Tensor, columns: Tensor, rows: int, across: int
) -> tuple[Tensor, Tensor]:
    """Counts and columns of one kind of block, checked, with common leading dimensions.

    Args:
        who: names the caller in errors.
        counts: int (B, H, block rows).
        columns: int (B, H, block rows, width); B and H of the two broadcast.
        rows: block rows there must be.
        across: block columns there are.

    Raises:
        ShapeError: other shapes.
        LayoutError: a count beyond the list, a column out of range, or one listed twice in a row.
    """
    counts, columns = indices(counts, who, 3), indices(columns, who, 4)
    if counts.shape[2] != rows or columns.shape[2] != rows or counts.device != columns.device:
        raise ShapeError(
            f"{who}: counts {tuple(counts.shape)} on {counts.device}, columns "
            f"{tuple(columns.shape)} on {columns.device}; expected (B, H, {rows}) and (B, H, "
            f"{rows}, width) on one device: {rows} block rows"
        )
    try:
        lead = torch.broadcast_shapes(counts.shape[:2], columns.shape[:2])
    except RuntimeError as error:
        raise ShapeError(
            f"{who}: counts {tuple(counts.shape)} and columns {tuple(columns.shape)} have other "
            "leading dimensions"
        ) from error
    check_within(counts, 0, columns.shape[3] + 1, who, "count")
    width = columns.shape[3]
    read = torch.arange(width, device=columns.device) < counts[..., None]
    wide = torch.where(read, columns.long(), across)
    if bool(((wide < 0) | (wide > across) | (read & (wide == across))).any()):
        bad = columns[read.expand_as(wide) & ((wide < 0) | (wide >= across))]
        raise LayoutError(
            f"{who}: block column {int(bad[0])}, 0 <= column < {across} expected; only the first "
            "counts of each list are read"
        )
    ordered = wide.sort(-1)[0]
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] < across)).any()):
        raise LayoutError(f"{who}: a block column is listed twice in a block row; list it once")
    return counts.expand(*lead, -1), columns.expand(*lead, -1, -1)
