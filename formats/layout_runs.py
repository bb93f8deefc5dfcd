"""The kept keys of a layout as runs, from its index arrays: full blocks are never taken apart."""

from __future__ import annotations

import torch
from torch import Tensor

from .block import BlockLayout
from .entries import unpack_bits
from .layout import Layout
from .mixed import MixedLayout
from .panel import PanelLayout
from .row import RowLayout
from .runs import Runs, from_intervals, from_mask, from_sorted_pairs, ragged_arange

# Row, first key and end of intervals; row u · nq + i is row i of distinct pattern u.
Intervals = tuple[Tensor, Tensor, Tensor]


def layout_runs(layout: Layout) -> list[Runs]:
    """The kept keys of each row of every distinct pattern, as Runs over the nq rows."""
    nq, nk = layout.shape
    distinct = max(layout.entry) + 1
    row, lo, hi = _intervals(layout, distinct)
    tall = from_intervals(row, lo, hi, distinct * nq, nk)
    return [part_of(tall, u * nq, nq) for u in range(distinct)]


def part_of(runs: Runs, first: int, rows: int) -> Runs:
    """Some neighbouring rows, in memory of their own."""
    offsets = runs.offsets[first : first + rows + 1]
    inside = slice(int(offsets[0]), int(offsets[-1]))
    return Runs(offsets - offsets[0], runs.lo[inside].clone(), runs.hi[inside].clone())


def _intervals(layout: Layout, distinct: int) -> Intervals:
    if isinstance(layout, MixedLayout):
        parts = [_intervals(part, distinct) for part in layout.parts]
        if not parts:
            none = torch.empty(0, dtype=torch.int64, device=layout.device)
            return none, none, none
        row, lo, hi = (torch.cat(ends) for ends in zip(*parts, strict=True))
        return row, lo, hi
    if isinstance(layout, BlockLayout):
        return _of_blocks(layout)
    if isinstance(layout, PanelLayout):
        return _of_panels(layout)
    nq = layout.shape[0]
    if isinstance(layout, RowLayout):
        lines = torch.arange(distinct * nq, device=layout.device)
        row = torch.repeat_interleave(lines, layout.row_offsets.diff())
        return _runs_of(from_sorted_pairs(row, layout.columns.long(), distinct * nq))
    row, column = layout.indices()
    entry = layout.slot_entry()
    live = layout.live()
    of = torch.tensor(layout.entry, device=layout.device)
    # One of the entries that share a pattern is enough.
    first = torch.tensor([layout.entry.index(u) for u in layout.entry], device=layout.device)
    wanted = first[entry] == entry
    if live is not None:
        wanted &= live
    column = column[wanted]
    return of[entry[wanted]] * nq + row[wanted], column, column + 1


def _runs_of(runs: Runs) -> Intervals:
    return runs.row_of_run(), runs.lo, runs.hi


def _of_blocks(layout: BlockLayout) -> Intervals:
    (nq, nk), size, device = layout.shape, layout.size, layout.device
    lines, distinct = layout.block_shape[0], layout.distinct
    row = torch.repeat_interleave(
        torch.arange(distinct * lines, device=device), layout.block_offsets.diff().long()
    )
    column, full = layout.block_columns.long(), layout.mask_index < 0
    spans = from_sorted_pairs(row[full], column[full], distinct * lines)
    # Neighbouring full blocks are one run before they are repeated for each of their rows.
    every = torch.arange(distinct * nq, device=device)
    tall = spans.select(every // max(nq, 1) * lines + every % max(nq, 1) // size)
    partial = ~full
    row, column = row[partial], column[partial]
    inside = torch.arange(size, device=device)
    # Masked rows of a partial block: (blocks, size), of which those beyond the edge keep nothing.
    masks = from_mask(unpack_bits(layout.masks).reshape(-1, size))
    cut = masks.select((layout.mask_index[partial].long()[:, None] * size + inside).flatten())
    at = cut.row_of_run()
    block = at // size
    line = row[block] // max(lines, 1) * nq + row[block] % max(lines, 1) * size + at % size
    left = column[block] * size
    return (
        torch.cat((tall.row_of_run(), line)),
        torch.cat((tall.lo * size, left + cut.lo)),
        torch.cat(((tall.hi * size).clamp_(max=nk), left + cut.hi)),
    )


def _of_panels(layout: PanelLayout) -> Intervals:
    base = layout.panel_entry.long() * layout.shape[0]
    masked = layout.mask_offset >= 0
    # Without a mask every row of a panel has the runs of its columns.
    panel, at = ragged_arange(torch.where(masked, 0, layout.col_count))
    columns = from_sorted_pairs(panel, layout.members("col", panel, at), layout.panels)
    panel, at = ragged_arange(torch.where(masked, 0, layout.row_count))
    row = base[panel] + layout.members("row", panel, at)
    whole = columns.select(panel)
    parts = [(row[whole.row_of_run()], whole.lo, whole.hi)]
    if bool(masked.any()):
        pitch = layout.pitch
        panel, bit = ragged_arange(torch.where(masked, layout.row_count * pitch, 0))
        byte = layout.mask_bits[layout.mask_offset[panel] + bit // 8]
        kept = (byte >> (bit % 8)) & 1 == 1
        panel, bit = panel[kept], bit[kept]
        r, c = bit // pitch[panel], bit % pitch[panel]
        column = layout.members("col", panel, c)
        parts.append((base[panel] + layout.members("row", panel, r), column, column + 1))
    row, lo, hi = (torch.cat(ends) for ends in zip(*parts, strict=True))
    return row, lo, hi
