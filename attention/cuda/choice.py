"""Whether the fused kernels take a call, and the costs by which patterns are split for them."""

from __future__ import annotations

import torch
from torch import Tensor

from mixgrain.cuda.device import facts
from mixgrain.cuda.errors import CudaError
from mixgrain.formats.costs import Costs
from mixgrain.formats.layout import Layout
from mixgrain.formats.pattern import Pattern
from mixgrain.formats.pattern_nm import NM

from . import kernel

WIDEST = 256
#: The kernel of units, by architecture and dtype: "sm90" on wgmma, "mma" on mma.sync and FMAs.
UNIT_KERNELS = {
    "80": {torch.float16: "mma", torch.bfloat16: "mma", torch.float32: "mma"},
    "86": {torch.float16: "mma", torch.bfloat16: "mma", torch.float32: "mma"},
    "89": {torch.float16: "mma", torch.bfloat16: "mma", torch.float32: "mma"},
    "90": {torch.float16: "mma", torch.bfloat16: "mma", torch.float32: "mma"},
    "90a": {torch.float16: "sm90", torch.bfloat16: "sm90", torch.float32: "mma"},
    "100": {torch.float16: "mma", torch.bfloat16: "mma", torch.float32: "mma"},
    "120": {torch.float16: "mma", torch.bfloat16: "mma", torch.float32: "mma"},
}


def unit_kernel(device: int, dtype: torch.dtype) -> str:
    """Which kernel of units takes a call."""
    return UNIT_KERNELS[facts(device).arch][dtype]


def groups(device: torch.device, dtype: torch.dtype, D: int) -> int:
    """Query units of an item for the kernel that takes calls of these kinds."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return kernel.groups(D) if unit_kernel(index, dtype) == "sm90" else 2


def split_costs(D: int) -> Costs:
    """Rates of the fused kernels on an H200, as measured of scattered positions.

    Scores never travel, so slots cost nothing.
    """
    wide = D > 64
    return Costs(
        # Of masked units: they fetch and apply their bits.
        dense_flops=5.1e14 if wide else 3.7e14,
        copy_bytes=4.2e12,
        gather_bytes=7e12,
        # A column gathered for one query unit is read, written and read again: 250 ps of D = 64.
        private_panel_factor=7.8 if wide else 5.6,
        slot_passes=0.0,
        head_dim=128 if wide else 64,
        row_seconds=4e-10 if wide else 3e-10,
    )


def lacking(
    kept: Pattern | Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
) -> str | None:
    """What the fused kernels lack for a call on CUDA, as the end of a sentence; None = nothing."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, sink)):
        return "has no backward yet, and an input requires a gradient"
    if isinstance(kept, NM):
        return "does not choose N:M yet"
    if max(q.shape[3], v.shape[3]) > WIDEST:
        return f"takes head dimensions up to {WIDEST}, not {max(q.shape[3], v.shape[3])}"
    try:
        found = UNIT_KERNELS[facts(q.device.index).arch]
    except CudaError:
        return "has no kernels for this device"
    if q.dtype not in found:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in found)
        return f"takes {names}, not {str(q.dtype).removeprefix('torch.')}"
    return None
