"""sddmm: the scores q kᵀ at the kept positions only."""

from __future__ import annotations

import torch
from torch import Tensor

from mixgrain.formats.arguments import as_number, shape_of
from mixgrain.formats.errors import LayoutError, ShapeError
from mixgrain.formats.layout import Layout
from mixgrain.formats.pattern import Pattern
from mixgrain.formats.pattern_nm import NM
from mixgrain.formats.sparse import SparseTensor

from . import ops, recorded
from .checks import (
    autocast,
    check_dtype,
    check_fits,
    check_key_mask,
    check_matrix,
    check_same_dtype,
)
from .dispatch import plan_for
from .fold import expand, fold, fold_mask, free_shape, join_lead


def sddmm(
    q: Tensor,
    k: Tensor,
    layout: Layout | Pattern,
    scale: float = 1.0,
    key_mask: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> SparseTensor:
    """Sampled dense-dense product: scale · q kᵀ at the kept positions.

    Leading dimensions broadcast as in ``torch.matmul``; besides, dimension −3 of q may be a
    multiple of that of k (grouped-query attention).

    Args:
        q: (*leading, nq, D), float16, bfloat16, float32 or float64.
        k: (*leading, nk, D), the dtype of q.
        layout: the positions, or a pattern (made a mixed layout). ``P.nm(n, m)``, alone or joined
            to a pattern by ``&``, keeps the n largest scores of every m neighbouring keys and
            returns an NMLayout made in this call; gradients flow to the kept scores. On CUDA n:m
            is 2:4 or 1:2.
        scale: multiplies scores before they are rounded; 1/sqrt(D) for attention.
        key_mask: bool (B, nk) or (nk,), True = kept. Slots of dropped keys are dead, here and in
            whatever is computed from the result, which carries the mask.
        out_dtype: dtype of the values; None = that of q.

    Returns:
        A SparseTensor with values (*free, slots). Sums are float32 (float64 for float64) and
        rounded once. Dead slots are zero. Differentiable with respect to q and k, any order.
        torch.autocast casts q and k as it does for torch.matmul (here, in spmm and in linear).

    Raises:
        ShapeError: shapes that do not fit each other or the layout.
        DtypeError: dtypes that differ or are no floats.
        LayoutError: a layout this operation does not take; a dense mask (use ``P.from_dense``).
        UnsupportedError: no kernels for a dtype, n:m or device.

    Source: Gale et al., Sparse GPU Kernels for Deep Learning, SC 2020; N:M: Chen et al., Dynamic
    N:M Fine-grained Structured Sparse Attention Mechanism, PPoPP 2023.
    """
    seen = recorded.sddmm(q, k, layout, scale, key_mask, out_dtype)
    if seen is not None:
        return seen
    scale = as_number("sddmm", "scale", scale)
    check_matrix("sddmm", "q", q)
    check_matrix("sddmm", "k", k)
    q, k = autocast(q, k)
    check_same_dtype("sddmm", "q", "k", q, k)
    if q.shape[-1] != k.shape[-1]:
        raise ShapeError(
            f"sddmm: q has {q.shape[-1]} columns and k {k.shape[-1]}; expected one head dimension"
        )
    dtype = q.dtype if out_dtype is None else out_dtype
    check_dtype("sddmm", "out_dtype", dtype)
    nq, nk = q.shape[-2], k.shape[-2]
    check_key_mask("sddmm", key_mask, nk)
    if isinstance(layout, NM):
        from .dynamic import sddmm_nm

        return sddmm_nm(q, k, layout, scale, key_mask, dtype)
    layout = resolve("sddmm", layout, nq, nk, q.device)
    check_fits("sddmm", layout, nq, nk)
    plan = plan_for("sddmm", layout, q, k, key_mask)
    lead = join_lead("sddmm", layout.lead, q.shape[:-2], k.shape[:-2])
    if key_mask is not None and key_mask.dim() == 2:
        lead = join_lead("sddmm", (1, 1), lead, (key_mask.shape[0], 1))
    seen = recorded.learn_sddmm(q, k, layout, scale, key_mask, out_dtype, plan, lead)
    if seen is not None:
        return seen
    values = ops.sddmm(
        fold(expand(q, lead), layout.lead),
        fold(expand(k, lead), layout.lead),
        fold_mask(key_mask, layout.lead, lead),
        False,
        plan,
        float(scale),
        dtype,
    )
    free = free_shape(layout.lead, lead)
    return SparseTensor(layout, values.reshape(*free, layout.slots), key_mask)


def resolve(op: str, layout: Layout | Pattern, nq: int, nk: int, device: torch.device) -> Layout:
    """A layout itself, or the mixed layout of a pattern.

    Raises:
        LayoutError: neither; a dense mask is told to become a pattern.
    """
    if isinstance(layout, Pattern):
        made: Layout = layout.to_layout("mixed", nq, nk, device=device)
        return made
    if isinstance(layout, Layout):
        return layout
    if isinstance(layout, Tensor):
        raise LayoutError(
            f"{op}: given a dense {shape_of(layout)} tensor where a layout or pattern is "
            "expected; make a pattern of a bool mask with patterns.from_dense(mask)"
        )
    raise LayoutError(
        f"{op}: given a {type(layout).__name__} where a layout or pattern is expected; build one "
        "with patterns.*, e.g. patterns.window(256), or to_layout(kind, nq, nk)"
    )
