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

WIDEST = 256
HALF = (torch.float16, torch.bfloat16)


def split_costs(D: int) -> Costs:
    """Rates of the fused kernels on an H200: scores never travel, so slots cost nothing."""
    return Costs(
        dense_flops=5.5e14,
        copy_bytes=4.2e12,
        gather_bytes=6e12,
        private_panel_factor=1.5,
        slot_passes=0.0,
        head_dim=128 if D > 64 else 64,
    )


def lacking(
    kept: Pattern | Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    sink: Tensor | None,
) -> str | None:
    """What the fused kernels lack for a call on CUDA, as the end of a sentence; None = nothing."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, sink)):
        return "has no backward yet, and an input requires a gradient"
    if isinstance(kept, NM):
        return "does not choose N:M yet"
    if max(q.shape[3], v.shape[3]) > WIDEST:
        return f"takes head dimensions up to {WIDEST}, not {max(q.shape[3], v.shape[3])}"
    rows = isinstance(kept, Layout) and kept.kind == "row"
    if q.dtype not in HALF and not (rows and q.dtype == torch.float32):
        return f"takes float16 and bfloat16 (on a RowLayout float32, too), not {q.dtype}"
    try:
        hopper = facts(q.device.index).hopper
    except CudaError:
        return "has no kernels for this device"
    if not hopper and not rows:
        return "exists for sm_90 only, but for RowLayouts"
    if keep is not None and not rows:
        return "takes no key_mask yet, but with a RowLayout"
    return None
