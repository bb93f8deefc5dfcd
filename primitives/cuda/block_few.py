"""Whole blocks times few rows of tokens, as users hold them: spmm_block_few."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.derived import derived
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import kernel

from ..plans import cuda_block, cuda_tile
from ..plans.plan import PartPlan
from .parts import CODES, MOST_MATRICES, activation_constant, aligned_values, in_fours, of_layer

# Microseconds on an H200: for any such work, for an element that is kept, and for each of its
# products by the size of a block; of the kernels for many columns, turns included, for any work and
# for each step of a line, of blocks or unions of them, up to so many results a multiprocessor.
START, STREAM, EACH = 5.5, 6.2e-7, {16: 3e-8, 32: 1.05e-8, 64: 1.05e-8, 128: 1.05e-8}
WGMMA = {16: (12.0, 0.1), 32: (7.0, 0.175), 64: (6.0, 0.6), 128: (6.0, 1.25)}
FULL = 15_000
# Tokens that this kernel is for on devices without them; and on any, of whatever weight.
MOST, WIDEST = 128, 1024


class Cut(NamedTuple):
    """How spmm_block_few is cut.

    Attributes:
        strips: of 16 lines that a CTA takes.
        blocks: of 8 columns of x.
        warps: of a CTA.
        ahead: pieces that a warp asks for at once.
        each: CTAs that a multiprocessor holds.
    """

    strips: int
    blocks: int
    warps: int
    ahead: int
    each: int


SIZES = (16, 32, 64, 128)


def cuts(size: int) -> tuple[Cut, ...]:
    """The ways to cut work of blocks of this size."""
    least = (Cut(1, 1, 8, 3, 2), Cut(1, 2, 8, 3, 2))
    if size == 16:
        return (*least, Cut(1, 4, 4, 3, 4))
    return (*least, Cut(2, 2, 8, 3, 2), Cut(2, 4, 8, 1, 2), Cut(2, 8, 4, 1, 2))


def takes(
    parts: list[PartPlan],
    values: Tensor,
    x: Tensor,
    keep: Tensor | None,
    dtype: torch.dtype,
    transposed: bool,
) -> bool:
    """Whether ``spmm`` is for this product.

    Args:
        parts: of the plan.
        values: (F, slots).
        x: (F, E, inner, D), any strides.
        keep: run-time mask or None.
        dtype: of the result.
        transposed: multiply by the transpose.
    """
    part = parts[0]
    if len(parts) > 1 or part.kind != "cblock" or not of_layer(keep, (values.dtype, dtype), x):
        return False
    items, masks, width = part.tensors[0], part.tensors[6], x.shape[3]
    if not items.shape[0] or masks.shape[0] or part.starts[0] % 8 or width > WIDEST:
        return False
    if width > 1 and x.stride(3) >= 1 << 30:
        return False
    return faster(part, facts(x.device.index).multiprocessors, width, transposed)


def faster(part: PartPlan, several: int, width: int, transposed: bool) -> bool:
    """Whether it takes less time than the kernels for many columns; the same for any F."""
    (size,), tensors = part.scalars, part.tensors
    if len(tensors) <= 10:  # those of other devices
        return width <= MOST
    table, lines = (len(t) for t in (tensors[12:14] if transposed else tensors[10:12]))
    kept = len(tensors[0]) * size * size
    rows = lines * (size if size >= 64 else cuda_block.UNION_ROWS)
    fixed, step = WGMMA[size]
    many = fixed + step * table / lines * max(1.0, width * rows / (FULL * several))
    return START + kept * (STREAM + EACH[size] * width) < many


def cut(several: int, size: int, lines: int, width: int) -> Cut:
    """How the work of ``lines`` lines of blocks is cut, one of ``cuts``; as measured on an H200."""
    first, second, *more = cuts(size)
    strips = lines * (size // 32)
    if width <= 8:
        return first
    if width <= 16:
        return more[0] if size > 16 and 2 * strips >= 3 * several else second
    return more[-1] if size == 16 or strips * -(-width // 32) > 4 * several else more[1]


def spmm(
    out: Tensor,
    values: Tensor,
    x: Tensor,
    part: PartPlan,
    scale: float,
    transposed: bool,
    bias: Tensor | None = None,
    activation: int = 0,
) -> None:
    """Scale · S x, or scale · Sᵀ x when transposed, plus the bias of each row, activated, to out.

    Args:
        out: (F, 1, rows, D), any strides, made for this.
        values: (F, slots).
        x: (F, 1, inner, D), as ``takes`` says.
        part: from ``plans.cuda_block``.
        scale: multiplies the product.
        transposed: multiply by the transpose.
        bias: (rows,) of x's dtype, contiguous, or None.
        activation: a code of ``activations``, applied before rounding; 0 = none.
    """
    free, _, rows, width = out.shape
    (size,) = part.scalars
    values = aligned_values(values)
    items, row_ptr, _, t_items, col_ptr = part.tensors[:5]
    bounds, order = (col_ptr, t_items) if transposed else (row_ptr, None)
    lines = bounds.numel() - 1
    how = cut(facts(x.device.index).multiprocessors, size, lines, width)
    shares, cells = derived(
        items,
        ("few", transposed, how.warps, how.ahead),
        lambda: _tables(items, bounds, order, size, how),
    )
    run = kernel(few_request(size, how, x.dtype, transposed, activation), x.device.index)
    grid = (lines * (size // (16 * how.strips)), -(-width // (8 * how.blocks)))
    for start in range(0, free, MOST_MATRICES):
        to, weights, right = (t[start : start + MOST_MATRICES] for t in (out, values, x))
        run(
            (*grid, to.shape[0]),
            32 * how.warps,
            (
                right.data_ptr(),
                *(np.int64(right.stride(d)) for d in (0, 3)),
                weights.data_ptr() + part.starts[0] * values.element_size(),
                np.int64(weights.shape[1]),
                shares.data_ptr(),
                cells.data_ptr(),
                np.float32(scale),
                0 if bias is None else bias.data_ptr(),
                to.data_ptr(),
                *(np.int64(to.stride(d)) for d in (0, 2, 3)),
                np.int32(in_fours(out)),
                np.int32(rows),
                np.int32(width),
            ),
        )


def _tables(
    items: Tensor, bounds: Tensor, order: Tensor | None, size: int, how: Cut
) -> tuple[Tensor, Tensor]:
    bounds, cells = cuda_block.pieces(items, bounds, order, size)
    return cuda_tile.shares(bounds, cells, how.warps, how.ahead), cells


@functools.lru_cache(maxsize=256)
def few_request(
    size: int, how: Cut, dtype: torch.dtype, transposed: bool, activation: int = 0
) -> Request:
    """The kernel."""
    constants = {
        "SIZE": size,
        "STRIPS": how.strips,
        "BLOCKS": how.blocks,
        "WARPS": how.warps,
        "AHEAD": how.ahead,
        "EACH": how.each,
        "DTYPE": CODES[dtype],
        "TRANSPOSED": int(transposed),
    }
    constants |= activation_constant(activation)
    return request("spmm_block_few", constants, flush=True)
