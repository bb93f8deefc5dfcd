"""What Python calls of the custom operators, and their derivatives: closed under differentiation.

Derivatives, in reverse and forward mode, are again these operators and plain torch arithmetic, so
that those of any order exist. Dead slots of the values they are given are ignored, NaN included;
those of the values they return are zero. batching.py has the rules of ``torch.func.vmap``.

Defined with ``Library.define`` and an ``autograd.Function`` at the Autograd key: half the time per
call of ``torch.library.custom_op`` with ``register_autograd``. The functions are single-level ones:
whichever transform of ``torch.func`` is being run, the dispatcher has peeled off the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import batching  # noqa: F401  # registers the rules of vmap
from .checks import accumulation
from .gradients import GRADIENTS
from .keys import Saved, below, differentiable, forward_rule, without_autocast
from .plans.plan import Plan
from .schemas import LIB

_ops = torch.ops.mixgrain
_op_sddmm = _ops.sddmm.default
_op_spmm = _ops.spmm.default
_op_spmm_t = _ops.spmm_t.default
_op_softmax = _ops.softmax.default
_op_softmax_backward = _ops.softmax_backward.default
_op_prune = _ops.prune.default
_op_row_sum = _ops.row_sum.default
_op_row_expand = _ops.row_expand.default

Keep = Tensor | None


def sddmm(
    q: Tensor, k: Tensor, keep: Keep, rows: bool, plan: Plan, scale: float, dtype: torch.dtype
) -> Tensor:
    """Scale · q kᵀ at every slot: (F, E, nq, D), (F, E, nk, D) -> (F, slots)."""
    made: Tensor = _op_sddmm(q, k, keep, rows, *plan, scale, dtype)
    return made


def spmm(
    values: Tensor, x: Tensor, keep: Keep, rows: bool, plan: Plan, scale: float, dtype: torch.dtype
) -> Tensor:
    """Scale · S x: (F, slots), (F, E, nk, D) -> (F, E, nq, D)."""
    made: Tensor = _op_spmm(values, x, keep, rows, *plan, scale, dtype)
    return made


def spmm_t(
    values: Tensor, x: Tensor, keep: Keep, rows: bool, plan: Plan, scale: float, dtype: torch.dtype
) -> Tensor:
    """Scale · Sᵀ x: (F, slots), (F, E, nq, D) -> (F, E, nk, D)."""
    made: Tensor = _op_spmm_t(values, x, keep, rows, *plan, scale, dtype)
    return made


def softmax(
    values: Tensor, keep: Keep, rows: bool, plan: Plan, dtype: torch.dtype, want_lse: bool
) -> tuple[Tensor, Tensor]:
    """Row softmax (F, slots) and log-sum-exp (F, E, nq), empty unless wanted."""
    p, lse = _op_softmax(values, keep, rows, *plan, dtype, want_lse)
    return p, lse


def softmax_backward(
    p: Tensor, grad: Tensor, grad_lse: Keep, keep: Keep, rows: bool, plan: Plan, dtype: torch.dtype
) -> Tensor:
    """Gradient of softmax, p · (grad − Σ p · grad + grad_lse), at every slot: (F, slots)."""
    made: Tensor = _op_softmax_backward(p, grad, grad_lse, keep, rows, *plan, dtype)
    return made


def row_sum(values: Tensor, keep: Keep, rows: bool, plan: Plan) -> Tensor:
    """Sums of rows, (F, E, nq), in the accumulation dtype."""
    made: Tensor = _op_row_sum(values, keep, rows, *plan)
    return made


def row_expand(vector: Tensor, keep: Keep, rows: bool, plan: Plan, dtype: torch.dtype) -> Tensor:
    """The value (F, E, nq) of every slot's row, zero at dead slots; the adjoint of row_sum."""
    made: Tensor = _op_row_expand(vector, keep, rows, *plan, dtype)
    return made


def prune(
    q: Tensor, k: Tensor, keep: Keep, plan: Plan, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scores of the n largest of every m keys, (1, slots), and the metadata of the choice.

    The plan is that of an NMLayout whose metadata is not there yet.
    """
    values, metadata = _op_prune(q, k, keep, *plan, scale, dtype)
    return values, metadata


# Gradients

_PRODUCTS: dict[str, Callable[..., Tensor]] = {"sddmm": sddmm, "spmm": spmm, "spmm_t": spmm_t}


class _Context(torch.autograd.function.FunctionCtx):
    """What the forwards below leave for their derivatives."""

    keep: Keep
    rows: bool
    plan: Plan
    scale: float
    dtypes: tuple[torch.dtype, ...]
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


def _save(ctx: _Context, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors)  # type: ignore[arg-type]  # takes None
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*tensors)  # type: ignore[arg-type]


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _gradients(ctx: _Context, name: str, plan: Plan, *held: Tensor) -> list[Tensor | None]:
    """Those of the operands a and b of a product, from a, b and the gradient of the result."""
    shared = (ctx.keep, ctx.rows, plan, ctx.scale)
    return [
        _PRODUCTS[op](*(held[n] for n in operands), *shared, like.dtype) if wanted else None
        for (op, operands), like, wanted in zip(
            GRADIENTS[name], held[:2], ctx.needs_input_grad[:2], strict=True
        )
    ]


def _tangent(
    ctx: _Context, name: str, plan: Plan, saved: Saved, da: Tensor | None, db: Tensor | None
) -> Tensor | None:
    """That of a product, which is linear in both operands."""
    a, b = saved
    product, rest = _PRODUCTS[name], (ctx.keep, ctx.rows, plan, ctx.scale, ctx.dtypes[0])
    first = None if da is None else product(da, b, *rest)
    return _plus(first, None if db is None else product(a, db, *rest))


def _product(name: str, op: Callable[..., Any]) -> type[_SingleLevelFunction]:
    """sddmm, spmm or spmm_t for autograd."""

    class Product(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: _Context, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
            ctx.keep, ctx.rows, ctx.plan, ctx.scale = rest[0], rest[1], Plan(*rest[2:5]), rest[5]
            ctx.dtypes = (rest[6],)
            _save(ctx, a, b)
            made: Tensor = below(op, a, b, *rest)
            return made

        @staticmethod
        def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
            return *_gradients(ctx, name, ctx.plan, *ctx.saved_tensors, grad), *[None] * 7

        @staticmethod
        @forward_rule
        def jvp(
            ctx: _Context, saved: Saved, da: Tensor | None, db: Tensor | None, *_: Any
        ) -> Tensor | None:
            return _tangent(ctx, name, ctx.plan, saved, da, db)

    Product.__name__ = Product.__qualname__ = f"_{name.title()}"
    return Product


class _Prune(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: _Context, q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        ctx.keep, ctx.rows = rest[0], False
        ctx.plan, ctx.scale = Plan(*rest[1:4]), rest[4]
        ctx.dtypes = (rest[5],)
        values, metadata = below(_op_prune, q, k, *rest)
        ctx.mark_non_differentiable(metadata)
        _save(ctx, q, k, metadata)
        return values, metadata

    @staticmethod
    def backward(ctx: _Context, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, metadata = ctx.saved_tensors
        plan = ctx.plan._replace(tensors=[metadata, *ctx.plan.tensors[1:]])
        return *_gradients(ctx, "sddmm", plan, q, k, grad), *[None] * 6

    @staticmethod
    @forward_rule
    def jvp(
        ctx: _Context, saved: Saved, dq: Tensor | None, dk: Tensor | None, *_: Any
    ) -> tuple[Any, None]:
        q, k, metadata = saved
        plan = ctx.plan._replace(tensors=[metadata, *ctx.plan.tensors[1:]])
        return _tangent(ctx, "sddmm", plan, (q, k), dq, dk), None


class _Softmax(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: _Context, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        ctx.keep, ctx.rows, ctx.plan = rest[0], rest[1], Plan(*rest[2:5])
        ctx.dtypes = (values.dtype,)
        ctx.set_materialize_grads(False)
        p, lse = below(_op_softmax, values, *rest)
        ctx.save_for_backward(p)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(p, lse)
        return p, lse

    @staticmethod
    def backward(
        ctx: _Context, grad: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        (p,) = ctx.saved_tensors
        if grad is None and grad_lse is None:
            return (None,) * 8
        grad = torch.zeros_like(p) if grad is None else grad
        if grad_lse is not None and not grad_lse.numel():
            grad_lse = None
        ds = softmax_backward(p, grad, grad_lse, ctx.keep, ctx.rows, ctx.plan, ctx.dtypes[0])
        return ds, *[None] * 7

    @staticmethod
    @forward_rule
    def jvp(
        ctx: _Context, saved: Saved, ds: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        p, lse = saved
        if ds is None:
            return None, None
        shared = (ctx.keep, ctx.rows, ctx.plan)
        dp = softmax_backward(p, ds, None, *shared, p.dtype)
        dl = row_sum(p.to(lse.dtype) * ds, *shared) if lse.numel() else torch.zeros_like(lse)
        return dp, dl


class _SoftmaxBackward(_SingleLevelFunction):
    @staticmethod
    def forward(
        ctx: _Context, p: Tensor, grad: Tensor, grad_lse: Tensor | None, *rest: Any
    ) -> Tensor:
        ctx.keep, ctx.rows, ctx.plan = rest[0], rest[1], Plan(*rest[2:5])
        ctx.dtypes = (p.dtype, grad.dtype, rest[5])
        _save(ctx, p, grad, grad_lse)
        made: Tensor = below(_op_softmax_backward, p, grad, grad_lse, *rest)
        return made

    @staticmethod
    def backward(ctx: _Context, h: Tensor) -> tuple[Tensor | None, ...]:
        # y = p (g − Σ p g + l), so with R the row sum spread over its row:
        #   dg = p (h − R(p h))    dl = Σ p h    dp = h (g − R(p g) + l) − g R(p h)
        p, g, grad_lse = ctx.saved_tensors
        shared = (ctx.keep, ctx.rows, ctx.plan)
        wide = accumulation(p.dtype, g.dtype)
        dg = softmax_backward(p, h, None, *shared, g.dtype) if ctx.needs_input_grad[1] else None
        ph = row_sum(p.to(wide) * h, *shared)
        dp = None
        if ctx.needs_input_grad[0]:
            inside = -row_sum(p.to(wide) * g, *shared)
            if grad_lse is not None:
                inside = inside + grad_lse
            ones = torch.ones_like(inside)
            live = row_expand(ones, *shared, wide) > 0
            dp = h * (g + row_expand(inside, *shared, wide)) - g * row_expand(ph, *shared, wide)
            # Cotangents may hold anything at dead slots.
            dp = torch.where(live, dp, 0).to(p.dtype)
        dl = ph.to(grad_lse.dtype) if grad_lse is not None and ctx.needs_input_grad[2] else None
        return dp, dg, dl, *[None] * 6

    @staticmethod
    @forward_rule
    def jvp(
        ctx: _Context,
        saved: Saved,
        dp: Tensor | None,
        dg: Tensor | None,
        dl: Tensor | None,
        *_: Any,
    ) -> Tensor | None:
        # y = p (g − Σ p g + l):  dy = p (dg − Σ p dg + dl) + dp (g − Σ p g + l) − p Σ dp g
        p, g, grad_lse = saved
        shared = (ctx.keep, ctx.rows, ctx.plan)
        wide = accumulation(p.dtype, g.dtype)
        dtype = ctx.dtypes[2]
        made = None
        if dg is not None or dl is not None:
            dg = torch.zeros_like(g) if dg is None else dg
            made = softmax_backward(p, dg, dl, *shared, dtype)
        if dp is None:
            return made
        inside = -row_sum(p.to(wide) * g, *shared)
        if grad_lse is not None:
            inside = inside + grad_lse
        live = row_expand(torch.ones_like(inside), *shared, wide) > 0
        spread = row_expand(row_sum(dp.to(wide) * g, *shared), *shared, wide)
        second = dp * (g + row_expand(inside, *shared, wide)) - p * spread
        return _plus(made, torch.where(live, second, 0).to(dtype))


class _RowSum(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: _Context, values: Tensor, *rest: Any) -> Tensor:
        ctx.keep, ctx.rows, ctx.plan = rest[0], rest[1], Plan(*rest[2:5])
        ctx.dtypes = (values.dtype,)
        made: Tensor = below(_op_row_sum, values, *rest)
        return made

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        return row_expand(grad, ctx.keep, ctx.rows, ctx.plan, ctx.dtypes[0]), *[None] * 5

    @staticmethod
    @forward_rule
    def jvp(ctx: _Context, saved: Saved, dv: Tensor, *_: Any) -> Tensor:
        return row_sum(dv, ctx.keep, ctx.rows, ctx.plan)


class _RowExpand(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: _Context, vector: Tensor, *rest: Any) -> Tensor:
        ctx.keep, ctx.rows, ctx.plan = rest[0], rest[1], Plan(*rest[2:5])
        ctx.dtypes = (vector.dtype, rest[5])
        made: Tensor = below(_op_row_expand, vector, *rest)
        return made

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        made = row_sum(grad, ctx.keep, ctx.rows, ctx.plan).to(ctx.dtypes[0])
        return made, *[None] * 6

    @staticmethod
    @forward_rule
    def jvp(ctx: _Context, saved: Saved, dv: Tensor, *_: Any) -> Tensor:
        return row_expand(dv, ctx.keep, ctx.rows, ctx.plan, ctx.dtypes[1])


_FUNCTIONS: dict[str, tuple[type[_SingleLevelFunction], Callable[..., Any], int]] = {
    "sddmm": (_product("sddmm", _op_sddmm), _op_sddmm, 2),
    "spmm": (_product("spmm", _op_spmm), _op_spmm, 2),
    "spmm_t": (_product("spmm_t", _op_spmm_t), _op_spmm_t, 2),
    "softmax": (_Softmax, _op_softmax, 1),
    "softmax_backward": (_SoftmaxBackward, _op_softmax_backward, 3),
    "prune": (_Prune, _op_prune, 2),
    "row_sum": (_RowSum, _op_row_sum, 1),
    "row_expand": (_RowExpand, _op_row_expand, 1),
}


for _name, (_function, _op, _inputs) in _FUNCTIONS.items():
    LIB.impl(_name, differentiable(_function, _op, _inputs), "Autograd")
    for _key in ("AutocastCPU", "AutocastCUDA"):
        LIB.impl(_name, without_autocast(_op), _key)
