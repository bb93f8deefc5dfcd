"""The operators spmm and spmm_t on CUDA: one kernel or two per part, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plans.plan import Plan, split
from . import block, panel, row
from .parts import aligned, aligned_values, check_dtypes

_KINDS = {"cblock": block.spmm, "cpanel": panel.spmm, "crow": row.spmm_row}


def spmm(
    values: Tensor,
    x: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    tensors: list[Tensor],
    dims: list[int],
    name: str,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Scale · (F, slots) times (F, E, nk, D) -> (F, E, nq, D)."""
    plan = Plan(tensors, dims, name)
    return _product("spmm", values, x, keep, keep_rows, plan, scale, dtype, transposed=False)


def spmm_t(
    values: Tensor,
    x: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    tensors: list[Tensor],
    dims: list[int],
    name: str,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Scale · the transpose of (F, slots) times (F, E, nq, D) -> (F, E, nk, D)."""
    plan = Plan(tensors, dims, name)
    return _product("spmm_t", values, x, keep, keep_rows, plan, scale, dtype, transposed=True)


def _product(
    op: str,
    values: Tensor,
    x: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    plan: Plan,
    scale: float,
    dtype: torch.dtype,
    transposed: bool,
) -> Tensor:
    check_dtypes(op, values.dtype, x.dtype, dtype)
    _, shape, entry, parts = split(plan)
    width = x.shape[3]
    lines = shape[1 if transposed else 0]
    size = (x.shape[0], len(entry), lines, width)
    if not parts or 0 in size:
        return x.new_zeros(size, dtype=dtype)
    x, values = aligned(x), aligned_values(values)
    # Several parts are summed in float32, in this order, and rounded once.
    alone = len(parts) == 1
    out = x.new_empty(*size[:3], x.shape[3], dtype=dtype if alone else torch.float32)
    for n, part in enumerate(parts):
        _KINDS[part.kind](out, values, x, keep, keep_rows, part, scale, transposed, n > 0)
    return out[..., :width].to(dtype).contiguous()
