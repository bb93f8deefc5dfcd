"""Plans for MixedLayout: those of its parts, one after the other."""

from __future__ import annotations

from mixgrain.formats.block import BlockLayout
from mixgrain.formats.layout import Layout
from mixgrain.formats.mixed import MixedLayout
from mixgrain.formats.panel import PanelLayout
from mixgrain.formats.row import RowLayout

from . import block, panel, row
from .plan import PartPlan, Plan, cached, join


def _part(layout: Layout, shift: int) -> PartPlan:
    if isinstance(layout, BlockLayout):
        return block.part(layout, shift)
    if isinstance(layout, PanelLayout):
        return panel.part(layout, shift)
    assert isinstance(layout, RowLayout)
    return row.part(layout, shift)


def cpu(layout: MixedLayout) -> Plan:
    """The CPU plan of a MixedLayout, for every operation."""

    def make() -> Plan:
        pairs = zip(layout.parts, layout.part_offsets, strict=False)
        return join(layout, [_part(part, shift) for part, shift in pairs])

    return cached(layout, make)
