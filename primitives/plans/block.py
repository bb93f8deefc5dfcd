"""Plans for BlockLayout: block rows grouped by how many blocks they hold.

Block rows with equally many blocks make one batched dense product: c blocks side by side are a
(size, c * size) matrix, and the rows of a bucket are its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixgrain.formats.block import BlockLayout
from mixgrain.formats.entries import unpack_bits

from .plan import PartPlan, Plan, cached, join


@dataclass(frozen=True)
class Bucket:
    """Block rows that hold equally many blocks.

    Attributes:
        count: blocks in each of these block rows, at least 1.
        rows: int64 (R,), the block rows within their distinct pattern, rising.
        first: int64 (R,), the first block of each, counted over the whole layout; the others
            follow it.
        start: the first block row when ``rows`` are consecutive (so their blocks are one contiguous
            run beginning at ``first[0]``), else −1.
    """

    count: int
    rows: Tensor
    first: Tensor
    start: int

    def split(self, rows_per_chunk: int) -> list[Bucket]:
        """The same bucket in pieces of at most this many block rows."""
        pieces = []
        for begin in range(0, len(self.rows), rows_per_chunk):
            rows = self.rows[begin : begin + rows_per_chunk]
            start = self.start + begin if self.start >= 0 else consecutive(rows)
            pieces.append(
                Bucket(self.count, rows, self.first[begin : begin + rows_per_chunk], start)
            )
        return pieces


def consecutive(rows: Tensor) -> int:
    """The first of rising indices that leave no gap, or −1."""
    if not len(rows):
        return -1
    first, last = int(rows[0]), int(rows[-1])
    return first if last - first + 1 == len(rows) else -1


def bucket_rows(offsets: Tensor) -> list[Bucket]:
    """Group the block rows of one distinct pattern by their number of blocks.

    Works on either order of a BlockLayout: pass ``block_offsets[u * nqb : (u + 1) * nqb + 1]`` for
    block rows or ``t_offsets[u * nkb : (u + 1) * nkb + 1]`` for block columns.

    Args:
        offsets: int (rows + 1,), where each block row's blocks start.

    Returns:
        Buckets by rising count; block rows without blocks are in none. Every non-empty block row is
        in exactly one, whatever the batch, so results never depend on what is batched with them.
    """
    offsets = offsets.long()
    counts = offsets.diff()
    order = torch.argsort(counts, stable=True)
    values, sizes = torch.unique_consecutive(counts[order], return_counts=True)
    buckets = []
    begin = 0
    for count, size in zip(values.tolist(), sizes.tolist(), strict=True):
        rows = order[begin : begin + size]
        begin += size
        if count:
            buckets.append(Bucket(count, rows, offsets[rows], consecutive(rows)))
    return buckets


def bucket_table(offsets: Tensor, rows: int, distinct: int) -> tuple[Tensor, Tensor]:
    """The buckets of all distinct patterns as two tensors.

    Args:
        offsets: int (distinct * rows + 1,), where each block row's blocks start.
        rows: block rows of one distinct pattern.
        distinct: number of distinct patterns.

    Returns:
        int64 (buckets, 4): distinct pattern, count, number of block rows, start; and int64, the
        block rows of all buckets, one bucket after the other.
    """
    table: list[list[int]] = []
    members: list[Tensor] = []
    for u in range(distinct):
        for bucket in bucket_rows(offsets[u * rows : (u + 1) * rows + 1]):
            table.append([u, bucket.count, len(bucket.rows), bucket.start])
            members.append(bucket.rows)
    return (
        torch.tensor(table, dtype=torch.int64).reshape(-1, 4),
        torch.cat(members) if members else torch.zeros(0, dtype=torch.int64),
    )


def part(layout: BlockLayout, shift: int = 0) -> PartPlan:
    """What the CPU needs of a BlockLayout whose slots start ``shift`` into the values."""
    rows, cols = layout.block_shape
    distinct = layout.distinct
    offsets, t_offsets = layout.block_offsets.long(), layout.t_offsets.long()
    # Words that are all ones where live and zero where dead; a last mask, which index −1 finds, is
    # live everywhere.
    live = -unpack_bits(layout.masks).int()
    tensors = [
        offsets,
        layout.block_columns.long(),
        layout.mask_index.long(),
        torch.cat([live, live.new_full((1, layout.size, layout.size), -1)]),
        *bucket_table(offsets, rows, distinct),
        t_offsets,
        layout.t_rows.long(),
        layout.t_order.long(),
        *bucket_table(t_offsets, cols, distinct),
    ]
    starts = [shift + start for start in layout.entry_slots]
    return PartPlan("block", tensors, [layout.size], starts)


def cpu(layout: BlockLayout) -> Plan:
    """The CPU plan of a BlockLayout, for every operation."""
    return cached(layout, lambda: join(layout, [part(layout)]))
