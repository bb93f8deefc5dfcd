"""CPU kernel of sddmm."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulation
from ..plans.plan import Plan
from .matrix import Matrix, operand


def sddmm(
    q: Tensor,
    k: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    tensors: list[Tensor],
    dims: list[int],
    name: str,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Scale · q kᵀ at every slot: (F, E, nq, D), (F, E, nk, D) -> (F, slots)."""
    matrix = Matrix(Plan(tensors, dims, name))
    out = q.new_empty(q.shape[0], matrix.slots, dtype=dtype)
    matrix.clear_gaps(out)
    wide = accumulation(q.dtype, k.dtype, dtype)
    rows, cols = matrix.padded
    for f, e in matrix.pairs(q.shape[0]):
        dropped = matrix.dropped(keep, keep_rows, f, e)
        left, right = operand(q[f, e], rows, wide), operand(k[f, e], cols, wide)
        for part, span in matrix.parts(e):
            part.sddmm(out[f, span], left, right, scale, dropped)
    return out
