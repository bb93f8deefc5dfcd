"""Rows of tokens, as users hold them, as rows of features, as some kernels take them."""

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


def turned(t: Tensor, pitch: int) -> Tensor:
    """The transpose of (rows, columns): (columns, pitch).

    Args:
        t: columns are neighbours.
        pitch: rows and more; what is more is zero.
    """
    rows, columns = t.shape
    out = t.new_empty((columns, pitch))
    kernel(turn_request(t.dtype), t.device.index)(
        (-(-columns // 32), -(-pitch // 32)),
        256,
        (
            out.data_ptr(),
            t.data_ptr(),
            np.int64(t.stride(0)),
            *map(np.int32, (rows, columns, pitch)),
        ),
    )
    return out


@functools.lru_cache(maxsize=16)
def turn_request(dtype: torch.dtype) -> Request:
    """The kernel; no number is flushed, as by torch's own."""
    return request("turn", {"DTYPE": CODES[dtype]})
