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

from ..plans import cuda_pairs
from .block_sm90 import CODES, TILES, laid_out, operand_map, values_map

# Stages of S, of 64 inner positions of two lines, and of x; inner positions of the latter.
LEFT, RIGHT, DEPTH = 4, 6, 32
SHARED = LEFT * 2 * 8192 + RIGHT * cuda_pairs.GROUPS * cuda_pairs.WIDE * DEPTH * 2 + 1024
# Lines that are paired: every line is compared with every other.
MOST_LINES = 1024
# Where pairs ask for more than this of what lines ask for alone, they gain nothing.
SHARE = 0.9
# Groups of 128 columns times elements of a pair that a multiprocessor has to have for it.
LEAST = 16


class Paired(NamedTuple):
    """Pairs of lines, and their elements on the device."""

    found: cuda_pairs.Pairs
    elements: Tensor


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
        if len(found.elements) > SHARE * found.blocks:
            return None
        return Paired(found, torch.from_numpy(found.elements).to(records.device))

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
) -> bool:
    """Whether scale · S x, or Sᵀ x, was written (or added) here; see ``block_sm90.spmm``.

    Blocks are whole, of 64, and one entry's. Results are those of single lines, to the bit.
    """
    free, entries, rows, width = out.shape
    units, several = -(-width // cuda_pairs.WIDE), facts(x.device.index).multiprocessors
    # Pairs have no more elements than there are blocks.
    if entries > 1 or units < 2 or table.shape[0] * units * free < LEAST * several:
        return False
    lines = paired(table, records)
    if lines is None or len(lines.elements) * units * free < LEAST * several:
        return False
    x = laid_out(x)
    run = kernel(spmm_request(x.dtype, transposed, out.dtype == torch.float32), x.device.index)
    for start in range(0, free, step := max(1, TILES // (len(lines.found.lines) * units))):
        to, weights, right = (t[start : start + step] for t in (out, values, x))
        tiles = _tiles(lines, records, units, to.shape[0], several)
        run(
            (tiles.shape[0],),
            128 * cuda_pairs.GROUPS + 128,
            (
                values_map(weights, shift, 64, items),
                operand_map(right, DEPTH),
                lines.elements.data_ptr(),
                tiles.data_ptr(),
                np.int32(tiles.shape[1]),
                np.float32(scale),
                to.data_ptr(),
                np.int32(rows),
                np.int32(width),
                np.int32(add),
            ),
            SHARED,
        )
    return True


def _tiles(lines: Paired, records: Tensor, units: int, matrices: int, several: int) -> Tensor:
    """The tiles of each CTA, kept with the records."""

    def make() -> Tensor:
        made = cuda_pairs.tiles(lines.found, units, matrices, several)
        return torch.from_numpy(made).to(records.device)

    return derived(records, ("pair tiles", units, matrices, several), make)


@functools.lru_cache(maxsize=64)
def spmm_request(dtype: torch.dtype, transposed: bool, partial: bool) -> Request:
    """The kernel; ``partial`` writes float32."""
    constants = {
        "DTYPE": CODES[dtype],
        "STAGES_A": LEFT,
        "STAGES_B": RIGHT,
        "DEPTH": DEPTH,
        "TRANSPOSED": int(transposed),
        "PARTIAL": int(partial),
    }
    return request("spmm_pair_sm90", constants, flush=True)
