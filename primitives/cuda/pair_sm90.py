"""Whole blocks on Hopper, two lines of them at a time: spmm_pair_sm90."""

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
from .block_sm90 import CODES, blocks_map, boxed, laid_out, panels_map


class Cut(NamedTuple):
    """How a product is cut.

    Attributes:
        across: columns of x of a tile.
        depth: inner positions of a stage of x.
        left: stages of S, of 64 inner positions.
        right: stages of x.
    """

    across: int
    depth: int
    left: int
    right: int

    def memory(self, size: int) -> int:
        """Dynamic shared memory of a CTA, bytes."""
        return self.left * size * 128 + self.right * self.across * self.depth * 2 + 1024


# By the side of a block.
CUTS = {64: Cut(512, 32, 4, 6), 128: Cut(256, 32, 4, 10)}
THREADS = 3 * 128
# Lines that are paired: every line is compared with every other.
MOST_LINES = 512
# Where pairs ask for more than this of what lines ask for alone, they gain nothing.
SHARE = 0.9
# Tiles of pairs of one launch, whose lists take 32 bytes each.
TILES = 1 << 18
# Elements of pairs, by tile, that a cluster has to have for it.
LEAST = 8


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
    size: int,
    items: int,
    table: Tensor,
    records: Tensor,
    transposed: bool,
    scale: float,
    add: bool,
) -> bool:
    """Whether scale · S x, or Sᵀ x, was written (or added) here; see ``block_sm90.spmm``.

    Blocks are whole, and one entry's. Results are those of single lines, to the bit.
    """
    free, entries, rows, width = out.shape
    cut, clusters = CUTS[size], max(1, facts(x.device.index).multiprocessors // 2)
    across = -(-width // cut.across)
    # Pairs have no more elements than there are blocks.
    if entries > 1 or width <= 128 or not boxed(width):
        return False
    if table.shape[0] * across * free < LEAST * clusters:
        return False
    lines = paired(table, records)
    if lines is None or len(lines.elements) * across * free < LEAST * clusters:
        return False
    x = laid_out(x)
    wanted = spmm_request(size, x.dtype, transposed, out.dtype == torch.float32)
    run = kernel(wanted, x.device.index)
    for start in range(0, free, step := max(1, TILES // (len(lines.found.partners) * across))):
        to, weights, right = (t[start : start + step] for t in (out, values, x))
        tiles = _tiles(lines, records, size, across, to.shape[0], clusters)
        run(
            (tiles.shape[0],),
            THREADS,
            (
                blocks_map(weights, shift, size, items, transposed),
                panels_map(right, cut.depth, cut.across // 128),  # half a stage a copy
                lines.elements.data_ptr(),
                tiles.data_ptr(),
                np.int32(tiles.shape[1]),
                np.int32(across),
                np.float32(scale),
                to.data_ptr(),
                np.int32(rows),
                np.int32(width),
                np.int32(add),
            ),
            cut.memory(size),
        )
    return True


def _tiles(
    lines: Paired, records: Tensor, size: int, across: int, matrices: int, clusters: int
) -> Tensor:
    """The tiles of each CTA, kept with the records."""

    def make() -> Tensor:
        wide = CUTS[size].across
        made = cuda_pairs.tiles(lines.found, size, wide, across, matrices, clusters)
        return torch.from_numpy(made).to(records.device)

    return derived(records, ("pair tiles", size, across, matrices, clusters), make)


@functools.lru_cache(maxsize=64)
def spmm_request(size: int, dtype: torch.dtype, transposed: bool, partial: bool) -> Request:
    """The kernel; ``partial`` writes float32."""
    cut = CUTS[size]
    constants = {
        "SIZE": size,
        "DTYPE": CODES[dtype],
        "DEPTH": cut.depth,
        "STAGES_A": cut.left,
        "STAGES_B": cut.right,
        "TRANSPOSED": int(transposed),
        "PARTIAL": int(partial),
    }
    return request("spmm_pair_sm90", constants, flush=True)
