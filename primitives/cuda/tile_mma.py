"""TileLayout on every device, for many columns: spmm_tile, x by TMA where there is one."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.derived import derived
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import kernel
from mixgrain.cuda.tma import descriptor
from mixgrain.formats.tile import SIZE

from ..plans import cuda_tile
from .block_sm90 import walked
from .parts import CODES, activation_constant


class Cut(NamedTuple):
    """How spmm_tile is cut.

    Attributes:
        warps: lines of tiles of a CTA, each a warp's.
        wide: columns of x of a CTA.
        each: CTAs that a multiprocessor holds.
        stages: of 64 inner positions of x.
        ahead: tiles whose values a warp has under way.
        early: it asks for the next ones before it multiplies.
        bulk: x comes by TMA.
    """

    warps: int
    wide: int
    each: int
    stages: int
    ahead: int
    early: bool
    bulk: bool

    @property
    def threads(self) -> int:
        """Of a CTA; registers move between whole warpgroups, so with TMA one of them produces."""
        return 32 * (self.warps + (4 if self.bulk else {1: 4, 2: 2, 4: 1}[self.each]))

    @property
    def shared(self) -> int:
        """Dynamic shared memory of a CTA, bytes."""
        return self.stages * self.wide * 128 + 1024


def cuts(bulk: bool, tokens: bool) -> tuple[Cut, Cut, Cut]:
    """The ways to cut spmm_tile, the largest first, which moves the least."""
    if bulk:
        return (
            Cut(16, 128, 1, 12, 1, True, True),
            Cut(8, 128, 2, 6, 1, True, True),
            Cut(4, 64, 4, 6, 1, True, True),
        )
    ahead = 2 if tokens else 1
    return (
        Cut(12, 128, 1, 5, ahead, True, False),
        Cut(6, 128, 2, 2, ahead, True, False),
        Cut(3, 64, 4, 2, ahead, True, False),
    )


def _choose(index: int, lines: int, width: int, free: int, tokens: bool) -> Cut:
    """How spmm_tile is cut for this work; however it is, it adds up in the same order."""
    ways, several = cuts(facts(index).hopper, tokens), facts(index).multiprocessors
    ctas = [-(-lines // how.warps) * -(-width // how.wide) for how in ways]
    fitting = (how for how, each in zip(ways, ctas, strict=True) if each * free >= 0.7 * several)
    return next(fitting, ways[-1])


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
            float32.
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
    free, rows, width = out.shape[0], *out.shape[-2:]
    if tokens:
        rows, width = width, rows
    device = x.device.index
    how = _choose(device, bounds.numel() - 1, width, free, tokens)
    grain = 4 if tokens else 1
    links, unions, records = derived(
        cells,
        (how.warps, grain),
        lambda: cuda_tile.groups(bounds, cells, how.warps, grain, inner),
    )
    across = -(-width // how.wide)
    partial = out.dtype == torch.float32
    run = kernel(wide_request(how, x.dtype, transposed, tokens, partial, activation), device)
    several = facts(device).multiprocessors * how.each
    for tiles, to, weights, right in walked(records, across, several, out, values, x):
        run(
            (tiles.shape[0],),
            how.threads,
            (
                *_source(right, how, tokens),
                weights.data_ptr(),
                np.int64(weights.shape[1]),
                bounds.data_ptr(),
                links.data_ptr(),
                unions.data_ptr(),
                tiles.data_ptr(),
                np.int32(tiles.shape[1]),
                np.int32(bounds.numel() - 1),
                np.int32(across),
                np.float32(scale),
                0 if bias is None else bias.data_ptr(),
                to.data_ptr(),
                np.int32(rows),
                np.int32(inner),
                np.int32(width),
            ),
            how.shared,
        )


def _source(x: Tensor, how: Cut, tokens: bool) -> tuple[Any, ...]:
    """What spmm_tile asks x by."""
    if not how.bulk:
        return x.data_ptr(), np.int64(x.stride(0)), np.int64(x.stride(3 if tokens else 2))
    if not tokens:
        return (_columns_map(x),)
    free, _, inner, width = x.shape
    strides = tuple(x.stride(d) * x.element_size() for d in (3, 0))
    return (descriptor(x.data_ptr(), x.dtype, (inner, width, free), strides, (64, how.wide, 1)),)


def _columns_map(x: Tensor) -> np.ndarray:
    free, _, inner, width = x.shape
    strides = tuple(x.stride(d) * x.element_size() for d in (2, 0))
    return descriptor(x.data_ptr(), x.dtype, (width, inner, free), strides, (64, SIZE, 1))


@functools.lru_cache(maxsize=256)
def wide_request(
    how: Cut,
    dtype: torch.dtype,
    transposed: bool,
    tokens: bool,
    partial: bool,
    activation: int = 0,
) -> Request:
    """The kernel for many columns; ``partial`` writes float32."""
    constants = {
        "WARPS": how.warps,
        "WIDE": how.wide,
        "STAGES": how.stages,
        "AHEAD": how.ahead,
        "EARLY": int(how.early),
        "TMA": int(how.bulk),
        "DTYPE": CODES[dtype],
        "TRANSPOSED": int(transposed),
        "TOKENS": int(tokens),
        "PARTIAL": int(partial),
    }
    constants |= activation_constant(activation)
    return request("spmm_tile", constants, flush=True)
