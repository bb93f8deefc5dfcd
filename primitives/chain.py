"""The three primitives of attention in one call, where that lets kernels run at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixgrain.formats.mixed import MixedLayout
from mixgrain.formats.row import RowLayout

from .checks import check_fits
from .dispatch import plan_for
from .fold import expand, fold, fold_mask, free_shape, join_lead, unfold, unfold_vector
from .looks import plain, usable


def chained(
    q: Tensor, k: Tensor, v: Tensor, layout: object, scale: float, key_mask: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """``spmm(softmax(sddmm(q, k)), v)`` and the log-sum-exp, to the same bits.

    Args:
        q: (B, Hq, nq, D).
        k: (B, Hkv, nk, D), Hkv divides Hq.
        v: (B, Hkv, nk, Dv).
        layout: any.
        scale: multiplies scores.
        key_mask: bool (B, nk), or None.

    Returns:
        o and lse; None where the primitives themselves have to be called: gradients are asked for,
        something watches the operators, the device has no lanes, or the layout has not enough of
        both grains.
    """
    if torch.compiler.is_compiling() or type(layout) is not MixedLayout:
        return None
    given = (q, k, v) if key_mask is None else (q, k, v, key_mask)
    if not plain() or not all(map(usable, given)):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return None
    fine = [part for part in layout.parts if isinstance(part, RowLayout)]
    if not fine or len(fine) == len(layout.parts) or not q.dtype == k.dtype == v.dtype:
        return None
    from .cuda import operator
    from .cuda.chain import worth

    lead = join_lead("attend", layout.lead, q.shape[:-2], k.shape[:-2])
    positions = math.prod(free_shape(layout.lead, lead)) * sum(part.slots for part in fine)
    if v.shape[:-2] != k.shape[:-2] or not worth(positions, q.dtype):
        return None
    check_fits("attend", layout, q.shape[-2], k.shape[-2])
    plan = plan_for("sddmm", layout, q, k, v, key_mask)
    rowwise = plan_for("softmax", layout, q)
    o, lse = operator("chain")(
        *(fold(expand(t, lead), layout.lead) for t in (q, k, v)),
        fold_mask(key_mask, layout.lead, lead),
        [*plan.tensors, *rowwise.tensors],
        plan.dims,
        plan.name,
        len(plan.tensors),
        tuple(rowwise.dims),
        rowwise.name,
        scale,
    )
    return unfold(o, layout.lead, lead), unfold_vector(lse, layout.lead, lead)
