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
from .parts import CODES, MOST_MATRICES, activation_constant, aligned_values, ready
from .tile_tables import HALVES, in_tokens

# Tokens that these kernels are for.
MOST = 64


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


def takes(
    parts: list[PartPlan], values: Tensor, x: Tensor, keep: Tensor | None, dtype: torch.dtype
) -> bool:
    """Whether ``spmm`` is for this product.

    Args:
        parts: of the plan.
        values: (F, slots).
        x: (F, E, inner, D), any strides.
        keep: run-time mask or None.
        dtype: of the result.
    """
    part = parts[0]
    if len(parts) > 1 or part.kind != "cblock" or keep is not None or x.shape[1] > 1:
        return False
    if x.dtype not in HALVES or values.dtype != x.dtype or dtype not in (x.dtype, torch.float32):
        return False
    items, masks = part.tensors[0], part.tensors[6]
    if not items.shape[0] or masks.shape[0] or part.starts[0] % 8:
        return False
    width = x.shape[3]
    if not (in_tokens(x) or width == 1) or not ready(x, 2, 3) or x.shape[2] % 8:
        return False
    if width > 1 and x.stride(3) >= 1 << 30:
        return False
    return width <= MOST


def cut(several: int, size: int, lines: int, width: int) -> Cut:
    """How the work of ``lines`` lines of blocks is cut; as measured on an H200."""
    if width <= 8:
        return Cut(1, 1, 8, 3, 2)
    strips = lines * (size // 32)
    if width <= 16:
        return Cut(2 if 2 * strips >= 3 * several else 1, 2, 8, 3, 2)
    if size == 16:
        return Cut(1, 4, 4, 3, 4)
    return Cut(2, 4, 8, 1, 2) if strips * -(-width // 32) <= 4 * several else Cut(2, 8, 4, 1, 2)


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
    quads = out.stride(2) == 1 and all(out.stride(d) % 4 == 0 for d in (0, 3) if out.shape[d] > 1)
    run = kernel(few_request(size, how, x.dtype, out.dtype, transposed, activation), x.device.index)
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
                np.int32(quads),
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
    size: int, how: Cut, dtype: torch.dtype, out: torch.dtype, transposed: bool, activation: int = 0
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
        "OUT": CODES[out],
        "TRANSPOSED": int(transposed),
    }
    constants |= activation_constant(activation)
    return request("spmm_block_few", constants, flush=True)
