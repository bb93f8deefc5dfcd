"""Plans for RowLayout on CUDA: CSR of every entry, and rows cut into work items of even length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixgrain.formats.entries import INT32_LIMIT, over_entries
from mixgrain.formats.row import RowLayout

from .plan import PartPlan, Plan, cached, join

# Kept positions of one work item. Longer rows are cut, so that a row that keeps everything does not
# hold up the end; partial results of this many positions are one percent of the traffic.
ITEM = 512
# Items of at most this many positions share a warp, which waits once for several of them.
SHORT = 64
# Threads of a CTA of the row kernels: what one of them clears.
MOST_CLEARED = 128


def expand_offsets(
    offsets: Tensor, lines: int, entry: Sequence[int], entry_slots: Sequence[int]
) -> Tensor:
    """Where each row of each entry starts, counted over the entries.

    Args:
        offsets: int64 (U * lines + 1,), where each row of the distinct patterns starts.
        lines: rows of one pattern.
        entry: the distinct pattern of each entry.
        entry_slots: where each entry's positions start, and the end.

    Returns:
        int64 (E * lines + 1,).
    """
    device = offsets.device
    first = torch.tensor(entry, device=device)[:, None] * lines
    starts = torch.tensor(entry_slots, device=device)
    local = offsets[first + torch.arange(lines, device=device)] - offsets[first]
    return torch.cat([(local + starts[:-1, None]).flatten(), starts[-1:]])


def row_items(offsets: Tensor, lines: int, most: int = ITEM) -> tuple[Tensor, Tensor, list[int]]:
    """Rows cut into items of at most ``most`` positions, long ones first.

    How a row is cut depends on its length alone: results do not depend on what else is computed.

    Args:
        offsets: int64 (R + 1,), where each row starts, R a multiple of ``lines``.
        lines: rows of one entry.
        most: positions of an item, less than 2**16.

    Returns:
        int32 (NI, 4): row; positions, and from bit 16 on the first one divided by 2**32; partial
        result it writes (−1 = it is all of its row); the first one modulo 2**32. Every row has an
        item, empty ones too. Items of more than SHORT positions come first, the longest before the
        others; then the short ones entry by entry, again the longest first. int32 (NS, 4): row,
        first partial result, their number, 0 of every row that is cut. The number of partial
        results and of long items.
    """
    counts = offsets.diff()
    cuts = ((counts + most - 1) // most).clamp(min=1)
    # Even lengths, but whole rounds of 32.
    step = ((counts + cuts - 1) // cuts + 31) // 32 * 32
    cuts = ((counts + step - 1) // step.clamp(min=1)).clamp(min=1)
    row = torch.repeat_interleave(torch.arange(len(counts), device=offsets.device), cuts)
    begin = (torch.arange(len(row), device=row.device) - (cuts.cumsum(0) - cuts)[row]) * step[row]
    length = torch.minimum(step[row], counts[row] - begin)
    cut = cuts > 1
    parts = torch.where(cut, cuts, 0)
    first = parts.cumsum(0) - parts
    number = begin // step[row].clamp(min=1)
    partial = torch.where(cut[row], first[row] + number, -1)
    start = offsets[row] + begin
    low = start & 0xFFFFFFFF
    low = torch.where(low < 2**31, low, low - 2**32)
    packed = length + (start >> 32 << 16)
    items = torch.stack([row, packed, partial, low], 1).to(torch.int32)
    # Stable: neighbouring rows of equal length stay neighbours and share caches; short items of one
    # entry gather from the same operand, which then stays in L2.
    long = length > SHORT
    rank = torch.where(long, -1, row // max(lines, 1)) * (most + 1) + most - length
    items = items[torch.argsort(rank, stable=True)]
    which = cut.nonzero()[:, 0]
    splits = torch.stack([which, first[which], cuts[which], torch.zeros_like(which)], 1)
    return items.contiguous(), splits.to(torch.int32), [int(parts.sum()), int(long.sum())]


def dealt_rows(items: Tensor, rows: int, ctas: int, warps: int) -> Tensor:
    """Whole rows of one entry dealt to warps, the longest first.

    Args:
        items: int32 (NI, 4), of ``row_items``, of fewer than 2**31 positions.
        rows: how many there are.
        ctas: that share them.
        warps: of each.

    Returns:
        int32 (rounds, ctas, warps, 4): row (−1 = none); its first position, divided by 8, and the
        remainder; its positions.
    """
    row, length = items[:, 0].long(), (items[:, 1] & 0xFFFF).long()
    counts = torch.zeros(rows, dtype=torch.int64, device=items.device).index_add_(0, row, length)
    first = counts.cumsum(0) - counts
    order = torch.argsort(counts, descending=True, stable=True)
    made = torch.stack([order, first[order] // 8, first[order] % 8, counts[order]], 1)
    rounds = -(-rows // (ctas * warps))
    full = made.new_zeros(rounds * ctas * warps, 4)
    full[:, 0] = -1
    full[:rows] = made
    # Neighbours in length go to different CTAs.
    return full.view(rounds, warps, ctas, 4).transpose(1, 2).to(torch.int32).contiguous()


def places(columns: Tensor) -> Tensor:
    """Where columns lie that have changed places eight by eight.

    Column c is at c ^ (c / 8 % 8), so that what is written for eight neighbours by each thread, and
    for the next eight by the next, goes to different banks of shared memory.

    Args:
        columns: int32 (n,), less than 65,536.

    Returns:
        Their low 16 bits, int16 (n, rounded up to 8,).
    """
    mixed = columns ^ (columns >> 3 & 7)
    mixed = torch.where(mixed < 1 << 15, mixed, mixed - (1 << 16)).to(torch.int16)
    return torch.nn.functional.pad(mixed, (0, -len(mixed) % 8))


def gap(layout: RowLayout, shift: int, end: int | None) -> int:
    """Slots between a part and the next that its own kernels clear: at most one of each thread."""
    free = 0 if end is None else end - shift - layout.slots
    return free if layout.slots and free <= MOST_CLEARED else 0


def part(layout: RowLayout, shift: int = 0, end: int | None = None) -> PartPlan:
    """What CUDA kernels need of a RowLayout whose slots start ``shift`` into the values.

    Tensors, E entries with NNZE kept positions together; position n has the slot ``shift + n``:

        columns      int32 (NNZE,)
        row_items    int32 (NI, 4), row_splits int32 (NS, 4): see ``row_items``
        t_rows       int32 (NNZE,), in column-major order
        t_order      (NNZE,), the position at each place of it; int32, int64 from 2**31 on
        col_items    int32, col_splits int32

    Scalars: partial results and long items of the rows, and of the columns; slots that kernels
    clear behind the last position, up to ``end`` (see ``gap``).
    """
    (rows, cols), entry, slots = layout.shape, layout.entry, layout.entry_slots
    narrow = torch.int32 if slots[-1] < INT32_LIMIT else torch.int64
    row_offsets = expand_offsets(layout.row_offsets, rows, entry, slots)
    t_offsets = expand_offsets(layout.t_offsets, cols, entry, slots)
    order = layout.t_order if narrow == torch.int32 else layout.t_order.long()
    items, splits, numbers = row_items(row_offsets, rows)
    t_items, t_splits, t_numbers = row_items(t_offsets, cols)
    tensors = [
        over_entries(layout.columns, entry, slots),
        items,
        splits,
        over_entries(layout.t_rows, entry, slots),
        over_entries(order, entry, slots, shift=True).to(narrow),
        t_items,
        t_splits,
    ]
    return PartPlan(
        "crow",
        tensors,
        [*numbers, *t_numbers, gap(layout, shift, end)],
        [shift + start for start in slots],
    )


def cuda(layout: RowLayout) -> Plan:
    """The CUDA plan of a RowLayout, for sddmm and spmm."""
    return cached(layout, lambda: join(layout, [part(layout)]))
