"""The operators along rows on CUDA: softmax, softmax_backward, row_sum and row_expand.

A layout whose rows lie in one part, of blocks or of entries, takes one look at its values. Blocks
beside entries do so too, once the entries have left the statistics of their rows, whose slots come
last. Else every part leaves the statistics of its rows, one kernel joins them, every part writes
its slots; rowwise.cuh has the formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..plans.plan import Plan
from .parts import check_dtypes
from .rowwise import BACKWARD, EXPAND, ONCE, ROWS, SOFTMAX, SUM, Call, Vectors


def softmax(
    values: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    tensors: list[Tensor],
    dims: list[int],
    name: str,
    dtype: torch.dtype,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Softmax of the kept slots of each row, all parts together, and its log-sum-exp.

    Returns:
        (F, slots) in ``dtype``; (F, E, nq) float32, or of no elements.
    """
    check_dtypes("softmax", values.dtype, dtype)
    plan = Plan(tensors, dims, name)
    call = Call(SOFTMAX, plan, values, keep, keep_rows, values, out_dtype=dtype)
    assert call.out is not None
    lse = call.vector() if want_lse else None
    if not call.parts:
        if lse is not None:
            lse.fill_(-torch.inf)
    elif call.once:
        call.run(ONCE, call.parts[0], Vectors(lse=lse))
    else:
        call.jointly(lse=lse)
    return call.out, values.new_empty(0, dtype=torch.float32) if lse is None else lse


def softmax_backward(
    p: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
    keep: Tensor | None,
    keep_rows: bool,
    tensors: list[Tensor],
    dims: list[int],
    name: str,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient p · (grad − Σ p · grad + grad_lse), sums over kept slots of a row; (F, slots)."""
    check_dtypes("softmax_backward", p.dtype, grad.dtype, dtype)
    plan = Plan(tensors, dims, name)
    call = Call(BACKWARD, plan, p, keep, keep_rows, p, grad, out_dtype=dtype)
    assert call.out is not None
    if grad_lse is not None:
        grad_lse = grad_lse.to(torch.float32).contiguous()
    if call.once:
        call.run(ONCE, call.parts[0], Vectors(grad_lse=grad_lse))
    elif call.parts:
        call.jointly(grad_lse=grad_lse)
    return call.out


def row_sum(
    values: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    tensors: list[Tensor],
    dims: list[int],
    name: str,
) -> Tensor:
    """Sum of the kept slots of each row: (F, slots) -> (F, E, nq), float32."""
    check_dtypes("row_sum", values.dtype)
    call = Call(SUM, Plan(tensors, dims, name), values, keep, keep_rows, values)
    made = call.vector()
    if call.once:
        call.run(ROWS, call.parts[0], Vectors(made.view(call.free, call.lines)))
        return made
    return call.joined().view(made.shape) if call.parts else made.zero_()


def row_expand(
    rows: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    tensors: list[Tensor],
    dims: list[int],
    name: str,
    dtype: torch.dtype,
) -> Tensor:
    """The value of each slot's row, zero where dead: (F, E, nq) -> (F, slots)."""
    check_dtypes("row_expand", rows.dtype, dtype)
    call = Call(EXPAND, Plan(tensors, dims, name), rows, keep, keep_rows, out_dtype=dtype)
    assert call.out is not None
    numbers = rows.to(torch.float32).contiguous().view(call.free, call.lines)
    call.everywhere(numbers)
    return call.out
