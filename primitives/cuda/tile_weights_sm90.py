"""The gradient of a layer's 16 × 16 tiles on sm_90a, from rows of tokens: sddmm_pick_tile_sm90."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.derived import derived
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import Argument, kernel
from mixgrain.formats.tile import SIZE

from ..plans.cuda_numbers import numbers
from .block_sm90 import CODES
from .dense_tile_sm90 import STAGES, TALL, cycles, launch, wide_of
from .parts import of_layer

# Places that numbers are of at most.
MOST_PLACES = 1 << 24
# Microseconds of a call beside its dense tiles; cycles of one.
CALL, CLOCK = 4.0, 1850


def possible(q: Tensor, k: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``sddmm`` is for q (F, E, nq, T) and k (F, E, nk, T), rows of tokens transposed."""
    if not of_layer(None, (dtype,), q, k) or not facts(q.device.index).hopper:
        return False
    return -(-q.shape[2] // SIZE) * -(-k.shape[2] // SIZE) <= MOST_PLACES


def cost(q: Tensor, k: Tensor) -> float:
    """Cycles of one matrix that keeps something of every dense tile."""
    given = facts(q.device.index).multiprocessors, q.shape[2], k.shape[2], q.shape[3]
    return cycles(wide_of(*given), *given)


def microseconds(q: Tensor, k: Tensor) -> float:
    """The same with what a call takes besides, on an H200."""
    return CALL + cost(q, k) / CLOCK


def sddmm(
    values: Tensor,
    shift: int,
    q: Tensor,
    k: Tensor,
    source: Tensor,
    places: Callable[[], tuple[Tensor, Tensor, Tensor]],
    scale: float,
    rows: bool,
) -> None:
    """Write scale · q kᵀ at the tiles.

    Args:
        values: (F, slots) of q's dtype, rows at 16 bytes.
        shift: slot of the first tile, a multiple of 8.
        q: (F, 1, nq, T), as ``possible`` says.
        k: (F, 1, nk, T), likewise.
        source: a tensor of the plan, with which what is derived is kept.
        places: tile rows, tile columns and numbers in memory of the tiles.
        scale: multiplies the products.
        rows: a tile's values are row after row, not in fragment order.
    """
    several, down, over = facts(q.device.index).multiprocessors, q.shape[2], k.shape[2]
    wide = wide_of(several, down, over, q.shape[3])
    found = derived(
        source,
        ("numbers", wide),
        lambda: numbers(*places(), -(-down // SIZE), -(-over // SIZE), TALL, wide),
    )
    run, count = kernel(sddmm_request(wide, q.dtype, rows), q.device.index), found.tiles.shape[0]

    def rest(out: Tensor) -> tuple[Argument, ...]:
        return (
            found.tiles.data_ptr(),
            found.numbers.data_ptr(),
            np.int32(count),
            np.int32(out.shape[0]),
            out.data_ptr() + shift * out.element_size(),
            np.int64(out.stride(0)),
            np.float32(scale),
            *map(np.int32, (q.shape[3], down, over)),
        )

    launch(run, values, q, k, rest, count, wide, staged=False)


@functools.lru_cache(maxsize=64)
def sddmm_request(wide: int, dtype: torch.dtype, rows: bool) -> Request:
    """The kernel."""
    constants = {"WIDE": wide, "STAGES": STAGES[wide], "DTYPE": CODES[dtype], "ROWS": int(rows)}
    return request("sddmm_pick_tile_sm90", constants, flush=True)
