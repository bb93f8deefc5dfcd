"""Packing of listed rows into whole units."""

from __future__ import annotations

import functools

import numpy as np
from torch import Tensor

from mixgrain.cuda.compile import request
from mixgrain.cuda.launch import Kernel, kernel
from mixgrain.cuda.steps import by_value

#: gather_rows.cu: Operand.
_LONGS = ("from", "to", "list", "patterns", "batch", "head", "row", "bytes")
_INTS = ("ratio", "heads", "count", "matrices")
OPERAND = np.dtype([*((name, np.int64) for name in _LONGS), *((name, np.int32) for name in _INTS)])
MOST = 3


@functools.lru_cache(maxsize=16)
def _kernel(device: int) -> Kernel:
    return kernel(request("gather_rows", {}), device)


def gather(*wanted: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Listed rows of each matrix, (B, Hp, n, D) for every operand; zeros where nothing is listed.

    Args:
        wanted: one to three of:
            an operand (B, H, N, D), rows 16-byte aligned, H divides Hp;
            its rows, int32 (U, n), −1 = none;
            the distinct pattern of each matrix, int32 (B, Hp), contiguous.
    """
    table = np.zeros(MOST, OPERAND)
    made, places = [], []
    for n, (t, rows, patterns) in enumerate(wanted):
        (batch, heads), count = patterns.shape, rows.shape[1]
        to = t.new_empty(batch, heads, count, t.shape[3])
        size = t.element_size()
        strides = (t.stride(0) * size, t.stride(1) * size, t.stride(2) * size)
        counts = (heads // t.shape[1], heads, count, batch * heads)
        table[n] = (0, 0, 0, 0, *strides, t.shape[3] * size, *counts)
        pointers = (p.data_ptr() for p in (t, to, rows, patterns))
        places += [(n * OPERAND.itemsize + 8 * i, p) for i, p in enumerate(pointers)]
        made.append(to)
    most = max(rows.shape[1] for _, rows, _ in wanted)
    matrices = max(patterns.numel() for _, _, patterns in wanted)
    _kernel(wanted[0][1].device.index)(
        (-(-most // 8), matrices, len(wanted)),
        256,
        (by_value(table.view(f"V{MOST * OPERAND.itemsize}"), places),),
    )
    return made
