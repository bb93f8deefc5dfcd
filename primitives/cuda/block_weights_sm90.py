"""The gradient of a layer's blocks of 64 or 128 on sm_90a, from rows of tokens."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.derived import derived
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import kernel

from ..plans import cuda_block
from ..plans.plan import PartPlan
from .block_sm90 import CODES, operand_map, runs_here
from .parts import MOST_MATRICES, ready
from .tile_tables import in_tokens

STAGES = 3
# Dynamic shared memory of a CTA, bytes: stages, what results leave through, and room to align.
MEMORY = STAGES * (1 + cuda_block.PANELS) * 64 * 128 + 8 * 1024 + 1024
# Up to this many tokens CTAs of other kernels hold all of a row.
FEW = 256


def takes(part: PartPlan, q: Tensor, k: Tensor, keep: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether ``sddmm`` is for q (F, E, nq, T) and k (F, E, nk, T), rows of tokens transposed."""
    if part.kind != "cblock" or keep is not None or q.shape[1] > 1 or q.shape[3] <= FEW:
        return False
    if part.scalars[0] < 64 or not part.tensors[0].shape[0] or part.starts[0] % 64:
        return False
    if not (runs_here(8, q.dtype, k.dtype, dtype) and facts(q.device.index).hopper):
        return False
    return all(in_tokens(t) and ready(t, 2, 3) for t in (q, k))


def sddmm(values: Tensor, q: Tensor, k: Tensor, part: PartPlan, scale: float) -> None:
    """Write scale · q kᵀ to the slots of a block part.

    Args:
        values: (F, slots), contiguous; the part's slots are written.
        q: (F, 1, nq, T), as ``takes`` says.
        k: (F, 1, nk, T), likewise.
        part: from ``plans.cuda_block``.
        scale: multiplies the products.
    """
    items, row_ptr, masks = part.tensors[0], part.tensors[1], part.tensors[6]
    (size,) = part.scalars
    table = derived(items, "panels", lambda: cuda_block.panels(items, row_ptr, size))
    run = kernel(sddmm_request(size, q.dtype), q.device.index)
    for start in range(0, values.shape[0], MOST_MATRICES):
        out, left, right = (t[start : start + MOST_MATRICES] for t in (values, q, k))
        run(
            (table.shape[0], out.shape[0]),
            3 * 128,
            (
                operand_map(left.mT, 64),
                operand_map(right.mT, 64),
                table.data_ptr(),
                masks.data_ptr(),
                out.data_ptr() + part.starts[0] * out.element_size(),
                np.int64(out.shape[1]),
                np.float32(scale),
                np.int32(q.shape[3]),
            ),
            MEMORY,
        )


@functools.lru_cache(maxsize=64)
def sddmm_request(size: int, dtype: torch.dtype) -> Request:
    """The kernel."""
    constants = {"SIZE": size, "DTYPE": CODES[dtype], "STAGES": STAGES}
    return request("sddmm_tokens_sm90", constants, flush=True)
