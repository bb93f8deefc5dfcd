"""The operators of products on CUDA: one kernel or two per part.

Coarse parts (blocks, panels) and fine ones (rows) leave float32 sums of their own, so that they can
run at once; a last kernel adds the two and rounds.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import request
from mixgrain.cuda.launch import kernel

from ..activations import CODES as ACTIVATIONS
from ..plans.plan import PartPlan, Plan, split
from . import block, block_few, expand_sm90, nm, nm_within, panel, row, row_few, strew_sm90, tile
from .block_sm90 import Tokens
from .finish import finish
from .nm_parts import within
from .parts import CODES, aligned, aligned_values, at_once, check_dtypes, is_fine, together

_KINDS = {
    "cblock": block.spmm,
    "cpanel": panel.spmm,
    "crow": row.spmm_row,
    "nm": nm_within.spmm,
    "nm_t": nm_within.spmm,
}


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
    return _product("spmm", values, x, keep, keep_rows, plan, scale, dtype, transposed=False)


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
    return _product("spmm_t", values, x, keep, keep_rows, plan, scale, dtype, transposed=True)


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
    check_dtypes("linear", values.dtype, x.dtype)
    _, shape, _, parts = split(Plan(tensors, dims, name))
    free, tokens, inner = x.shape
    outer = shape[1 if transposed else 0]
    if not parts or 0 in (free, tokens, outer, inner):
        out = x.new_zeros(free, tokens, outer)
        return out if bias is None else torch.add(out, bias)
    if parts[0].kind in nm.KINDS:
        return nm.linear(values, x, bias, parts[0], shape, transposed)
    right = _across(x)
    rows = rows_of_tokens(values, right, bias, None, tensors, dims, name, transposed)
    if rows is not None:
        return rows
    plain = len(parts) == 1 and bias is None
    wide = x.dtype if plain else torch.float32
    sums = _sums(values, right, None, False, parts, outer, 1.0, wide, transposed)
    with together():
        return finish(sums, None if bias is None else bias.contiguous(), tokens, x.dtype, 0)


def _across(x: Tensor) -> Tensor:
    """(F, T, inner) as (F, 1, inner, T)."""
    (free, tokens, inner), step = x.shape, x.stride()
    return x.as_strided((free, 1, inner, tokens), (step[0], step[0], step[2], step[1]))


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
    plan = Plan(tensors, dims, name)
    _, (rows, _), _, parts = split(plan)
    if parts and 0 not in (*x.shape, rows):
        part, more = parts[0], bias.contiguous()
        if part.kind == "ctile":
            check_dtypes("linear", values.dtype, x.dtype, dtype)
            return tile.spmm(values, x, keep, keep_rows, part, 1.0, dtype, False, more)
        made = _few(values, x, keep, parts, rows, 1.0, dtype, False, more)
        if made is not None:
            return made
    wide = torch.float32
    out = _product("linear", values, x, keep, keep_rows, plan, 1.0, wide, transposed=False)
    return torch.add(out, bias.contiguous().view(1, 1, rows, 1)).to(dtype)


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
    """Act(x Sᵀ + bias): (F, slots), (F, T, inner), (outer,) -> (F, T, outer).

    In the kernels that write rows of tokens; else by the one that lays sums out so.
    """
    check_dtypes("linear", values.dtype, x.dtype)
    _, shape, _, parts = split(Plan(tensors, dims, name))
    free, tokens, _ = x.shape
    code, wide = ACTIVATIONS[activation], torch.float32
    if bias is not None:
        bias = bias.contiguous()
    if not parts or 0 in (*x.shape, shape[0]):
        sums = [x.new_zeros((free, 1, shape[0], tokens), dtype=wide)]
        return finish(sums, bias, tokens, x.dtype, code)
    part, right = parts[0], _across(x)
    if part.kind in nm.KINDS and keep is None:
        return nm.linear(values, x, bias, part, shape, False, code)
    rows = rows_of_tokens(values, right, bias, keep, tensors, dims, name, False, code)
    if rows is not None:
        return rows
    if part.kind in nm.KINDS and not within(part):
        sums = [nm.product(values, right, keep, keep_rows, part, shape, 1.0, wide, False)]
    elif part.kind == "ctile":
        out = tile.spmm(values, right, keep, keep_rows, part, 1.0, x.dtype, False, bias, code)
        return out.mT.contiguous().view(free, tokens, shape[0])
    else:
        sums = _sums(values, right, keep, keep_rows, parts, shape[0], 1.0, wide, transposed=False)
    with together():
        return finish(sums, bias, tokens, x.dtype, code)


def _product(
    op: str,
    values: Tensor,
    x: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    plan: Plan,
    scale: float,
    dtype: torch.dtype,
    transposed: bool,
) -> Tensor:
    check_dtypes(op, values.dtype, x.dtype, dtype)
    _, shape, entry, parts = split(plan)
    width = x.shape[3]
    lines = shape[1 if transposed else 0]
    size = (x.shape[0], len(entry), lines, width)
    if not parts or 0 in (*size, x.shape[2]):
        return x.new_zeros(size, dtype=dtype)
    if parts[0].kind in nm.KINDS and not within(parts[0]):
        part = parts[0]
        return nm.product(values, x, keep, keep_rows, part, shape, scale, dtype, transposed)
    if parts[0].kind == "ctile":
        return tile.spmm(values, x, keep, keep_rows, parts[0], scale, dtype, transposed)
    few = _few(values, x, keep, parts, lines, scale, dtype, transposed, None)
    if few is not None:
        return few
    made = _sums(values, x, keep, keep_rows, parts, lines, scale, dtype, transposed)
    if len(parts) == 1:
        return made[0][..., :width].contiguous()
    with together():
        return _rounded(made, dtype)[..., :width].contiguous()


def _few(
    values: Tensor,
    x: Tensor,
    keep: Tensor | None,
    parts: list[PartPlan],
    lines: int,
    scale: float,
    dtype: torch.dtype,
    transposed: bool,
    bias: Tensor | None,
) -> Tensor | None:
    """The product by kernels that take rows of tokens; None where there is none."""
    free, entries, _, width = x.shape
    if block_few.takes(parts, values, x, keep, dtype, transposed):
        out = x.new_empty((free, entries, lines, width))
        block_few.spmm(out, values, x, parts[0], scale, transposed, bias)
        return out
    by_rows = not transposed and row_few.takes(parts, values, x, keep, dtype)
    strewn = strew_sm90.takes(parts, values, x, keep, dtype, transposed, lines, by_rows)
    if not (by_rows or strewn):
        return None
    out = x.new_empty((free, entries, width, lines))
    if strewn:
        strew_sm90.spmm(out, values.contiguous(), x, parts[0], scale, transposed, bias)
    else:
        row_few.spmm(out, values, x, parts[0], scale, bias)
    return out.mT.contiguous()


def rows_of_tokens(
    values: Tensor,
    x: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    tensors: list[Tensor],
    dims: list[int],
    name: str,
    transposed: bool,
    activation: int = 0,
) -> Tensor | None:
    """(F, T, outer) from (F, 1, inner, T), all rows of tokens; None where no kernel does it so.

    The products of ``spmm``, ``affine`` and ``activated``, to the bit.
    """
    _, shape, _, parts = split(Plan(tensors, dims, name))
    free, _, _, width = x.shape
    outer = shape[1 if transposed else 0]
    if 0 in (*x.shape, outer) or len(parts) != 1 or x.shape[1] > 1 or keep is not None:
        return None
    few = block_few.takes(parts, values, x, keep, x.dtype, transposed)
    by_rows = not transposed and row_few.takes(parts, values, x, keep, x.dtype)
    strewn = strew_sm90.takes(parts, values, x, keep, x.dtype, transposed, outer, by_rows)
    if not (few or strewn or by_rows or block.takes_tokens(values, x, parts[0], outer)):
        return None
    out = x.new_empty((free, 1, width, outer))
    bias = None if bias is None else bias.contiguous()
    if strewn:
        strew_sm90.spmm(out, values.contiguous(), x, parts[0], 1.0, transposed, bias, activation)
    elif by_rows:
        row_few.spmm(out, values, x, parts[0], 1.0, bias, activation)
    elif few:
        block_few.spmm(out.mT, values, x, parts[0], 1.0, transposed, bias, activation)
    else:
        end = Tokens(bias, activation)
        block.tokens(out.mT, aligned_values(values), x, parts[0], transposed, end)
    return out.view(free, width, outer)


def unrounded(
    values: Tensor,
    x: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    tensors: list[Tensor],
    dims: list[int],
    name: str,
    scale: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The product of blocks, panels and rows, of a single part, or one or two float32 sums.

    Columns are as many as x has, rounded up.
    """
    _, shape, _, parts = split(Plan(tensors, dims, name))
    return _sums(values, x, keep, keep_rows, parts, shape[0], scale, dtype, transposed=False)


def _sums(
    values: Tensor,
    x: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    parts: list[PartPlan],
    lines: int,
    scale: float,
    dtype: torch.dtype,
    transposed: bool,
) -> list[Tensor]:
    """The product of a single part; of several, one or two float32 tensors that add up to it.

    Columns are as many as x has, rounded up.
    """
    x, values = aligned(x), aligned_values(values)
    size = (*x.shape[:2], lines, x.shape[3])
    if len(parts) == 1:
        out = x.new_empty(size, dtype=dtype)
        left: PartPlan | None = parts[0]
        if parts[0].kind == "crow" and keep is None:
            left = expand_sm90.spmm(out, values, x, parts[0], scale, transposed)
        if left is not None:
            _KINDS[left.kind](out, values, x, keep, keep_rows, left, scale, transposed, False)
        return [out]
    # Each lane is summed in the order of its parts, then coarse + fine: always the same bits.
    sums: dict[bool, Tensor] = {}

    def add(part: PartPlan) -> None:
        lane = is_fine(part)
        more = lane in sums
        if not more:
            sums[lane] = x.new_empty(size, dtype=torch.float32)
        out = sums[lane]
        _KINDS[part.kind](out, values, x, keep, keep_rows, part, scale, transposed, more)

    at_once(parts, add, values.shape[0])
    return [sums[lane] for lane in sorted(sums)]


def _rounded(sums: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of one or two float32 tensors, in another dtype."""
    if len(sums) == 1 and dtype == torch.float32:
        return sums[0]
    out = sums[0].new_empty(sums[0].shape, dtype=dtype)
    wanted = request("spmm_join", {"OUT": CODES[dtype], "TWO": int(len(sums) == 2)})
    kernel(wanted, out.device.index)(
        (-(-out.numel() // 2048),),
        256,
        (
            out.data_ptr(),
            sums[0].data_ptr(),
            sums[-1].data_ptr(),
            np.int64(out.numel()),
        ),
    )
    return out
