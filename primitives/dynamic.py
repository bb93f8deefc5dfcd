"""Dynamic N:M: sddmm that keeps the n largest scores of every m neighbouring keys."""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import Tensor

from mixgrain.formats.block import BlockLayout
from mixgrain.formats.errors import ShapeError, UnsupportedError
from mixgrain.formats.layout import TRACED, next_key
from mixgrain.formats.nm_metadata import encoding_for
from mixgrain.formats.pattern_nm import NM
from mixgrain.formats.sparse import SparseTensor

from . import ops, recorded_nm
from .blank import nm_layout, nm_plan
from .fold import expand, fold, fold_mask, free_shape, join_lead
from .plans.plan import trust


def sddmm_nm(
    q: Tensor,
    k: Tensor,
    pattern: NM,
    scale: float,
    key_mask: Tensor | None,
    dtype: torch.dtype,
) -> SparseTensor:
    """Prune and encode; ``sddmm`` has checked the operands.

    Args:
        q: (*leading, nq, D), at most two leading dimensions.
        k: (*leading, nk, D).
        pattern: n, m and the static pattern that limits the choice, if any.
        scale: multiplies scores before they are compared.
        key_mask: bool (B, nk) or (nk,); dropped keys are never chosen over live ones.
        dtype: of the values.

    Returns:
        A SparseTensor on an NMLayout made here, a different one on every call. Every matrix has
        its own positions, so the layout varies over all leading dimensions.

    Source: Chen et al., Dynamic N:M Fine-grained Structured Sparse Attention Mechanism, PPoPP 2023.
    """
    if q.device.type not in ("cpu", "cuda"):
        raise UnsupportedError(
            f"sddmm with P.nm: no {q.device.type} kernels in this version; move q and k with "
            '.cpu(), or use mixgrain.primitives.reference (impl="reference" in attend)'
        )
    for name, t in (("k", k), ("key_mask", key_mask)):
        if t is not None and t.device != q.device:
            raise ShapeError(
                f"sddmm: {name} on {t.device} and q on {q.device}; move one of them, e.g. "
                f"{name}.to({str(q.device)!r})"
            )
    # A layout is of one shape: index makes a size that torch.compile left open what it is now.
    shape = (operator.index(q.shape[-2]), operator.index(k.shape[-2]))
    within: BlockLayout | None = None
    if pattern.within is not None:
        made = pattern.within.to_layout("block", *shape, size=64, device=q.device)
        assert isinstance(made, BlockLayout)
        within = made
    varying = (1, 1) if within is None else within.lead
    lead = join_lead("sddmm", varying, q.shape[:-2], k.shape[:-2])
    if key_mask is not None and key_mask.dim() == 2:
        lead = join_lead("sddmm", (1, 1), lead, (key_mask.shape[0], 1))
    if len(lead) > 2:
        raise ShapeError(
            f"sddmm: leading dimensions {lead} for dynamic N:M, whose positions differ between all "
            "of them; expected at most (batch, heads); flatten the batch dimensions"
        )
    b, h = map(operator.index, (1, 1, *lead)[-2:])
    if 0 in lead:
        # No matrix to choose from: any choice will do, and what is empty stays a free dimension.
        from .sddmm import sddmm

        one = [t.new_zeros(max(b, 1), max(h, 1), *t.shape[-2:]) for t in (q, k)]
        layout = sddmm_nm(one[0], one[1], pattern, scale, None, dtype).layout
        return sddmm(q, k, layout, scale, key_mask, dtype)
    n, m = operator.index(pattern.n), operator.index(pattern.m)
    encoding = encoding_for(n, m, dtype)
    blank = nm_layout(shape, n, m, encoding, (b, h), within)
    plan = nm_plan(shape, n, m, encoding, (b, h), within)
    seen = recorded_nm.learn(q, k, pattern, scale, key_mask, dtype, plan, lead, blank)
    if seen is not None:
        return seen
    values, metadata = ops.prune(
        fold(expand(q, lead), (b, h)),
        fold(expand(k, lead), (b, h)),
        fold_mask(key_mask, (b, h), lead),
        plan,
        float(scale),
        dtype,
    )
    if torch.compiler.is_dynamo_compiling():
        layout = replace(blank, metadata=metadata, key=TRACED)
    else:
        layout = replace(blank, metadata=metadata, key=next_key())
        trust(layout)
    return SparseTensor(layout, values.reshape(*free_shape((b, h), lead), layout.slots), key_mask)
