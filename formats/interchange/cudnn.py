"""Patterns from and to the two mask languages of cuDNN's frontend.

Interval masks (``cudnn.flex_attention``): for each query its keys as rising ends
F0 <= F1 <= F2 …, of which [0, F0), [F1, F2), [F3, F4) … are kept:

    query keeps 0 1 . 3 4 .      F = 2, 3, 5
    query keeps . . 2 3 . .      F = 0, 2, 4

Block indices (``cudnn.BSA``): for each block of queries the blocks of keys it sees, whole ones
except that ``block_sizes`` may cut each block of keys after its first so many.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import among, as_size, shown
from ..block import SIZES
from ..entries import unpack_bits
from ..errors import LayoutError, ShapeError
from ..layout_runs import part_of
from ..pattern import Frame, Pattern
from ..pattern_queries import chunked_runs
from ..pattern_ragged import ragged
from ..runs import from_intervals as merged
from .arrays import as_array, as_shape, check_within, indices
from .block_lists import check_lists, listed
from .sources import Positions, as_blocks, as_pattern, entry_table


def to_intervals(
    source: Positions,
    nq: int | None = None,
    nk: int | None = None,
    batch: int = 1,
    max_intervals: int = 1024,
) -> Tensor:
    """The interval mask of a pattern or layout: ``mask_func`` of cuDNN's create_mask_plan.

    Args:
        source: a static pattern, a layout or a SparseTensor.
        nq: number of queries, for a pattern.
        nk: number of keys, for a pattern.
        batch: batch entries the mask is repeated for, if the pattern is the same for all.
        max_intervals: refuse rows with more intervals than this: every query gets as many ends as
            the most scattered one.

    Returns:
        int32 (1 or H, ends, B · nq), ends odd and at least 1, values 0 … nk that never fall.
        Nothing is lost.

    Raises:
        LayoutError: P.nm, a key mask, or more intervals than allowed.
        ShapeError: a pattern without nq and nk, or a batch that is not the pattern's.
    """
    who = "to_intervals"
    pattern, frame = as_pattern(source, nq, nk, who)
    (b, h), total = pattern.lead, as_size(who, "batch", batch, 1)
    most = as_size(who, "max_intervals", max_intervals, 1)
    if b > 1 and total not in (1, b):
        raise ShapeError(f"{who}: batch {total} given, the pattern has {b} batch entries")
    found = [_ends(flat, frame, most, who) for flat in pattern.distinct]
    width = max(ends.shape[0] for ends in found)
    # Empty intervals after the last key of each row.
    padded = [
        torch.cat((ends, ends[-1:].expand(width - ends.shape[0], -1))).int() for ends in found
    ]
    stacked = torch.stack(padded)[torch.tensor(pattern.entry, device=frame.device)]
    stacked = stacked.unflatten(0, (b, h)).permute(1, 2, 0, 3)  # heads, ends, batch, queries
    stacked = stacked.expand(-1, -1, max(b, total), -1)
    mask: Tensor = stacked.reshape(h, width, max(b, total) * frame.nq)
    return mask.contiguous()


def _ends(flat: Pattern, frame: Frame, most: int, who: str) -> Tensor:
    """int64 (ends, nq) of one flat pattern, as few ends as it needs."""
    chunks: list[Tensor] = []
    for rows, runs in chunked_runs(flat, frame):
        row, lo = runs.row_of_run(), runs.lo
        nth = torch.arange(lo.numel(), device=lo.device) - runs.offsets[row]
        # The first interval starts at 0 and has its end alone.
        first = runs.offsets[:-1]
        some = runs.counts() > 0
        at_zero = torch.zeros_like(some)
        at_zero[some] = lo[first[some]] == 0
        nth = nth + 1 - at_zero[row].long()
        count = int(nth.max()) + 1 if nth.numel() else 1
        if count > most:
            raise LayoutError(
                f"{who}: a query keeps {count} intervals of keys, more than max_intervals = "
                f"{most}, and every query would get as many ends; raise max_intervals if "
                f"{frame.nq} × {2 * count} numbers are acceptable"
            )
        # (queries, 2 · count): start and end of every interval, −1 = none
        ends = torch.full((rows.numel(), 2 * count), -1, dtype=torch.int64, device=lo.device)
        ends[row, 2 * nth], ends[row, 2 * nth + 1] = lo, runs.hi
        ends[:, 0] = 0
        ends[:, 1].clamp_(min=0)
        chunks.append(ends.cummax(1)[0][:, 1:].T)  # rising, so an interval left out is empty
    if not chunks:
        return torch.zeros(1, frame.nq, dtype=torch.int64, device=frame.device)
    width = max(chunk.shape[0] for chunk in chunks)
    return torch.cat([torch.cat((c, c[-1:].expand(width - c.shape[0], -1))) for c in chunks], dim=1)


def from_intervals(mask_func: Tensor, shape: tuple[int, int], batch: int = 1) -> Pattern:
    """The pattern of a cuDNN interval mask, exact to the element; its shape is fixed.

    Args:
        mask_func: int (1 or H, ends, batch · nq), ends odd; query i keeps [0, F0) and [F1, F2) …
        shape: (nq, nk).
        batch: batch entries that stand one after the other in the last dimension.

    Raises:
        LayoutError: ends that fall, or lie outside 0 … nk.
        ShapeError: shapes that do not fit.
        DtypeError: not integers.
    """
    who = "from_intervals"
    nq, nk = as_shape(shape, who)
    count = as_size(who, "batch", batch, 1)
    ends = indices(mask_func, who, 3)
    heads, width, total = ends.shape
    if width % 2 == 0 or total != count * nq or not heads:
        raise ShapeError(
            f"{who}: mask_func {tuple(ends.shape)}, (1 or H, an odd number of ends, "
            f"{count} · {nq}) expected"
        )
    check_within(ends, 0, nk + 1, who, "end")
    if bool((ends.diff(dim=1) < 0).any()):
        h, at, i = (ends.diff(dim=1) < 0).nonzero()[0].tolist()
        raise LayoutError(
            f"{who}: end {at + 1} of query {i} (head {h}) is {int(ends[h, at + 1, i])}, less than "
            f"the {int(ends[h, at, i])} before; ends must not fall"
        )
    # One row for each (batch entry, head, query): 0, F0, F1 … as starts and ends.
    lines = ends.long().unflatten(2, (count, nq)).permute(2, 0, 3, 1)
    pairs = torch.nn.functional.pad(lines, (1, 0)).reshape(count * heads * nq, (width + 1) // 2, 2)
    row, at = (pairs[..., 0] < pairs[..., 1]).nonzero(as_tuple=True)
    lo, hi = pairs[row, at].unbind(1)
    runs = merged(row, lo, hi, count * heads * nq, nk)
    entries = [part_of(runs, e * nq, nq) for e in range(count * heads)]
    lead = None if count * heads == 1 else (count, heads)
    return ragged(entries, lead, (nq, nk), who)


class BlockIndices(NamedTuple):
    """What cudnn.BSA's block_sparse_attention_forward takes besides q, k and v.

    Attributes:
        q2k_block_index: int32 (B, H, blocks of queries, most blocks), rising; what stands after a
            row's number of blocks is 0 and not read.
        q2k_block_nums: int32 (B, H, blocks of queries); 0 needs allow_empty_block_nums=True.
        block_sizes: int32 (blocks of keys,), or (B, blocks of keys) or (B, H, blocks of keys) where
            they differ: keys that count in each block; None = all of them.
        sparse_block_size: side of a block.
    """

    q2k_block_index: Tensor
    q2k_block_nums: Tensor
    block_sizes: Tensor | None
    sparse_block_size: int


def to_bsa(
    source: Positions,
    nq: int | None = None,
    nk: int | None = None,
    size: int = 64,
    batch: int = 1,
    heads: int = 1,
) -> BlockIndices:
    """The block indices of a pattern or layout for cuDNN's block-sparse attention.

    Args:
        source: a static pattern, a layout or a SparseTensor that keeps whole blocks, or of each
            block of keys the same first keys everywhere (a length, padding).
        nq: number of queries, for a pattern.
        nk: number of keys, for a pattern.
        size: side of the blocks, 64 (Hopper) or 128 (Blackwell); 16 and 32 are possible.
        batch: batch entries the indices are repeated for, if the pattern is the same for all.
        heads: query heads, likewise.

    Returns:
        BlockIndices. Nothing is lost.

    Raises:
        LayoutError: P.nm, a key mask, or a pattern that cuts blocks otherwise: name the block.
        ShapeError: a pattern without nq and nk, or a batch or heads that are not the pattern's.
    """
    who = "to_bsa"
    if not among(size, SIZES):
        raise LayoutError(f"{who}: size {shown(size)}; choose one of {SIZES}")
    batch, heads = as_size(who, "batch", batch, 1), as_size(who, "heads", heads, 1)
    layout = as_blocks(source, nq, nk, size, who)
    (b, h), u = layout.lead, layout.distinct
    outer = (max(b, batch), max(h, heads))
    if (b > 1 and batch not in (1, b)) or (h > 1 and heads not in (1, h)):
        raise ShapeError(f"{who}: batch, heads = {batch}, {heads} given, the pattern has {b}, {h}")
    (rows, across), (_, keys) = layout.block_shape, layout.shape
    of = torch.repeat_interleave(
        torch.arange(u, device=layout.device), layout.block_offsets.diff().reshape(u, -1).sum(1)
    )
    line, column = layout.block_rows(), layout.block_columns.long()
    kept = _widths(layout.masks, size, layout.shape[0] % size)[
        layout.mask_index.long(), (line == layout.shape[0] // size).long()
    ]
    if bool((kept < 0).any()):
        at = int((kept < 0).nonzero()[0])
        raise LayoutError(
            f"{who}: block ({int(line[at])}, {int(column[at])}) of {size} × {size} is cut inside; "
            "block indices hold whole blocks, or their first keys; a BlockMask (to_block_mask) or "
            "interval mask (to_intervals) is exact to the element"
        )
    # What each block of keys is cut to, and whether all rows agree.
    place = of * across + column
    low = torch.full((u * across,), size, dtype=torch.int64, device=layout.device)
    high = torch.zeros_like(low)
    low.scatter_reduce_(0, place, kept, "amin")
    high.scatter_reduce_(0, place, kept, "amax")
    differing = (high > 0) & (low != high)
    if bool(differing.any()):
        raise LayoutError(
            f"{who}: block column {int(differing.nonzero()[0]) % across} keeps its first "
            f"{int(low[differing][0])} keys for some queries and {int(high[differing][0])} for "
            "others; block_sizes holds one number for each"
        )
    grid = torch.zeros(u, rows, across, dtype=torch.bool, device=layout.device)
    grid[of, line, column] = True
    entry = entry_table(layout)
    nums, index = listed(grid)
    sizes: Tensor | None = None
    # A block that nobody sees has the size it would have whole.
    edge = torch.arange(across, device=layout.device) * size
    whole = (keys - edge).clamp(max=size).expand(u, -1)
    cut = torch.where(high.reshape(u, across) > 0, low.reshape(u, across), whole)
    if bool((cut < size).any()):
        sizes = cut.int()[entry].expand(*outer, -1)
        same_heads = bool((sizes == sizes[:, :1]).all())
        same = same_heads and bool((sizes == sizes[:1]).all())
        sizes = (sizes[0, 0] if same else sizes[:, 0] if same_heads else sizes).contiguous()
    return BlockIndices(
        index[entry].expand(*outer, -1, -1).contiguous(),
        nums[entry].expand(*outer, -1).contiguous(),
        sizes,
        size,
    )


def _widths(masks: Tensor, size: int, last: int) -> Tensor:
    """How many first keys each mask keeps, −1 if it is cut otherwise: int64 (masks + 1, 2).

    Column 0 for whole blocks of queries, 1 for the last one, which has `last` of them. The last
    row is that of a full block.
    """
    bits = unpack_bits(masks)
    counts = bits.sum(-1)
    prefix = (bits == (torch.arange(size, device=masks.device) < counts[..., None])).all(-1)
    found = []
    for rows in (size, last or size):
        width = counts[:, 0]
        good = prefix[:, :rows].all(1) & (counts[:, :rows] == width[:, None]).all(1) & (width > 0)
        found.append(torch.where(good, width, -1))
    whole = torch.full((1, 2), size, dtype=torch.int64, device=masks.device)
    return torch.cat((torch.stack(found, 1), whole))


def from_bsa(
    q2k_block_index: Tensor,
    shape: tuple[int, int],
    q2k_block_nums: Tensor | int | None = None,
    block_sizes: Tensor | None = None,
    size: int = 64,
) -> Pattern:
    """The pattern of cuDNN block indices, exact to the element; its shape is fixed.

    Args:
        q2k_block_index: int (B, H, blocks of queries, width), each block of keys once in a row.
        shape: (nq, nk).
        q2k_block_nums: int (B, H, blocks of queries), or one number (block_sparse_num): how many of
            each row count; None = all.
        block_sizes: int (blocks of keys,), (B, blocks of keys) or (B, H, blocks of keys): keys that
            count in each block; None = all.
        size: side of a block (sparse_block_size).

    Returns:
        A pattern for all heads if B = H = 1, else one for each batch entry and head.

    Raises:
        LayoutError: an index out of range or listed twice, a number or size that cannot be.
        ShapeError: shapes that do not fit.
        DtypeError: not integers.
    """
    who = "from_bsa"
    nq, nk = as_shape(shape, who)
    side = as_size(who, "size", size, 1)
    index = indices(q2k_block_index, who, 4)
    rows, across = -(-nq // side), -(-nk // side)
    if q2k_block_nums is None or isinstance(q2k_block_nums, int):
        number = index.shape[3]
        if q2k_block_nums is not None:
            number = as_size(who, "q2k_block_nums", q2k_block_nums)
        q2k_block_nums = torch.full(index.shape[:3], number, device=index.device)
    nums, index = check_lists(who, q2k_block_nums, index, rows, across)
    b, h = int(index.shape[0]), int(index.shape[1])
    if not b * h:
        raise LayoutError(f"{who}: q2k_block_index {tuple(index.shape)} has no entry")
    start = torch.arange(across, device=index.device) * side
    width = (nk - start).clamp(max=side)
    if block_sizes is not None:
        given = as_array(block_sizes, who)
        given = indices(given, who, given.ndim)
        if given.shape[-1:] != (across,) or given.ndim > 3:
            raise ShapeError(
                f"{who}: block_sizes {tuple(given.shape)}, ({across},), ({b}, {across}) or ({b}, "
                f"{h}, {across}) expected"
            )
        check_within(given, 0, side + 1, who, "block size")
        given = given[:, None] if given.ndim == 2 else given
        try:
            width = torch.minimum(width, given.long()).expand(b, h, across)
        except RuntimeError as error:
            raise ShapeError(f"{who}: block_sizes {tuple(given.shape)}: {error}") from error
    width = width.expand(b, h, across)
    used = torch.arange(index.shape[3], device=index.device) < nums[..., None]
    i, j, line, at = used.nonzero(as_tuple=True)
    column = index[i, j, line, at].long()
    lo = column * side
    hi = lo + width[i, j, column]
    some = hi > lo
    block_line = (i * h + j) * rows + line
    coarse = merged(block_line[some], lo[some], hi[some], b * h * rows, nk)
    of = torch.arange(nq, device=index.device) // side
    entries = [part_of(coarse, e * rows, rows).select(of) for e in range(b * h)]
    return ragged(entries, None if b * h == 1 else (b, h), (nq, nk), who)
