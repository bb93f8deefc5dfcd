"""Attention as three primitives: what to copy when you build your own variant."""

from __future__ import annotations

from torch import Tensor

from mixgrain.formats.layout import Layout
from mixgrain.formats.pattern import Pattern
from mixgrain.primitives.chain import chained
from mixgrain.primitives.sddmm import sddmm
from mixgrain.primitives.softmax import softmax
from mixgrain.primitives.spmm import spmm

from .merge import add_sink


def attend_composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Pattern | Layout,
    scale: float,
    key_mask: Tensor | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the kept positions; every step can be differentiated twice.

    Args:
        q: (B, Hq, nq, D).
        k: (B, Hkv, nk, D), Hkv divides Hq.
        v: (B, Hkv, nk, Dv).
        kept: a layout, or a pattern (P.nm prunes and encodes).
        scale: multiplies scores, which are rounded to q's dtype.
        key_mask: bool (B, nk), True = kept, or None.
        sink_logits: (Hq,) or None.

    Returns:
        o (B, Hq, nq, Dv) in q's dtype and lse (B, Hq, nq), float32 (float64 for float64).
    """
    made = chained(q, k, v, kept, scale, key_mask)  # the same, kernels of the steps at once
    if made is None:
        s = sddmm(q, k, kept, scale=scale, key_mask=key_mask)
        p, lse = softmax(s, return_lse=True)
        o = spmm(p, v)
    else:
        o, lse = made
    return (o, lse) if sink_logits is None else add_sink(o, lse, sink_logits)
