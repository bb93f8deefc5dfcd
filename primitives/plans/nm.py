"""Plans for NMLayout. They depend on shapes and ``within`` alone; metadata is passed through.

So a layout made from scores a moment ago costs no planning, and none of these plans is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixgrain.formats.nm import NMLayout
from mixgrain.formats.nm_metadata import metadata_shape, padded

from . import block
from .plan import PartPlan, Plan, join, split, validate_once

ENCODINGS = ("2:4", "1:2-half", "1:2-float32", "bytes")


def plan_of(layout: NMLayout) -> Plan:
    """The plan of a layout whose metadata is trusted, or not there yet."""
    tensors: list[Tensor] = []
    inner: list[int] = []
    if layout.within is not None:
        tensors, inner = block.cpu(layout.within).tensors, [layout.within.size]
    scalars = [layout.n, layout.m, ENCODINGS.index(layout.encoding), len(inner), *inner]
    scalars += layout.within_entry
    kind = "nm_t" if layout.transposed else "nm"
    starts = list(layout.entry_slots)
    return join(layout, [PartPlan(kind, [layout.metadata, *tensors], scalars, starts)])


def plan(layout: NMLayout) -> Plan:
    """The plan of an NMLayout, for every operation, on the CPU and on CUDA alike."""
    validate_once(layout)
    return plan_of(layout)


def metadata_of(plan: Plan) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the metadata that belongs to a plan."""
    _, shape, entry, (part,) = split(plan)
    n, m, encoding = part.scalars[0], part.scalars[1], ENCODINGS[part.scalars[2]]
    if part.scalars[3]:
        size = part.scalars[4]
        grid = (part.starts[-1] // (size * size // m * n), size, size // m, n)
    else:
        grid = (len(entry), *padded(*shape, m, encoding), n)
    return metadata_shape(grid, encoding, m)
