"""The short way of sddmm, softmax and spmm, and its recording for autograd.

Each function takes what the public one takes and returns None where the long way has to be gone;
``learn_…`` keeps what the long way found out. See ``eager.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixgrain.formats.layout import Layout
from mixgrain.formats.nm import NMLayout
from mixgrain.formats.pattern_nm import NM
from mixgrain.formats.sparse import SparseTensor

from . import recorded_nm
from .eager import (
    LAYOUT_TYPES,
    Backward,
    Call,
    Term,
    find,
    index_of,
    learn,
    learnable,
    without_index,
)
from .fold import free_shape
from .gradients import KINDS, Work, gradients
from .plans.plan import Plan

_grad_enabled = torch.is_grad_enabled
_NUMBERS = (float, int)
_DTYPES = (torch.dtype, type(None))
_new = object.__new__


class _Context(torch.autograd.function.FunctionCtx):
    """What the forwards below leave for their backwards."""

    gradients: Backward
    index: Tensor | None
    keep: Tensor | None
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _Product(torch.autograd.Function):
    """sddmm and spmm: both gradients need the result's and the other operand."""

    @staticmethod
    def forward(
        ctx: _Context,
        call: Call,
        index: Tensor | None,
        keep: Tensor | None,
        pointers: list[int],
        a: Tensor,
        b: Tensor,
    ) -> Tensor:
        assert call.backward is not None
        ctx.gradients, ctx.index, ctx.keep = call.backward, index, keep
        ctx.save_for_backward(a, b)
        made: Tensor = call.run(together((a, b), index, keep), pointers)
        return made

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Any, ...]:
        a, b = ctx.saved_tensors
        held = together((a, b, grad), ctx.index)
        return None, None, None, None, *ctx.gradients(held, ctx.keep, ctx.needs_input_grad[4:])


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        call: Call,
        index: Tensor | None,
        keep: Tensor | None,
        pointers: list[int],
        values: Tensor,
    ) -> Any:
        assert call.backward is not None
        ctx.gradients, ctx.index, ctx.keep = call.backward, index, keep
        ctx.set_materialize_grads(False)
        made = call.run(together((values,), index, keep), pointers)
        ctx.save_for_backward(made[0] if isinstance(made, tuple) else made)
        return made

    @staticmethod
    def backward(
        ctx: _Context, grad: Tensor | None, grad_lse: Tensor | None = None
    ) -> tuple[Any, ...]:
        (p,) = ctx.saved_tensors
        if grad is None and grad_lse is None:
            return (None,) * 5
        grad = torch.zeros_like(p) if grad is None else grad
        held: tuple[Any, ...] = (p, grad, grad_lse)
        held = held if ctx.index is None else (*held, ctx.index)
        return None, None, None, None, *ctx.gradients(held, ctx.keep, (True,))


# What Function.apply does besides is to look for transforms, which calls that are found have not.
_apply_product: Callable[..., Any] = super(torch.autograd.Function, _Product).apply
_apply_softmax: Callable[..., Any] = super(torch.autograd.Function, _Softmax).apply


def together(
    tensors: tuple[Tensor, ...], index: Tensor | None, keep: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Tensors, then metadata and a mask where there are any."""
    if index is None and keep is None:
        return tensors
    if index is not None:
        tensors = (*tensors, index)
    return tensors if keep is None else (*tensors, keep)


def sparse(layout: Layout, values: Tensor, keep: Tensor | None, rows: bool) -> SparseTensor:
    """A SparseTensor whose values are known to fit."""
    made = _new(SparseTensor)
    fields = made.__dict__
    fields["layout"], fields["values"] = layout, values
    fields["keep"], fields["keep_rows"] = keep, rows
    return made


def _forward(
    op: str,
    scalars: tuple[Any, ...],
    layout: Layout,
    lead: tuple[int, ...],
    keep_rows: bool,
    plan: Plan,
    results: int = 1,
) -> tuple[Term, Tensor | None]:
    """An operator as the public function that has its name calls it; its first results.

    Also what the call is given of the layout.
    """
    kinds, made = KINDS[op]
    work = Work(op, tuple(range(len(kinds))), scalars, made[:results])
    index = index_of(layout)
    if index is not None:
        kinds = (*kinds, "index")
    layout, plan = without_index(layout, plan)
    return Term((work,), layout, lead, kinds, keep_rows, plan), index


def _backward(
    op: str, term: Term, dtypes: tuple[torch.dtype, ...], scale: tuple[float, ...] = ()
) -> Backward:
    """The gradients of such a call; dtypes of its inputs."""
    operands, results = KINDS[op]
    works = gradients(op, dtypes, scale)
    # Softmax saves its result instead, which is of the same kind.
    kinds = (*operands, *results, *(("index",) if term.indexed else ()))
    return Backward(term._replace(works=works, kinds=kinds))


def sddmm(
    q: Tensor, k: Tensor, layout: Any, scale: float, keep: Tensor | None, out_dtype: Any
) -> SparseTensor | None:
    """What ``sddmm`` returns, or None: not seen before, or not to be had this way."""
    if torch.compiler.is_dynamo_compiling():
        return None
    if type(layout) is NM:
        return recorded_nm.sddmm(q, k, layout, scale, keep, out_dtype)
    if type(layout) not in LAYOUT_TYPES:
        return None
    # Other numbers are checked the long way; a scale of 0 and one of −0 are equal keys.
    if type(scale) not in _NUMBERS or not scale or type(out_dtype) not in _DTYPES:
        return None
    index = layout.metadata if type(layout) is NMLayout else None
    calls = find(layout)
    if calls is None:
        return None
    given = together((q, k), index, keep)
    rest = "sddmm", scale, out_dtype, index is None, keep is None
    seen = calls.find(given, rest)
    if seen is None:
        return None
    call, pointers = seen
    if _grad_enabled() and (q.requires_grad or k.requires_grad):
        if call.backward is None:
            return None
        values = _apply_product(call, index, keep, pointers, q, k)
    else:
        values = call.run(given, pointers)
    return sparse(layout, values, keep, False)


def learn_sddmm(
    q: Tensor,
    k: Tensor,
    layout: Layout,
    scale: float,
    keep: Tensor | None,
    out_dtype: torch.dtype | None,
    plan: Plan,
    lead: tuple[int, ...],
) -> SparseTensor | None:
    """Keep the call that passed all checks, and run it; None: not to be had this way.

    Even the first call of a signature is not the operators': a checkpoint that makes it again
    wants tensors of the same shapes saved.
    """
    if type(layout) not in LAYOUT_TYPES or not learnable(q, k, keep):
        return None
    if type(scale) not in _NUMBERS or not scale:
        return None
    wide = float(scale)
    scalars = (wide, q.dtype if out_dtype is None else out_dtype)
    term, index = _forward("sddmm", scalars, layout, lead, False, plan)
    rest = "sddmm", scale, out_dtype, index is None, keep is None
    call = learn(layout, rest, term, together((q, k), index), keep)
    if q.shape[:-2] == lead == k.shape[:-2]:
        call.backward = _backward("sddmm", term, (q.dtype, k.dtype), (wide,))
    return sddmm(q, k, layout, scale, keep, out_dtype)


def spmm(s: Any, x: Tensor) -> Tensor | None:
    """What ``spmm`` returns, or None: not seen before, or not to be had this way."""
    if torch.compiler.is_dynamo_compiling() or type(s) is not SparseTensor:
        return None
    layout, values, keep = s.layout, s.values, s.keep
    if type(layout) not in LAYOUT_TYPES:
        return None
    index = layout.metadata if type(layout) is NMLayout else None
    calls = find(layout)
    if calls is None:
        return None
    given = together((values, x), index, keep)
    rest = "spmm", s.keep_rows, index is None, keep is None
    seen = calls.find(given, rest)
    if seen is None:
        return None
    call, pointers = seen
    made: Tensor | None = None
    if not _grad_enabled() or not (values.requires_grad or x.requires_grad):
        made = call.run(given, pointers)
    elif call.backward is not None:
        made = _apply_product(call, index, keep, pointers, values, x)
    return made


def learn_spmm(s: SparseTensor, x: Tensor, plan: Plan, lead: tuple[int, ...]) -> Tensor | None:
    """Keep the call that passed all checks, and run it; see ``learn_sddmm``."""
    layout, values = s.layout, s.values
    if type(layout) not in LAYOUT_TYPES or not learnable(values, x, s.keep):
        return None
    term, index = _forward("spmm", (1.0, x.dtype), layout, lead, s.keep_rows, plan)
    rest = "spmm", s.keep_rows, index is None, s.keep is None
    call = learn(layout, rest, term, together((values, x), index), s.keep)
    if values.shape[:-1] == free_shape(layout.lead, lead) and x.shape[:-2] == lead:
        call.backward = _backward("spmm", term, (values.dtype, x.dtype), (1.0,))
    return spmm(s, x)


def softmax(s: Any, want_lse: bool, out_dtype: Any) -> Any:
    """What ``softmax`` returns, or None: not seen before, or not to be had this way."""
    if torch.compiler.is_dynamo_compiling() or type(s) is not SparseTensor:
        return None
    layout, values, keep = s.layout, s.values, s.keep
    if type(layout) not in LAYOUT_TYPES:
        return None
    if (want_lse is not True and want_lse is not False) or type(out_dtype) not in _DTYPES:
        return None
    index = layout.metadata if type(layout) is NMLayout else None
    calls = find(layout)
    if calls is None:
        return None
    given = together((values,), index, keep)
    rest = "softmax", s.keep_rows, want_lse, out_dtype, index is None, keep is None
    seen = calls.find(given, rest)
    if seen is None:
        return None
    call, pointers = seen
    if _grad_enabled() and values.requires_grad:
        if call.backward is None:
            return None
        made = _apply_softmax(call, index, keep, pointers, values)
    else:
        made = call.run(given, pointers)
    if want_lse:
        return sparse(layout, made[0], keep, s.keep_rows), made[1]
    return sparse(layout, made, keep, s.keep_rows)


def learn_softmax(
    s: SparseTensor, want_lse: bool, out_dtype: torch.dtype | None, plan: Plan
) -> Any:
    """Keep the call that passed all checks, and run it; see ``learn_sddmm``."""
    layout, values, lead = s.layout, s.values, s.lead_shape
    if type(layout) not in LAYOUT_TYPES or not learnable(values, s.keep):
        return None
    scalars = (values.dtype if out_dtype is None else out_dtype, want_lse)
    results = 2 if want_lse else 1
    term, index = _forward("softmax", scalars, layout, lead, s.keep_rows, plan, results)
    rest = "softmax", s.keep_rows, want_lse, out_dtype, index is None, s.keep is None
    call = learn(layout, rest, term, together((values,), index), s.keep)
    call.backward = _backward("softmax", term, (values.dtype,))
    return softmax(s, want_lse, out_dtype)
