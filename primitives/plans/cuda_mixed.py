"""Plans for MixedLayout on CUDA: those of its parts, one after the other."""

from __future__ import annotations

from itertools import pairwise

from mixgrain.formats.block import BlockLayout
from mixgrain.formats.layout import Layout
from mixgrain.formats.mixed import MixedLayout
from mixgrain.formats.panel import PanelLayout
from mixgrain.formats.row import RowLayout

from . import cuda_block, cuda_panel, cuda_row
from .plan import PartPlan, Plan, cached, join


def _part(layout: Layout, shift: int, end: int) -> PartPlan:
    if isinstance(layout, BlockLayout):
        return cuda_block.part(layout, shift)
    if isinstance(layout, PanelLayout):
        return cuda_panel.part(layout, shift)
    assert isinstance(layout, RowLayout)
    return cuda_row.part(layout, shift, end)


def cuda(layout: MixedLayout) -> Plan:
    """The CUDA plan of a MixedLayout, for every operation."""

    def make() -> Plan:
        spans = zip(layout.parts, pairwise(layout.part_offsets), strict=True)
        return join(layout, [_part(part, *span) for part, span in spans])

    return cached(layout, make, cuda_block.variety(layout))
