"""Between rows of tokens, as users hold them, and rows of features, as some kernels take them."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.launch import kernel

from .parts import CODES

# A grid counts 32 rows each in y.
MOST_ROWS = 1 << 20


def turned(
    t: Tensor, columns: int, pitch: int, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """The transpose of (rows, at least columns) plus a bias, rounded: (columns, pitch).

    Args:
        t: columns are neighbours.
        columns: how many of them.
        pitch: rows and more; what is more is zero.
        dtype: of the result.
        bias: (rows,) of ``dtype``, contiguous, or None.
    """
    out = t.new_empty((columns, pitch), dtype=dtype)
    kernel(turn_request(t.dtype, dtype, bias is not None), t.device.index)(
        (-(-columns // 32), -(-pitch // 32)),
        256,
        (
            out.data_ptr(),
            t.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            np.int64(t.stride(0)),
            *map(np.int32, (t.shape[0], columns, pitch)),
        ),
    )
    return out


@functools.lru_cache(maxsize=64)
def turn_request(dtype: torch.dtype, out: torch.dtype, biased: bool) -> Request:
    """The kernel; no number is flushed, as by torch's own."""
    return request("turn", {"DTYPE": CODES[dtype], "OUT": CODES[out], "BIAS": int(biased)})
