"""How the slots of panels are found, masked and transposed; no loop over panels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .entries import pack_bits

if TYPE_CHECKING:
    from .panel import PanelLayout

ALIGN = 128
PITCH = 8
Axis = tuple[Tensor, Tensor, Tensor, Tensor]


def round_up(n: Tensor, to: int) -> Tensor:
    """The next multiple of ``to``."""
    return (n + (to - 1)) // to * to


def slot_table(
    panel_entry: Tensor, row_count: Tensor, col_count: Tensor, distinct: int
) -> tuple[Tensor, list[int]]:
    """Where panels start inside their pattern's slots, and the slots of each distinct pattern.

    Args:
        panel_entry: int32 (P,), rising.
        row_count: int (P,).
        col_count: int (P,).
        distinct: number of distinct patterns.

    Returns:
        int64 (P + 1,) and a list of ``distinct`` ints.
    """
    spans = round_up(row_count.long() * round_up(col_count.long(), PITCH), ALIGN)
    ends = torch.cumsum(spans, 0)
    panels = torch.arange(distinct + 1, dtype=torch.int32, device=panel_entry.device)
    bounds = torch.searchsorted(panel_entry.contiguous(), panels)
    running = torch.cat([ends.new_zeros(1), ends])
    base = running[bounds]
    offsets = torch.empty(spans.numel() + 1, dtype=torch.int64, device=spans.device)
    offsets[:-1] = running[:-1] - base[panel_entry.long()]
    offsets[-1] = running[-1] - base[panel_entry[-1].long()] if spans.numel() else 0
    return offsets, base.diff().tolist()


@dataclass(frozen=True)
class PanelSlots:
    """Place of every slot of the distinct patterns, laid end to end.

    Attributes:
        panel: int64 (slots,), −1 in the gaps that align the panels.
        r: int64 (slots,), row inside the panel; 0 in gaps.
        c: int64 (slots,), column inside the panel, >= col_count for padding; 0 in gaps.
    """

    panel: Tensor
    r: Tensor
    c: Tensor

    def positions(self, layout: PanelLayout) -> tuple[Tensor, Tensor]:
        """(row, column) of every slot in the matrix; padding repeats its panel's last column."""
        gap = self.panel < 0
        panel = self.panel.clamp(min=0)
        if not layout.panels:
            return self.r, self.c
        c = torch.minimum(self.c, (layout.col_count - 1).clamp(min=0)[panel])
        row = layout.members("row", panel, self.r)
        column = layout.members("col", panel, c)
        return row.masked_fill_(gap, 0), column.masked_fill_(gap, 0)


def look_up(panel: Tensor, at: Tensor, start: Tensor, offset: Tensor, listed: Tensor) -> Tensor:
    """Member ``at`` of each panel's range or list."""
    first = start[panel]
    if not listed.numel():
        return first + at
    ranged = first >= 0
    index = torch.where(ranged, 0, offset[panel] + at)
    return torch.where(ranged, first + at, listed[index].long())


def locate_slots(layout: PanelLayout) -> PanelSlots:
    """Panel, row and column of every slot of the distinct patterns."""
    pitch = layout.pitch
    used = layout.row_count * pitch
    spans = round_up(used, ALIGN)
    panel = torch.repeat_interleave(torch.arange(layout.panels, device=layout.device), spans)
    starts = torch.cumsum(spans, 0) - spans
    local = torch.arange(panel.numel(), device=layout.device) - starts[panel]
    gap = local >= used[panel]
    width = pitch[panel].clamp(min=1)
    r = local // width
    c = local - r * width
    return PanelSlots(panel.masked_fill(gap, -1), r.masked_fill_(gap, 0), c.masked_fill_(gap, 0))


def panel_live(layout: PanelLayout, at: PanelSlots) -> Tensor:
    """Bool (slots of the distinct patterns,): kept, inside the panel's columns, no gap."""
    if not layout.panels:
        return torch.zeros(0, dtype=torch.bool, device=layout.device)
    panel = at.panel.clamp(min=0)
    live = (at.panel >= 0) & (at.c < layout.col_count[panel])
    if layout.mask_bits.numel():
        offset = layout.mask_offset[panel]
        masked = (offset >= 0) & live
        byte = torch.where(masked, offset + (at.r * layout.pitch[panel] + at.c) // 8, 0)
        bit = (layout.mask_bits[byte].long() >> (at.c % 8)) & 1
        live = live & (~masked | (bit > 0))
    return live


def count_live(layout: PanelLayout) -> list[int]:
    """Kept positions of each distinct pattern."""
    area = layout.row_count * layout.col_count
    if layout.mask_bits.numel():
        # Padding bits are zero, so that the set bits of a panel are its kept positions.
        table = torch.tensor([i.bit_count() for i in range(256)], device=layout.device)
        running = torch.zeros(layout.mask_bits.numel() + 1, dtype=torch.int64, device=layout.device)
        torch.cumsum(table[layout.mask_bits.long()], 0, out=running[1:])
        first = layout.mask_offset.clamp(min=0)
        last = first + layout.row_count * layout.pitch // 8
        last = torch.where(layout.mask_offset < 0, first, last)
        area = torch.where(layout.mask_offset < 0, area, running[last] - running[first])
    totals = torch.zeros(layout.distinct, dtype=torch.int64, device=layout.device)
    totals.index_add_(0, layout.panel_entry.long(), area)
    return [int(n) for n in totals.tolist()]


def mask_table(row_count: Tensor, col_count: Tensor, masked: Tensor) -> tuple[Tensor, int]:
    """Where each masked panel's bytes start (−1 where not masked), and the bytes in all."""
    size = row_count * round_up(col_count, PITCH) // 8
    size = torch.where(masked, size, 0)
    ends = torch.cumsum(size, 0)
    offset = torch.where(masked, ends - size, -1)
    return offset, int(ends[-1]) if ends.numel() else 0


def transposed_masks(layout: PanelLayout) -> tuple[Tensor, Tensor]:
    """mask_offset and mask_bits of the transposed panels."""
    masked = layout.mask_offset >= 0
    offset, total = mask_table(layout.col_count, layout.row_count, masked)
    if not total:
        return offset, layout.mask_bits
    counts = torch.where(masked, layout.row_count * layout.pitch, 0)
    panel = torch.repeat_interleave(torch.arange(layout.panels, device=layout.device), counts)
    local = torch.arange(panel.numel(), device=layout.device)
    local = local - (torch.cumsum(counts, 0) - counts)[panel]
    bits = (layout.mask_bits[layout.mask_offset[panel] + local // 8].long() >> (local % 8)) & 1
    kept = bits > 0
    panel, local = panel[kept], local[kept]
    r = local // layout.pitch[panel]
    c = local - r * layout.pitch[panel]
    turned = torch.zeros(total * 8, dtype=torch.bool, device=layout.device)
    turned[offset[panel] * 8 + c * round_up(layout.row_count, PITCH)[panel] + r] = True
    return offset, pack_bits(turned)


def arrays_of(
    panels: Sequence[tuple[range | Tensor, range | Tensor, Tensor | None]],
    device: torch.device | str,
) -> tuple[Axis, Axis, Tensor, Tensor]:
    """The panel arrays of panels written out; see ``PanelLayout.from_panels``."""

    def axis(members: Sequence[range | Tensor]) -> Axis:
        counts = [len(m) for m in members]
        lists = [m.cpu() for m in members if isinstance(m, Tensor)]
        lengths = [0 if isinstance(m, range) else len(m) for m in members]
        at = [0, *itertools.accumulate(lengths)]
        offsets = [o if n else 0 for o, n in zip(at[:-1], lengths, strict=True)]
        starts = [m.start if isinstance(m, range) else -1 for m in members]
        listed = torch.cat(lists) if lists else torch.zeros(0)
        return (
            torch.tensor(starts, dtype=torch.int64, device=device),
            torch.tensor(counts, dtype=torch.int64, device=device),
            torch.tensor(offsets, dtype=torch.int64, device=device),
            listed.to(device=device, dtype=torch.int32),
        )

    rows, cols = axis([p[0] for p in panels]), axis([p[1] for p in panels])
    masked = torch.tensor([p[2] is not None for p in panels], dtype=torch.bool, device=device)
    offset, _ = mask_table(rows[1], cols[1], masked)
    pieces = []
    for members, columns, mask in panels:
        if mask is not None:
            width = -(-len(columns) // PITCH) * PITCH
            padded = torch.zeros(len(members), width, dtype=torch.bool, device=device)
            padded[:, : len(columns)] = mask
            pieces.append(pack_bits(padded).flatten())
    bits = torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.uint8, device=device)
    return rows, cols, offset, bits
