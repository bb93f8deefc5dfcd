"""Plans for PanelLayout on CUDA: panels of every entry, and the tiles and sums CTAs work on."""

from __future__ import annotations

import torch
from torch import Tensor

from mixgrain.formats.panel import PanelLayout

from .cuda_block import COLUMNS, running, spread
from .plan import PartPlan, Plan, cached, join

# Outer positions of one CTA, and the most contracted positions before a sum is cut.
ROWS, SEGMENT = 64, 2048


def pieces(counts: Tensor, most: int, unit: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Cut ranges into even pieces.

    Args:
        counts: int64 (n,), lengths of the ranges.
        most: longest piece.
        unit: pieces but the last of a range are multiples of this.

    Returns:
        int64 (m,) each: the range, where in it the piece starts, its length.
    """
    cuts = (counts + most - 1) // most
    step = (counts + cuts.clamp(min=1) - 1) // cuts.clamp(min=1)
    step = (step + unit - 1) // unit * unit
    cuts = (counts + step.clamp(min=1) - 1) // step.clamp(min=1)
    which = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), cuts)
    at = torch.arange(len(which), device=counts.device) - (cuts.cumsum(0) - cuts)[which]
    start = at * step[which]
    return which, start, torch.minimum(step[which], counts[which] - start)


def cross(outer: Tensor, inner: Tensor, most: int) -> Tensor:
    """int32 (n, 4): panel, first outer, first inner position, inner positions of every tile."""
    panel, row, _ = pieces(outer, ROWS, ROWS)
    which, start, length = pieces(inner[panel], most, ROWS)
    return torch.stack([panel[which], row[which], start, length], 1).to(torch.int32)


def sums(
    work: Tensor, table: Tensor, axis: int, listed: Tensor, lines: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which partial rows make up each row of a result.

    Args:
        work: int32 (W, 4) from ``cross``; work item w leaves its m-th row at ``w * ROWS + m``.
        table: int64 (P, 11), the panels.
        axis: 1 when outer positions are the panels' rows, 4 when they are columns.
        listed: row_list or col_list.
        lines: rows of one entry's result.

    Returns:
        int32 (T,), the rows of the result that get anything, ``entry * lines + i``, rising; int32
        (T + 1,) into int32 (n,), the partial rows of each in work order.
    """
    panel = table[work[:, 0].long()]
    first = work[:, 1].long()
    counts = (panel[:, axis + 1] - first).clamp(max=ROWS)
    which = torch.repeat_interleave(torch.arange(len(work), device=work.device), counts)
    m = torch.arange(len(which), device=work.device) - (counts.cumsum(0) - counts)[which]
    position = first[which] + m
    start = panel[which, axis]
    line = start + position
    if listed.numel():
        at = torch.where(start >= 0, 0, panel[which, axis + 2] + position)
        line = torch.where(start >= 0, line, listed[at].long())
    line = line + panel[which, 0] * lines
    order = torch.argsort(line, stable=True)
    rows, sizes = torch.unique_consecutive(line[order], return_counts=True)
    source = (which * ROWS + m)[order]
    return rows.to(torch.int32), running(sizes), source.to(torch.int32)


def used(layout: PanelLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which rows and columns of masked panels have a live element.

    Returns:
        int64 (P,) over the distinct panels, where a panel's rows start, −1 without a mask; uint8,
        1 for each such row that has one; then the same two for columns, padded to the pitch.
    """
    masked = layout.mask_offset >= 0
    rows = torch.where(masked, layout.row_count, 0)
    line = torch.where(masked, layout.pitch // 8, 0)
    row_at, byte_at = rows.cumsum(0) - rows, line.cumsum(0) - line
    size = rows * line
    panel = torch.repeat_interleave(torch.arange(len(size), device=size.device), size)
    local = torch.arange(len(panel), device=size.device) - (size.cumsum(0) - size)[panel]
    width = line[panel]
    data = layout.mask_bits[layout.mask_offset[panel] + local]
    row_used = data.new_zeros(int(rows.sum()))
    row_used[(row_at[panel] + local // width)[data > 0]] = 1
    col_used = data.new_zeros(int(line.sum()), 8)
    byte = byte_at[panel] + local % width
    for bit in range(8):
        col_used[byte[(data >> bit) & 1 > 0], bit] = 1
    return (
        torch.where(masked, row_at, -1),
        row_used,
        torch.where(masked, byte_at * 8, -1),
        col_used.flatten(),
    )


def part(layout: PanelLayout, shift: int = 0) -> PartPlan:
    """What CUDA kernels need of a PanelLayout whose slots start ``shift`` into the values.

    Tensors, P panels over all entries:

        table      int64 (P, 11): entry; rows: start (−1 = listed), count, place in row_list;
                   columns likewise; byte of mask_bits (−1 = all kept); first slot in the last axis
                   of the values (the shift and the entry's start are in it); place in row_used and
                   in col_used (−1 = no mask)
        row_list   int32
        col_list   int32
        mask_bits  uint8
        tiles      int32 (T, 4) of sddmm: panel, first row, first column, columns
        work       int32 (W, 4) of spmm: panel, first row, first column, columns
        lines, bounds, sources    which partial rows of work make up a row (see ``sums``)
        t_work     int32 (V, 4) of spmm_t: panel, first column, first row, rows
        t_lines, t_bounds, t_sources
        row_used   uint8, 1 for each row of a masked panel with a live element
        col_used   uint8, likewise for columns
    """
    device = layout.device
    steps = torch.arange(layout.distinct + 1, dtype=torch.int32, device=device)
    ends = torch.searchsorted(layout.panel_entry.contiguous(), steps).tolist()
    index, _ = spread(layout.entry, ends, device)
    sizes = [ends[u + 1] - ends[u] for u in layout.entry]
    which = torch.repeat_interleave(
        torch.arange(layout.entries, device=device), torch.tensor(sizes, device=device)
    )
    starts = torch.tensor(layout.entry_slots[:-1], device=device) + shift
    row_used_at, row_used, col_used_at, col_used = used(layout)
    table = torch.stack(
        [
            which,
            layout.row_start[index],
            layout.row_count[index],
            layout.row_list_offset[index],
            layout.col_start[index],
            layout.col_count[index],
            layout.col_list_offset[index],
            layout.mask_offset[index],
            layout.slot_offsets[:-1][index] + starts[which],
            row_used_at[index],
            col_used_at[index],
        ],
        dim=1,
    )
    rows, cols = table[:, 2], table[:, 5]
    work, t_work = cross(rows, cols, SEGMENT), cross(cols, rows, SEGMENT)
    tensors = [
        table,
        layout.row_list,
        layout.col_list,
        layout.mask_bits,
        cross(rows, cols, COLUMNS),
        work,
        *sums(work, table, 1, layout.row_list, layout.shape[0]),
        t_work,
        *sums(t_work, table, 4, layout.col_list, layout.shape[1]),
        row_used,
        col_used,
    ]
    return PartPlan("cpanel", tensors, [], [shift + start for start in layout.entry_slots])


def cuda(layout: PanelLayout) -> Plan:
    """The CUDA plan of a PanelLayout, for every operation."""
    return cached(layout, lambda: join(layout, [part(layout)]))
