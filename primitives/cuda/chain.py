"""sddmm, softmax and spmm in one recorded call, so that lanes go on from one to the next.

Called one after the other, each primitive joins its two lanes, since its result is the user's. Here
only what needs both lanes waits for both: a fine kernel runs beside whichever coarse kernel is on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..plans.plan import Plan, split
from . import parts
from .sddmm import sddmm
from .softmax import softmax
from .spmm import spmm


def chain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    tensors: list[Tensor],
    dims: list[int],
    name: str,
    products: int,
    rowwise_dims: tuple[int, ...],
    rowwise_name: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Softmax(scale · q kᵀ) v over the kept positions.

    Args:
        q: (F, E, nq, D).
        k: (F, E, nk, D).
        v: (F, E, nk, Dv).
        keep: bool (F, E, nk) or None.
        tensors: of the products' plan, then of the plan of operations along rows.
        dims: of the products' plan.
        name: of the products' plan.
        products: number of its tensors.
        rowwise_dims: of the other plan.
        rowwise_name: of the other plan.
        scale: multiplies scores.

    Returns:
        (F, E, nq, Dv) in v's dtype, with scores and probabilities in q's, and (F, E, nq) float32.
    """
    plan = Plan(tensors[:products], dims, name)
    rowwise = Plan(tensors[products:], list(rowwise_dims), rowwise_name)
    with parts.lanes(split(plan)[3], q.shape[0]):
        scores = sddmm(q, k, keep, False, *plan, scale, q.dtype)
        p, lse = softmax(scores, keep, False, *rowwise, q.dtype, True)
        return spmm(p, v, keep, False, *plan, 1.0, v.dtype), lse


def worth(positions: int, dtype: torch.dtype) -> bool:
    """Whether there is so much of the fine part that lanes pay."""
    return positions >= parts.FORK_POSITIONS and dtype in parts.CODES
