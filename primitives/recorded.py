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
    Call,
    Gradient,
    Term,
    find,
    learn,
    learnable,
    plain,
    tf32,
    usable,
)
from .fold import free_shape
from .plans.plan import Plan

_grad_enabled = torch.is_grad_enabled
_FLOAT = torch.float32
_NUMBERS = (float, int)
_new = object.__new__


class _Context(torch.autograd.function.FunctionCtx):
    """What the forwards below leave for their backwards."""

    gradients: tuple[Gradient, ...]
    keep: Tensor | None
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _Product(torch.autograd.Function):
    """sddmm and spmm: both gradients need the result's and the other operand."""

    @staticmethod
    def forward(
        ctx: _Context, call: Call, keep: Tensor | None, pointers: list[int], a: Tensor, b: Tensor
    ) -> Tensor:
        assert call.gradients is not None
        ctx.gradients, ctx.keep = call.gradients, keep
        ctx.save_for_backward(a, b)
        made: Tensor = call.run((a, b) if keep is None else (a, b, keep), pointers)
        return made


class _Sddmm(_Product):
    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Any, ...]:
        q, k = ctx.saved_tensors
        (of_q, of_k), (wants_q, wants_k) = ctx.gradients, ctx.needs_input_grad[3:]
        return (
            *(None, None, None),
            of_q((grad, k), ctx.keep) if wants_q else None,
            of_k((grad, q), ctx.keep) if wants_k else None,
        )


class _Spmm(_Product):
    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Any, ...]:
        values, x = ctx.saved_tensors
        (of_values, of_x), (wants_values, wants_x) = ctx.gradients, ctx.needs_input_grad[3:]
        return (
            *(None, None, None),
            of_values((grad, x), ctx.keep) if wants_values else None,
            of_x((values, grad), ctx.keep) if wants_x else None,
        )


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, call: Call, keep: Tensor | None, pointers: list[int], values: Tensor
    ) -> Any:
        assert call.gradients is not None
        ctx.gradients, ctx.keep = call.gradients, keep
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
        return None, None, None, ctx.gradients[0]((p, grad, grad_lse), ctx.keep)


# What Function.apply does besides is to look for transforms, which `plain` has done.
_apply_sddmm: Callable[..., Any] = super(torch.autograd.Function, _Sddmm).apply
_apply_spmm: Callable[..., Any] = super(torch.autograd.Function, _Spmm).apply
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
        if call.gradients is None:
            return None
        values = _apply_sddmm(call, keep, pointers, q, k)
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
    both, values, dense = ("dense", "dense"), ("values",), ("dense",)
    term = Term("sddmm", layout, lead, both, values, False, plan, scalars)
    key = _sddmm_key(q, k, scale, keep, out_dtype, q.data_ptr(), k.data_ptr())
    call = learn(layout, key, term, (q, k), keep)
    if q.shape[:-2] == lead == k.shape[:-2]:
        kinds = ("values", "dense")
        shared = (False, plan)
        of_q = Term("spmm", layout, lead, kinds, dense, *shared, (wide, q.dtype))
        of_k = Term("spmm_t", layout, lead, kinds, dense, *shared, (wide, k.dtype))
        call.gradients = Gradient(of_q), Gradient(of_k)


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
    elif call.gradients is not None:
        made = _apply_spmm(call, keep, pointers, values, x)
    return made


def learn_spmm(s: SparseTensor, x: Tensor, plan: Plan, lead: tuple[int, ...]) -> None:
    """Keep the call that went the long way."""
    layout, values = s.layout, s.values
    if type(layout) not in LAYOUT_TYPES or not learnable(values, x, s.keep):
        return
    kinds, dense = ("values", "dense"), ("dense",)
    term = Term("spmm", layout, lead, kinds, dense, s.keep_rows, plan, (1.0, x.dtype))
    key = _spmm_key(s, x, values.data_ptr(), x.data_ptr())
    call = learn(layout, key, term, (values, x), s.keep)
    complete = values.shape[:-1] == free_shape(layout.lead, lead) and x.shape[:-2] == lead
    if complete:
        shared = (s.keep_rows, plan)
        both = ("dense", "dense")
        of_v = Term("sddmm", layout, lead, both, ("values",), *shared, (1.0, values.dtype))
        of_x = Term("spmm_t", layout, lead, kinds, dense, *shared, (1.0, x.dtype))
        call.gradients = Gradient(of_v), Gradient(of_x)


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
        if call.gradients is None:
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
    kinds = ("values", "vector") if want_lse else ("values",)
    scalars = (values.dtype if out_dtype is None else out_dtype, want_lse)
    term = Term("softmax", layout, lead, ("values",), kinds, s.keep_rows, plan, scalars)
    key = _softmax_key(s, want_lse, out_dtype, values.data_ptr())
    call = learn(layout, key, term, (values,), s.keep)
    both = ("values", "values", "vector")
    shared = (s.keep_rows, plan, (values.dtype,))
    back = Term("softmax_backward", layout, lead, both, ("values",), *shared)
    call.gradients = (Gradient(back),)
