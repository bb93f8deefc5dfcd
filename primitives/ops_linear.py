"""The operator linear and its derivatives: a dense matrix times a sparse weight, no transposes.

Beside ``ops.spmm`` for plans whose kernels read rows of tokens and write them so, or turn them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .keys import Saved, below, differentiable, forward_rule, without_autocast
from .ops import _Context, _plus, _save, sddmm
from .plans.plan import Plan
from .schemas import LIB

_op_linear = torch.ops.mixgrain.linear.default


def by_rows(plan: Plan) -> bool:
    """Whether the operator is for this plan; N:M beside a run-time mask is not."""
    kinds = set(plan.name.split("+"))
    return kinds <= {"nm", "nm_t"} or kinds <= {"cblock", "cpanel", "crow"}


def linear(values: Tensor, x: Tensor, bias: Tensor | None, plan: Plan, transposed: bool) -> Tensor:
    """Product x Sᵀ + bias, or x S + bias when transposed: (F, slots), (F, T, n) -> (F, T, m)."""
    made: Tensor = _op_linear(values, x, bias, *plan, transposed)
    return made


class _Linear(torch.autograd.function._SingleLevelFunction):
    @staticmethod
    def forward(
        ctx: _Context, values: Tensor, x: Tensor, bias: Tensor | None, *rest: Any
    ) -> Tensor:
        # ``rows`` says here that S is not transposed in the product.
        ctx.plan, ctx.rows = Plan(*rest[:3]), not rest[3]
        ctx.dtypes = (x.dtype if bias is None else bias.dtype,)
        _save(ctx, values, x)
        made: Tensor = below(_op_linear, values, x, bias, *rest)
        return made

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, x = ctx.saved_tensors
        dv = dx = db = None
        if ctx.needs_input_grad[0]:
            q, k = (grad, x) if ctx.rows else (x, grad)
            sides = q.mT[:, None], k.mT[:, None]
            dv = sddmm(*sides, None, False, ctx.plan, 1.0, values.dtype)
        if ctx.needs_input_grad[1]:
            dx = linear(values, grad, None, ctx.plan, ctx.rows).to(x.dtype)
        if ctx.needs_input_grad[2]:
            db = grad.sum((0, 1)).to(ctx.dtypes[0])
        return dv, dx, db, *[None] * 4

    @staticmethod
    @forward_rule
    def jvp(
        ctx: _Context,
        saved: Saved,
        dv: Tensor | None,
        dx: Tensor | None,
        db: Tensor | None,
        *_: Any,
    ) -> Tensor | None:
        values, x = saved
        first = None if dv is None else linear(dv, x, None, ctx.plan, not ctx.rows)
        second = None if dx is None else linear(values, dx, None, ctx.plan, not ctx.rows)
        made = _plus(first, second)
        if db is None:
            return made
        wide = db.to(x.dtype).expand(*x.shape[:2], db.shape[0])
        return wide.clone() if made is None else made + wide


LIB.impl("linear", differentiable(_Linear, _op_linear, 3), "Autograd")
for _key in ("AutocastCPU", "AutocastCUDA"):
    LIB.impl("linear", without_autocast(_op_linear), _key)
