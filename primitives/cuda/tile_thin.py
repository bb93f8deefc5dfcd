"""Long lines of tiles times few columns on Hopper: x whole in shared memory, even shares."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.derived import derived
from mixgrain.cuda.device import DeviceFacts, facts
from mixgrain.cuda.launch import kernel
from mixgrain.formats.tile import SIZE

from ..plans import cuda_tile
from .block_sm90 import operand_map
from .parts import CODES, MOST_MATRICES, activation_constant, in_fours

WARPS = 16
# Slabs that a cluster's CTAs take, and the share of all multiprocessors that such clusters find
# room on: an H200's do not come in whole fours.
SPLITS = {1: 1.0, 2: 1.0, 4: 0.88}
# Microseconds on an H200: of a call, a wave more, twice as many CTAs in a cluster; of each byte of
# a multiprocessor's share of all tiles and of the result, then of the tiles, x and places that a
# CTA has. Within 7 % (root mean square) of 734 measured cuts of 56 products; of these it chooses
# what takes .8 % more than the best, on average.
START, WAVE, CLUSTER = 6.0, 2.0, 0.1
MEMORY, RESULT, TILES, STAGED, PLACES = 1.6e-5, 6e-5, 1.65e-5, 5.6e-6, 2.8e-5
# Tiles of a warp that batches of two are for.
SHORT = 4
# Of a matrix; 16 bytes of them are counted in 32 bits.
MOST_TILES = 1 << 27
# Of a CTA; what its table of lines holds.
MOST_LINES = 128


class Thin(NamedTuple):
    """How spmm_tile_thin_sm90 is cut.

    Attributes:
        blocks: of 8 columns of x that a CTA takes.
        split: slabs of inner positions, each a CTA's of a cluster.
        per: lines of tiles of a CTA.
        group: tiles of a batch; a warp has two batches under way.
    """

    blocks: int
    split: int
    per: int
    group: int

    @property
    def kept(self) -> int:
        """Lines that a CTA finishes."""
        return -(-self.per // self.split)

    @property
    def most_places(self) -> int:
        """Segments of these lines, whatever the layout."""
        return self.split * (WARPS + self.kept - 1)

    @property
    def usual_places(self) -> int:
        """Segments of these lines where all lines are about as long."""
        usual = self.split * (WARPS + self.per - 1) * self.kept / self.per
        return min(self.most_places, int(1.15 * usual) + 2)

    def staged(self, inner: int, width: int) -> int:
        """Bytes of x in shared memory: a column as it lies, more of them in boxes."""
        tiles = cuda_tile.slab_of(inner, self.split)
        return 32 * tiles if width == 1 else 8 * self.blocks * 128 * -(-tiles // 4)

    def shared(self, inner: int, width: int, places: int) -> int:
        """Dynamic shared memory of a CTA, bytes, and room to align."""
        return 1024 + self.staged(inner, width) + (MOST_LINES + 4) * 8 + places * self.blocks * 512


def room_of(there: DeviceFacts) -> int:
    """Bytes of dynamic shared memory of a CTA; the driver keeps some."""
    return there.shared_bytes - 2048


@functools.lru_cache(maxsize=4096)
def cut(
    there: DeviceFacts, lines: int, tiles: int, inner: int, width: int, sure: bool = False
) -> tuple[float, Thin] | None:
    """The fastest way, and its microseconds.

    It is one for any number of matrices: sums are added up in an order of its own.

    Args:
        there: the device.
        lines: of tiles.
        tiles: kept ones.
        inner: inner positions.
        width: columns of x.
        sure: only ways that have room for segments whatever the layout.

    Returns:
        None where x is too long for all.
    """
    if tiles > MOST_TILES:
        return None
    found: list[tuple[float, Thin]] = []
    for blocks in (1,) if width <= 8 else (1, 2) if width <= 16 else (1, 2, 4):
        chunks = -(-width // (8 * blocks))
        for split, share in SPLITS.items():
            clusters = int(there.multiprocessors * share) // split
            per = min(-(-lines // max(clusters // chunks, 1)), MOST_LINES)
            while per > 1 and not _fits(there, Thin(blocks, split, per, 4), inner, width, sure):
                per = -(-per // 2)
            per = max(per, 1)
            # Of few tiles a warp would ask for many twice.
            few = tiles * per <= SHORT * WARPS * max(lines, 1) * split
            how = Thin(blocks, split, per, 2 if few else 4)
            if _fits(there, how, inner, width, sure):
                found.append((_cost(there, how, lines, tiles, inner, width), how))
    return min(found, default=None)


def _fits(there: DeviceFacts, how: Thin, inner: int, width: int, sure: bool) -> bool:
    places = how.most_places if sure else how.usual_places
    return how.shared(inner, width, places) <= room_of(there)


def _cost(there: DeviceFacts, how: Thin, lines: int, tiles: int, inner: int, width: int) -> float:
    several = there.multiprocessors
    clusters = max(int(several * SPLITS[how.split]) // how.split, 1)
    waves = -(-(-(-lines // how.per) * -(-width // (8 * how.blocks))) // clusters)
    each = TILES * 512 * tiles * how.per / (max(lines, 1) * how.split)
    each += STAGED * how.staged(inner, width) + PLACES * 512 * how.blocks * how.usual_places
    fixed = START + WAVE * (waves - 1) + CLUSTER * (how.split.bit_length() - 1)
    shared = MEMORY * 512 * tiles + RESULT * 2 * SIZE * lines * width
    return fixed + shared / several + waves * each


def spmm(
    out: Tensor,
    values: Tensor,
    x: Tensor,
    tables: list[Tensor],
    how: Thin,
    scale: float,
    transposed: bool,
    bias: Tensor | None,
    activation: int = 0,
) -> None:
    """Scale · S x, or scale · Sᵀ x when transposed, plus the bias of each row, to ``out``.

    Args:
        out: (F, 1, rows, D), any strides, made for this.
        values: (F, slots), rows at 16 bytes.
        x: (F, 1, inner, D), inner positions contiguous, all else at multiples of 16 bytes.
        tables: bounds and cells of ``plans.cuda_tile.part``.
        how: from ``cut``.
        scale: multiplies the product.
        transposed: multiply by the transpose.
        bias: (rows,) of x's dtype, or None.
        activation: a code of ``activations``, applied before rounding; 0 = none.
    """
    _, _, rows, width = out.shape
    inner, device = x.shape[2], x.device.index
    work, links, span, places = _segments(tables, how, inner)
    if how.shared(inner, width, places) > room_of(facts(device)):
        lines, tiles = tables[0].numel() - 1, len(tables[1])
        found = cut(facts(device), lines, tiles, inner, width, sure=True)
        assert found, "taken only where there is a sure way"
        how = found[1]
        work, links, span, places = _segments(tables, how, inner)
    run = kernel(thin_request(how, x.dtype, out.dtype, transposed, activation), device)
    chunks = -(-width // (8 * how.blocks))
    for start in range(0, out.shape[0], MOST_MATRICES):
        to, weights, right = (t[start : start + MOST_MATRICES] for t in (out, values, x))
        run(
            (work.shape[0], chunks, to.shape[0]),
            32 * WARPS,
            (
                operand_map(right.mT, 8 * how.blocks),
                right.data_ptr(),
                np.int64(right.stride(0)),
                weights.data_ptr(),
                np.int64(weights.shape[1]),
                work.data_ptr(),
                np.int32(work.shape[1]),
                np.int32(span),
                links.data_ptr(),
                np.int32(how.kept),
                np.int32(cuda_tile.slab_of(inner, how.split) * SIZE),
                np.uint32(how.staged(inner, width)),
                np.uint32(values.shape[1] // (64 * work.shape[0] * chunks) + 1),
                np.float32(scale),
                0 if bias is None else bias.data_ptr(),
                to.data_ptr(),
                *(np.int64(to.stride(d)) for d in (0, 2, 3)),
                np.int32(in_fours(out)),
                np.int32(rows),
                np.int32(inner),
                np.int32(width),
            ),
            how.shared(inner, width, places),
        )


def _segments(tables: list[Tensor], how: Thin, inner: int) -> tuple[Tensor, Tensor, int, int]:
    bounds, cells = tables
    return derived(
        cells,
        ("segments", how.per, how.split),
        lambda: cuda_tile.segments(bounds, cells, how.per, how.split, WARPS, inner),
    )


def thin_request(
    how: Thin,
    dtype: torch.dtype,
    out: torch.dtype,
    transposed: bool,
    activation: int = 0,
) -> Request:
    """The kernel."""
    constants = {
        "BLOCKS": how.blocks,
        "WARPS": WARPS,
        "GROUP": how.group,
        "SPLIT": how.split,
        "DTYPE": CODES[dtype],
        "OUT": CODES[out],
        "TRANSPOSED": int(transposed),
    }
    constants |= activation_constant(activation)
    return request("spmm_tile_thin_sm90", constants, flush=True)
