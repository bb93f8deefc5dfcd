"""Kernels of fused attention before they are asked for: the common ones, and those of a call."""

from __future__ import annotations

import contextlib
import functools

import torch

from mixgrain.cuda.compile import Request, build_all, request
from mixgrain.cuda.device import SHARED_BYTES, facts
from mixgrain.cuda.errors import MissingError
from mixgrain.primitives.cuda.parts import tf32

from . import choice, kernel, mma
from .merge import merge_request
from .planner import requests as planning
from .row import row_request
from .tables import walk_request

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
#: Dtypes and head dimensions of the common calls.
DTYPES = (HALF, BRAIN, FLOAT)
WIDTHS = (64, 128)
THREADS = 8


def requests(arch: str) -> list[Request]:
    """The kernels that calls of these kinds ask for on an architecture, each once.

    Args:
        arch: one of ``mixgrain.cuda.compile.ARCHITECTURES``.
    """
    found = [request("gather_rows", {}), *planning(), walk_request()]
    for dtype in DTYPES:
        for width in WIDTHS:
            found += _units(arch, dtype, width, False, False)
            pieces = width * dtype.itemsize // 16
            for few in (False, True):
                found.append(row_request(dtype, pieces, pieces, False, False, few))
    return list(dict.fromkeys(found))


def _units(arch: str, dtype: torch.dtype, width: int, masked: bool, rounded: bool) -> list[Request]:
    """What computes units and merges what they leave."""
    if choice.UNIT_KERNELS[arch][dtype] == "sm90":
        units = kernel.fused_request(dtype, kernel.cut(width), masked)
    else:
        how = mma.cut(dtype, width, rounded, SHARED_BYTES[arch])
        units = mma.fused_request(dtype, how, rounded)
    return [merge_request(dtype, width), units]


@functools.cache
def compile_together(index: int, dtype: torch.dtype, width: int, masked: bool) -> None:
    """Compile side by side what a call of units asks for one after the other.

    What is missing, or cannot be written, is said by whoever asks for a kernel.

    Args:
        index: torch's index of the device.
        dtype: of q, k and v.
        width: head dimension.
        masked: whether there is a mask of keys.
    """
    arch = facts(index).arch
    wanted = [request("gather_rows", {}), *planning(), walk_request()]
    wanted += _units(arch, dtype, width, masked, tf32(dtype))
    with contextlib.suppress(MissingError, OSError):
        build_all([(each, arch) for each in wanted], THREADS)
