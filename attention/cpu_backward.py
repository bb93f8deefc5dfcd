"""Gradients of the fused attention on CPU: scores are computed again, tile by tile.

With p = exp(s − lse), δ = Σ o · do − dlse per row:

    dv += pᵀ do      ds = p (do vᵀ − δ)      dq += ds k      dk += dsᵀ q

Sums over rows and heads are taken in the order of the plan's steps and of the heads, so results
repeat bitwise and do not depend on what else is in the batch.

Source: Dao et al., FlashAttention, arXiv 2205.14135, algorithm 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cpu import compute_dtype, key_bias, stored_keys
from .cpu_tiles import (
    Work,
    add_cols,
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


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    plan: Sequence[Tensor],
    ints: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to q, k, v and the sink logits.

    Args:
        grad_out: (B, Hq, nq, Dv).
        grad_lse: (B, Hq, nq) or None.
        q: and k, v, keep, sink as given to ``forward``.
        k: see q.
        v: see q.
        keep: see q.
        sink: see q.
        out: what ``forward`` returned.
        lse: what ``forward`` returned.
        scale: multiplies scores.
        plan: ``Plan.tensors``.
        ints: ``Plan.ints``.

    Returns:
        dq, dk, dv in the dtypes and shapes of q, k, v; the gradient of the sink (Hq,), empty
        without one.
    """
    work = Work.of(plan, ints)
    dtype = compute_dtype(q.dtype)
    batch, heads = q.shape[:2]
    nk = k.shape[2]
    group = heads // max(k.shape[1], 1)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dsink = q.new_zeros(0 if sink is None else heads, dtype=dtype)
    for b in range(batch):
        kept = None if keep is None else keep[b]
        bias = key_bias(kept, nk, dtype)
        for h in range(heads):
            g = h // group
            if h % group == 0:
                keys, values = stored_keys(k[b, g], kept, dtype), stored_keys(v[b, g], kept, dtype)
                sum_k, sum_v = torch.zeros_like(keys), torch.zeros_like(values)
            do = grad_out[b, h].to(dtype)
            logs = lse[b, h]
            # Zero for rows without keys, whatever stands in their gradients.
            delta = (out[b, h].to(dtype) * do).sum(-1)
            if grad_lse is not None:
                delta = delta - grad_lse[b, h]
            delta = delta.masked_fill(logs == -torch.inf, 0.0)
            if sink is not None:
                share = torch.exp(sink[h].to(dtype) - logs).masked_fill_(logs == -torch.inf, 0.0)
                dsink[h] -= (share * delta).sum()
            one = _one_head(
                padded(q[b, h], dtype).mul_(scale), keys, values, do, logs, delta, sum_k, sum_v,
                bias, keep is not None, work, b, h,
            )  # fmt: skip
            dq[b, h] = one.mul_(scale)
            if (h + 1) % group == 0:
                if kept is not None:
                    sum_k[:nk].masked_fill_(~kept[:, None], 0.0)
                    sum_v[:nk].masked_fill_(~kept[:, None], 0.0)
                dk[b, g], dv[b, g] = sum_k[:nk], sum_v[:nk]
    return dq, dk, dv, dsink if sink is None else dsink.to(sink.dtype)


def _one_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    sum_k: Tensor,
    sum_v: Tensor,
    bias: Tensor,
    masked: bool,
    work: Work,
    batch: int,
    head: int,
) -> Tensor:
    """Gradient of q (nq, D) of one head, not yet scaled; adds to sum_k and sum_v."""
    nq, ids = work.shape[0], work.ids
    do = padded(do, q.dtype)
    exact = overflows(q, k) or overflows(v, do) or overflows(q) or overflows(k) or overflows(do)
    dq = torch.zeros_like(q)
    # Rows without keys have exp(s − inf) = 0, and so have the rows behind the last query.
    logs = q.new_full((padded_length(nq), 1), torch.inf)
    logs[:nq, 0] = torch.where(lse == -torch.inf, torch.inf, lse)
    shift = q.new_zeros(padded_length(nq), 1)
    shift[:nq, 0] = delta
    for step in work.steps_of(batch, head):
        qs, ks = pick_rows(q, step, ids), pick_cols(k, step, work)
        dos, vs = pick_rows(do, step, ids), pick_cols(v, step, work)
        s = scores(qs, ks, step, work, bias if masked or step.pads else None, exact)
        live = s != -torch.inf if exact else None
        turned = live.transpose(1, 2) if live is not None else None
        p = weights(s, pick_rows(logs, step, ids))
        add_cols(sum_v, step, work, product(p.transpose(1, 2), turned, dos))
        ds = torch.bmm(dos, vs.transpose(1, 2)).sub_(pick_rows(shift, step, ids)).mul_(p)
        part = product(ds, live, ks)
        if not step.fresh:
            part += pick_rows(dq, step, ids)
        put_rows(dq, step, ids, part)
        add_cols(sum_k, step, work, product(ds.transpose(1, 2), turned, qs))
    return dq[:nq]
