"""The common kernels of fused attention, for ``mixgrain warm``."""

from __future__ import annotations

import torch

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.device import SHARED_BYTES

from . import choice, kernel, mma
from .merge import merge_request
from .planner import requests as planning
from .row import row_request
from .tables import walk_request

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
#: Dtypes and head dimensions of the common calls.
DTYPES = (HALF, BRAIN, FLOAT)
WIDTHS = (64, 128)


def requests(arch: str) -> list[Request]:
    """The kernels that calls of these kinds ask for on an architecture, each once.

    Args:
        arch: one of ``mixgrain.cuda.compile.ARCHITECTURES``.
    """
    found = [request("gather_rows", {}), *planning(), walk_request()]
    for dtype in DTYPES:
        for width in WIDTHS:
            found.append(merge_request(dtype, width))
            if choice.UNIT_KERNELS[arch][dtype] == "sm90":
                found.append(kernel.fused_request(dtype, kernel.cut(width)))
            else:
                how = mma.cut(dtype, width, False, SHARED_BYTES[arch])
                found.append(mma.fused_request(dtype, how, False))
            pieces = width * dtype.itemsize // 16
            for few in (False, True):
                found.append(row_request(dtype, pieces, pieces, False, False, few))
    return list(dict.fromkeys(found))
