"""The custom operators as torch sees them: schemas, shapes for tracing, kernels by device.

Each takes folded tensors (see fold.py), a plan spread out as (tensors, dims, name), and numbers;
nothing of a layout crosses. ops.py has what Python calls, and the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import accumulation
from .cpu import prune as cpu_prune
from .cpu import sddmm as cpu_sddmm
from .cpu import softmax as cpu_softmax
from .cpu import spmm as cpu_spmm
from .plans.nm import metadata_of
from .plans.plan import Plan

LIB = torch.library.Library("mixgrain", "FRAGMENT")
_MASK = "Tensor? keep, bool keep_rows"
_PLAN = "Tensor[] tensors, int[] dims, str name"

SCHEMAS = {
    "sddmm": f"(Tensor q, Tensor k, {_MASK}, {_PLAN}, float scale, ScalarType dtype) -> Tensor",
    "spmm": f"(Tensor values, Tensor x, {_MASK}, {_PLAN}, float scale, ScalarType dtype) -> Tensor",
    "spmm_t": f"(Tensor values, Tensor x, {_MASK}, {_PLAN}, float scale, ScalarType dtype)"
    " -> Tensor",
    "linear": f"(Tensor values, Tensor x, Tensor? bias, {_PLAN}, bool transposed) -> Tensor",
    "affine": f"(Tensor values, Tensor x, Tensor bias, {_MASK}, {_PLAN}, ScalarType dtype)"
    " -> Tensor",
    "activated": f"(Tensor values, Tensor x, Tensor? bias, {_MASK}, {_PLAN}, str activation)"
    " -> Tensor",
    "softmax": f"(Tensor values, {_MASK}, {_PLAN}, ScalarType dtype, bool want_lse)"
    " -> (Tensor, Tensor)",
    "softmax_backward": f"(Tensor p, Tensor grad, Tensor? grad_lse, {_MASK}, {_PLAN},"
    " ScalarType dtype) -> Tensor",
    "row_sum": f"(Tensor values, {_MASK}, {_PLAN}) -> Tensor",
    "prune": f"(Tensor q, Tensor k, Tensor? keep, {_PLAN}, float scale, ScalarType dtype)"
    " -> (Tensor, Tensor)",
    "row_expand": f"(Tensor rows, {_MASK}, {_PLAN}, ScalarType dtype) -> Tensor",
}

for _name, _schema in SCHEMAS.items():
    LIB.define(_name + _schema)

# Shapes for tracing


def _fake_values(like: Tensor, dims: list[int], dtype: torch.dtype) -> Tensor:
    return like.new_empty(like.shape[0], dims[0], dtype=dtype)


def _fake_rows(values: Tensor, dims: list[int], dtype: torch.dtype) -> Tensor:
    return values.new_empty(values.shape[0], dims[3], dims[1], dtype=dtype)


@torch.library.register_fake("mixgrain::sddmm", lib=LIB)
def _(q, k, keep, keep_rows, tensors, dims, name, scale, dtype):  # type: ignore[no-untyped-def]
    return _fake_values(q, dims, dtype)


def _fake_product(x: Tensor, rows: int, name: str, dtype: torch.dtype) -> Tensor:
    free, entries, _, width = x.shape
    if name == "ctile" and width > 1 and x.stride(2) == 1 and x.stride(3) != 1:
        return x.new_empty(free, entries, width, rows, dtype=dtype).mT  # laid out as x is
    return x.new_empty(free, entries, rows, width, dtype=dtype)


@torch.library.register_fake("mixgrain::spmm", lib=LIB)
def _(values, x, keep, keep_rows, tensors, dims, name, scale, dtype):  # type: ignore[no-untyped-def]
    return _fake_product(x, dims[1], name, dtype)


@torch.library.register_fake("mixgrain::affine", lib=LIB)
def _(values, x, bias, keep, keep_rows, tensors, dims, name, dtype):  # type: ignore[no-untyped-def]
    return _fake_product(x, dims[1], name, dtype)


@torch.library.register_fake("mixgrain::spmm_t", lib=LIB)
def _(values, x, keep, keep_rows, tensors, dims, name, scale, dtype):  # type: ignore[no-untyped-def]
    return _fake_product(x, dims[2], name, dtype)


@torch.library.register_fake("mixgrain::linear", lib=LIB)
def _(values, x, bias, tensors, dims, name, transposed):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:2], dims[2 if transposed else 1])


@torch.library.register_fake("mixgrain::activated", lib=LIB)
def _(values, x, bias, keep, keep_rows, tensors, dims, name, activation):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:2], dims[1])


@torch.library.register_fake("mixgrain::softmax", lib=LIB)
def _(values, keep, keep_rows, tensors, dims, name, dtype, want_lse):  # type: ignore[no-untyped-def]
    wide = accumulation(values.dtype, dtype)
    lse = _fake_rows(values, dims, wide) if want_lse else values.new_empty(0, dtype=wide)
    return _fake_values(values, dims, dtype), lse


@torch.library.register_fake("mixgrain::softmax_backward", lib=LIB)
def _(p, grad, grad_lse, keep, keep_rows, tensors, dims, name, dtype):  # type: ignore[no-untyped-def]
    return _fake_values(p, dims, dtype)


@torch.library.register_fake("mixgrain::row_sum", lib=LIB)
def _(values, keep, keep_rows, tensors, dims, name):  # type: ignore[no-untyped-def]
    return _fake_rows(values, dims, accumulation(values.dtype))


@torch.library.register_fake("mixgrain::row_expand", lib=LIB)
def _(rows, keep, keep_rows, tensors, dims, name, dtype):  # type: ignore[no-untyped-def]
    return _fake_values(rows, dims, dtype)


@torch.library.register_fake("mixgrain::prune", lib=LIB)
def _(q, k, keep, tensors, dims, name, scale, dtype):  # type: ignore[no-untyped-def]
    shape, kind = metadata_of(Plan(tensors, dims, name))
    return _fake_values(q, dims, dtype), q.new_empty(shape, dtype=kind)


LIB.impl("sddmm", cpu_sddmm.sddmm, "CPU")
LIB.impl("spmm", cpu_spmm.spmm, "CPU")
LIB.impl("spmm_t", cpu_spmm.spmm_t, "CPU")
LIB.impl("linear", cpu_spmm.linear, "CPU")
LIB.impl("affine", cpu_spmm.affine, "CPU")
LIB.impl("activated", cpu_spmm.activated, "CPU")
LIB.impl("softmax", cpu_softmax.softmax, "CPU")
LIB.impl("softmax_backward", cpu_softmax.softmax_backward, "CPU")
LIB.impl("prune", cpu_prune.prune, "CPU")
LIB.impl("row_sum", cpu_softmax.row_sum, "CPU")
LIB.impl("row_expand", cpu_softmax.row_expand, "CPU")


def _cuda(name: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        from .cuda import operator  # CuPy and the kernels come with the first CUDA tensor

        return operator(name)(*arguments)

    return run


for _name in SCHEMAS:
    LIB.impl(_name, _cuda(_name), "CUDA")
