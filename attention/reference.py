"""The definition of attend: dense masked attention in float64, on any device.

It shares nothing with the kernels and costs O(nq · nk): for tests, for documents, for tiny inputs.
Everything is made of differentiable torch operations, so it can be differentiated any number of
times.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from mixgrain.formats.layout import Layout
from mixgrain.formats.pattern import Pattern
from mixgrain.formats.pattern_nm import NM

from .merge import add_sink


def attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Pattern | Layout,
    scale: float,
    key_mask: Tensor | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense attention over the kept positions.

    Args:
        q: (B, Hq, nq, D).
        k: (B, Hkv, nk, D).
        v: (B, Hkv, nk, Dv).
        kept: a pattern (P.nm included) or a layout.
        scale: multiplies scores.
        key_mask: bool (B, nk), True = kept, or None.
        sink_logits: (Hq,) or None.

    Returns:
        o (B, Hq, nq, Dv) and lse (B, Hq, nq), both float64. What dropped positions hold, NaN
        included, reaches neither them nor any gradient.
    """
    group = q.shape[1] // max(k.shape[1], 1)
    q, k, v = q.double(), k.double(), v.double()
    if key_mask is not None:
        k, v = (torch.where(key_mask[:, None, :, None], x, 0.0) for x in (k, v))
    k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    mask = static_mask(kept, q.shape[2], k.shape[2], q.device)
    if key_mask is not None:
        mask = mask & key_mask[:, None, None, :]
    mask = mask.expand(*q.shape[:3], k.shape[2])
    s = scores(q, k, mask) * scale
    s = torch.where(mask, s, -torch.inf)
    if isinstance(kept, NM):
        mask = mask & largest(s.detach(), kept.n, kept.m)
        s = torch.where(mask, s, -torch.inf)
    top = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_zeros(*s.shape[:-1], 1)
    top = torch.where(top == -torch.inf, 0.0, top)
    weight = torch.where(mask, torch.exp(torch.where(mask, s - top, 0.0)), 0.0)
    total = weight.sum(-1, keepdim=True)
    empty = total == 0  # no key, or none with a score above −inf
    safe = torch.where(empty, 1.0, total)
    o = apply(weight / safe, v, mask)
    lse = torch.where(empty, -torch.inf, top + torch.log(safe))[..., 0]
    return (o, lse) if sink_logits is None else add_sink(o, lse, sink_logits)


def static_mask(kept: Pattern | Layout, nq: int, nk: int, device: torch.device) -> Tensor:
    """Bool (1 or B, 1 or H, nq, nk): what the pattern keeps; for P.nm what it is within."""
    if isinstance(kept, Layout):
        return kept.mask().to(device)
    if isinstance(kept, NM):
        if kept.within is None:
            return torch.ones(1, 1, nq, nk, dtype=torch.bool, device=device)
        kept = kept.within
    dense = kept.dense(nq, nk, device)
    return dense.reshape(*kept.lead, nq, nk)


def largest(s: Tensor, n: int, m: int) -> Tensor:
    """Bool, shape of s: the n largest of every m neighbours along the last dimension.

    Ties go to the lower index, a NaN counts as infinite; the last group may be short.
    """
    columns = s.shape[-1]
    padded = torch.nn.functional.pad(s, (0, -columns % m), value=-torch.inf)
    groups = padded.unflatten(-1, (-1, m))
    groups = torch.where(groups.isnan(), torch.inf, groups)
    order = torch.sort(groups, dim=-1, descending=True, stable=True).indices
    chosen = torch.zeros_like(groups, dtype=torch.bool)
    chosen.scatter_(-1, order[..., :n], torch.ones_like(chosen[..., :n]))
    return chosen.flatten(-2)[..., :columns]


class _Scores(torch.autograd.Function):
    """Where the mask is set: q kᵀ; elsewhere 0, whatever q and k hold there."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, mask)
        return torch.where(mask, q @ k.transpose(-1, -2), 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, mask = ctx.saved_tensors
        turned = mask.transpose(-1, -2)
        return apply(grad, k, mask), apply(grad.transpose(-1, -2), q, turned), None


class _Apply(torch.autograd.Function):
    """p v, over the positions where the mask is set only."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(p, v, mask)
        p = torch.where(mask, p, 0.0)
        if bool(torch.isfinite(v).all()):
            return p @ v
        # Position by position, lest 0 · NaN arises where nothing is kept.
        return (p[..., None] * torch.where(mask[..., None], v[..., None, :, :], 0.0)).sum(-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        p, v, mask = ctx.saved_tensors
        return scores(grad, v, mask), apply(p.transpose(-1, -2), grad, mask.transpose(-1, -2)), None


def scores(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Scores q kᵀ at the kept positions, 0 elsewhere; closed, with ``apply``, under derivatives."""
    return cast(Tensor, _Scores.apply(q, k, mask))  # type: ignore[no-untyped-call]


def apply(p: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Sums p v over the kept positions; nothing that stands elsewhere reaches the result."""
    return cast(Tensor, _Apply.apply(p, v, mask))  # type: ignore[no-untyped-call]
