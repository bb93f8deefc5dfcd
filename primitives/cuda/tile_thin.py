"""TileLayout times few columns on Hopper: x whole in shared memory, tiles shared by warps evenly."""

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
from mixgrain.formats.tile import SIZE

from ..plans import cuda_tile
from .parts import CODES, MOST_MATRICES, ready

WARPS, RING, FAR, TOUCH = 16, 8, 0, 0
# What a cluster's exchange costs, as bytes that a multiprocessor brings meanwhile; and a CTA's most lines.
EXCHANGE, MOST_LINES = 24_576, 128


class Thin(NamedTuple):
    """How spmm_tile_thin_sm90 is cut.

    Attributes:
        blocks: of 8 columns of x that a CTA takes.
        split: slabs of inner positions, each a CTA's of a cluster.
        per: lines of tiles of a CTA.
    """

    blocks: int
    split: int
    per: int

    def shared(self, inner: int) -> int:
        """Dynamic shared memory of a CTA, bytes: x, tiles on their way, segments, what others send."""
        columns = 8 * self.blocks
        x = columns * (cuda_tile.slab_of(inner, self.split) * SIZE * 2 + 16)
        sent = self.per * columns * 64 if self.split > 1 else 0
        return x + WARPS * RING * 512 + (WARPS + self.per) * columns * 80 + sent


@functools.lru_cache(maxsize=4096)
def cut(index: int, lines: int, tiles: int, inner: int, width: int) -> Thin | None:
    """The way that brings the fewest bytes to each multiprocessor; None where x is too long for all.

    It is one for any number of matrices: sums are added up in an order of its own.
    """
    there = facts(index)
    found: list[tuple[float, Thin]] = []
    for blocks in (1,) if width <= 8 else (2,) if width <= 16 else (2, 4):
        chunks = -(-width // (8 * blocks))
        for split in (1, 2, 4, 8):
            groups = max(there.multiprocessors // (chunks * split), 1)
            per = min(max(-(-lines // groups), 1), MOST_LINES)
            while per > 1 and Thin(blocks, split, per).shared(inner) > there.shared_bytes - 2048:
                per = -(-per // 2)
            how = Thin(blocks, split, per)
            if how.shared(inner) > there.shared_bytes - 2048:
                continue
            waves = -(-(-(-lines // per) * chunks * split) // there.multiprocessors)
            x = min(width, 8 * blocks) * cuda_tile.slab_of(inner, split) * SIZE * 2
            each = x + 512 * tiles * per / (max(lines, 1) * split)
            found.append((waves * each + EXCHANGE * (split > 1), how))
    return min(found)[1] if found else None


def spmm(
    out: Tensor,
    values: Tensor,
    x: Tensor,
    tables: list[Tensor],
    how: Thin,
    scale: float,
    transposed: bool,
    bias: Tensor | None,
) -> None:
    """Scale · S x, or scale · Sᵀ x when transposed, plus the bias of each row, to ``out``.

    Args:
        out: (F, 1, rows, D), any strides, made for this.
        values: (F, slots), rows at 16 bytes.
        x: (F, 1, inner, D), any strides.
        tables: bounds and cells of ``plans.cuda_tile.part``.
        how: from ``cut``.
        scale: multiplies the product.
        transposed: multiply by the transpose.
        bias: (rows,) of x's dtype, or None.
    """
    bounds, cells = tables
    _, _, rows, width = out.shape
    inner, device = x.shape[2], x.device.index
    work, links, span = derived(
        bounds,
        ("segments", how.per, how.split),
        lambda: cuda_tile.segments(bounds, cells, how.per, how.split, WARPS, inner),
    )
    wide = inner % 8 == 0 and ready(x, 2, 3)
    quads = out.stride(2) == 1 and all(out.stride(d) % 4 == 0 for d in (0, 3) if out.shape[d] > 1)
    run = kernel(thin_request(how.blocks, how.split, x.dtype, out.dtype, transposed, wide), device)
    for start in range(0, out.shape[0], MOST_MATRICES):
        to, weights, right = (t[start : start + MOST_MATRICES] for t in (out, values, x))
        run(
            (work.shape[0], -(-width // (8 * how.blocks)), to.shape[0]),
            32 * WARPS,
            (
                right.data_ptr(),
                *(np.int64(right.stride(d)) for d in (0, 2, 3)),
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
                np.int32(quads),
                np.int32(rows),
                np.int32(inner),
                np.int32(width),
            ),
            how.shared(inner),
        )


@functools.lru_cache(maxsize=256)
def thin_request(
    blocks: int,
    split: int,
    dtype: torch.dtype,
    out: torch.dtype,
    transposed: bool,
    wide: bool,
) -> Request:
    """The kernel; ``wide`` copies of 16 bytes bring x."""
    constants = {
        "BLOCKS": blocks,
        "WARPS": WARPS,
        "RING": RING,
        "SPLIT": split,
        "DTYPE": CODES[dtype],
        "OUT": CODES[out],
        "TRANSPOSED": int(transposed),
        "WIDE": int(wide),
        "FAR": FAR,
        "TOUCH": TOUCH,
    }
    return request("spmm_tile_thin_sm90", constants, flush=True)
