"""Long lines of tiles times few columns on Hopper: x whole in shared memory, even shares."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.derived import derived
from mixgrain.cuda.device import DeviceFacts
from mixgrain.cuda.launch import kernel
from mixgrain.formats.tile import SIZE

from ..plans import cuda_tile
from .parts import CODES, MOST_MATRICES, activation_constant, in_fours

WARPS = 16
# Slabs that a cluster's CTAs take, and the share of all multiprocessors that such clusters find
# room on: an H200's do not come in whole fours.
SPLITS = {1: 1.0, 2: 1.0, 4: 0.88}
# What a cluster's exchange costs, as bytes that a multiprocessor brings meanwhile.
EXCHANGE = 30_000
# Tiles of a warp that batches of two are for.
SHORT = 8
# Of a matrix; 16 bytes of them are counted in 32 bits.
MOST_TILES = 1 << 27
# Of a CTA; what its table of segments holds.
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

    def staged(self, inner: int, width: int) -> int:
        """Bytes of x in shared memory."""
        return min(8 * self.blocks, width) * (cuda_tile.slab_of(inner, self.split) * SIZE * 2 + 16)

    @property
    def sums(self) -> int:
        """Bytes of segments."""
        return (WARPS + self.per) * self.blocks * 640

    def shared(self, inner: int, width: int) -> int:
        """Dynamic shared memory of a CTA, bytes; what others of the cluster send comes last."""
        sent = -(-self.per // self.split) * self.split * self.blocks * 512 * (self.split > 1)
        return (MOST_LINES + 4) * 8 + self.staged(inner, width) + self.sums + sent


@functools.lru_cache(maxsize=4096)
def cut(
    there: DeviceFacts, lines: int, tiles: int, inner: int, width: int
) -> tuple[float, Thin] | None:
    """The way that brings fewest bytes to each multiprocessor, and how many these are.

    None where x is too long for all. It is one for any number of matrices: sums are added up in an
    order of its own.
    """
    if tiles > MOST_TILES:
        return None
    room = there.shared_bytes - 2048  # the driver keeps some
    found: list[tuple[float, Thin]] = []
    for blocks in (1,) if width <= 8 else (1, 2) if width <= 16 else (1, 2, 4):
        chunks = -(-width // (8 * blocks))
        for split, share in SPLITS.items():
            clusters = int(there.multiprocessors * share) // split
            per = min(-(-lines // max(clusters // chunks, 1)), MOST_LINES)
            while per > 1 and Thin(blocks, split, per, 4).shared(inner, width) > room:
                per = -(-per // 2)
            per = max(per, 1)
            # Of few tiles a warp would ask for many twice.
            few = tiles * per <= SHORT * WARPS * max(lines, 1) * split
            how = Thin(blocks, split, per, 2 if few else 4)
            if how.shared(inner, width) > room:
                continue
            waves = -(-(-(-lines // how.per) * chunks) // max(clusters, 1))
            # Sums pass through shared memory twice, at three times the rate of what comes from L2.
            tiles_of = 512 * tiles * how.per / (max(lines, 1) * split)
            each = how.staged(inner, width) + tiles_of + how.sums * 2 / 3
            found.append((waves * each + EXCHANGE * (split > 1), how))
    return min(found, default=None)


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
    bounds, cells = tables
    _, _, rows, width = out.shape
    inner, device = x.shape[2], x.device.index
    work, links, span = derived(
        cells,
        ("segments", how.per, how.split),
        lambda: cuda_tile.segments(bounds, cells, how.per, how.split, WARPS, inner),
    )
    run = kernel(thin_request(how, x.dtype, out.dtype, transposed, activation), device)
    for start in range(0, out.shape[0], MOST_MATRICES):
        to, weights, right = (t[start : start + MOST_MATRICES] for t in (out, values, x))
        run(
            (work.shape[0], -(-width // (8 * how.blocks)), to.shape[0]),
            32 * WARPS,
            (
                right.data_ptr(),
                *(np.int64(right.stride(d)) for d in (0, 3)),
                weights.data_ptr(),
                np.int64(weights.shape[1]),
                work.data_ptr(),
                np.int32(work.shape[1]),
                np.int32(span),
                links.data_ptr(),
                np.int32(how.per),
                np.int32(cuda_tile.slab_of(inner, how.split) * SIZE),
                np.float32(scale),
                0 if bias is None else bias.data_ptr(),
                to.data_ptr(),
                *(np.int64(to.stride(d)) for d in (0, 2, 3)),
                np.int32(in_fours(out)),
                np.int32(rows),
                np.int32(inner),
                np.int32(width),
            ),
            how.shared(inner, width),
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
