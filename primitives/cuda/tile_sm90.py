"""TileLayout on sm_90a, for many columns: spmm_tile_sm90."""

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
from mixgrain.formats.tile import SIZE

from ..plans import cuda_tile_stages
from .block_sm90 import CODES, walked
from .parts import activation_constant

# Bytes of stages of a CTA.
ROOM = 192 * 1024
# Most stages.
STAGES = 12
# Clocks of a microsecond; of a call, and of a tile of the result beside its stages.
CLOCK, CALL, TILE = 1755, 12_000, 2500
# Of a stage, from one product to the next: of a warpgroup that is alone, and how much of it is left
# for each when others multiply meanwhile; the share of the products that they do not hide. What
# products take of their own at best. Bytes that a multiprocessor takes in in a clock.
ALONE, EACH, BARE, BEST, READ = 250, 80, 0.65, 1.2, 55
# The share of all tiles from which it is faster than spmm_tile, which multiplies by nothing else
# than tiles; by whether x has rows of tokens.
LARGE = {True: 0.05, False: 0.12}


class Cut(NamedTuple):
    """How the product is cut.

    Attributes:
        groups: warpgroups of a CTA, four lines of tiles each.
        wide: columns of x.
    """

    groups: int
    wide: int

    def stage(self, capacity: int) -> int:
        """Bytes of a stage of x and so many tiles."""
        return self.wide * 128 + capacity * 512

    def stages(self, capacity: int) -> int:
        """Of a CTA."""
        return min(STAGES, ROOM // self.stage(capacity))

    def shared(self, capacity: int, tokens: bool) -> int:
        """Dynamic shared memory of a CTA, bytes: what rows of tokens leave through, too."""
        staging, stages = 4096 * self.groups if tokens else 0, self.stages(capacity)
        # Barriers, notes and lists of spmm_tile_sm90.
        rest = 16 * stages + 96 + 32 * self.groups * stages + 48 * (4 + capacity)
        return stages * self.stage(capacity) + staging + rest + 1024


# The ways to cut it.
CUTS = (Cut(4, 128), Cut(2, 128), Cut(2, 64))


def takes(x: Tensor, rows: int, tables: list[Tensor], dtype: torch.dtype, tokens: bool) -> bool:
    """Whether ``spmm`` is for results of x (F, 1, inner, D), halves, once it is aligned.

    And faster than spmm_tile.
    """
    if not facts(x.device.index).hopper or (tokens and (rows % 8 or dtype != x.dtype)):
        return False
    bounds, cells = tables
    return len(cells) >= LARGE[tokens] * (bounds.numel() - 1) * -(-x.shape[2] // SIZE)


def choose(several: int, lines: int, tiles: int, inner: int, width: int, free: int) -> Cut:
    """The cut of least cost; however it is cut, it adds up in the same order."""
    return min(CUTS, key=lambda cut: cost(cut, several, lines, tiles, inner, width, free))


def cost(
    cut: Cut, several: int, lines: int, tiles: int, inner: int, width: int, free: int
) -> float:
    """Microseconds of a product with tiles at random, by measurements on an H200."""
    density = min(1.0, tiles / max(1, lines * -(-inner // SIZE)))
    per, four = cuda_tile_stages.FOUR * cut.groups, 4 * cuda_tile_stages.FOUR
    met = 1 - (1 - density) ** (4 * per)  # of all stages
    stages = -(-inner // (4 * SIZE)) * met
    products = 4 * (1 - (1 - density) ** cuda_tile_stages.FOUR) / max(met, 1e-9)
    multiplied = products * cut.wide / 2
    step = max(
        (cut.wide * 128 + four * cut.groups * density * 512) / READ,
        cut.groups * BEST * multiplied,
        cut.groups * (EACH + BARE * multiplied),
        ALONE + multiplied,
    )
    results = -(-lines // per) * -(-width // cut.wide) * free
    return (CALL + -(-results // several) * (TILE + stages * step)) / CLOCK


def spmm(
    out: Tensor,
    values: Tensor,
    x: Tensor,
    inner: int,
    tables: list[Tensor],
    scale: float,
    transposed: bool,
    tokens: bool,
    bias: Tensor | None,
    activation: int,
) -> None:
    """Write scale · S x, or scale · Sᵀ x when transposed, plus the bias of each row, activated.

    Args:
        out: (F, 1, rows, D), contiguous, or with ``tokens`` (F, 1, D, rows); of x's dtype or
            float32, as ``takes`` says.
        values: (F, slots) of x's dtype, contiguous, 16-byte aligned.
        x: (F, 1, inner or more, D), rows of its contiguous dimension 16-byte aligned.
        inner: inner positions of the matrix.
        tables: bounds and cells of ``plans.cuda_tile``, of the columns when transposed.
        scale: multiplies the product.
        transposed: multiply by the transpose.
        tokens: inner positions of x are contiguous, and rows of the result.
        bias: (rows,) of x's dtype, contiguous, or None; tokens only.
        activation: a code of ``activations``, applied before rounding; tokens only.
    """
    bounds, cells = tables
    free, lines = out.shape[0], bounds.numel() - 1
    rows, width = out.shape[2:] if not tokens else (out.shape[3], out.shape[2])
    several = facts(x.device.index).multiprocessors
    cut = choose(several, lines, len(cells), inner, width, free)
    made = derived(
        cells,
        ("stages", cut.groups, inner),
        lambda: cuda_tile_stages.stages(bounds, cells, cut.groups, inner),
    )
    across = -(-width // cut.wide)
    partial = out.dtype == torch.float32
    wanted = spmm_request(cut, made.capacity, x.dtype, transposed, tokens, partial, activation)
    run = kernel(wanted, x.device.index)
    for tiles, to, weights, right in walked(made.spans, across, several, out, values, x):
        run(
            (tiles.shape[0],),
            128 * cut.groups + 128,
            (
                _map(right, cut.wide, tokens),
                weights.data_ptr(),
                np.int64(weights.shape[1]),
                made.table.data_ptr(),
                tiles.data_ptr(),
                np.int32(tiles.shape[1]),
                np.int32(across),
                np.float32(scale),
                0 if bias is None else bias.data_ptr(),
                to.data_ptr(),
                np.int32(rows),
                np.int32(inner),
                np.int32(width),
                right.data_ptr(),
                *(np.int64(right.stride(d)) for d in (0, 2, 3)),
                bounds.data_ptr(),
                cells.data_ptr(),
            ),
            cut.shared(made.capacity, tokens),
        )


def _map(x: Tensor, wide: int, tokens: bool) -> np.ndarray:
    """X in boxes of 64 inner positions × ``wide`` tokens, or 64 columns × 64 inner positions."""
    free, _, inner, width = x.shape
    line, dims, box = (3, (inner, width), (64, wide)) if tokens else (2, (width, inner), (64, 64))
    strides = tuple(x.stride(d) * x.element_size() for d in (line, 0))
    return descriptor(x.data_ptr(), x.dtype, (*dims, free), strides, (*box, 1))


@functools.lru_cache(maxsize=256)
def spmm_request(
    cut: Cut,
    capacity: int,
    dtype: torch.dtype,
    transposed: bool,
    tokens: bool,
    partial: bool,
    activation: int = 0,
) -> Request:
    """The kernel; ``partial`` writes float32."""
    constants = {
        "GROUPS": cut.groups,
        "WIDE": cut.wide,
        "CAPACITY": capacity,
        "STAGES": cut.stages(capacity),
        "SHARED": cut.shared(capacity, tokens),
        "DTYPE": CODES[dtype],
        "TRANSPOSED": int(transposed),
        "TOKENS": int(tokens),
        "PARTIAL": int(partial),
    }
    return request("spmm_tile_sm90", constants | activation_constant(activation), flush=True)
