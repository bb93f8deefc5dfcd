"""The table of what exists: (operation, layout, backend) -> how a layout becomes a plan.

One literal; tests run over every cell, and error messages are read from it. An operator of ops.py
computes with the plan on the device that its tensors are on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from mixgrain.formats.block import BlockLayout
from mixgrain.formats.errors import LayoutError, ShapeError, UnsupportedError
from mixgrain.formats.layout import TRACED, Layout
from mixgrain.formats.mixed import MixedLayout
from mixgrain.formats.nm import NMLayout
from mixgrain.formats.panel import PanelLayout
from mixgrain.formats.row import RowLayout
from mixgrain.formats.tile import TileLayout
from mixgrain.formats.tracing import constant

from .blank import nm_plan
from .plans import (
    block,
    cuda_block,
    cuda_mixed,
    cuda_panel,
    cuda_row,
    cuda_rowwise,
    cuda_tile,
    mixed,
    nm,
    panel,
    row,
    tile,
)
from .plans.plan import Plan

Planner = Callable[[Any], Plan]

# fmt: off
TABLE: Final[Mapping[str, Mapping[type[Layout], Mapping[str, Planner]]]] = {
    "sddmm": {
        NMLayout: {"cpu": nm.plan, "cuda": nm.cuda},
        BlockLayout: {"cpu": block.cpu, "cuda": cuda_block.cuda},
        RowLayout: {"cpu": row.cpu, "cuda": cuda_row.cuda},
        PanelLayout: {"cpu": panel.cpu, "cuda": cuda_panel.cuda},
        MixedLayout: {"cpu": mixed.cpu, "cuda": cuda_mixed.cuda},
    },
    "softmax": {
        NMLayout: {"cpu": nm.plan, "cuda": nm.cuda},
        BlockLayout: {"cpu": block.cpu, "cuda": cuda_rowwise.cuda},
        RowLayout: {"cpu": row.cpu, "cuda": cuda_rowwise.cuda},
        PanelLayout: {"cpu": panel.cpu, "cuda": cuda_rowwise.cuda},
        MixedLayout: {"cpu": mixed.cpu, "cuda": cuda_rowwise.cuda},
    },
    "softmax_backward": {
        NMLayout: {"cpu": nm.plan, "cuda": nm.cuda},
        BlockLayout: {"cpu": block.cpu, "cuda": cuda_rowwise.cuda},
        RowLayout: {"cpu": row.cpu, "cuda": cuda_rowwise.cuda},
        PanelLayout: {"cpu": panel.cpu, "cuda": cuda_rowwise.cuda},
        MixedLayout: {"cpu": mixed.cpu, "cuda": cuda_rowwise.cuda},
    },
    "spmm": {
        TileLayout: {"cpu": tile.cpu, "cuda": cuda_tile.cuda},
        NMLayout: {"cpu": nm.plan, "cuda": nm.cuda},
        BlockLayout: {"cpu": block.cpu, "cuda": cuda_block.cuda},
        RowLayout: {"cpu": row.cpu, "cuda": cuda_row.cuda},
        PanelLayout: {"cpu": panel.cpu, "cuda": cuda_panel.cuda},
        MixedLayout: {"cpu": mixed.cpu, "cuda": cuda_mixed.cuda},
    },
    "linear": {
        TileLayout: {"cpu": tile.cpu, "cuda": cuda_tile.cuda},
        NMLayout: {"cpu": nm.plan, "cuda": nm.cuda},
        BlockLayout: {"cpu": block.cpu, "cuda": cuda_block.cuda},
        RowLayout: {"cpu": row.cpu, "cuda": cuda_row.cuda},
        PanelLayout: {"cpu": panel.cpu, "cuda": cuda_panel.cuda},
        MixedLayout: {"cpu": mixed.cpu, "cuda": cuda_mixed.cuda},
    },
}
# fmt: on


def plan_for(op: str, layout: Layout, *tensors: Tensor | None) -> Plan:
    """The plan of a layout for an operation on the device of the tensors.

    Args:
        op: a row of the table.
        layout: the positions.
        tensors: everything the operation reads; all must be on the layout's device.

    Raises:
        LayoutError: no such cell, or indices that do not validate.
        ShapeError: tensors on another device than the layout.
        UnsupportedError: no kernels for this device.
    """
    cells = TABLE[op].get(type(layout))
    if cells is None:
        raise LayoutError(
            f"{op}: not for {type(layout).__name__}; it exists for "
            f"{', '.join(cls.__name__ for cls in TABLE[op])}; convert with "
            "sparsify(s.to_dense(), kind) or another kind in to_layout"
        )
    if op != "spmm" and op != "linear" and isinstance(layout, NMLayout) and layout.transposed:
        raise LayoutError(
            f"{op}: not for the transpose of an NMLayout, whose rows are not stored together; it "
            "exists for NMLayout itself; spmm and linear take the transpose"
        )
    device = layout.home or next((t.device for t in tensors if t is not None), layout.device)
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            raise ShapeError(
                f"{op}: a tensor on {tensor.device} and a layout on {device}; move one of them, "
                f"e.g. layout.to({str(tensor.device)!r})"
            )
    planner = cells.get(device.type)
    if planner is None:
        raise UnsupportedError(
            f"{op}: no {device.type} kernels for {type(layout).__name__} in this version; it runs "
            f"on {', '.join(cells)}: move tensors and layout with .cpu() and .to('cpu'), or use "
            'mixgrain.primitives.reference (impl="reference" in attend), which runs anywhere'
        )
    if torch.compiler.is_dynamo_compiling():
        return _traced(planner, layout)
    return planner(layout)


def _traced(planner: Planner, layout: Layout) -> Plan:
    """The plan that traced code asks for, made or remembered while it is being traced."""
    if layout.key != TRACED:
        return Plan(*_planned(planner, layout))
    # Chosen by score in this very trace: only the metadata is not known yet.
    assert isinstance(layout, NMLayout)
    blank = nm_plan(layout.stored_shape, layout.n, layout.m, layout.encoding, layout.lead,
                    layout.within, layout.transposed)  # fmt: skip
    return Plan([layout.metadata, *blank.tensors[1:]], blank.dims, blank.name)


@constant
def _planned(planner: Planner, layout: Layout) -> tuple[Any, ...]:
    return tuple(planner(layout))
