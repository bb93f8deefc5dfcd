"""N:M products of any encoding and dtype: patches are expanded on chip; portable."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.launch import Kernel, kernel

from .nm_stored import Stored
from .parts import CODES, THREADS, activation_constant, aligned, mask, ready, runs, tf32


def spmm(
    out: Tensor,
    values: Tensor,
    s: Stored,
    x: Tensor,
    keep: Tensor | None,
    side: int,
    scale: float,
    transposed: bool,
    major: bool,
    turned: bool,
    bias: Tensor | None,
    activation: int = 0,
) -> None:
    """Write scale · S x, or Sᵀ x when transposed, or (turned) its transpose + bias, activated.

    Args:
        out: (F, E, outer, N), contiguous, N % 8 == 0; turned: (F, E, N, outer), contiguous.
        values: (F, slots), contiguous, 16-byte aligned.
        s: the matrices.
        x: (F, E, inner, N), N or inner contiguous, 16-byte aligned.
        keep: bool (F, E, n) or None.
        side: 0 without a mask, 1 if it is over the stored columns, 2 if over the rows.
        scale: multiplies the product.
        transposed: multiply by the transpose.
        major: whether N is the contiguous one.
        turned: write the transpose.
        bias: (outer,) of x's dtype, added before rounding; turned only.
        activation: a code of ``activations``, applied before rounding; 0 = none; turned only.
    """
    entries, width = s.entries, x.shape[3]
    outer, across = s.columns if transposed else s.rows, wide_of(x.shape[3], x.dtype)
    run, shared = _spmm_kernel(
        x.device.index, s.encoding, s.n, s.m, x.dtype, values.dtype, out.dtype,
        transposed, major, turned, across, side, tf32(x.dtype), activation,
    )  # fmt: skip
    for kept, to, weights, right in runs(keep, out, values, x, entries=entries):
        run(
            (
                -(-outer // 64),
                -(-width // across),
                to.shape[0] * entries,
            ),
            THREADS,
            (
                to.data_ptr(),
                weights.data_ptr(),
                s.metadata.data_ptr(),
                right.data_ptr(),
                *map(np.int64, (right.stride(0), right.stride(1), right.stride(2 if major else 3))),
                *mask(kept),
                0 if bias is None else bias.data_ptr(),
                np.int64(s.words),
                *map(np.int32, (entries, s.rows, s.columns, s.lines, s.packed, width)),
                np.float32(scale),
            ),
            shared,
        )


def wide_of(width: int, dtype: torch.dtype) -> int:
    """MG_WIDE: columns of the result per CTA."""
    return 128 if width > 64 and dtype != torch.float32 else 64


def spmm_request(
    encoding: int,
    n: int,
    m: int,
    operand: torch.dtype,
    value: torch.dtype,
    out: torch.dtype,
    transposed: bool,
    major: bool,
    turned: bool,
    wide: int,
    side: int,
    rounded: bool,
    activation: int = 0,
) -> Request:
    """The kernel that takes every N:M product."""
    constants = {
        "ENCODING": encoding,
        "N": n,
        "M": m,
        "DTYPE": CODES[operand],
        "VALUES": CODES[value],
        "OUT": CODES[out],
        "TRANSPOSED": int(transposed),
        "MAJOR": int(major),
        "TURNED": int(turned),
        "WIDE": wide,
        "KEEP": side,
        "TF32": int(rounded),
    }
    constants |= activation_constant(activation)
    return request("spmm_nm_any", constants, flush=operand != torch.float32)


@functools.lru_cache(maxsize=1024)
def _spmm_kernel(device: int, *rest: Any) -> tuple[Kernel, int]:
    """The kernel and its shared memory."""
    operand, (transposed, major, _, wide) = rest[3], rest[6:10]
    size = operand.itemsize
    depth, pad = (32, 4) if size == 4 else (64, 8)
    left = depth * (64 + pad) if transposed else 64 * (depth + pad)
    right = depth * (wide + pad) if major else wide * (depth + pad)
    return kernel(spmm_request(*rest), device), 3 * (left + right) * size


def sddmm(
    values: Tensor, s: Stored, q: Tensor, k: Tensor, keep: Tensor | None, side: int, scale: float
) -> None:
    """Write scale · q kᵀ to every slot, zero to dead ones.

    Args:
        values: (F, slots), contiguous.
        s: the matrices.
        q: (F, E, rows, D), any strides.
        k: (F, E, columns, D), any strides, q's dtype.
        keep: bool (F, E, n) or None.
        side: 0 without a mask, 1 if it is over the columns, 2 if over the rows.
        scale: multiplies the scores.
    """
    major = ready(q, 2, 3) and ready(k, 2, 3)
    if not major:
        q, k = (t if t.shape[3] % 8 == 0 and ready(t, 3, 2) else aligned(t) for t in (q, k))
    entries, depth = s.entries, q.shape[3]
    run, shared = _sddmm_kernel(
        q.device.index, s.encoding, s.n, s.m, q.dtype, values.dtype, major, side, tf32(q.dtype)
    )
    line = 3 if major else 2
    for kept, to, left, right in runs(keep, values, q, k, entries=entries):
        run(
            (-(-s.lines // 64), -(-(s.packed // s.n * s.m) // 64), to.shape[0] * entries),
            THREADS,
            (
                to.data_ptr(),
                s.metadata.data_ptr(),
                left.data_ptr(),
                *map(np.int64, (left.stride(0), left.stride(1), left.stride(line))),
                right.data_ptr(),
                *map(np.int64, (right.stride(0), right.stride(1), right.stride(line))),
                *mask(kept),
                np.int64(s.words),
                *map(np.int32, (entries, s.rows, s.columns, s.lines, s.packed, depth)),
                np.float32(scale),
            ),
            shared,
        )


def sddmm_request(
    encoding: int,
    n: int,
    m: int,
    operand: torch.dtype,
    value: torch.dtype,
    major: bool,
    side: int,
    rounded: bool,
) -> Request:
    """The kernel of the sampled product."""
    constants = {
        "ENCODING": encoding,
        "N": n,
        "M": m,
        "DTYPE": CODES[operand],
        "VALUES": CODES[value],
        "MAJOR": int(major),
        "KEEP": side,
        "TF32": int(rounded),
    }
    return request("sddmm_nm", constants, flush=operand != torch.float32)


@functools.lru_cache(maxsize=1024)
def _sddmm_kernel(device: int, *rest: Any) -> tuple[Kernel, int]:
    """The kernel and its shared memory."""
    operand, major = rest[3], rest[5]
    size = operand.itemsize
    depth, pad = (32, 4) if size == 4 else (64, 8)
    side = depth * (64 + pad) if major else 64 * (depth + pad)
    return kernel(sddmm_request(*rest), device), max(6 * side * size, 64 * 65 * 4)
