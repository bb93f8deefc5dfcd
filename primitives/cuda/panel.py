"""Panel parts on CUDA."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import request
from mixgrain.cuda.launch import Kernel, kernel

from ..plans.cuda_panel import ROWS
from ..plans.plan import PartPlan
from .parts import CODES, THREADS, dense, mask, mask_side, runs, tf32, wide_of
from .tiles import sddmm_kernel, spmm_kernel


def sddmm(
    values: Tensor,
    q: Tensor,
    k: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    part: PartPlan,
    scale: float,
) -> None:
    """Write scale · q kᵀ to the slots of a panel part; see ``block.sddmm``."""
    table, row_list, col_list, mask_bits, tiles = part.tensors[:5]
    if not tiles.shape[0]:
        return
    side = mask_side(keep, not keep_rows)
    run, shared = sddmm_kernel(
        q.device.index, "panel", ROWS, q.shape[3], q.dtype, values.dtype, side, tf32(q.dtype)
    )
    for kept, out, left, right in runs(keep, values, q, k):
        run(
            (tiles.shape[0], out.shape[0]),
            THREADS,
            (
                out.data_ptr(),
                np.int64(out.shape[1]),
                *dense(left),
                *dense(right),
                *mask(kept),
                table.data_ptr(),
                row_list.data_ptr(),
                col_list.data_ptr(),
                mask_bits.data_ptr(),
                tiles.data_ptr(),
                np.int32(q.shape[3]),
                np.float32(scale),
            ),
            shared,
        )


@functools.lru_cache(maxsize=64)
def _merge_kernel(device: int, out: torch.dtype, add: bool) -> Kernel:
    return kernel(request("spmm_merge", {"OUT": CODES[out], "ADD": int(add)}), device)


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

    Work items leave float32 partial sums, which a second kernel adds in a fixed order; see
    ``block.spmm`` for the arguments.
    """
    table, row_list, col_list, mask_bits = part.tensors[:4]
    work, lines, bounds, sources = part.tensors[9:13] if transposed else part.tensors[5:9]
    used = part.tensors[13 if transposed else 14]
    _, entries, outer, width = out.shape
    items, count, device = work.shape[0], lines.shape[0], x.device.index
    if not add and count < entries * outer:
        out.zero_()
    if not items or not width:
        return
    wide = wide_of(width, x.dtype)
    side = mask_side(keep, keep_rows == transposed)
    sums, rounded = torch.float32, tf32(x.dtype)
    run, shared = spmm_kernel(
        device, "panel", ROWS, wide, x.dtype, values.dtype, sums, transposed, side, rounded
    )
    merge = _merge_kernel(device, out.dtype, add)
    for kept, to, weights, rows in runs(keep, out, values, x):
        many = to.shape[0]
        partials = x.new_empty(many, items * ROWS, width, dtype=sums)
        run(
            (items, -(-width // wide), many),
            THREADS,
            (
                partials.data_ptr(),
                weights.data_ptr(),
                np.int64(values.shape[1]),
                *dense(rows),
                *mask(kept),
                table.data_ptr(),
                row_list.data_ptr(),
                col_list.data_ptr(),
                mask_bits.data_ptr(),
                used.data_ptr(),
                work.data_ptr(),
                np.int32(width),
                np.float32(scale),
            ),
            shared,
        )
        merge(
            (-(-count // 4), many),
            THREADS,
            (
                to.data_ptr(),
                partials.data_ptr(),
                np.int64(items * ROWS),
                lines.data_ptr(),
                bounds.data_ptr(),
                sources.data_ptr(),
                np.int32(count),
                np.int64(entries * outer),
                np.int32(width),
            ),
        )
