"""Plans for BlockLayout on CUDA: the blocks of every entry as a table, by rows and by columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixgrain.formats.block import BlockLayout
from mixgrain.formats.entries import pack_bits, unpack_bits

from .plan import PartPlan, Plan, cached, join

# Columns that one CTA of sddmm takes from a block row (sddmm.cuh: kColumns).
COLUMNS = 256
# Blocks that one CTA of sddmm_block_sm90 takes from a block row.
WGMMA_BLOCKS = 16


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
    """int32 (n, 2): (first item, items) of runs of at most ``most`` inside one row, evenly cut."""
    first, counts = row_ptr[:-1].long(), row_ptr.diff().long()
    cuts = (counts + most - 1) // most
    total = int(cuts.sum())
    row = torch.repeat_interleave(torch.arange(len(counts), device=cuts.device), cuts)
    at = torch.arange(total, device=cuts.device) - (cuts.cumsum(0) - cuts)[row]
    begin = at * counts[row] // cuts[row]
    end = (at + 1) * counts[row] // cuts[row]
    return torch.stack([first[row] + begin, end - begin], 1).to(torch.int32)


def records(bounds: Tensor, order: Tensor, lines: int) -> Tensor:
    """int32 (n, 4): line, first element, elements, entry; lines in the order given."""
    line = order.long()
    return torch.stack([line, bounds[line], bounds.diff()[line], line // max(lines, 1)], 1)


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
        longer     int32 (L, 2): chunks of up to WGMMA_BLOCKS items
        table      int32 (NBE, 4): item, block column, mask, 0; in the order of items
        records    int32 (E * nqb, 4): row, first in table, blocks, entry; in row_order
        t_table    int32 (NBE, 4): item, block row, mask, 0; in the order of t_items
        t_records  int32 (E * nkb, 4): column, first in t_table, blocks, entry; in col_order

    The last five are for sizes 64 and 128, and empty for others.

    Scalars: size.
    """
    size, device = layout.size, layout.block_columns.device
    nqb, nkb = layout.block_shape
    ends = layout.block_offsets[:: max(nqb, 1)].tolist() if nqb else [0] * (layout.distinct + 1)
    entry = layout.entry
    index, moved = spread(entry, ends, device)
    which = torch.tensor(entry, device=device)
    counts = layout.block_offsets.diff().view(layout.distinct, nqb)[which].flatten()
    t_counts = layout.t_offsets.diff().view(layout.distinct, nkb)[which].flatten()
    row_ptr = running(counts)
    at = torch.repeat_interleave(torch.arange(len(entry) * nqb, device=device), counts.long())
    items = torch.stack(
        [
            at // max(nqb, 1),
            at % max(nqb, 1),
            layout.block_columns[index].long(),
            layout.mask_index[index].long(),
        ],
        dim=1,
    )
    items = items.to(torch.int32)
    t_items = (layout.t_order[index].long() + moved).to(torch.int32)
    row_order, col_ptr, col_order = longest_first(counts), running(t_counts), longest_first(t_counts)
    bits = unpack_bits(layout.masks)
    if size >= 64:
        walks = [
            torch.stack([torch.arange(len(items), device=device), *items[:, 2:].T, at * 0], 1),
            records(row_ptr, row_order, nqb),
            torch.stack([t_items, *items[t_items.long()][:, 1:4:2].T, at * 0], 1),
            records(col_ptr, col_order, nkb),
        ]
        walks = [w.to(torch.int32).contiguous() for w in walks]
    else:
        walks = [row_ptr.new_empty(0, 4)] * 4
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
        chunks_of(row_ptr, WGMMA_BLOCKS) if size >= 64 else row_ptr.new_empty(0, 2),
        *walks,
    ]
    return PartPlan("cblock", tensors, [size], [shift + start for start in layout.entry_slots])


def cuda(layout: BlockLayout) -> Plan:
    """The CUDA plan of a BlockLayout, for every operation."""
    return cached(layout, lambda: join(layout, [part(layout)]))
