"""The gradient of a layer's blocks on sm_90a, from rows of tokens: sddmm_tokens_sm90."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.derived import derived
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import kernel

from ..plans import cuda_strips
from ..plans.plan import PartPlan
from . import tile_weights_sm90
from .block_sm90 import CODES, operand_map
from .parts import MOST_MATRICES, of_layer

STAGES = 3
# Dynamic shared memory of a CTA, bytes: stages, what results leave through, and room to align.
MEMORY = STAGES * (cuda_strips.ROWS + cuda_strips.COLUMNS) * 128 + 8 * 1024 + 1024
# Cycles of a CTA beside its steps, and bytes that a multiprocessor reads in a cycle where all do,
# by size of a block: TMA reads rows of 64 bytes slowly, of 32 more so.
START, READ = 6000, {16: 18, 32: 29}
# Of kernels for all devices: cycles to start, operands being turned first; bytes that they turn,
# and operations, in a cycle of a multiprocessor.
LAUNCHES, TURN, RATE = 17_600, 12, {16: 245, 32: 340}


def takes(part: PartPlan, q: Tensor, k: Tensor, keep: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether ``sddmm`` is for q (F, E, nq, T) and k (F, E, nk, T), rows of tokens transposed.

    And faster than the kernels for all devices, as it always is for blocks of 64 and 128.
    """
    if part.kind != "cblock" or not of_layer(keep, (dtype,), q, k):
        return False
    if not facts(q.device.index).hopper or part.starts[0] % 64:
        return False
    items, (size,) = part.tensors[0], part.scalars
    tokens, several = q.shape[3], facts(q.device.index).multiprocessors
    if not len(items):
        return False
    if size >= 64:
        return True
    picked = _picked(items, size, q, k)
    cost = tile_weights_sm90.cost(q, k) if picked else _cost(items, size, tokens, several)
    turned = (q.shape[2] + k.shape[2]) * tokens * 4 / TURN
    work = 2 * len(items) * size * size * tokens / RATE[size]
    return cost < LAUNCHES + (turned + work) / several


def _cost(items: Tensor, size: int, tokens: int, several: int) -> float:
    """Cycles of sddmm_tokens_sm90."""
    made = _strips(items, size)
    ctas = made.table.shape[0]
    read = (cuda_strips.ROWS + size * made.panels / ctas) * 128 / READ[size]
    return START + max(1, ctas / several) * -(-tokens // 64) * read


def _picked(items: Tensor, size: int, q: Tensor, k: Tensor) -> bool:
    """Whether sddmm_pick_tile_sm90 is for the blocks, which have to be whole, and faster."""
    if size != 16 or not tile_weights_sm90.possible(q, k, q.dtype):
        return False
    if not derived(items, "whole", lambda: bool((items[:, 3] < 0).all())):
        return False
    several = facts(q.device.index).multiprocessors
    return tile_weights_sm90.cost(q, k) < _cost(items, size, q.shape[3], several)


def sddmm(values: Tensor, q: Tensor, k: Tensor, part: PartPlan, scale: float) -> None:
    """Write scale · q kᵀ to the slots of a block part.

    Args:
        values: (F, slots), contiguous; the part's slots are written.
        q: (F, 1, nq, T), as ``takes`` says.
        k: (F, 1, nk, T), likewise.
        part: from ``plans.cuda_block``.
        scale: multiplies the products.
    """
    items, masks, (size,) = part.tensors[0], part.tensors[6], part.scalars
    if _picked(items, size, q, k):

        def places() -> tuple[Tensor, Tensor, Tensor]:
            order = torch.arange(len(items), dtype=torch.int32, device=items.device)
            return items[:, 1], items[:, 2], order

        tile_weights_sm90.sddmm(values, part.starts[0], q, k, items, places, scale, rows=True)
        return
    table, wide = _strips(items, size).table, min(size, 64)
    run = kernel(sddmm_request(size, q.dtype), q.device.index)
    for start in range(0, values.shape[0], MOST_MATRICES):
        out, left, right = (t[start : start + MOST_MATRICES] for t in (values, q, k))
        run(
            (table.shape[0], out.shape[0]),
            3 * 128,
            (
                operand_map(left.mT, 64),
                operand_map(right.mT, 64, wide),
                table.data_ptr(),
                masks.data_ptr(),
                out.data_ptr() + part.starts[0] * out.element_size(),
                np.int64(out.shape[1]),
                np.float32(scale),
                np.int32(q.shape[3]),
            ),
            MEMORY,
        )


def _strips(items: Tensor, size: int) -> cuda_strips.Strips:
    return derived(items, "strips", lambda: cuda_strips.strips(items, size))


@functools.lru_cache(maxsize=64)
def sddmm_request(size: int, dtype: torch.dtype) -> Request:
    """The kernel."""
    constants = {"SIZE": size, "DTYPE": CODES[dtype], "STAGES": STAGES}
    return request("sddmm_tokens_sm90", constants, flush=True)
