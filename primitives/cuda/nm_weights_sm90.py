"""The gradient of a layer's 2:4 or 1:2 halves on sm_90a, from rows of tokens."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import Argument, kernel

from .block_sm90 import CODES
from .dense_tile_sm90 import FEWER, TALL, launch, wide_of
from .nm_stored import Stored
from .parts import of_layer


def takes(s: Stored, q: Tensor, k: Tensor, keep: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether ``sddmm`` is for q (F, E, rows, T) and k (F, E, columns, T), rows of tokens."""
    if s.encoding not in (0, 1) or not of_layer(keep, (dtype,), q, k):
        return False
    if s.metadata.data_ptr() % 4 or not s.packed:
        return False
    return facts(q.device.index).hopper


def sddmm(values: Tensor, s: Stored, q: Tensor, k: Tensor, scale: float) -> None:
    """Write scale · q kᵀ at the slots, zero at dead ones.

    Args:
        values: (F, slots) of q's dtype, contiguous.
        s: one matrix, 2:4 or 1:2 in 16 bits.
        q: (F, 1, rows, T), as ``takes`` says.
        k: (F, 1, columns, T), likewise.
        scale: multiplies the products.
    """
    columns, tokens, several = 2 * s.packed, q.shape[3], facts(q.device.index).multiprocessors
    wide = wide_of(several, s.lines, columns, tokens)
    run = kernel(sddmm_request(wide, q.dtype), q.device.index)
    across, down = -(-columns // wide), -(-s.lines // TALL)

    def rest(out: Tensor) -> tuple[Argument, ...]:
        return (
            s.metadata.data_ptr(),
            np.int32(across),
            np.int32(across * down * out.shape[0]),
            out.data_ptr(),
            np.int64(out.shape[1]),
            np.float32(scale),
            *map(np.int32, (tokens, s.rows, s.columns, s.lines, s.packed)),
        )

    launch(run, values, q, k, rest, across * down, wide, staged=True)


@functools.lru_cache(maxsize=64)
def sddmm_request(wide: int, dtype: torch.dtype) -> Request:
    """The kernel."""
    constants = {"WIDE": wide, "STAGES": FEWER[wide], "DTYPE": CODES[dtype]}
    return request("sddmm_pick_nm_sm90", constants, flush=True)
