"""The oracles: dense, masked, float64, on any device. Slow and obvious on purpose.

They share nothing with the kernels: positions come from ``layout.mask()``, ``layout.indices()`` and
``to_dense()``, arithmetic from dense torch operations. Everything is differentiable by autograd.
Matrices of nq × nk are built, so keep sizes small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixgrain.formats.layout import Layout
from mixgrain.formats.sparse import SparseTensor

from .activations import ACTIVATIONS


def mask_of(layout: Layout, keep: Tensor | None = None, over_rows: bool = False) -> Tensor:
    """Kept positions with a run-time mask applied: bool (b or B, h, nq, nk)."""
    mask = layout.mask()
    if keep is not None:
        kept = keep if keep.dim() == 2 else keep[None]
        mask = mask & (kept[:, None, :, None] if over_rows else kept[:, None, None, :])
    return mask


def grouped(t: Tensor, heads: int) -> Tensor:
    """(…, Hkv, N, D) with every head repeated up to ``heads``, as grouped-query attention does."""
    if t.dim() < 3 or t.shape[-3] in (1, heads) or heads % t.shape[-3]:
        return t
    return t.repeat_interleave(heads // t.shape[-3], dim=-3)


def lead_of(layout: Layout, keep: Tensor | None, *tensors: Tensor) -> tuple[int, ...]:
    """The leading shape that operands, layout and mask broadcast to."""
    shapes = [t.shape[:-2] for t in tensors]
    b, h = layout.lead
    shapes.append(torch.Size((b, h) if b > 1 else ((h,) if h > 1 else ())))
    if keep is not None and keep.dim() == 2:
        shapes.append(torch.Size((keep.shape[0], 1)))
    return tuple(torch.broadcast_shapes(*shapes))


def fit(mask: Tensor, lead: tuple[int, ...]) -> Tensor:
    """A mask (b, h, nq, nk) broadcast to (*lead, nq, nk)."""
    while mask.dim() - 2 > len(lead) and mask.shape[0] == 1:
        mask = mask[0]
    return mask.expand(*lead, *mask.shape[-2:])


def scores(
    q: Tensor, k: Tensor, layout: Layout, scale: float = 1.0, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Dense scores, zero where masked, and the mask: float64 and bool, both (*lead, nq, nk)."""
    heads = torch.broadcast_shapes(q.shape[-3:-2], (layout.lead[1],))[0]
    k = grouped(k, heads)
    lead = lead_of(layout, key_mask, q, k)
    mask = fit(mask_of(layout, key_mask), lead)
    dense = (q.double() @ k.double().transpose(-1, -2) * scale).expand(mask.shape)
    return torch.where(mask, dense, 0), mask


def sample(dense: Tensor, layout: Layout, keep: Tensor | None = None) -> SparseTensor:
    """The slots of a dense (*lead, nq, nk): dead and dropped ones zero."""
    b, h = layout.lead
    row, column = layout.indices()
    entry = layout.slot_entry()
    lead = dense.shape[:-2]
    if b > 1 and h == 1:
        picked = dense.movedim(-4, -3)[..., entry, row, column]
    elif b > 1:
        picked = dense.flatten(-4, -3)[..., entry, row, column]
    elif h > 1:
        picked = dense[..., entry, row, column]
    else:
        picked = dense[..., row, column]
    made = SparseTensor(layout, picked, keep)
    assert made.lead_shape == tuple(lead) or b * h == 1
    live = made.live()
    return made if live is None else made.with_values(torch.where(live, picked, 0))


def sddmm(
    q: Tensor, k: Tensor, layout: Layout, scale: float = 1.0, key_mask: Tensor | None = None
) -> SparseTensor:
    """Scale · q kᵀ sampled at the layout; float64."""
    return sample(scores(q, k, layout, scale, key_mask)[0], layout, key_mask)


def masked_softmax(dense: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and log-sum-exp of dense scores over the kept entries of each row.

    Rows without one, or with only −inf, are zero and −inf.
    """
    low = torch.where(mask, dense, -torch.inf)
    top = low.detach().amax(-1, keepdim=True) if dense.shape[-1] else dense.sum(-1, keepdim=True)
    empty = top == -torch.inf if dense.shape[-1] else torch.ones_like(top, dtype=torch.bool)
    # A finite stand-in keeps NaN out of the gradients of empty rows.
    safe = torch.where(mask & ~empty, dense, torch.where(empty, 0.0, -torch.inf))
    top = torch.where(empty, 0.0, top)
    weight = torch.where(mask & ~empty, torch.exp(safe - top), 0)
    total = weight.sum(-1, keepdim=True)
    p = weight / torch.where(empty, 1.0, total)
    lse = torch.where(empty, 1.0, total).log() + top
    return p, torch.where(empty, -torch.inf, lse)[..., 0]


def softmax(s: SparseTensor) -> tuple[SparseTensor, Tensor]:
    """(probabilities, lse) of a SparseTensor; float64."""
    clean = dense_of(s)
    mask = fit(mask_of(s.layout, s.keep, s.keep_rows), s.lead_shape)
    p, lse = masked_softmax(clean, mask)
    return sample_like(p, s), lse


def sample_like(dense: Tensor, s: SparseTensor) -> SparseTensor:
    """``sample`` on the layout and with the run-time mask of ``s``."""
    made = sample(dense, s.layout)
    made = SparseTensor(s.layout, made.values, s.keep, s.keep_rows)
    live = made.live()
    return made if live is None else made.with_values(torch.where(live, made.values, 0))


def dense_of(s: SparseTensor) -> Tensor:
    """The dense matrix in float64, zero at dead slots whatever they hold."""
    live = s.live()
    values = s.values.double()
    if live is not None:
        values = torch.where(live, values, 0)
    return SparseTensor(s.layout, values, s.keep, s.keep_rows).to_dense()


def spmm(s: SparseTensor, x: Tensor) -> Tensor:
    """S @ x in float64: sums run over kept entries only, whatever x holds elsewhere."""
    dense = dense_of(s)
    heads = dense.shape[-3] if dense.dim() > 2 else 1
    x = grouped(x.double(), heads)
    mask = fit(mask_of(s.layout, s.keep, s.keep_rows), s.lead_shape)
    if bool(torch.isfinite(x).all()):
        return dense @ x
    # 0 · NaN is NaN, so products are formed one by one and only the kept ones are added.
    product = dense[..., :, :, None] * x[..., None, :, :]
    return torch.where(mask[..., None], product, 0).sum(-2)


def linear(
    x: Tensor, w: SparseTensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Act(x @ w.T + bias) in float64."""
    y = x.double() @ dense_of(w).transpose(-1, -2)
    y = y if bias is None else y + bias.double()
    return y if activation is None else ACTIVATIONS[activation](y)


def prune(
    q: Tensor,
    k: Tensor,
    n: int,
    m: int,
    mask: Tensor | None = None,
    scale: float = 1.0,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense scores and the positions dynamic N:M keeps, by sorting each group.

    Args:
        q: (*lead, nq, D).
        k: (*lead, nk, D).
        n: kept per group.
        m: keys per group, j // m.
        mask: bool, broadcastable to (*lead, nq, nk); the static pattern.
        scale: multiplies scores before they are compared.
        key_mask: bool (B, nk) or (nk,).

    Returns:
        float64 scores and bool kept, both (*lead, nq, nk).
    """
    dense = q.double() @ k.double().transpose(-1, -2) * scale
    live = torch.ones_like(dense, dtype=torch.bool)
    if mask is not None:
        live = live & mask
    if key_mask is not None:
        live = live & (key_mask if key_mask.dim() == 1 else key_mask[:, None, None, :])
    kept = torch.zeros_like(live)
    for start in range(0, dense.shape[-1], m):
        group = slice(start, start + m)
        low = torch.where(dense[..., group].isnan(), torch.inf, dense[..., group])
        low = torch.where(live[..., group], low, -torch.inf)
        order = torch.sort(low, dim=-1, descending=True, stable=True).indices[..., :n]
        chosen = torch.zeros_like(live[..., group]).scatter(-1, order, True)
        kept[..., group] = chosen & live[..., group]
    return dense, kept
