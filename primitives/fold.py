"""Leading dimensions: every kernel sees (free, entries, N, D), whatever the caller passed.

A layout with leading shape (b, h) is one block-diagonal matrix of ``E = b * h`` entries for every
*free* index: the batch dimensions over which its positions are shared. Folding moves the dimensions
the layout varies over behind the free ones and flattens both groups::

    lead (1, 1)   (*L, N, D)        ->  F = prod(L),        E = 1
    lead (1, h)   (*B, h, N, D)     ->  F = prod(B),        E = h
    lead (b, 1)   (*R, b, H, N, D)  ->  F = prod(R) * H,    E = b
    lead (b, h)   (*R, b, h, N, D)  ->  F = prod(R),        E = b * h

``SparseTensor.values`` are already in this order, (*free, slots); see ``free_shape``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from mixgrain.formats.errors import ShapeError

Lead = tuple[int, int]


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """``torch.broadcast_shapes``, which takes 20 µs, spared where there is nothing to do."""
    return a if a == b or not b else tuple(torch.broadcast_shapes(a, b))


def join_lead(name: str, lead: Lead, left: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    """The leading shape that two operands and a layout make together.

    They broadcast as in ``torch.matmul``, a layout that varies over heads or batch counting as one
    more operand; besides, the head dimension (the last) of ``left`` may be a multiple of that of
    ``right`` (grouped-query attention).

    Args:
        name: the operation, for error messages.
        lead: (b, h) of the layout.
        left: leading shape of q (or of the sparse matrix).
        right: leading shape of k (or of x).

    Raises:
        ShapeError: the shapes do not broadcast.
    """
    b, h = lead
    needed = (b, h) if b > 1 else ((h,) if h > 1 else ())
    try:
        mine = _broadcast(tuple(left), needed)
    except RuntimeError:
        raise ShapeError(
            f"{name}: leading dimensions {tuple(left)} do not fit a layout that varies over "
            f"(batch, heads) = {lead}; give tensors whose last leading dimensions are {needed}, "
            "or 1 where they are shared"
        ) from None
    other = tuple(right)
    if other and mine and other[-1] > 1 and mine[-1] > other[-1] and mine[-1] % other[-1] == 0:
        other = (*other[:-1], mine[-1])
    try:
        return _broadcast(mine, other)
    except RuntimeError:
        raise ShapeError(
            f"{name}: leading dimensions {tuple(left)} and {tuple(right)} (layout: {lead}) do not "
            "broadcast; give equal sizes, 1, or a number of query heads that is a multiple of the "
            "number of key heads"
        ) from None


def expand(t: Tensor, lead_shape: Sequence[int]) -> Tensor:
    """Broadcast (*any, N, D) to (*lead_shape, N, D), repeating grouped key heads.

    Head i of the result is head ``i // (H / heads)`` of ``t``, as in grouped-query attention. A
    view unless heads are repeated; autograd sums over what was repeated.
    """
    if t.shape[:-2] == lead_shape:
        return t
    heads = lead_shape[-1] if lead_shape else 1
    if t.dim() > 2 and t.shape[-3] not in (1, heads):
        t = t.repeat_interleave(heads // t.shape[-3], dim=-3)
    return t.expand(*lead_shape, *t.shape[-2:])


def free_shape(lead: Lead, lead_shape: Sequence[int]) -> tuple[int, ...]:
    """The free part of a full leading shape: what stands before the slots in ``values``."""
    b, h = lead
    shape = tuple(lead_shape)
    if b == 1:
        return shape if h == 1 else shape[:-1]
    return (*shape[:-2], shape[-1]) if h == 1 else shape[:-2]


def fold(t: Tensor, lead: Lead) -> Tensor:
    """(*lead_shape, N, D) -> (F, E, N, D), a view where strides allow.

    Args:
        t: a tensor whose leading shape is complete (see ``join_lead`` and ``expand``).
        lead: (b, h) of the layout.
    """
    b, h = lead
    rows, width = t.shape[-2:]
    if b > 1 and h == 1:
        t = t.movedim(-4, -3)
    free = prod(free_shape(lead, t.shape[:-2])) if b == 1 or h > 1 else prod(t.shape[:-3])
    return t.reshape(free, b * h, rows, width)


def unfold(t: Tensor, lead: Lead, lead_shape: Sequence[int]) -> Tensor:
    """The inverse of ``fold``: (F, E, N, D) -> (*lead_shape, N, D)."""
    b, h = lead
    rows, width = t.shape[-2:]
    if b > 1 and h == 1:
        swapped = (*lead_shape[:-2], lead_shape[-1], lead_shape[-2])
        return t.reshape(*swapped, rows, width).movedim(-3, -4)
    return t.reshape(*lead_shape, rows, width)


def fold_vector(t: Tensor, lead: Lead) -> Tensor:
    """(*lead_shape, N) -> (F, E, N): row statistics and run-time masks."""
    return fold(t[..., None], lead)[..., 0]


def unfold_vector(t: Tensor, lead: Lead, lead_shape: Sequence[int]) -> Tensor:
    """The inverse of ``fold_vector``."""
    return unfold(t[..., None], lead, lead_shape)[..., 0]


def fold_values(values: Tensor, lead: Lead, lead_shape: Sequence[int]) -> Tensor:
    """(*free, slots) -> (F, slots), broadcast to the free part of ``lead_shape`` first."""
    free = free_shape(lead, lead_shape)
    return values.expand(*free, values.shape[-1]).reshape(prod(free), values.shape[-1])


def fold_mask(mask: Tensor | None, lead: Lead, lead_shape: Sequence[int]) -> Tensor | None:
    """A run-time mask, bool (n,) or (B, n) -> (F, E, n); None stays None.

    B is the dimension before the heads. O(F * E * n) at most, mostly a view.
    """
    if mask is None:
        return None
    if mask.dim() == 2:
        if len(lead_shape) < 2:
            raise ShapeError(
                f"key_mask {tuple(mask.shape)} has a batch dimension but the tensors have none; "
                f"give a mask of shape ({mask.shape[1]},)"
            )
        if mask.shape[0] not in (1, lead_shape[-2]):
            raise ShapeError(
                f"key_mask {tuple(mask.shape)} has batch {mask.shape[0]}, the tensors have "
                f"{lead_shape[-2]}; give one row per batch entry, or one row"
            )
        mask = mask[:, None, :]
    return fold_vector(mask.expand(*lead_shape, mask.shape[-1]), lead)
