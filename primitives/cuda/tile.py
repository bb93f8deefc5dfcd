"""TileLayout on CUDA: mma.sync on every device, x by TMA where there is one."""

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
from ..plans.plan import PartPlan
from . import block, tile_thin
from .block_sm90 import laid_out, walks
from .finish import finish
from .parts import CODES, MOST_MATRICES, activation_constant, aligned, aligned_values
from .tile_tables import HALVES, blocks_of, in_tokens, rows_first

# Up to this many columns, a line of tiles is a CTA's (spmm_tile_few).
FEW = 16
# And up to so many where lines are of few tiles, or spmm_tile has too few CTAs.
FEW_AT_MOST, SHORT = 256, 40


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


def _hopper(index: int) -> bool:
    return facts(index).hopper


def spmm(
    values: Tensor,
    x: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    part: PartPlan,
    scale: float,
    dtype: torch.dtype,
    transposed: bool,
    bias: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    """Scale · S x, or scale · Sᵀ x when transposed, plus the bias of each row, activated.

    Args:
        values: (F, slots).
        x: (F, 1, inner, D), any strides.
        keep: bool (F, 1, n) or None.
        keep_rows: the mask is over rows of S.
        part: from ``plans.cuda_tile``.
        scale: multiplies the product.
        dtype: of the result.
        transposed: multiply by the transpose.
        bias: (rows,) of x's dtype, or None.
        activation: a code of ``activations``, applied before rounding; 0 = none.

    Returns:
        (F, 1, rows, D), contiguous, or its last two dimensions exchanged where x is so.
    """
    tokens = in_tokens(x) or x.shape[2] == 1
    if (bias is not None or activation) and not tokens:
        # They join where rows of tokens are written.
        shared = (keep, keep_rows, part, scale, dtype, transposed, bias, activation)
        return spmm(values, x.mT.contiguous().mT, *shared).contiguous()
    rows = part.scalars[1 if transposed else 0]
    free, _, inner, width = x.shape
    shape = (free, 1, width, rows) if tokens else (free, 1, rows, width)
    values = aligned_values(values)
    if keep is not None or x.dtype not in HALVES or values.dtype != x.dtype or (
        dtype not in (x.dtype, torch.float32)
    ):  # fmt: skip
        out = _as_blocks(
            values, x, keep, keep_rows, part, scale, dtype, transposed, bias, activation
        )
        return out.mT.contiguous().mT if tokens else out
    tables = part.tensors[2:] if transposed else part.tensors[:2]
    chosen = _choose(x.device.index, tables, width, free, tokens)
    if chosen is None:
        out = x.new_empty(shape, dtype=dtype)
        out = out.mT if tokens else out
        lines, tiles = tables[0].numel() - 1, len(tables[1])
        index = x.device.index
        thin = tile_thin.cut(facts(index), lines, tiles, inner, width) if _hopper(index) else None
        if thin is None:
            _few(out, values, x, tables, scale, transposed, bias, activation)
        else:
            tile_thin.spmm(out, values, x, tables, thin, scale, transposed, bias, activation)
        return out
    x = laid_out(aligned(x.mT)).mT if tokens else laid_out(aligned(x))
    # Aligning pads the last dimension with zeros: inner positions that no tile meets, or columns.
    if not tokens:
        shape = (*shape[:3], x.shape[3])
    out = x.new_empty(shape, dtype=dtype)
    _wide(out, values, x, inner, tables, chosen, scale, transposed, tokens, bias, activation)
    return out.mT if tokens else out[..., :width].contiguous()


def _choose(index: int, tables: list[Tensor], width: int, free: int, tokens: bool) -> Cut | None:
    """How spmm_tile is cut for this work, None where spmm_tile_few does it.

    However it is cut, it adds up in the same order; spmm_tile_few in another, so that which of them
    it is does not depend on the number of matrices.
    """
    bounds, cells = tables
    lines, several = bounds.numel() - 1, facts(index).multiprocessors
    if width <= FEW or (width <= FEW_AT_MOST and len(cells) <= SHORT * lines and lines <= 256):
        return None
    ways = cuts(_hopper(index), tokens)
    ctas = [-(-lines // how.warps) * -(-width // how.wide) for how in ways]
    if width <= FEW_AT_MOST and max(ctas) < 0.7 * several:
        return None
    fitting = (how for how, each in zip(ways, ctas, strict=True) if each * free >= 0.7 * several)
    return next(fitting, ways[-1])


def _few(
    out: Tensor,
    values: Tensor,
    x: Tensor,
    tables: list[Tensor],
    scale: float,
    transposed: bool,
    bias: Tensor | None,
    activation: int,
) -> None:
    bounds, cells = tables
    free, _, rows, width = out.shape
    inner = x.shape[2]
    blocks = 1 if width <= 8 else 2 if width <= 16 else 4
    steps = [x.stride(d) for d in (0, 3) if x.shape[d] > 1]
    pairs = x.stride(2) == 1 and not (x.data_ptr() % 4 or any(step % 2 for step in steps))
    chunks = -(-width // (8 * blocks))
    lines, there = bounds.numel() - 1, facts(x.device.index)
    # Where a wave has room for a matrix, more warps share a line. They add up in another order, so
    # the number of matrices has no part in it.
    warps = 8 if width <= 16 or lines * chunks <= 3 * there.multiprocessors else 4
    shares, most = derived(cells, ("shares", warps), lambda: cuda_tile.shares(bounds, cells, warps))
    ring = 12 if most > 6 and there.shared_bytes > 160_000 else 6
    wanted = few_request(blocks, warps, ring, x.dtype, out.dtype, transposed, pairs, activation)
    run = kernel(wanted, x.device.index)
    for start in range(0, free, MOST_MATRICES):
        to, weights, right = (t[start : start + MOST_MATRICES] for t in (out, values, x))
        run(
            (lines, chunks, to.shape[0]),
            32 * warps,
            (
                right.data_ptr(),
                *(np.int64(right.stride(d)) for d in (0, 2, 3)),
                weights.data_ptr(),
                np.int64(weights.shape[1]),
                shares.data_ptr(),
                np.int32(shares.shape[2]),
                cells.data_ptr(),
                np.float32(scale),
                0 if bias is None else bias.data_ptr(),
                to.data_ptr(),
                *(np.int64(to.stride(d)) for d in (0, 2, 3)),
                np.int32(rows),
                np.int32(inner),
                np.int32(width),
            ),
            few_shared(blocks, warps, ring),
        )


def few_shared(blocks: int, warps: int, ring: int) -> int:
    """Dynamic shared memory of spmm_tile_few, bytes: tiles on their way, then sums."""
    return max(warps * ring * 512, warps * blocks * 8 * 17 * 4)


def _wide(
    out: Tensor,
    values: Tensor,
    x: Tensor,
    inner: int,
    tables: list[Tensor],
    how: Cut,
    scale: float,
    transposed: bool,
    tokens: bool,
    bias: Tensor | None,
    activation: int,
) -> None:
    bounds, cells = tables
    free, rows, width = out.shape[0], *out.shape[-2:]
    if tokens:
        rows, width = width, rows
    device = x.device.index
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
    tiles = walks(records, across, free, several)
    run(
        (tiles.shape[0],),
        how.threads,
        (
            *_source(x, how, tokens),
            values.data_ptr(),
            np.int64(values.shape[1]),
            bounds.data_ptr(),
            links.data_ptr(),
            unions.data_ptr(),
            tiles.data_ptr(),
            np.int32(tiles.shape[1]),
            np.int32(bounds.numel() - 1),
            np.int32(across),
            np.float32(scale),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
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


def _as_blocks(
    values: Tensor,
    x: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    part: PartPlan,
    scale: float,
    dtype: torch.dtype,
    transposed: bool,
    bias: Tensor | None,
    activation: int,
) -> Tensor:
    """What there are no kernels for on tiles themselves: float32, mixed dtypes, run-time masks."""
    rows, width = part.scalars[1 if transposed else 0], x.shape[3]
    x = aligned(x)
    wide = dtype if bias is None and not activation else torch.float32
    out = x.new_empty((x.shape[0], 1, rows, x.shape[3]), dtype=wide)
    turned = rows_first(values, back=False)
    block.spmm(out, turned, x, keep, keep_rows, blocks_of(part), scale, transposed, add=False)
    if activation:
        made = finish([out], bias, width, dtype, activation)
        return made.view(made.shape[0], 1, width, rows).mT
    out = out[..., :width].contiguous()
    if bias is None:
        return out
    return torch.add(out, bias.view(1, 1, rows, 1)).to(dtype)


@functools.lru_cache(maxsize=256)
def few_request(
    blocks: int,
    warps: int,
    ring: int,
    dtype: torch.dtype,
    out: torch.dtype,
    transposed: bool,
    pairs: bool,
    activation: int = 0,
) -> Request:
    """The kernel for few columns; ``pairs`` of inner positions are read at once."""
    constants = {
        "BLOCKS": blocks,
        "WARPS": warps,
        "RING": ring,
        "DTYPE": CODES[dtype],
        "OUT": CODES[out],
    }
    constants |= {"TRANSPOSED": int(transposed), "PAIRS": int(pairs)}
    constants |= activation_constant(activation)
    return request("spmm_tile_few", constants, flush=True)


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
