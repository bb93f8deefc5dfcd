"""TileLayout on CUDA: which kernel takes a product, and those for few columns on every device."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.derived import derived
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import Argument, kernel
from mixgrain.formats.tile import SIZE

from ..plans import cuda_tile
from ..plans.plan import PartPlan
from . import block, tile_mma, tile_sm90, tile_thin
from .block_sm90 import laid_out
from .finish import finish
from .parts import (
    CODES,
    HALVES,
    MOST_MATRICES,
    activation_constant,
    aligned,
    aligned_values,
    in_fours,
    in_tokens,
    ready,
)
from .tile_tables import blocks_of, rows_first

# Microseconds on an H200, beyond those of other kernels: of spmm_tile for a start and for each tile
# of a line, which a warp takes one after the other; of the others for each tile and column, by
# whether x has rows of tokens.
START, STEP, EACH = 5.0, 0.57, {True: 7.2e-6, False: 14e-6}
# Of spmm_tile_few on Hopper, where spmm_tile_thin_sm90 and spmm_tile_sm90 do the rest: for a call,
# each tile, each tile and column, and each line and column.
CALL, TILE, COLUMN, RESULT = 5.8, 1.9e-4, {True: 8.3e-6, False: 14e-6}, 1.3e-5
# Columns beyond which there is no choice: a grid counts its tiles of columns in 16 bits.
WIDEST = 2048
# Warps of its CTAs and tiles that a warp asks for at once, by blocks of 8 columns that a CTA takes.
FEW_CUTS = {1: (8, 4), 2: (4, 5), 4: (4, 2)}
# Bytes of a table among its parameters, which may be 4 KiB in all.
ROOMS = (1024, 2816)


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
    large = tile_sm90.takes(x, rows, tables, dtype, tokens)
    if _is_few(x, tables, tokens, large):
        out = x.new_empty(shape, dtype=dtype)
        out = out.mT if tokens else out
        found = _thin(x, tables, tokens)
        if found is None:
            _few(out, values, x, tables, scale, transposed, bias, activation)
        else:
            tile_thin.spmm(out, values, x, tables, found[1], scale, transposed, bias, activation)
        return out
    x = laid_out(aligned(x.mT)).mT if tokens else laid_out(aligned(x))
    # Aligning pads the last dimension with zeros: inner positions that no tile meets, or columns.
    if not tokens:
        shape = (*shape[:3], x.shape[3])
    out = x.new_empty(shape, dtype=dtype)
    many = tile_sm90.spmm if large else tile_mma.spmm
    many(out, values, x, inner, tables, scale, transposed, tokens, bias, activation)
    return out.mT if tokens else out[..., :width].contiguous()


def _thin(x: Tensor, tables: list[Tensor], tokens: bool) -> tuple[float, tile_thin.Thin] | None:
    """How spmm_tile_thin_sm90 is cut, and its time; None where spmm_tile_few does it."""
    index, lines, tiles = x.device.index, tables[0].numel() - 1, len(tables[1])
    _, _, inner, width = x.shape
    if not _hopper(index) or inner % 8 or not ready(x, 2, 3):
        return None
    size = (lines, tiles, inner, width)
    # A layout may turn out to need a way that is sure to have room.
    if tile_thin.cut(facts(index), *size, sure=True) is None:
        return None
    found = tile_thin.cut(facts(index), *size)
    return found if found and found[0] < _few_us(lines, tiles, width, tokens) else None


def _few_us(lines: int, tiles: int, width: int, tokens: bool) -> float:
    """Of spmm_tile_few on Hopper."""
    return CALL + (TILE + COLUMN[tokens] * width) * tiles + RESULT * lines * width


def _is_few(x: Tensor, tables: list[Tensor], tokens: bool, large: bool) -> bool:
    """Whether kernels for few columns are faster than spmm_tile, or (``large``) spmm_tile_sm90.

    They add up in another order, so the number of matrices has no part in the choice.
    """
    lines, tiles, inner, width = tables[0].numel() - 1, len(tables[1]), *x.shape[2:]
    if width > WIDEST:
        return False
    if not large:
        return EACH[tokens] * width * tiles <= START + STEP * tiles / max(lines, 1)
    found = _thin(x, tables, tokens)
    few = found[0] if found else _few_us(lines, tiles, width, tokens)
    several = facts(x.device.index).multiprocessors
    how = tile_sm90.choose(several, lines, tiles, inner, width, 1)
    return few <= tile_sm90.cost(how, several, lines, tiles, inner, width, 1)


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
    lines, inner = bounds.numel() - 1, x.shape[2]
    blocks = few_blocks(facts(x.device.index).multiprocessors, lines, width)
    warps, ahead = FEW_CUTS[blocks]
    chunks, threads, small = -(-width // (8 * blocks)), 32 * warps, False
    # A batch of cells may end behind the last of them; no table says which of several matrices.
    room = room_for(lines, len(cells) + ahead, inner, transposed) if free == 1 else 0
    # Sums are added up in the order of warps, so the number of matrices has no part in the cut.
    if room:
        known = derived(
            cells, ("compact", transposed), lambda: cuda_tile.compact(bounds, cells, transposed)
        )
        listed: tuple[Argument, ...] = (np.pad(known, (0, room - known.size)).view(f"V{room}")[0],)
    else:
        shares = derived(
            cells, ("shares", warps, ahead), lambda: cuda_tile.shares(bounds, cells, warps, ahead)
        )
        listed = shares.data_ptr(), cells.data_ptr()
        # Of what one CTA and all of them can ask for at once, while they wait for the tables.
        small = free == 1 and width <= lines * chunks and inner <= 64 * threads
        small = small and values.shape[1] <= 64 * threads * lines * chunks
    dtypes, edge = (x.dtype, out.dtype), inner % SIZE > 0
    wanted = few_request(blocks, *dtypes, transposed, _in_fours(x), activation, room, edge)
    run = kernel(wanted, x.device.index)
    for start in range(0, free, MOST_MATRICES):
        to, weights, right = (t[start : start + MOST_MATRICES] for t in (out, values, x))
        run(
            (chunks, lines) if room else (lines, chunks, to.shape[0]),
            threads,
            (
                right.data_ptr(),
                *(np.int64(right.stride(d)) for d in (0, 2, 3)),
                weights.data_ptr(),
                np.int64(weights.shape[1]),
                *listed,
                np.float32(scale),
                0 if bias is None else bias.data_ptr(),
                to.data_ptr(),
                *(np.int64(to.stride(d)) for d in (0, 2, 3)),
                np.int32(in_fours(out)),
                np.int32(small),
                np.int32(rows),
                np.int32(inner),
                np.int32(width),
            ),
        )


def room_for(lines: int, cells: int, inner: int, transposed: bool) -> int:
    """Bytes of a parameter of spmm_tile_few that hold ``cuda_tile.compact``; 0 if none do."""
    size = 2 * (lines + 1) + cells * (3 if transposed else 1)
    if inner > 256 * SIZE:
        return 0
    return next((room for room in ROOMS if room >= size), 0)


def few_blocks(several: int, lines: int, width: int) -> int:
    """Of 8 columns, that a CTA of spmm_tile_few takes: the fewest whose CTAs are about a wave.

    Up to 16 columns are one CTA's.
    """
    enough = (b for b in (1, 2) if width <= 8 * b or lines * -(-width // (8 * b)) <= 4 * several)
    return next(enough, 4)


def _in_fours(x: Tensor) -> bool:
    """Whether inner positions lie side by side, four and four at multiples of 8 bytes."""
    steps = [x.stride(d) for d in (0, 3) if x.shape[d] > 1]
    whole = x.stride(2) == 1 and not (x.shape[2] % 4 or x.data_ptr() % 8)
    return whole and all(step % 4 == 0 and step < 1 << 30 for step in steps)


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
    dtype: torch.dtype,
    out: torch.dtype,
    transposed: bool,
    wide: bool,
    activation: int = 0,
    room: int = 0,
    edge: bool = False,
) -> Request:
    """The kernel for few columns; ``wide`` loads of four inner positions bring x.

    With ``room`` a table of up to so many bytes is one of its parameters, of a single matrix. The
    last tiles of lines hang over the ``edge``.
    """
    warps, ahead = FEW_CUTS[blocks]
    constants = {"BLOCKS": blocks, "WARPS": warps, "AHEAD": ahead, "ROOM": room}
    constants |= {"DTYPE": CODES[dtype], "OUT": CODES[out]}
    constants |= {"TRANSPOSED": int(transposed), "WIDE": int(wide), "EDGE": int(edge)}
    constants |= activation_constant(activation)
    return request("spmm_tile_few", constants, flush=True)
