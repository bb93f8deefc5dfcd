"""NMLayout on mma.sp, sm_80 and later: 2:4 and 1:2 of halves, and 1:2 of float32 as TF32."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import kernel

from .nm_stored import Stored
from .parts import CODES, activation_constant, runs


def tile_of(rows: int, width: int, matrices: int, several: int) -> tuple[int, int]:
    """Rows and columns of a CTA: large ones where they still are enough for the device."""
    if width <= 16:
        return 64, 16
    tiles = -(-rows // 128) * -(-width // 128) * matrices
    return (128, 128) if width > 64 and tiles >= several else (64, 64)


@functools.lru_cache(maxsize=256)
def spmm_request(
    operand: torch.dtype,
    out: torch.dtype,
    tile: tuple[int, int],
    major: bool,
    turned: bool,
    activation: int = 0,
) -> Request:
    """The kernel; ``major``: columns of x lie side by side."""
    constants = {
        "DTYPE": CODES[operand],
        "OUT": CODES[out],
        "ROWS": tile[0],
        "WIDE": tile[1],
        "MAJOR": int(major),
        "TURNED": int(turned),
    }
    constants |= activation_constant(activation)
    return request("spmm_nm", constants, flush=operand != torch.float32)


def threads_of(tile: tuple[int, int]) -> int:
    """Threads of a CTA: a warp for every 32 × 64, or 16 × a narrow tile's width."""
    rows, wide = tile
    return rows // 32 * 64 if wide == 128 else rows // 16 * 32


def shared_of(tile: tuple[int, int], size: int, major: bool) -> int:
    """Dynamic shared memory of a CTA, bytes: three stages of 128 bytes of dense rows."""
    rows, wide = tile
    right = 128 // size * (wide * size + 16) if major else wide * 144
    return 3 * (rows * 88 + right)


def spmm(
    out: Tensor,
    values: Tensor,
    s: Stored,
    x: Tensor,
    major: bool,
    scale: float,
    turned: bool = False,
    bias: Tensor | None = None,
    activation: int = 0,
) -> None:
    """Write scale · S x of every matrix, or (turned) its transpose plus a bias, activated.

    Args:
        out: (F, E, rows, N), contiguous, N % 8 == 0, or, turned, (F, E, N, rows rounded up to 8).
        values: (F, slots) of x's dtype, contiguous, 16-byte aligned.
        s: the matrices, metadata in hardware order: "2:4" or "1:2-half"; of float32 "1:2-float32".
        x: (F, E, columns, N), N or the columns contiguous, 16-byte aligned.
        major: whether N is the contiguous one.
        scale: multiplies the product.
        turned: write the transpose.
        bias: (rows,) of x's dtype, added before rounding; turned only.
        activation: a code of ``activations``, applied before rounding; 0 = none; turned only.
    """
    width, entries, device = x.shape[3], s.entries, x.device.index
    tile = tile_of(s.rows, width, out.shape[0] * entries, facts(device).multiprocessors)
    run = kernel(spmm_request(x.dtype, out.dtype, tile, major, turned, activation), device)
    lines = s.words // (4 * s.lines)
    for _, to, weights, right in runs(None, out, values, x, entries=entries):
        run(
            (-(-s.rows // tile[0]), -(-width // tile[1]), to.shape[0] * entries),
            threads_of(tile),
            (
                to.data_ptr(),
                weights.data_ptr(),
                s.metadata.data_ptr(),
                right.data_ptr(),
                *map(np.int64, (right.stride(0), right.stride(1), right.stride(2 if major else 3))),
                0 if bias is None else bias.data_ptr(),
                *map(np.int32, (entries, s.rows, to.shape[3] if turned else s.rows, s.columns)),
                *map(np.int32, (width, s.lines, s.packed, lines)),
                np.float32(scale),
            ),
            shared_of(tile, x.element_size(), major),
        )
