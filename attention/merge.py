"""Merging attentions over disjoint keys, and the sink as a key without a value."""

from __future__ import annotations

import torch
from torch import Tensor

from mixgrain.formats.arguments import check_dense
from mixgrain.formats.errors import DtypeError, ShapeError

from .arguments import DTYPES


def merge(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attentions over each.

        lse = log(exp(lse1) + exp(lse2))      o = o1 · exp(lse1 − lse) + o2 · exp(lse2 − lse)

    Associative and commutative up to rounding; differentiable in all four arguments.

    Args:
        o1: (…, nq, Dv), any floating dtype.
        lse1: (…, nq), natural log; a sink must be in one of the two only.
        o2: as o1.
        lse2: as lse1.

    Returns:
        (o, lse) in float32, float64 if any argument is. Where both lse are −inf: 0, −inf and zero
        gradients.

    Raises:
        ShapeError: shapes that differ or do not fit.
        DtypeError: an argument that is not floating point.

    Source: Milakov and Gimelshein, arXiv 1805.02867.
    """
    for name, t in (("o1", o1), ("lse1", lse1), ("o2", o2), ("lse2", lse2)):
        check_dense("merge", name, t)
        if t.dtype not in DTYPES:
            raise DtypeError(
                f"merge: {name} is {t.dtype}; give float16, bfloat16, float32 or float64"
            )
        if t.device != o1.device:
            raise ShapeError(f"merge: {name} on {t.device}, o1 on {o1.device}; move one of them")
    if o1.shape != o2.shape or lse1.shape != lse2.shape or o1.shape[:-1] != lse1.shape:
        raise ShapeError(
            f"merge: o1 {tuple(o1.shape)}, lse1 {tuple(lse1.shape)}, o2 {tuple(o2.shape)}, lse2 "
            f"{tuple(lse2.shape)}; give o (…, nq, Dv) and lse (…, nq) of the same leading shape"
        )
    wide = torch.float64 in (o1.dtype, o2.dtype, lse1.dtype, lse2.dtype)
    dtype = torch.float64 if wide else torch.float32
    o1, lse1, o2, lse2 = (t.to(dtype) for t in (o1, lse1, o2, lse2))
    # The maximum only keeps the exponentials in range: the result does not depend on it.
    top = torch.maximum(lse1, lse2).detach()
    floor = top.clamp(min=torch.finfo(dtype).min)
    w1, w2 = torch.exp(lse1 - floor), torch.exp(lse2 - floor)
    total = w1 + w2
    empty = top == -torch.inf
    safe = torch.where(empty, 1.0, total)
    o = _weighted(o1, w1 / safe) + _weighted(o2, w2 / safe)
    lse = torch.where(empty, -torch.inf, floor + torch.log(safe))
    return o, lse


def _weighted(o: Tensor, weight: Tensor) -> Tensor:
    # A partial without keys counts as absent even if its rows were never written.
    wide = weight[..., None]
    return torch.where(wide == 0, 0.0, o) * wide


def add_sink(o: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with one more term exp(sink) in the denominator; differentiable twice.

    Args:
        o: (B, H, nq, Dv).
        lse: (B, H, nq), −inf for rows without keys.
        sink: (H,); −inf stands for no sink.

    Returns:
        o scaled by exp(lse − lse'), and lse' = log(exp(lse) + exp(sink)); a row with neither key
        nor sink stays 0 and −inf.
    """
    logit = sink.to(lse.dtype)[:, None].expand_as(lse)
    # Derivatives of exp(−inf − …) would be NaN, so the absent cases are computed apart.
    no_keys, no_sink = lse == -torch.inf, logit == -torch.inf
    both = ~(no_keys | no_sink)
    gap = torch.where(both, lse - logit, 0.0)
    share = torch.where(both, torch.sigmoid(gap), torch.where(no_sink, 1.0, 0.0))
    joint = logit - torch.nn.functional.logsigmoid(-gap)
    total = torch.where(both, joint, torch.where(no_sink, lse, logit))
    return o * share[..., None].to(o.dtype), total
