"""Block parts on CUDA."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.device import facts

from ..plans.plan import PartPlan
from . import block_sm90, pair_sm90, union_sm90
from .parts import THREADS, dense, mask, mask_side, of_layer, runs, tf32, wide_of
from .tiles import sddmm_kernel, spmm_kernel


def _hopper(t: Tensor, items: Tensor, keep: Tensor | None, *dtypes: torch.dtype) -> bool:
    """Whether the kernels for sm_90a take this product; run-time masks are not for them."""
    return (
        keep is None
        and items.shape[0] > 0
        and block_sm90.runs_here(t.shape[3], *dtypes)
        and facts(t.device.index).hopper
    )


def sddmm(
    values: Tensor,
    q: Tensor,
    k: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    part: PartPlan,
    scale: float,
) -> None:
    """Write scale · q kᵀ to the slots of a block part.

    Args:
        values: (F, slots), contiguous; the part's slots are written.
        q: (F, E, nq, D), aligned.
        k: (F, E, nk, D), aligned.
        keep: bool (F, E, n) or None.
        keep_rows: the mask is over rows.
        part: from ``plans.cuda_block``.
        scale: multiplies scores.
    """
    items, masks, chunks = part.tensors[0], part.tensors[6], part.tensors[9]
    (size,) = part.scalars
    if not chunks.shape[0]:
        return
    if size >= 64 and q.shape[3] <= 256 and _hopper(q, items, keep, q.dtype, values.dtype):
        longer = part.tensors[14]
        block_sm90.sddmm(values, q, k, part.starts[0], size, items, longer, masks, scale)
        return
    run, shared = sddmm_kernel(
        q.device.index,
        "block",
        min(size, 64),
        q.shape[3],
        q.dtype,
        values.dtype,
        mask_side(keep, not keep_rows),
        tf32(q.dtype),
        size,
    )
    for kept, out, left, right in runs(keep, values, q, k):
        run(
            (chunks.shape[0] * max(size // 64, 1), out.shape[0]),
            THREADS,
            (
                out.data_ptr(),
                np.int64(out.shape[1]),
                np.int64(part.starts[0]),
                *dense(left),
                *dense(right),
                *mask(kept),
                items.data_ptr(),
                chunks.data_ptr(),
                masks.data_ptr(),
                np.int32(q.shape[2]),
                np.int32(k.shape[2]),
                np.int32(q.shape[3]),
                np.float32(scale),
            ),
            shared,
        )


def spmm(
    out: Tensor,
    values: Tensor,
    x: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    part: PartPlan,
    scale: float,
    transposed: bool,
    add: bool,
) -> None:
    """Write, or add, scale · S x (or Sᵀ x when transposed) to every row of out.

    Args:
        out: (F, E, outer, D), contiguous; float32 to add.
        values: (F, slots), contiguous, aligned.
        x: (F, E, inner, D), aligned.
        keep: bool (F, E, n) or None.
        keep_rows: the mask is over rows of S.
        part: from ``plans.cuda_block``.
        scale: multiplies the product.
        transposed: multiply by the transpose.
        add: add to what out holds.
    """
    items, row_ptr, row_order, t_items, col_ptr, col_order, masks, any_col, any_row = part.tensors[
        :9
    ]
    (size,) = part.scalars
    bounds, order, used = row_ptr, row_order, any_col
    if transposed:
        bounds, order, used = col_ptr, col_order, any_row
    _, entries, outer, width = out.shape
    lines = order.shape[0]
    if 0 in (lines, width):
        return
    fitting = out.dtype in (x.dtype, torch.float32)
    if fitting and _hopper(x, items, keep, x.dtype, values.dtype):
        _wgmma(out, values, x, part, scale, transposed, add)
        return
    wide = wide_of(width, x.dtype)
    run, shared = spmm_kernel(
        x.device.index,
        "block",
        min(size, 64),
        wide,
        x.dtype,
        values.dtype,
        out.dtype,
        transposed,
        mask_side(keep, keep_rows == transposed),
        tf32(x.dtype),
        size,
        add,
    )
    for kept, to, weights, rows in runs(keep, out, values, x):
        run(
            (lines * max(size // 64, 1), -(-width // wide), to.shape[0]),
            THREADS,
            (
                to.data_ptr(),
                weights.data_ptr(),
                np.int64(values.shape[1]),
                np.int64(part.starts[0]),
                *dense(rows),
                *mask(kept),
                items.data_ptr(),
                t_items.data_ptr(),
                bounds.data_ptr(),
                order.data_ptr(),
                masks.data_ptr(),
                used.data_ptr(),
                np.int32(entries),
                np.int32(lines // entries),
                np.int32(outer),
                np.int32(x.shape[2]),
                np.int32(width),
                np.float32(scale),
            ),
            shared,
        )


def takes_tokens(values: Tensor, x: Tensor, part: PartPlan, outer: int) -> bool:
    """Whether ``tokens`` is for x (F, 1, inner, D) and results of ``outer`` rows."""
    # Of blocks of 16 TMA would read rows of 32 bytes, which takes longer than to turn x.
    if part.kind != "cblock" or not part.tensors[0].shape[0] or outer % 8 or part.scalars[0] < 32:
        return False
    return of_layer(None, (values.dtype,), x) and facts(x.device.index).hopper


def tokens(
    out: Tensor,
    values: Tensor,
    x: Tensor,
    part: PartPlan,
    transposed: bool,
    rows: block_sm90.Tokens,
) -> None:
    """Write S x, or Sᵀ x when transposed, to rows of tokens from rows of tokens.

    Args:
        out: (F, 1, outer, D), its transpose contiguous, of x's dtype.
        values: (F, slots), contiguous, aligned.
        x: (F, 1, inner, D), as ``takes_tokens`` says.
        part: from ``plans.cuda_block``.
        transposed: multiply by the transpose.
        rows: bias and activation.
    """
    _wgmma(out, values, x, part, 1.0, transposed, False, rows)


def _wgmma(
    out: Tensor,
    values: Tensor,
    x: Tensor,
    part: PartPlan,
    scale: float,
    transposed: bool,
    add: bool,
    tokens: block_sm90.Tokens | None = None,
) -> None:
    items, masks, any_col, any_row = part.tensors[0], *part.tensors[6:9]
    (size,), shift = part.scalars, part.starts[0]
    table, records = part.tensors[12:14] if transposed else part.tensors[10:12]
    count, last = items.shape[0], (transposed, scale, add, tokens)
    if size < 64:
        blocks = part.tensors[16 if transposed else 15]
        bits = part.tensors[14] if transposed else masks
        union_sm90.spmm(out, values, x, shift, size, count, table, blocks, records, bits, *last)
        return
    whole = size == pair_sm90.SIZE and not masks.shape[0]
    if whole and pair_sm90.spmm(out, values, x, shift, count, table, records, *last):
        return
    used = any_row if transposed else any_col
    block_sm90.spmm(out, values, x, shift, size, count, table, records, masks, used, *last)
