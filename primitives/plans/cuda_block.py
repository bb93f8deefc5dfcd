"""Plans for BlockLayout on CUDA: the blocks of every entry as a table, by rows and by columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixgrain.formats.block import BlockLayout
from mixgrain.formats.entries import pack_bits, unpack_bits
from mixgrain.formats.layout import Layout

from .plan import PartPlan, Plan, cached, join

# Columns that one CTA of sddmm takes from a block row (sddmm.cuh: kColumns).
COLUMNS = 256
# Blocks that one CTA of sddmm_block_sm90 takes from a block row, by size: as measured.
WGMMA_BLOCKS = {64: 16, 128: 4}
# Rows of a CTA of spmm_union_sm90.
UNION_ROWS = 128


def spread(
    entry: Sequence[int], ends: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where the elements of every entry lie in arrays over the distinct patterns.

    Args:
        entry: the distinct pattern of each entry.
        ends: U + 1 ints, where each distinct pattern's elements start, and the end.
        device: of the result.

    Returns:
        int64 (n,), index of each element of each entry; int64 (n,), what an index of that element
        has to be shifted by to count over the entries.
    """
    sizes = [ends[u + 1] - ends[u] for u in entry]
    first, total = [], 0
    for size in sizes:
        first.append(total)
        total += size
    counts = torch.tensor(sizes, device=device)
    shift = torch.tensor([at - ends[u] for at, u in zip(first, entry, strict=True)], device=device)
    shift = torch.repeat_interleave(shift, counts, output_size=total)
    return torch.arange(total, device=device) - shift, shift


def running(counts: Tensor) -> Tensor:
    """int32 (n + 1,): 0 and the running sums."""
    out = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=out[1:])
    return out.to(torch.int32)


def longest_first(counts: Tensor) -> Tensor:
    """int32, indices by falling count; equal ones keep their order, so neighbours share caches."""
    return torch.argsort(counts, descending=True, stable=True).to(torch.int32)


def chunks_of(row_ptr: Tensor, most: int) -> Tensor:
    """int32 (n, 2): (first item, items) of runs of at most ``most`` in one row, evenly cut.

    The longest come first, so that the last CTAs to start are short.
    """
    first, counts = row_ptr[:-1].long(), row_ptr.diff().long()
    cuts = (counts + most - 1) // most
    total = int(cuts.sum())
    row = torch.repeat_interleave(torch.arange(len(counts), device=cuts.device), cuts)
    at = torch.arange(total, device=cuts.device) - (cuts.cumsum(0) - cuts)[row]
    begin = at * counts[row] // cuts[row]
    end = (at + 1) * counts[row] // cuts[row]
    runs = torch.stack([first[row] + begin, end - begin], 1).to(torch.int32)
    return runs[longest_first(runs[:, 1]).long()]


def records(bounds: Tensor, order: Tensor) -> Tensor:
    """int32 (n, 3): line, first element, elements; lines in the order given."""
    line = order.long()
    return torch.stack([line, bounds[line], bounds.diff()[line]], 1).to(torch.int32)


def unions(
    items: Tensor, side: int, entries: int, lines: tuple[int, int], used: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The inner blocks that groups of UNION_ROWS rows (or columns) have any block at.

    Args:
        items: int32 (n, 4), entry, block row, block column, mask of every block.
        side: 1 to group rows, 2 to group columns.
        entries: number of entries.
        lines: block lines of an entry, and inner blocks.
        used: bool (M, size), inner positions with a kept element in each mask.

    Returns:
        int64 (U, 4): inner block; bits of the group's lines that have a block there; bits of the
        inner positions in use; 0. By entry, group, inner block. Their ``records``. And int64
        (U, lines of a group, 2): item and mask of the block of each line, −1 and −1 where none.
    """
    size = used.shape[1]
    each, inner = UNION_ROWS // size, max(lines[1], 1)
    groups = -(-lines[0] // each)
    entry, line, column, mask = (items[:, c].long() for c in (0, side, 3 - side, 3))
    key = (entry * groups + line // each) * inner + column
    found, which = torch.unique(key, return_inverse=True)
    bits = torch.zeros_like(found).index_add_(0, which, 1 << line % each)
    live = torch.zeros(len(found), size, dtype=torch.int32, device=items.device)
    full = mask < 0
    live.index_add_(0, which[~full], used[mask[~full]].to(torch.int32))
    live[which[full]] = 1
    weights = 1 << torch.arange(size, device=items.device)
    words = ((live > 0) * weights).sum(1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words)  # as int32
    table = torch.stack([found % inner, bits, words, torch.zeros_like(found)], 1)
    counts = torch.bincount(found // inner, minlength=entries * groups)
    blocks = torch.full((len(found), each, 2), -1, device=items.device)
    blocks[which, line % each] = torch.stack(
        [torch.arange(len(items), device=mask.device), mask], 1
    )
    return table, records(running(counts), longest_first(counts)), blocks


def pieces(items: Tensor, bounds: Tensor, order: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Blocks of one entry in pieces of up to 32 inner positions, by their lines.

    Args:
        items: int32 (n, 4), of ``part``.
        bounds: int32 (lines + 1,), row_ptr of ``part``; col_ptr for the transpose.
        order: int32 (n,), t_items of ``part`` for the transpose, else None.
        size: side of a block.

    Returns:
        int32 (lines + 1,) into the pieces, and the pieces int32 (p, 2): inner position / the depth
        of a piece, first of its slots / 16.
    """
    deep = min(size, 32)
    each, step = size // deep, deep * (1 if order is None else size) // 16
    item = torch.arange(len(items), device=items.device) if order is None else order.long()
    inner = items[:, 2].long() if order is None else items[item, 1].long()
    at = torch.arange(each, device=items.device)
    cells = [inner[:, None] * each + at, item[:, None] * (size * size // 16) + at * step]
    return bounds * each, torch.stack(cells, -1).view(-1, 2).to(torch.int32)


def lines_of(layout: BlockLayout) -> list[Tensor]:
    """The tensors items, row_ptr and row_order of ``part``."""
    nqb, _ = layout.block_shape
    index, _ = spread(layout.entry, _ends(layout), layout.device)
    counts = _counts(layout, layout.block_offsets, nqb)
    at = torch.repeat_interleave(torch.arange(len(counts), device=layout.device), counts.long())
    items = torch.stack(
        [
            at // max(nqb, 1),
            at % max(nqb, 1),
            layout.block_columns[index].long(),
            layout.mask_index[index].long(),
        ],
        dim=1,
    )
    return [items.to(torch.int32), running(counts), longest_first(counts)]


def _ends(layout: BlockLayout) -> list[int]:
    """Where the blocks of each distinct pattern start, and the end."""
    nqb, _ = layout.block_shape
    ends: list[int] = layout.block_offsets[:: max(nqb, 1)].tolist()
    return ends if nqb else [0] * (layout.distinct + 1)


def _counts(layout: BlockLayout, offsets: Tensor, lines: int) -> Tensor:
    """Blocks of each line of every entry."""
    which = torch.tensor(layout.entry, device=layout.device)
    return offsets.diff().view(layout.distinct, lines)[which].flatten()


def part(layout: BlockLayout, shift: int = 0) -> PartPlan:
    """What CUDA kernels need of a BlockLayout whose slots start ``shift`` into the values.

    Tensors, E entries of nqb × nkb blocks, NBE kept blocks over all entries; item n has the slots
    ``shift + n * size**2`` onwards:

        items      int32 (NBE, 4): entry, block row, block column, mask (−1 = full); by entry, row
        row_ptr    int32 (E * nqb + 1,) into items
        row_order  int32 (E * nqb,) rows, most blocks first
        t_items    int32 (NBE,): items by entry, column, row
        col_ptr    int32 (E * nkb + 1,) into t_items
        col_order  int32 (E * nkb,) columns, most blocks first
        masks      uint8 (M, size, size / 8)
        any_col    uint8 (M, size / 8): columns with a live row
        any_row    uint8 (M, size / 8): rows with a live column
        chunks     int32 (C, 2): first item and items of what one CTA of sddmm takes

    and where the kernels for sm_90a run those of ``wgmma``. Scalars: size.
    """
    size, device = layout.size, layout.device
    items, row_ptr, row_order = lines_of(layout)
    index, moved = spread(layout.entry, _ends(layout), device)
    t_counts = _counts(layout, layout.t_offsets, layout.block_shape[1])
    t_items = (layout.t_order[index].long() + moved).to(torch.int32)
    col_ptr, col_order = running(t_counts), longest_first(t_counts)
    bits = unpack_bits(layout.masks)
    tensors = [
        items,
        row_ptr,
        row_order,
        t_items,
        col_ptr,
        col_order,
        layout.masks.contiguous(),
        pack_bits(bits.any(1)),
        pack_bits(bits.any(2)),
        chunks_of(row_ptr, COLUMNS // size),
    ]
    if variety(layout):
        tensors += wgmma(layout, tensors)
    return PartPlan("cblock", tensors, [size], [shift + start for start in layout.entry_slots])


def wgmma(layout: BlockLayout, tensors: list[Tensor]) -> list[Tensor]:
    """What the kernels for sm_90a need besides the tensors of ``part``.

        table      sizes 64 and 128: int32 (NBE, 4): item, block column, mask, 0, as items; 16 and
                   32: int32 (U, 4) of ``unions``
        records    int32 (n, 3): row, or group of rows, first in table, elements; longest first
        t_table    the same of columns, as t_items
        t_records  the same of columns

    then for sizes 64 and 128:

        longer     int32 (L, 2): chunks of up to WGMMA_BLOCKS items

    and for 16 and 32:

        masks_t    uint8 (M, size, size / 8), the transposed masks
        blocks     int32 (U, lines, 2): item and mask by union and line
        t_blocks   the same of columns
    """
    items, row_ptr, row_order, t_items, col_ptr, col_order = tensors[:6]
    if layout.size >= 64:
        item = torch.arange(len(items), device=items.device)
        table = torch.stack([item, *items[:, 2:].T, item * 0], 1)
        t_table = torch.stack([t_items, *items[t_items.long()][:, 1:4:2].T, item * 0], 1)
        made = [table, records(row_ptr, row_order), t_table, records(col_ptr, col_order)]
        made.append(chunks_of(row_ptr, WGMMA_BLOCKS[layout.size]))
    else:
        nqb, nkb = layout.block_shape
        bits = unpack_bits(layout.masks)
        table, lines, blocks = unions(items, 1, layout.entries, (nqb, nkb), bits.any(1))
        t_table, columns, t_blocks = unions(items, 2, layout.entries, (nkb, nqb), bits.any(2))
        made = [table, lines, t_table, columns, pack_bits(bits.mT.contiguous()), blocks, t_blocks]
    return [t if t.dtype == torch.uint8 else t.to(torch.int32).contiguous() for t in made]


def variety(layout: Layout) -> str:
    """Tells plans with the tables of ``wgmma`` from those without."""
    from mixgrain.cuda.device import hopper  # the dispatch table is loaded where there is no CUDA

    return "sm_90a" if hopper(layout.device) else ""


def cuda(layout: BlockLayout) -> Plan:
    """The CUDA plan of a BlockLayout, for every operation."""
    return cached(layout, lambda: join(layout, [part(layout)]), variety(layout))
