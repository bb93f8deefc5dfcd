"""The operator of linear layers with a bias, and its derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import ops
from .keys import Saved, below, differentiable, forward_rule, without_autocast
from .plans.plan import Plan
from .schemas import LIB

_op_affine = torch.ops.mixgrain.affine.default


def affine(
    values: Tensor,
    x: Tensor,
    bias: Tensor,
    keep: Tensor | None,
    rows: bool,
    plan: Plan,
    dtype: torch.dtype,
) -> Tensor:
    """S x + bias: (F, slots), (F, E, nk, D), (nq,) -> (F, E, nq, D), rounded once."""
    made: Tensor = _op_affine(values, x, bias, keep, rows, *plan, dtype)
    return made


class _Context(torch.autograd.function.FunctionCtx):
    keep: Tensor | None
    rows: bool
    plan: Plan
    dtypes: tuple[torch.dtype, torch.dtype]
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _Affine(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: _Context, values: Tensor, x: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        ctx.keep, ctx.rows, ctx.plan = rest[0], rest[1], Plan(*rest[2:5])
        ctx.dtypes = (bias.dtype, rest[5])
        ctx.save_for_backward(values, x)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(values, x)
        made: Tensor = below(_op_affine, values, x, bias, *rest)
        return made

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, x = ctx.saved_tensors
        shared = (ctx.keep, ctx.rows, ctx.plan, 1.0)
        wanted = ctx.needs_input_grad
        dv = ops.sddmm(grad, x, *shared, values.dtype) if wanted[0] else None
        dx = ops.spmm_t(values, grad, *shared, x.dtype) if wanted[1] else None
        # torch sums half precision in float32.
        db = grad.sum((0, 1, 3)).to(ctx.dtypes[0]) if wanted[2] else None
        return dv, dx, db, *[None] * 6

    @staticmethod
    @forward_rule
    def jvp(
        ctx: _Context,
        saved: Saved,
        dv: Tensor | None,
        dx: Tensor | None,
        db: Tensor | None,
        *_: Any,
    ) -> Tensor:
        values, x = saved
        rest = (ctx.keep, ctx.rows, ctx.plan, 1.0, ctx.dtypes[1])
        made = torch.zeros((), dtype=ctx.dtypes[1], device=x.device)
        if dv is not None:
            made = made + ops.spmm(dv, x, *rest)
        if dx is not None:
            made = made + ops.spmm(values, dx, *rest)
        if db is not None:
            made = made + db[:, None].to(ctx.dtypes[1])
        dims = ctx.plan.dims
        return made.expand(x.shape[0], x.shape[1], dims[1], x.shape[3]).clone()


LIB.impl("affine", differentiable(_Affine, _op_affine, 3), "Autograd")
for _key in ("AutocastCPU", "AutocastCUDA"):
    LIB.impl("affine", without_autocast(_op_affine), _key)
