"""Whole blocks of 64 on Hopper, two lines of them at a time: spmm_pair_sm90."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.derived import derived
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import kernel
from mixgrain.cuda.tma import descriptor

from ..plans import cuda_pairs
from .block_sm90 import (
    CODES,
    Tokens,
    bias_of,
    end_of,
    laid_out,
    right_map,
    token_constants,
    values_map,
)

# Side of a block, columns of x of a tile.
SIZE, ACROSS = 64, 512
# Stages of blocks; inner positions of the stages of x, and of one of them. TMA reads whole lines.
LEFT, RIGHT, DEPTH, TOKEN_DEPTH = 3, 192, 32, 64
# Dynamic shared memory of a CTA, bytes: the rings, what results leave through, and room to align.
MEMORY = LEFT * SIZE * 128 + RIGHT * ACROSS * 2 + 8 * 1024 + 1024
THREADS = 3 * 128
# Lines that are paired: every line is compared with every other.
MOST_LINES = 512
# Where pairs ask for more than this of what lines ask for alone, they gain nothing.
SHARE = 0.9
# Tiles of pairs of one launch, whose lists take 32 bytes each.
TILES = 1 << 18
# Blocks that a line has to have, on average.
LEAST = 6
# Tiles of rows of tokens, for each multiprocessor.
ENOUGH = 1.5


class Paired(NamedTuple):
    """Pairs of lines, and their steps on the device."""

    found: cuda_pairs.Pairs
    steps: Tensor


def paired(table: Tensor, records: Tensor) -> Paired | None:
    """The pairs of a plan's lines; None where they would bring in about as much as single lines.

    Args:
        table: int32 (n, 4) of ``plans.cuda_block``, of the columns when transposed.
        records: int32 (lines, 3) of it, likewise.
    """

    def make() -> Paired | None:
        if not 1 < records.shape[0] <= MOST_LINES or not table.shape[0]:
            return None
        found = cuda_pairs.pairs(table.cpu().numpy(), records.cpu().numpy())
        if found.reads.sum() > SHARE * found.blocks:
            return None
        return Paired(found, torch.from_numpy(found.steps).to(records.device))

    return derived(records, "pairs", make)


def spmm(
    out: Tensor,
    values: Tensor,
    x: Tensor,
    shift: int,
    items: int,
    table: Tensor,
    records: Tensor,
    transposed: bool,
    scale: float,
    add: bool,
    tokens: Tokens | None = None,
) -> bool:
    """Whether scale · S x, or Sᵀ x, was written (or added) here; see ``block_sm90.spmm``.

    Blocks are whole and of 64, and one entry's. Results are those of single lines, to the bit.
    """
    free, entries, rows, width = out.shape
    clusters, across = max(1, facts(x.device.index).multiprocessors // 2), -(-width // ACROSS)
    if entries > 1 or width <= 128 or (width % 64 and not tokens):
        return False
    if table.shape[0] < LEAST * records.shape[0]:
        return False
    if tokens and free * records.shape[0] * across < 2 * ENOUGH * clusters:
        return False
    lines = paired(table, records)
    if lines is None:
        return False
    x = laid_out(x)
    wanted = spmm_request(x.dtype, transposed, out.dtype == torch.float32, end_of(tokens))
    run = kernel(wanted, x.device.index)
    for start in range(0, free, step := max(1, TILES // (len(lines.found.partners) * across))):
        to, weights, right = (t[start : start + step] for t in (out, values, x))
        tiles = _tiles(lines, records, across, to.shape[0], clusters)
        run(
            (tiles.shape[0],),
            THREADS,
            (
                values_map(weights, shift, SIZE, items),
                *_right_maps(right, tokens),
                lines.steps.data_ptr(),
                tiles.data_ptr(),
                np.int32(tiles.shape[1]),
                np.int32(across),
                np.float32(scale),
                bias_of(tokens),
                to.data_ptr(),
                np.int32(rows),
                np.int32(width),
                np.int32(add),
            ),
            MEMORY,
        )
    return True


def _right_maps(x: Tensor, tokens: Tokens | None) -> tuple[np.ndarray, np.ndarray]:
    """X (F, 1, inner, D) in boxes of a stage, and of half of one."""
    if tokens:
        half = right_map(x, TOKEN_DEPTH, ACROSS // 2, tokens)
        return half, half
    return _panels_map(x, ACROSS // 64), _panels_map(x, ACROSS // 128)


def _panels_map(t: Tensor, panels: int) -> np.ndarray:
    """(F, 1, N, D), any strides but the last, in boxes of panels of 64 columns × a stage's rows."""
    free, _, n, width = t.shape
    batch, row = (t.stride(d) * t.element_size() for d in (0, 2))
    dims, box = (64, n, width // 64, free), (64, DEPTH, panels, 1)
    return descriptor(t.data_ptr(), t.dtype, dims, (row, 128, batch), box)


def _tiles(lines: Paired, records: Tensor, across: int, matrices: int, clusters: int) -> Tensor:
    """The tiles of each CTA, kept with the records."""

    def make() -> Tensor:
        made = cuda_pairs.tiles(lines.found, SIZE, ACROSS, across, matrices, clusters)
        return torch.from_numpy(made).to(records.device)

    return derived(records, ("pair tiles", across, matrices, clusters), make)


@functools.lru_cache(maxsize=64)
def spmm_request(
    dtype: torch.dtype, transposed: bool, partial: bool, tokens: int | None = None
) -> Request:
    """The kernel; ``partial`` writes float32."""
    depth = DEPTH if tokens is None else TOKEN_DEPTH
    constants = {
        "DTYPE": CODES[dtype],
        "DEPTH": depth,
        "STAGES_A": LEFT,
        "STAGES_B": RIGHT // depth,
        "TRANSPOSED": int(transposed),
        "PARTIAL": int(partial),
    }
    constants |= token_constants(tokens)
    return request("spmm_pair_sm90", constants, flush=True)
