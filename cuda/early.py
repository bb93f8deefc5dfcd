"""Launches that may begin while the one before them on the stream ends (sm_90 and later).

Programmatic dependent launch, CUDA C++ Programming Guide. A kernel launched so waits in its code
(`include/grids.cuh`) before it touches what earlier kernels write. CuPy's launcher knows no
attributes, so the driver is called directly.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from .device import driver
from .errors import CudaError

_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


def early(how: tuple[int, ...], stream: int, table: int) -> Callable[[], None]:
    """A launch that may begin while the kernel before it on the stream ends.

    Args:
        how: function, grid in x, y and z, threads of a CTA in x, y and z, dynamic shared memory.
        stream: the stream's address.
        table: address of the table of the arguments' addresses; it has to live as long.

    Returns:
        What launches it, raising CudaError when the driver refuses.
    """
    function, *sizes, shared = how
    attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (ctypes.c_int * 16)(1))
    grid, block = (ctypes.c_uint * 3)(*sizes[:3]), (ctypes.c_uint * 3)(*sizes[3:])
    config = _Config(grid, block, shared, stream, ctypes.pointer(attribute), 1)
    call = driver().cuLaunchKernelEx
    arguments = (
        ctypes.byref(config), ctypes.c_void_p(function), ctypes.c_void_p(table), ctypes.c_void_p(0),
    )  # fmt: skip

    def launch() -> None:
        status = call(*arguments)
        if status != 0:
            raise CudaError(f"cuLaunchKernelEx refused a launch (driver error {status})")

    return launch
