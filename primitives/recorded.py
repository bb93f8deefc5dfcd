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
from mixgrain.formats.sparse import SparseTensor

from .eager import (
    LAYOUT_TYPES,
    TENSORS,
    Backward,
    Call,
    Term,
    find,
    learn,
    learnable,
    plain,
    tf32,
    usable,
)
from .fold import free_shape
from .gradients import KINDS, Work, gradients
from .plans.plan import Plan

_grad_enabled = torch.is_grad_enabled
_FLOAT = torch.float32
_NUMBERS = (float, int)
_new = object.__new__


class _Context(torch.autograd.function.FunctionCtx):
    """What the forwards below leave for their backwards."""

    gradients: Backward
    keep: Tensor | None
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _Product(torch.autograd.Function):
    """sddmm and spmm: both gradients need the result's and the other operand."""

    @staticmethod
    def forward(
        ctx: _Context, call: Call, keep: Tensor | None, pointers: list[int], a: Tensor, b: Tensor
    ) -> Tensor:
        assert call.backward is not None
        ctx.gradients, ctx.keep = call.backward, keep
        ctx.save_for_backward(a, b)
        made: Tensor = call.run((a, b) if keep is None else (a, b, keep), pointers)
        return made

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Any, ...]:
        a, b = ctx.saved_tensors
        made = ctx.gradients((a, b, grad), ctx.keep, ctx.needs_input_grad[3:])
        return None, None, None, *made


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, call: Call, keep: Tensor | None, pointers: list[int], values: Tensor
    ) -> Any:
        assert call.backward is not None
        ctx.gradients, ctx.keep = call.backward, keep
        ctx.set_materialize_grads(False)
        made = call.run((values,) if keep is None else (values, keep), pointers)
        ctx.save_for_backward(made[0] if isinstance(made, tuple) else made)
        return made

    @staticmethod
    def backward(
        ctx: _Context, grad: Tensor | None, grad_lse: Tensor | None = None
    ) -> tuple[Any, ...]:
        (p,) = ctx.saved_tensors
        if grad is None and grad_lse is None:
            return (None,) * 4
        grad = torch.zeros_like(p) if grad is None else grad
        return None, None, None, *ctx.gradients((p, grad, grad_lse), ctx.keep, (True,))


# What Function.apply does besides is to look for transforms, which `plain` has done.
_apply_product: Callable[..., Any] = super(torch.autograd.Function, _Product).apply
_apply_softmax: Callable[..., Any] = super(torch.autograd.Function, _Softmax).apply


def _mask_key(keep: Tensor | None) -> Any:
    if keep is None:
        return None
    return keep.shape, keep.stride(), keep.dtype, keep.data_ptr() & 7, keep.get_device()


def _sparse(layout: Layout, values: Tensor, keep: Tensor | None, rows: bool) -> SparseTensor:
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
) -> Term:
    """An operator as the public function that has its name calls it; its first results."""
    kinds, made = KINDS[op]
    work = Work(op, tuple(range(len(kinds))), scalars, made[:results])
    return Term((work,), layout, lead, kinds, keep_rows, plan)


def _backward(
    op: str, term: Term, dtypes: tuple[torch.dtype, ...], scale: tuple[float, ...] = ()
) -> Backward:
    """The gradients of such a call; dtypes of its inputs."""
    operands, results = KINDS[op]
    works = gradients(op, dtypes, scale)
    # Softmax saves its result instead, which is of the same kind.
    return Backward(term._replace(works=works, kinds=(*operands, *results)))


def _sddmm_key(
    q: Tensor, k: Tensor, scale: float, keep: Tensor | None, out: Any, a: int, b: int
) -> Any:
    dtype = q.dtype
    return (
        "sddmm", q.shape, q.is_contiguous() or q.stride(), dtype, a & 15, q.get_device(),
        k.shape, k.is_contiguous() or k.stride(), k.dtype, b & 15, k.get_device(),
        q.is_neg() or k.is_neg(), scale, out, None if keep is None else _mask_key(keep),
        tf32() if dtype is _FLOAT else None,
    )  # fmt: skip


def sddmm(
    q: Tensor, k: Tensor, layout: Any, scale: float, keep: Tensor | None, out_dtype: Any
) -> SparseTensor | None:
    """What ``sddmm`` returns, or None: not seen before, or not to be had this way."""
    if torch.compiler.is_dynamo_compiling() or type(layout) not in LAYOUT_TYPES:
        return None
    # Other numbers are checked the long way; a scale of 0 and one of −0 are equal keys.
    if type(scale) not in _NUMBERS or not scale:
        return None
    calls = find(layout) if type(q) in TENSORS and type(k) in TENSORS else None
    if calls is None or not plain() or not (keep is None or usable(keep)):
        return None
    a, b = q.data_ptr(), k.data_ptr()
    call = calls.get(_sddmm_key(q, k, scale, keep, out_dtype, a, b))
    if call is None:
        return None
    pointers = [a, b] if keep is None else [a, b, keep.data_ptr()]
    if _grad_enabled() and (q.requires_grad or k.requires_grad):
        if call.backward is None:
            return None
        values = _apply_product(call, keep, pointers, q, k)
    else:
        values = call.run((q, k) if keep is None else (q, k, keep), pointers)
    return _sparse(layout, values, keep, False)


def learn_sddmm(
    q: Tensor,
    k: Tensor,
    layout: Layout,
    scale: float,
    keep: Tensor | None,
    out_dtype: torch.dtype | None,
    plan: Plan,
    lead: tuple[int, ...],
) -> None:
    """Keep the call that went the long way."""
    if type(layout) not in LAYOUT_TYPES or not learnable(q, k, keep):
        return
    if type(scale) not in _NUMBERS:
        return
    wide = float(scale)
    scalars = (wide, q.dtype if out_dtype is None else out_dtype)
    term = _forward("sddmm", scalars, layout, lead, False, plan)
    key = _sddmm_key(q, k, scale, keep, out_dtype, q.data_ptr(), k.data_ptr())
    call = learn(layout, key, term, (q, k), keep)
    if q.shape[:-2] == lead == k.shape[:-2]:
        call.backward = _backward("sddmm", term, (q.dtype, k.dtype), (wide,))


def _spmm_key(s: SparseTensor, x: Tensor, a: int, b: int) -> Any:
    values, keep = s.values, s.keep
    kind, dtype = values.dtype, x.dtype
    return (
        "spmm", values.shape, values.is_contiguous() or values.stride(), kind, a & 15,
        x.shape, x.is_contiguous() or x.stride(), dtype, b & 15,
        values.get_device(), x.get_device(), values.is_neg() or x.is_neg(),
        None if keep is None else (s.keep_rows, *_mask_key(keep)),
        tf32() if dtype is _FLOAT or kind is _FLOAT else None,
    )  # fmt: skip


def spmm(s: Any, x: Tensor) -> Tensor | None:
    """What ``spmm`` returns, or None: not seen before, or not to be had this way."""
    if torch.compiler.is_dynamo_compiling() or type(s) is not SparseTensor:
        return None
    layout, values, keep = s.layout, s.values, s.keep
    if type(layout) not in LAYOUT_TYPES:
        return None
    calls = find(layout) if type(values) in TENSORS and type(x) in TENSORS else None
    if calls is None or not plain() or not (keep is None or usable(keep)):
        return None
    a, b = values.data_ptr(), x.data_ptr()
    call = calls.get(_spmm_key(s, x, a, b))
    if call is None:
        return None
    pointers = [a, b] if keep is None else [a, b, keep.data_ptr()]
    made: Tensor | None = None
    if not _grad_enabled() or not (values.requires_grad or x.requires_grad):
        made = call.run((values, x) if keep is None else (values, x, keep), pointers)
    elif call.backward is not None:
        made = _apply_product(call, keep, pointers, values, x)
    return made


def learn_spmm(s: SparseTensor, x: Tensor, plan: Plan, lead: tuple[int, ...]) -> None:
    """Keep the call that went the long way."""
    layout, values = s.layout, s.values
    if type(layout) not in LAYOUT_TYPES or not learnable(values, x, s.keep):
        return
    term = _forward("spmm", (1.0, x.dtype), layout, lead, s.keep_rows, plan)
    key = _spmm_key(s, x, values.data_ptr(), x.data_ptr())
    call = learn(layout, key, term, (values, x), s.keep)
    if values.shape[:-1] == free_shape(layout.lead, lead) and x.shape[:-2] == lead:
        call.backward = _backward("spmm", term, (values.dtype, x.dtype), (1.0,))


def _softmax_key(s: SparseTensor, want_lse: bool, out: Any, a: int) -> Any:
    values, keep = s.values, s.keep
    return (
        "softmax", values.shape, values.is_contiguous() or values.stride(), values.dtype, a & 15,
        values.get_device(), values.is_neg(), want_lse, out,
        None if keep is None else (s.keep_rows, *_mask_key(keep)),
    )  # fmt: skip


def softmax(s: Any, want_lse: bool, out_dtype: Any) -> Any:
    """What ``softmax`` returns, or None: not seen before, or not to be had this way."""
    if torch.compiler.is_dynamo_compiling() or type(s) is not SparseTensor:
        return None
    layout, values, keep = s.layout, s.values, s.keep
    if type(layout) not in LAYOUT_TYPES or type(values) not in TENSORS:
        return None
    if want_lse is not True and want_lse is not False:
        return None
    calls = find(layout)
    if calls is None or not plain() or not (keep is None or usable(keep)):
        return None
    a = values.data_ptr()
    call = calls.get(_softmax_key(s, want_lse, out_dtype, a))
    if call is None:
        return None
    pointers = [a] if keep is None else [a, keep.data_ptr()]
    if _grad_enabled() and values.requires_grad:
        if call.backward is None:
            return None
        made = _apply_softmax(call, keep, pointers, values)
    else:
        made = call.run((values,) if keep is None else (values, keep), pointers)
    if want_lse:
        return _sparse(layout, made[0], keep, s.keep_rows), made[1]
    return _sparse(layout, made, keep, s.keep_rows)


def learn_softmax(
    s: SparseTensor, want_lse: bool, out_dtype: torch.dtype | None, plan: Plan
) -> None:
    """Keep the call that went the long way."""
    layout, values, lead = s.layout, s.values, s.lead_shape
    if type(layout) not in LAYOUT_TYPES or not learnable(values, s.keep):
        return
    scalars = (values.dtype if out_dtype is None else out_dtype, want_lse)
    results = 2 if want_lse else 1
    term = _forward("softmax", scalars, layout, lead, s.keep_rows, plan, results)
    key = _softmax_key(s, want_lse, out_dtype, values.data_ptr())
    call = learn(layout, key, term, (values,), s.keep)
    call.backward = _backward("softmax", term, (values.dtype,))
