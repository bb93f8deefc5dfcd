"""Packing of listed rows into whole units."""

from __future__ import annotations

import functools

import numpy as np
from torch import Tensor

from mixgrain.cuda.compile import request
from mixgrain.cuda.launch import Kernel, kernel

#: gather_rows.cu: Operand.
OPERAND = np.dtype(
    [(name, np.int64) for name in ("from", "to", "batch", "head", "row", "bytes", "ratio")]
)
MOST = 3


@functools.lru_cache(maxsize=16)
def _kernel(device: int) -> Kernel:
    return kernel(request("gather_rows", {}), device)


def gather(operands: list[Tensor], rows: Tensor, patterns: Tensor) -> list[Tensor]:
    """Listed rows of each matrix, (B, Hp, n, D); zeros where nothing is listed.

    Args:
        operands: up to three (B, H, N, D), rows 16-byte aligned; H divides Hp.
        rows: int32 (U, n), −1 = none.
        patterns: int32 (B, Hp), the distinct pattern of each matrix, contiguous.
    """
    batch, heads = patterns.shape
    count = rows.shape[1]
    table = np.zeros(MOST, OPERAND)
    made = []
    for n, t in enumerate(operands):
        to = t.new_empty(batch, heads, count, t.shape[3])
        size = t.element_size()
        strides = (t.stride(0) * size, t.stride(1) * size, t.stride(2) * size)
        table[n] = (t.data_ptr(), to.data_ptr(), *strides, t.shape[3] * size, heads // t.shape[1])
        made.append(to)
    _kernel(rows.device.index)(
        (-(-count // 8), batch * heads, len(operands)),
        256,
        (
            table.view(f"V{MOST * OPERAND.itemsize}"),
            rows.data_ptr(),
            patterns.data_ptr(),
            np.int32(count),
            np.int32(heads),
        ),
    )
    return made
