"""CPU kernels of softmax, its backward, and the row sums and row copies they differentiate into."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import accumulation
from ..plans.plan import Plan
from .matrix import Matrix, flat, pad
from .part import Dropped, Part, add, put, take

Parts = list[tuple[Part, slice]]


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
        (F, slots) in ``dtype``; (F, E, nq) in the accumulation dtype, or of no elements.
    """
    matrix = Matrix(Plan(tensors, dims, name))
    values = flat(values)
    free, wide = values.shape[0], accumulation(values.dtype, dtype)
    out = values.new_empty(values.shape, dtype=dtype)
    matrix.clear_gaps(out)
    rows = matrix.shape[0]
    lse = values.new_empty((free, matrix.entries, rows) if want_lse else (0,), dtype=wide)
    for f, e in matrix.pairs(free):
        dropped = matrix.dropped(keep, keep_rows, f, e)
        parts = matrix.parts(e)
        vector = torch.full((matrix.padded[0],), -torch.inf, dtype=wide)
        if len(parts) == 1 and parts[0][0].rows_once:
            part, span = parts[0]
            _softmax_once(part, values[f, span], out[f, span], vector, dropped, want_lse)
        else:
            _softmax_joint(parts, values[f], out[f], vector, dropped)
        if want_lse:
            lse[f, e] = vector[:rows]
    return out, lse


def _softmax_once(
    part: Part, values: Tensor, out: Tensor, lse: Tensor, dropped: Dropped | None, want_lse: bool
) -> None:
    """Every row lies in one strip: one look at it does."""
    for strip in part.strips(1):
        m = strip.load(values, lse.dtype)
        strip.kill(m, -torch.inf, dropped)
        top = m.amax(-1)
        p = torch.softmax(m, -1)
        if not math.isfinite(top.sum().item()):
            # Rows without a kept key are zero; in a row with NaN or +inf dead slots still are.
            p.masked_fill_((top == -torch.inf)[:, None], 0)
            strip.kill(p, 0.0, dropped)
        if want_lse:
            # The largest probability is exp(0) / sum.
            put(lse, strip.rows, torch.where(top.isinf(), top, top - p.amax(-1).log()))
        strip.store(out, p)


def _softmax_joint(
    parts: Parts, values: Tensor, out: Tensor, lse: Tensor, dropped: Dropped | None
) -> None:
    """Rows are spread over strips and parts: one look for maxima and sums, one to write."""
    top = lse
    total = torch.zeros_like(lse)
    for part, span in parts:
        for strip in part.strips(1):
            m = strip.load(values[span], lse.dtype)
            strip.kill(m, -torch.inf, dropped)
            old = take(top, strip.rows)
            new = torch.maximum(old, m.amax(-1))
            # A row without a kept key so far: exp(−inf − 0) = 0.
            shift = torch.where(new == -torch.inf, 0, new)
            more = m.sub_(shift[:, None]).exp_().sum(-1)
            put(total, strip.rows, take(total, strip.rows) * (old - shift).exp() + more)
            put(top, strip.rows, new)
    inverse = torch.where(total == 0, 0, 1 / total)
    shift = torch.where(top == -torch.inf, 0, top)
    spoilt = not math.isfinite((total + shift).sum().item())
    for part, span in parts:
        for strip in part.strips(1):
            m = strip.load(values[span], lse.dtype)
            strip.kill(m, -torch.inf, dropped)
            m.sub_(take(shift, strip.rows)[:, None]).exp_()
            m.mul_(take(inverse, strip.rows)[:, None])
            if spoilt:
                strip.kill(m, 0.0, dropped)
            strip.store(out[span], m)
    lse.copy_(torch.where(top.isinf(), top, top + total.log()))


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
    """Gradient of softmax, p · (grad − Σ p · grad + grad_lse), sums over kept slots: (F, slots)."""
    matrix = Matrix(Plan(tensors, dims, name))
    p, grad = flat(p), flat(grad)
    wide = accumulation(p.dtype, grad.dtype, dtype)
    out = p.new_empty(p.shape, dtype=dtype)
    matrix.clear_gaps(out)
    for f, e in matrix.pairs(p.shape[0]):
        dropped = matrix.dropped(keep, keep_rows, f, e)
        parts = matrix.parts(e)
        shift = torch.zeros(matrix.padded[0], dtype=wide)
        if grad_lse is not None:
            shift -= pad(grad_lse[f, e].to(wide), len(shift))
        once = len(parts) == 1 and parts[0][0].rows_once
        if not once:
            for part, span in parts:
                for strip in part.strips(1):
                    left = strip.load(p[f, span], wide)
                    strip.kill(left, 0.0, dropped)
                    right = strip.load(grad[f, span], wide)
                    strip.kill(right, 0.0, dropped)
                    add(shift, strip.rows, left.mul_(right).sum(-1))
        for part, span in parts:
            for strip in part.strips(1):
                left = strip.load(p[f, span], wide)
                right = strip.load(grad[f, span], wide)
                if once:
                    strip.kill(left, 0.0, dropped)
                    strip.kill(right, 0.0, dropped)
                    add(shift, strip.rows, (left * right).sum(-1))
                right.sub_(take(shift, strip.rows)[:, None])
                right.mul_(left)
                strip.kill(right, 0.0, dropped)
                strip.store(out[f, span], right)
    return out


def row_sum(
    values: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    tensors: list[Tensor],
    dims: list[int],
    name: str,
) -> Tensor:
    """Sum of the kept slots of each row: (F, slots) -> (F, E, nq), accumulation dtype."""
    matrix = Matrix(Plan(tensors, dims, name))
    values = flat(values)
    wide = accumulation(values.dtype)
    out = values.new_empty(values.shape[0], matrix.entries, matrix.shape[0], dtype=wide)
    for f, e in matrix.pairs(values.shape[0]):
        dropped = matrix.dropped(keep, keep_rows, f, e)
        total = torch.zeros(matrix.padded[0], dtype=wide)
        for part, span in matrix.parts(e):
            for strip in part.strips(1):
                m = strip.load(values[f, span], wide)
                strip.kill(m, 0.0, dropped)
                add(total, strip.rows, m.sum(-1))
        out[f, e] = total[: matrix.shape[0]]
    return out


def row_expand(
    rows: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    tensors: list[Tensor],
    dims: list[int],
    name: str,
    dtype: torch.dtype,
) -> Tensor:
    """Copy (F, E, nq) to the live slots of each row, (F, slots); the adjoint of row_sum."""
    matrix = Matrix(Plan(tensors, dims, name))
    out = rows.new_empty(rows.shape[0], matrix.slots, dtype=dtype)
    matrix.clear_gaps(out)
    for f, e in matrix.pairs(rows.shape[0]):
        dropped = matrix.dropped(keep, keep_rows, f, e)
        vector = pad(rows[f, e], matrix.padded[0])
        for part, span in matrix.parts(e):
            for strip in part.strips(1):
                m = strip.load(out[f, span], vector.dtype)
                m.copy_(take(vector, strip.rows)[:, None].expand(m.shape))
                strip.kill(m, 0.0, dropped)
                strip.store(out[f, span], m)
    return out
