"""SpMM of a BlockLayout of 16 or 32 on sm_90a: wgmma over unions of block rows."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import kernel

from ..plans.cuda_block import UNION_ROWS
from .block_sm90 import (
    CODES,
    Tokens,
    bias_of,
    end_of,
    laid_out,
    right_map,
    token_constants,
    values_map,
    walked,
)

# TMA stages of 64 rows of x, by columns of a CTA.
STAGES = {64: 4, 128: 6, 256: 4}
THREADS = 384
# What a tile of rows of tokens costs where a multiprocessor has many, relatively, by its width.
TOKEN_COSTS = {256: 30, 128: 16, 64: 9.8}


def spmm(
    out: Tensor,
    values: Tensor,
    x: Tensor,
    shift: int,
    size: int,
    items: int,
    table: Tensor,
    blocks: Tensor,
    records: Tensor,
    masks: Tensor,
    transposed: bool,
    scale: float,
    add: bool = False,
    tokens: Tokens | None = None,
) -> None:
    """Write (or add to a float32 out) scale · S x, or scale · Sᵀ x when transposed.

    Args:
        out: (F, E, rows, D), contiguous; x's dtype, or float32 for partial results.
        values: (F, slots) of x's dtype, contiguous, rows at multiples of 16 bytes.
        x: (F, E, inner, D), rows 16-byte aligned.
        shift: first slot of the part.
        size: side of a block, 16 or 32.
        items: blocks of the part.
        table: int32 (U, 4), the unions of ``plans.cuda_block``, of columns when transposed.
        blocks: int32 (U, lines, 2), their blocks, likewise.
        records: int32 (E * groups, 3), likewise.
        masks: uint8 (M, size, size // 8), the transposed ones when transposed.
        transposed: multiply by the transpose.
        scale: multiplies the product.
        add: add to out instead of overwriting it; float32 only.
        tokens: x and out are rows of tokens; rows % 8 == 0.
    """
    free, entries, rows, width = out.shape
    if 0 in (free, records.shape[0], width):
        return
    x = laid_out(x)
    several = facts(x.device.index).multiprocessors
    wide = token_wide(several, records.shape[0] * free, width) if tokens else wide_of(width)
    partial = out.dtype == torch.float32
    device = x.device.index
    groups, across = records.shape[0], -(-width // wide)
    several *= 2 if wide == 64 else 1
    run = kernel(spmm_request(size, x.dtype, wide, transposed, partial, end_of(tokens)), device)
    for tiles, to, weights, right in walked(records, across, several, out, values, x):
        run(
            (tiles.shape[0],),
            THREADS,
            (
                values_map(weights, shift, size, items, (size, size)),
                right_map(right, size, wide, tokens),
                table.data_ptr(),
                blocks.data_ptr(),
                tiles.data_ptr(),
                np.int32(tiles.shape[1]),
                masks.data_ptr(),
                np.int32(groups // entries),
                np.int32(entries),
                np.int32(across),
                np.float32(scale),
                bias_of(tokens),
                to.data_ptr(),
                np.int32(rows),
                np.int32(width),
                np.int32(add),
            ),
            spmm_shared(wide, tokens is not None),
        )


def wide_of(width: int) -> int:
    """Columns of a CTA for x of this width."""
    return 64 if width <= 64 else 128 if width <= 128 else 256


def token_wide(several: int, groups: int, width: int) -> int:
    """Columns of a CTA for rows of tokens; see ``block_sm90.token_tile``."""

    def cost(wide: int) -> float:
        return -(-groups * -(-width // wide) // several) * TOKEN_COSTS[wide]

    return min(TOKEN_COSTS, key=cost)


def spmm_shared(wide: int, tokens: bool = False) -> int:
    """Dynamic shared memory of a CTA, bytes: stages of x and of a band of values.

    Rows of tokens leave through 1 KiB a warp.
    """
    return STAGES[wide] * 128 * (wide + UNION_ROWS) + (8 * 1024 if tokens else 0) + 1024


@functools.lru_cache(maxsize=256)
def spmm_request(
    size: int,
    dtype: torch.dtype,
    wide: int,
    transposed: bool,
    partial: bool,
    tokens: int | None = None,
) -> Request:
    """The kernel; ``partial`` writes float32."""
    constants = {
        "SIZE": size,
        "DTYPE": CODES[dtype],
        "WIDE": wide,
        "STAGES": STAGES[wide],
        "TRANSPOSED": int(transposed),
        "PARTIAL": int(partial),
    }
    constants |= token_constants(tokens)
    return request("spmm_union_sm90", constants, flush=True)
