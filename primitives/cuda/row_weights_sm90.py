"""The gradient of a layer's single entries on sm_90a, from rows of tokens: sddmm_pick_sm90."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.derived import derived
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import Argument, kernel

from ..plans import cuda_pick
from ..plans.plan import PartPlan
from .block_sm90 import CODES
from .dense_tile_sm90 import FEWER, TALL, cycles, launch, wide_of
from .parts import of_layer

# Entries whose tables are worth their memory: while they are made, some 60 bytes each.
MOST_ENTRIES = 1 << 27
# Cycles of an entry. What kernels that gather take to start, bytes that they turn, and of rows of
# features that they gather, in a cycle.
ENTRY, LAUNCHES, TURN, GATHER = 0.65, 17_600, 12, 33


def takes(part: PartPlan, q: Tensor, k: Tensor, keep: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether ``sddmm`` is for q (F, E, nq, T) and k (F, E, nk, T), rows of tokens transposed.

    And faster than gathering rows of features for each entry.
    """
    if part.kind != "crow" or not of_layer(keep, (dtype,), q, k):
        return False
    order = part.tensors[4]
    if order.dtype != torch.int32 or not 0 < order.numel() <= MOST_ENTRIES:
        return False
    if not facts(q.device.index).hopper:
        return False
    rows, columns, tokens = q.shape[2], k.shape[2], q.shape[3]
    several, positions = facts(q.device.index).multiprocessors, order.numel()
    turned = (rows + columns) * tokens * 4 / (TURN * several)
    gathered = positions * tokens * 2 / (GATHER * several)
    wide = wide_of(several, rows, columns, tokens)
    picked = ENTRY * positions / several + cycles(wide, several, rows, columns, tokens)
    return picked < LAUNCHES + turned + gathered


def sddmm(values: Tensor, q: Tensor, k: Tensor, part: PartPlan, scale: float) -> None:
    """Write scale · q kᵀ to the slots of a row part.

    Args:
        values: (F, slots), contiguous; the part's slots are written.
        q: (F, 1, nq, T), as ``takes`` says.
        k: (F, 1, nk, T), likewise.
        part: from ``plans.cuda_row``.
        scale: multiplies the products.
    """
    indices, items = part.tensors[:2]
    rows, columns, tokens = q.shape[2], k.shape[2], q.shape[3]
    several = facts(q.device.index).multiprocessors
    wide = wide_of(several, rows, columns, tokens)
    table = derived(
        items,
        ("picks", wide),
        lambda: cuda_pick.picks(items, indices, rows, columns, TALL, wide),
    )
    run, count = kernel(sddmm_request(wide, q.dtype), q.device.index), table.tiles.shape[0]

    def rest(out: Tensor) -> tuple[Argument, ...]:
        return (
            table.tiles.data_ptr(),
            np.int32(count),
            np.int32(out.shape[0]),
            table.spots.data_ptr(),
            table.slots.data_ptr(),
            out.data_ptr() + part.starts[0] * out.element_size(),
            np.int64(out.shape[1]),
            np.float32(scale),
            np.int32(tokens),
        )

    launch(run, values, q, k, rest, count, wide, staged=True)


@functools.lru_cache(maxsize=64)
def sddmm_request(wide: int, dtype: torch.dtype) -> Request:
    """The kernel."""
    constants = {"WIDE": wide, "STAGES": FEWER[wide], "DTYPE": CODES[dtype]}
    return request("sddmm_pick_sm90", constants, flush=True)
