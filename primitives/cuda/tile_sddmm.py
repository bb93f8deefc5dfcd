"""Values of the kept tiles of a product of dense matrices on CUDA: gradients of weights."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.derived import derived
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import kernel
from mixgrain.formats.tile import SIZE

from ..plans import cuda_tile
from ..plans.plan import PartPlan
from . import block, tile_weights_sm90
from .block_sm90 import laid_out
from .parts import CODES, HALVES, MOST_MATRICES, aligned, in_tokens
from .tile_tables import blocks_of, rows_first

# Microseconds of sddmm_tile on an H200: of a call, and of each place of a tile and each tile; of
# these for a token, in matrices that fill the device; of a token and of a tile for it in others.
CALL, PLACE, TILE = 7.0, 4e-5, 1.1e-4
PLACES, TILES = 7.25e-7, 1.85e-6
ALONE, SMALL = 0.0165, 1e-5


def sddmm(
    q: Tensor,
    k: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    part: PartPlan,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Scale · q kᵀ at every slot: (F, 1, nq, D), (F, 1, nk, D) -> (F, slots)."""
    rows, columns = part.scalars
    free = q.shape[0]
    values = q.new_empty((free, part.starts[-1]), dtype=dtype)
    if keep is not None or q.dtype not in HALVES or dtype not in (q.dtype, torch.float32):
        q, k = aligned(q), aligned(k)
        block.sddmm(values, q, k, keep, keep_rows, blocks_of(part), scale)
        return rows_first(values, back=True)
    bounds, cells = part.tensors[:2]
    if _picked(part, q, k, dtype):

        def places() -> tuple[Tensor, Tensor, Tensor]:
            return cuda_tile.lines_of(bounds), cells[:, 0], cells[:, 1]

        tile_weights_sm90.sddmm(values, 0, q, k, cells, places, scale, rows=False)
        return values
    deep = in_tokens(q) and in_tokens(k)
    q, k = (laid_out(aligned(t.mT)).mT if deep else laid_out(aligned(t)) for t in (q, k))
    device = q.device.index
    large = _large(rows, columns, free, facts(device).multiprocessors)
    side, warps, each, span = sampling(large, facts(device).shared_bytes)
    across = -(-columns // SIZE)
    chunks, listed = derived(
        cells,
        ("regions", side),
        lambda: cuda_tile.regions(bounds, cells, side, warps * each, across),
    )
    wanted = sddmm_request(side, q.dtype, dtype, deep, warps, each, span)
    run = kernel(wanted, device)
    shared = sddmm_shared(side, span, deep)
    for start in range(0, free, MOST_MATRICES):
        to, left, right = (t[start : start + MOST_MATRICES] for t in (values, q, k))
        line = 3 if deep else 2
        run(
            (chunks.shape[0], to.shape[0]),
            32 * warps,
            (
                to.data_ptr(),
                np.int64(to.shape[1]),
                left.data_ptr(),
                np.int64(left.stride(0)),
                np.int64(left.stride(line)),
                right.data_ptr(),
                np.int64(right.stride(0)),
                np.int64(right.stride(line)),
                chunks.data_ptr(),
                listed.data_ptr(),
                np.int32(-(-across // side)),
                np.int32(rows),
                np.int32(columns),
                np.int32(q.shape[3]),
                np.float32(scale),
            ),
            shared,
        )
    return values


def _picked(part: PartPlan, q: Tensor, k: Tensor, dtype: torch.dtype) -> bool:
    """Whether picking tiles out of dense ones on wgmma is faster than products of tiles alone.

    Whatever the number of matrices: sums are added up in another order.
    """
    if not tile_weights_sm90.possible(q, k, dtype):
        return False
    rows, columns = part.scalars
    places, tiles = -(-rows // SIZE) * -(-columns // SIZE), len(part.tensors[1])
    large = _large(rows, columns, 1, facts(q.device.index).multiprocessors)
    token = PLACES * places + TILES * tiles if large else ALONE + SMALL * tiles
    alone = CALL + PLACE * places + TILE * tiles + token * q.shape[3]
    return tiles > 0 and tile_weights_sm90.microseconds(q, k) < alone


def _large(rows: int, columns: int, free: int, several: int) -> bool:
    """Whether regions of 256 × 256 are enough for the device."""
    return -(-rows // 256) * -(-columns // 256) * free >= 0.7 * several


def sampling(large: bool, shared_bytes: int) -> tuple[int, int, int, int]:
    """SIDE, WARPS, EACH and SPAN of sddmm_tile for devices of so much shared memory."""
    if not large:
        return 4, 4, 4, 64
    return 16, 16, 5, 64 if shared_bytes >= 227_000 else 32 if shared_bytes >= 160_000 else 16


def sddmm_shared(side: int, span: int, deep: bool) -> int:
    """Dynamic shared memory of sddmm_tile, bytes."""
    lines = SIZE * side
    pitched = span * (lines + 8) if deep else lines * (span + 8)
    return 3 * 2 * pitched * 2


@functools.lru_cache(maxsize=256)
def sddmm_request(
    side: int, dtype: torch.dtype, out: torch.dtype, deep: bool, warps: int, each: int, span: int
) -> Request:
    """The sddmm kernel; ``deep`` where rows of q and k are neighbours."""
    constants = {"SIDE": side, "DTYPE": CODES[dtype], "OUT": CODES[out], "DEEP": int(deep)}
    return request(
        "sddmm_tile", constants | {"WARPS": warps, "EACH": each, "SPAN": span}, flush=True
    )
