"""Products with N:M weights that have no use for their zeros: the transpose, and sampled scores.

Neither is sparse along what is summed, so sparse tensor cores cannot take them. A weight is
expanded, or the scores of all positions are made, by a dense product of torch's, in memory of the
dense weight's size; a kernel that reads and writes its bytes once does the rest.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.launch import kernel

from .nm_stored import Stored
from .parts import CODES, HALVES, THREADS

#: Fewer tokens than this are multiplied without making anything of the dense weight's size.
TOKENS = 256


def expand_request(s: Stored, dtype: torch.dtype) -> Request:
    """The kernel that expands."""
    return _request("nm_expand", s.encoding, s.n, s.m, dtype)


@functools.lru_cache(maxsize=64)
def spread_request(dtype: torch.dtype) -> Request:
    """The kernel that expands 2:4 and 1:2 of halves."""
    return request("nm_spread", {"DTYPE": CODES[dtype]}, flush=True)


def sample_request(s: Stored, dtype: torch.dtype) -> Request:
    """The kernel that picks."""
    return _request("nm_sample", s.encoding, s.n, s.m, dtype)


def _request(name: str, encoding: int, n: int, m: int, dtype: torch.dtype) -> Request:
    code = CODES[dtype]
    kept = {"ENCODING": encoding, "N": n, "M": m, "DTYPE": code, "VALUES": code, "KEEP": 0}
    return request(name, kept, flush=dtype != torch.float32)


def product(values: Tensor, s: Stored, x: Tensor) -> Tensor:
    """Product x S with a weight S of rows × columns.

    Args:
        values: (1, slots) of x's dtype, contiguous, 16-byte aligned.
        s: one matrix.
        x: (T, rows), any strides.

    Returns:
        (T, columns).
    """
    pitch = s.columns + -s.columns % 8
    whole = values.new_empty(s.rows, pitch)
    if s.encoding in (0, 1) and values.dtype in HALVES and not s.metadata.data_ptr() % 4:
        kernel(spread_request(values.dtype), values.device.index)(
            (-(-s.rows // 256), -(-pitch // 128)),
            256,
            (
                whole.data_ptr(),
                values.data_ptr(),
                s.metadata.data_ptr(),
                *map(np.int32, (s.rows, s.lines, s.packed, pitch)),
            ),
        )
        return torch.matmul(x, whole[:, : s.columns])
    depth = 32 if values.dtype == torch.float32 else 64
    kernel(expand_request(s, values.dtype), values.device.index)(
        (-(-s.rows // 64), -(-pitch // depth)),
        THREADS,
        (
            whole.data_ptr(),
            values.data_ptr(),
            s.metadata.data_ptr(),
            *map(np.int32, (s.rows, s.columns, s.lines, s.packed, pitch)),
        ),
    )
    return torch.matmul(x, whole[:, : s.columns])


def sddmm(values: Tensor, s: Stored, q: Tensor, k: Tensor) -> None:
    """Write q kᵀ at the slots, zero at dead ones.

    Args:
        values: (1, slots) of q's dtype.
        s: one matrix.
        q: (rows, T), any strides.
        k: (columns, T), any strides.
    """
    scores = torch.matmul(q, k.transpose(0, 1))
    kernel(sample_request(s, values.dtype), values.device.index)(
        (-(-s.lines // 64), -(-(s.packed // s.n * s.m) // 64)),
        THREADS,
        (
            values.data_ptr(),
            s.metadata.data_ptr(),
            scores.data_ptr(),
            *map(np.int32, (s.rows, s.columns, s.lines, s.packed, s.columns)),
        ),
    )
