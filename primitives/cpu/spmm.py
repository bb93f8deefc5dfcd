"""CPU kernels of spmm: a sparse matrix, or its transpose, times a dense one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..checks import accumulation
from ..plans.plan import Plan
from .matrix import Matrix, flat, operand

# Operands are taken this many columns at a time: rows of 2 KiB of float32 stream well, and the
# pieces of the matrix that meet them stay in cache.
COLUMNS = 512


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
    return _product(values, x, keep, keep_rows, plan, scale, dtype, transposed=False)


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
    return _product(values, x, keep, keep_rows, plan, scale, dtype, transposed=True)


def linear(
    values: Tensor,
    x: Tensor,
    bias: Tensor | None,
    tensors: list[Tensor],
    dims: list[int],
    name: str,
    transposed: bool,
) -> Tensor:
    """Product x Sᵀ + bias, or x S when transposed: (F, slots), (F, T, inner) -> (F, T, outer)."""
    # A bias joins the sums before they are rounded.
    dtype = x.dtype if bias is None else accumulation(x.dtype)
    plan = Plan(tensors, dims, name)
    out = _product(values, x.mT[:, None], None, False, plan, 1.0, dtype, transposed)[:, 0].mT
    return out.contiguous() if bias is None else (out + bias.to(dtype)).to(x.dtype).contiguous()


def affine(
    values: Tensor,
    x: Tensor,
    bias: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    tensors: list[Tensor],
    dims: list[int],
    name: str,
    dtype: torch.dtype,
) -> Tensor:
    """(F, slots) times (F, E, nk, D) plus (nq,) -> (F, E, nq, D); the bias joins the sums."""
    wide = accumulation(values.dtype, x.dtype)
    plan = Plan(tensors, dims, name)
    out = _product(values, x, keep, keep_rows, plan, 1.0, wide, transposed=False)
    return out.add_(bias[:, None].to(wide)).to(dtype)


def activated(
    values: Tensor,
    x: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    keep_rows: bool,
    tensors: list[Tensor],
    dims: list[int],
    name: str,
    activation: str,
) -> Tensor:
    """Act(x Sᵀ + bias), rounded once: (F, slots), (F, T, inner), (outer,) -> (F, T, outer)."""
    wide = accumulation(x.dtype)
    plan = Plan(tensors, dims, name)
    right = x.mT[:, None]
    out = _product(values, right, keep, keep_rows, plan, 1.0, wide, transposed=False)[:, 0].mT
    if bias is not None:
        out = out + bias.to(wide)
    return ACTIVATIONS[activation](out).to(x.dtype).contiguous()


def _product(
    values: Tensor,
    x: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    plan: Plan,
    scale: float,
    dtype: torch.dtype,
    transposed: bool,
) -> Tensor:
    matrix = Matrix(plan)
    values = flat(values)
    free, entries, _, columns = x.shape
    lines = matrix.shape[1 if transposed else 0]
    out = x.new_empty(free, entries, lines, columns, dtype=dtype)
    wide = accumulation(values.dtype, x.dtype, dtype)
    out_length, x_length = matrix.padded[::-1] if transposed else matrix.padded
    for f, e in matrix.pairs(free):
        dropped = matrix.dropped(keep, keep_rows, f, e)
        # The mask is over the contracted dimension, or over that of the result.
        contracted = dropped is not None and dropped.over_rows == transposed
        parts = [(part, part.unpack(values[f, span])) for part, span in matrix.parts(e)]
        exact = all(part.exact for part, _ in parts)
        for start in range(0, columns, COLUMNS):
            piece = slice(start, start + COLUMNS)
            gone = dropped.mask if dropped is not None and contracted else None
            dense = operand(x[f, e, :, piece], x_length, wide, gone)
            finite = exact or _all_finite(dense)
            clean = dense if finite else torch.where(torch.isfinite(dense), dense, 0)
            target = out[f, e, :, piece]
            direct = dtype == wide and out_length == lines and target.is_contiguous()
            acc = target.zero_() if direct else torch.zeros(out_length, dense.shape[1], dtype=wide)
            for part, mine in parts:
                source = dense if part.exact else clean
                if transposed:
                    part.spmm_t(acc, mine, source, dropped)
                else:
                    part.spmm(acc, mine, source, dropped)
                if not finite and not part.exact:
                    part.add_nonfinite(acc, mine, dense, dropped, transposed)
            if dropped is not None and not contracted:
                acc.masked_fill_(dropped.mask[:, None], 0)
            if scale != 1:
                acc.mul_(scale)
            if not direct:
                target.copy_(acc[:lines])
    return out


def _all_finite(x: Tensor) -> bool:
    # One pass: the sum is finite unless some element is not, or the sum overflows, which only
    # costs a second look.
    return math.isfinite(x.sum().item()) or bool(torch.isfinite(x).all())
