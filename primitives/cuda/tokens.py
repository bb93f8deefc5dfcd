"""linear and its gradients as users hold their tensors: rows of tokens in, rows of tokens out.

Launch code around that of the operators, so that one recorded call is all there is to a layer. What
it makes of each tensor is what ``linear.py`` and autograd make of it, stride by stride: the same
kernels, the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixgrain.cuda.recording import strides_of

from ..activations import CODES as ACTIVATIONS
from ..plans.plan import Plan, split
from . import sddmm, spmm, turn
from .finish import finish
from .nm import KINDS
from .parts import CODES, together
from .sddmm import by_tokens

#: Kinds of parts whose kernels take and write rows of features.
TURNED = {"cblock", "cpanel", "crow"}


def tokens(
    values: Tensor,
    x: Tensor,
    bias: Tensor | None,
    tensors: list[Tensor],
    dims: list[int],
    name: str,
    keep: Tensor | None,
    keep_rows: bool,
    activation: str | None,
) -> Tensor:
    """Act(x Sᵀ + bias): (slots,), (..., n_in), (n_out,) -> (..., n_out)."""
    plan = Plan(tensors, dims, name)
    weights, rows = _shaped(values, (1, *values.shape)), _rows(x)
    mask, shape = _mask(keep), (*x.shape[:-1], dims[1])
    code = 0 if activation is None else ACTIVATIONS[activation]
    some = _direct(weights, _columns(rows), bias, keep, plan, False, code)
    if some is not None:
        return some.view(*shape)
    if _turns(dims, name, rows):
        # Bias and activation join the sums before they are rounded.
        plain = "+" not in name and bias is None and activation is None
        wide = x.dtype if plain else torch.float32
        given = _features(rows)
        sums = spmm.unrounded(weights, given, mask, keep_rows, *plan, 1.0, wide)
        bias = None if bias is None else bias.contiguous()
        with together():
            out = finish(sums, bias, rows.shape[0], x.dtype, code)
        return out.view(*shape)
    given = _shaped(rows, (1, *rows.shape))
    if activation is not None:
        out = spmm.activated(weights, given, bias, mask, keep_rows, *plan, activation)
        return out.view(*shape)
    if direct(name, keep):
        return spmm.linear(weights, given, bias, *plan, False).view(*shape)
    columns = _columns(rows)
    if bias is None:
        out = spmm.spmm(weights, columns, mask, keep_rows, *plan, 1.0, x.dtype)
    else:
        out = spmm.affine(weights, columns, bias, mask, keep_rows, *plan, x.dtype)
    return out.mT.contiguous().view(*shape)


def token_gradients(
    values: Tensor,
    x: Tensor,
    grad: Tensor,
    tensors: list[Tensor],
    dims: list[int],
    name: str,
    keep: Tensor | None,
    keep_rows: bool,
    wanted: tuple[bool, bool, bool],
    bias_dtype: torch.dtype,
) -> Tensor | tuple[Tensor, ...]:
    """Gradients of ``tokens`` with respect to values, x and bias, those that are wanted.

    Args:
        values: (slots,).
        x: (..., n_in).
        grad: of the result, (..., n_out).
        tensors: of the plan.
        dims: of the plan.
        name: of the plan.
        keep: bool (n,) or None.
        keep_rows: the mask is over rows of S.
        wanted: which gradients.
        bias_dtype: of the bias.

    Returns:
        The gradients, alone if it is one.
    """
    plan = Plan(tensors, dims, name)
    weights, rows, above = _shaped(values, (1, *values.shape)), _rows(x), _rows(grad)
    one_by_one = direct(name, keep)
    turned = _features if _turns(dims, name, rows, above) else _columns
    dx = None
    if wanted[1] and one_by_one:
        dx = spmm.linear(weights, _shaped(above, (1, *above.shape)), None, *plan, True)
    elif wanted[1]:
        dx = _direct(weights, _columns(above), None, keep, plan, True)
    mask, left, right = _mask(keep), _columns(above), _columns(rows)
    plain = wanted[0] and by_tokens(split(plan)[3], left, right, mask, values.dtype)
    turns = (wanted[0] and not plain) or (wanted[1] and dx is None)
    tops = turned(above) if turns else left
    shared = (mask, keep_rows, *plan, 1.0)
    made: list[Tensor] = []
    if wanted[0]:
        one, other = (left, right) if plain else (tops, turned(rows))
        made.append(sddmm.sddmm(one, other, *shared, values.dtype).view(*values.shape))
    if dx is not None:
        made.append(dx.view(*x.shape))
    elif wanted[1]:
        dx = spmm.spmm_t(weights, tops, *shared, x.dtype)
        made.append(_spread(dx[..., : rows.shape[0]].mT, tuple(x.shape)))
    if wanted[2]:
        # torch sums half precision in float32.
        total = torch.sum(_shaped(above, (1, *above.shape)), (0, 1)) if one_by_one else (
            torch.sum(_columns(above), (0, 1, 3))
        )  # fmt: skip
        made.append(total.to(bias_dtype))
    return made[0] if len(made) == 1 else tuple(made)


def _direct(
    weights: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    plan: Plan,
    transposed: bool,
    activation: int = 0,
) -> Tensor | None:
    """Of blocks or rows; see ``spmm.rows_of_tokens``."""
    if plan.name not in ("cblock", "crow"):
        return None
    return spmm.rows_of_tokens(weights, columns, bias, keep, *plan, transposed, activation)


def direct(name: str, keep: Tensor | None) -> bool:
    """Whether there are kernels that read and write rows of tokens: of N:M without a mask."""
    return keep is None and name in KINDS


def _rows(t: Tensor) -> Tensor:
    """(..., n) as (T, n), as ``torch.reshape`` does it."""
    flat = (math.prod(t.shape[:-1]), t.shape[-1])
    like = torch.empty_strided(t.shape, t.stride(), device="meta")
    try:
        strides = like.view(flat).stride()
    except RuntimeError:  # no view has these rows
        t, strides = t.contiguous(), strides_of(flat)
    return _shaped(t, flat, strides)


def _columns(rows: Tensor) -> Tensor:
    """(T, n) as (1, 1, n, T), transposed."""
    (count, n), (line, step) = rows.shape, rows.stride()
    return _shaped(rows, (1, 1, n, count), (0, 0, step, line))


def _turns(dims: list[int], name: str, *given: Tensor) -> bool:
    """Whether rows of tokens are turned into rows of features by a kernel of our own.

    Not where features are rows already, or nothing is contiguous.
    """
    if not set(name.split("+")) <= TURNED or min(dims[1:3]) < 1 or max(dims[1:3]) > turn.MOST_ROWS:
        return False
    for t in given:
        (count, _), (line, step) = t.shape, t.stride()
        if t.dtype not in CODES or not 0 < count <= turn.MOST_ROWS:
            return False
        if step != 1 or (line == 1 and count > 1):
            return False
    return True


def _features(rows: Tensor) -> Tensor:
    """(T, n) as (1, 1, n, T) as kernels want it: to a multiple of 8 in T, zeros at the end."""
    count, n = rows.shape
    made = turn.turned(rows, count + -count % 8)
    return _shaped(made, (1, 1, n, made.shape[1]))


def _mask(keep: Tensor | None) -> Tensor | None:
    return None if keep is None else _shaped(keep, (1, 1, *keep.shape))


def _shaped(t: Tensor, shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> Tensor:
    """A view, by default with more dimensions in front; strides of one element as recorded."""
    if strides is None:
        strides = (*[0] * (len(shape) - t.dim()), *t.stride())
    triples = zip(shape, strides, strides_of(shape), strict=True)
    return t.as_strided(shape, tuple(plain if n == 1 else step for n, step, plain in triples))


def _spread(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(1, 1, T, n) as (..., n)."""
    line, step = rows.stride()[2:]
    return rows.as_strided(shape, (*(line * s for s in strides_of(shape[:-1])), step))
