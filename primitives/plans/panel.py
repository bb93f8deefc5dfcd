"""Plans for PanelLayout: panels as a table of ints and two lists of indices."""

from __future__ import annotations

import torch

from mixgrain.formats.panel import PanelLayout

from .plan import PartPlan, Plan, cached, join


def part(layout: PanelLayout, shift: int = 0) -> PartPlan:
    """What the CPU needs of a PanelLayout whose slots start ``shift`` into the values."""
    table = torch.stack(
        [
            layout.panel_entry.long(),
            layout.row_start,
            layout.row_count,
            layout.row_list_offset,
            layout.col_start,
            layout.col_count,
            layout.col_list_offset,
            layout.mask_offset,
            layout.slot_offsets[:-1],
        ],
        dim=1,
    )
    tensors = [table, layout.row_list.long(), layout.col_list.long(), layout.mask_bits]
    return PartPlan("panel", tensors, [], [shift + start for start in layout.entry_slots])


def cpu(layout: PanelLayout) -> Plan:
    """The CPU plan of a PanelLayout, for every operation."""
    return cached(layout, lambda: join(layout, [part(layout)]))
