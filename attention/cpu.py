"""The fused attention forward on CPU: one pass over the kept tiles with online softmax.

For every (batch, head) and every step of the plan: gather queries and keys, one batched product,
mask, exponential, one batched product; rows that occur in several steps are rescaled and added.
Work memory is O(N · D) and one step's scores; nothing but the output and its log-sum-exp is kept.

Every head is computed on its own, by calls whose shapes depend on the plan alone. Batched products
may round differently for another number of matrices, so that is what makes a row's result
independent of how many heads and batch entries stand beside it.

Source: Dao et al., FlashAttention, arXiv 2205.14135; Milakov and Gimelshein, arXiv 1805.02867.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cpu_tiles import (
    Work,
    overflows,
    padded,
    padded_length,
    pick_cols,
    pick_rows,
    product,
    put_rows,
    scores,
    weights,
)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, all else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_output(q: Tensor, width: int) -> Tensor:
    """(B, H, N, width) in q's dtype and stride order."""
    if q.shape[-1] == width:
        return torch.empty_like(q)
    order, back = stride_order(q)
    shape = (*q.shape[:-1], width)
    return q.new_empty([shape[d] for d in order]).permute(back)


def stride_order(x: Tensor) -> tuple[list[int], list[int]]:
    """Dimensions from the largest stride to the smallest, and the inverse permutation."""
    strides = x.stride()
    order: list[int] = []
    for d in range(x.dim()):  # one comparison at a time, as torch.compile wants it of dynamic sizes
        at = d
        while at and strides[order[at - 1]] < strides[d]:
            at -= 1
        order.insert(at, d)
    return order, [order.index(d) for d in range(x.dim())]


def in_stride_order(o: Tensor, q: Tensor) -> Tensor:
    """The output with the order of strides that q has; itself if it has it."""
    order, back = stride_order(q)
    return o.permute(order).contiguous().permute(back)


def key_bias(keep: Tensor | None, nk: int, dtype: torch.dtype) -> Tensor:
    """(padded nk, 1): −inf behind the last key and at dropped keys, 0 elsewhere.

    Args:
        keep: bool (nk,) or None.
        nk: number of keys.
        dtype: of the result.
    """
    bias = torch.full((padded_length(nk), 1), -torch.inf, dtype=dtype)
    bias[:nk, 0] = 0.0 if keep is None else torch.where(keep, 0.0, -torch.inf)
    return bias


def stored_keys(x: Tensor, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Keys or values of one head, padded; rows of dropped keys are zero, whatever they held."""
    out = padded(x, dtype)
    if keep is not None:
        out[: x.shape[0]].masked_fill_(~keep[:, None], 0.0)
    return out


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    sink: Tensor | None,
    scale: float,
    plan: Sequence[Tensor],
    ints: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Attention over the kept positions.

    Args:
        q: (B, Hq, nq, D); float16 and bfloat16 are computed in float32 and rounded once.
        k: (B, Hkv, nk, D), Hkv divides Hq.
        v: (B, Hkv, nk, Dv).
        keep: bool (B, nk), True = kept, or None.
        sink: (Hq,) extra logit of the denominator, or None.
        scale: multiplies scores.
        plan: ``Plan.tensors``.
        ints: ``Plan.ints``.

    Returns:
        o (B, Hq, nq, Dv) in q's dtype and stride order, and the natural log-sum-exp (B, Hq, nq),
        float32 (float64 for float64). Rows without keys: 0 and −inf.
    """
    work = Work.of(plan, ints)
    dtype = compute_dtype(q.dtype)
    batch, heads, nq, _ = q.shape
    group = heads // max(k.shape[1], 1)
    out = empty_output(q, v.shape[-1])
    lse = q.new_empty(batch, heads, nq, dtype=dtype)
    for b in range(batch):
        kept = None if keep is None else keep[b]
        bias = key_bias(kept, k.shape[2], dtype)
        for h in range(heads):
            if h % group == 0:
                keys = stored_keys(k[b, h // group], kept, dtype)
                values = stored_keys(v[b, h // group], kept, dtype)
            one, logs = _one_head(
                padded(q[b, h], dtype).mul_(scale), keys, values, bias, keep is not None,
                work, b, h,
            )  # fmt: skip
            if sink is not None:
                total = torch.logaddexp(logs, sink[h].to(dtype))
                # Clamped, or a row with neither key nor sink would be exp(−inf + inf).
                one *= torch.exp(logs - total.clamp(min=torch.finfo(dtype).min))[:, None]
                logs = total
            out[b, h] = one
            lse[b, h] = logs
    return out, lse


def _one_head(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, masked: bool, work: Work, batch: int, head: int
) -> tuple[Tensor, Tensor]:
    """Output (nq, Dv) and log-sum-exp (nq,) of one head from padded, scaled operands."""
    rows, width = q.shape[0], v.shape[1]
    lowest = torch.finfo(q.dtype).min
    exact = overflows(q, k) or overflows(v)
    acc = q.new_zeros(rows, width)
    top = q.new_full((rows, 1), -torch.inf)
    total = q.new_zeros(rows, 1)
    for step in work.steps_of(batch, head):
        ids = work.ids
        s = scores(
            pick_rows(q, step, ids), pick_cols(k, step, work), step, work,
            bias if masked or step.pads else None, exact,
        )  # fmt: skip
        new = s.amax(-1, keepdim=True)
        if not step.fresh:
            old = pick_rows(top, step, ids)
            new = torch.maximum(new, old)
        # A row that has seen no key keeps its maximum of −inf; −inf − lowest is −inf, not NaN.
        floor = new.clamp(min=lowest)
        live = s != -torch.inf if exact else None
        p = weights(s, floor)
        part = product(p, live, pick_cols(v, step, work))
        mass = p.sum(-1, keepdim=True)
        if not step.fresh:
            shrink = torch.exp(old - floor)
            part += pick_rows(acc, step, ids) * shrink
            mass += pick_rows(total, step, ids) * shrink
        put_rows(acc, step, ids, part)
        put_rows(top, step, ids, new)
        put_rows(total, step, ids, mass)
    nq = work.shape[0]
    acc, top, total = acc[:nq], top[:nq, 0], total[:nq]
    empty = total == 0
    logs = top + torch.log(total[:, 0])
    return (acc / total).masked_fill_(empty, 0.0), logs
