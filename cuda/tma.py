"""Descriptors for the tensor memory accelerator (TMA) of sm_90 and later.

A kernel takes a descriptor by value (``const __grid_constant__``); CuPy passes a numpy array of one
128-byte element as such. Encoding touches no device and takes about a microsecond; prepared calls
keep descriptors by address.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from .device import driver
from .errors import CudaError
from .steps import Address, Map

_DTYPE = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
# Bytes of the swizzled row to the driver's code: 0 none, then 32, 64, 128.
_SWIZZLE = {0: 0, 32: 1, 64: 2, 128: 3}
_L2_PROMOTION_256 = 3


def descriptor(
    pointer: int | Address,
    dtype: torch.dtype,
    dims: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int = 128,
) -> np.ndarray:
    """A tiled tensor map, elements outside the tensor read as zero.

    Args:
        pointer: address of the first element, a multiple of 16; or its symbol.
        dtype: float16, bfloat16 or float32.
        dims: elements of each dimension, innermost first, at most 5.
        strides: bytes from one index to the next of every dimension but the innermost; multiples
            of 16 where there are several.
        box: elements of each dimension that one copy brings, each at most 256; the innermost at
            most `swizzle` bytes.
        swizzle: 0, 32, 64 or 128 bytes.

    Returns:
        A numpy array of shape (1,) and 128 bytes, an argument to pass by value; for a symbol a
        `Map` to be encoded later.

    Raises:
        CudaError: the driver refused the combination.
    """
    # Of a single index there is nowhere to go; views have any number there.
    strides = tuple(16 if n == 1 else step for n, step in zip(dims[1:], strides, strict=True))
    if isinstance(pointer, Address):
        # Launch code only passes it on.
        return Map(pointer, dtype, dims, strides, box, swizzle)  # type: ignore[return-value]
    raw = np.zeros(256, np.uint8)
    start = -raw.ctypes.data % 128
    place = raw[start : start + 128]
    rank = len(dims)
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(place.ctypes.data),
        ctypes.c_int(_DTYPE[dtype]),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * rank)(*dims),
        (ctypes.c_uint64 * max(rank - 1, 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*([1] * rank)),
        ctypes.c_int(0),
        ctypes.c_int(_SWIZZLE[swizzle]),
        ctypes.c_int(_L2_PROMOTION_256),
        ctypes.c_int(0),
    )
    if status != 0:
        raise CudaError(
            f"TMA descriptor refused (driver error {status}): address {pointer:#x}, dims {dims}, "
            f"strides {strides}, box {box}, swizzle {swizzle}; addresses and strides must be "
            "multiples of 16 bytes"
        )
    view: np.ndarray = place.view("V128")
    return view
