"""BlockLayout of 64 or 128 on sm_90a: wgmma and TMA for float16 and bfloat16."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.derived import derived
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import Argument, kernel
from mixgrain.cuda.tma import descriptor

from ..plans.even import dealt
from .parts import MOST_MATRICES, activation_constant

CODES = {torch.float16: 0, torch.bfloat16: 1}
# TMA stages of sddmm by panels of 64 columns of D.
SDDMM_STAGES = {1: 3, 2: 3, 3: 2, 4: 2}


def runs_here(width: int, *dtypes: torch.dtype) -> bool:
    """Whether these kernels take operands of this width and dtypes."""
    return width % 8 == 0 and all(dtype in CODES and dtype == dtypes[0] for dtype in dtypes)


def laid_out(t: Tensor) -> Tensor:
    """A copy where a dimension is broadcast: a tensor map has no stride 0."""
    return t.contiguous() if 0 in t.stride() else t


class Tokens(NamedTuple):
    """Rows of tokens in, rows of tokens out, as linear layers have them.

    Attributes:
        bias: (rows,) of x's dtype, contiguous, or None.
        activation: a code of ``activations``, applied before rounding; 0 = none.
    """

    bias: Tensor | None
    activation: int


def operand_map(t: Tensor, rows: int, columns: int = 64) -> np.ndarray:
    """(F, E, N, D), any strides but the last, in boxes of columns × rows."""
    free, entries, n, width = t.shape
    size = t.element_size()
    strides = tuple(t.stride(d) * size for d in (2, 1, 0))
    dims, box = (width, n, entries, free), (columns, rows, 1, 1)
    return descriptor(t.data_ptr(), t.dtype, dims, strides, box, columns * size)


def values_map(
    values: Tensor, shift: int, size: int, items: int, box: tuple[int, int] = (64, 64)
) -> np.ndarray:
    """The slots of a block part, (F, items · size, size), in boxes of columns × rows."""
    each = values.element_size()
    return descriptor(
        values.data_ptr() + shift * each,
        values.dtype,
        (size, items * size, values.shape[0]),
        (size * each, values.stride(0) * each),
        (*box, 1),
        box[0] * each,
    )


def sddmm(
    values: Tensor,
    q: Tensor,
    k: Tensor,
    shift: int,
    size: int,
    items: Tensor,
    chunks: Tensor,
    masks: Tensor,
    scale: float,
) -> None:
    """Write scale · q kᵀ to the slots of a block part.

    Args:
        values: (F, slots) of q's dtype, contiguous; slots from ``shift`` on are written.
        q: (F, E, nq, D), rows 16-byte aligned.
        k: (F, E, nk, D), rows 16-byte aligned.
        shift: first slot of the part.
        size: side of a block, 64 or 128.
        items: int32 (n, 4), entry, block row, block column, mask of every block.
        chunks: int32 (c, 2), first item and number of items, each within one block row.
        masks: uint8 (M, size, size // 8).
        scale: multiplies scores.
    """
    if not chunks.shape[0] or not values.shape[0]:
        return
    q, k = laid_out(q), laid_out(k)
    panels = -(-q.shape[-1] // 64)
    stages = SDDMM_STAGES[panels]
    wanted = sddmm_request(size, q.dtype, panels, stages)
    run = kernel(wanted, q.device.index)
    for start in range(0, values.shape[0], MOST_MATRICES):
        out, left, right = (t[start : start + MOST_MATRICES] for t in (values, q, k))
        run(
            (chunks.shape[0], out.shape[0]),
            size * 2 + 32,
            (
                operand_map(left, size),
                operand_map(right, 64),
                values_map(out, shift, size, items.shape[0]),
                items.data_ptr(),
                chunks.data_ptr(),
                masks.data_ptr(),
                np.float32(scale),
            ),
            sddmm_shared(size, panels, stages),
        )


def spmm(
    out: Tensor,
    values: Tensor,
    x: Tensor,
    shift: int,
    size: int,
    items: int,
    table: Tensor,
    records: Tensor,
    masks: Tensor,
    used: Tensor,
    transposed: bool,
    scale: float,
    add: bool = False,
    tokens: Tokens | None = None,
) -> None:
    """Write (or add to a float32 out) scale · S x, or scale · Sᵀ x when transposed.

    Args:
        out: (F, E, rows, D), contiguous, or with ``tokens`` its transpose is; x's dtype, or float32
            for partial results.
        values: (F, slots) of x's dtype, contiguous.
        x: (F, E, inner, D), rows 16-byte aligned, or with ``tokens`` columns.
        shift: first slot of the part.
        size: side of a block, 64 or 128.
        items: blocks of the part.
        table: int32 (items, 4) of ``plans.cuda_block``, of the columns when transposed.
        records: int32 (E * block rows or columns, 3) of ``plans.cuda_block``, likewise.
        masks: uint8 (M, size, size // 8).
        used: uint8 (M, size // 8), inner positions with a kept element.
        transposed: multiply by the transpose.
        scale: multiplies the product.
        add: add to out instead of overwriting it; float32 only.
        tokens: x and out are rows of tokens; rows % 8 == 0.
    """
    free, entries, rows, width = out.shape
    if 0 in (free, records.shape[0], width):
        return
    x = laid_out(x)
    several = facts(x.device.index).multiprocessors
    lines, all_lines = records.shape[0], records.shape[0] * free
    cut = token_tile(several, size, all_lines, width) if tokens else tile(size, width)
    partial = out.dtype == torch.float32
    device = x.device.index
    across = -(-width // cut.across)
    several = several if cut.alone else 0
    run = kernel(spmm_request(size, x.dtype, cut, transposed, partial, end_of(tokens)), device)
    shared = cut.shared(size, tokens is not None)
    for tiles, to, weights, right in walked(records, across, several, out, values, x):
        run(
            (tiles.shape[0],),
            cut.threads(size),
            (
                values_map(weights, shift, size, items),
                right_map(right, cut.depth, cut.across, tokens),
                table.data_ptr(),
                tiles.data_ptr(),
                np.int32(tiles.shape[1]),
                masks.data_ptr(),
                used.data_ptr(),
                np.int32(lines // entries),
                np.int32(entries),
                np.int32(across),
                np.float32(scale),
                bias_of(tokens),
                to.data_ptr(),
                np.int32(rows),
                np.int32(width),
                np.int32(add),
            ),
            shared,
        )


def right_map(x: Tensor, depth: int, across: int, tokens: Tokens | None) -> np.ndarray:
    """X (F, E, inner, D) in boxes of ``depth`` inner positions × 64 columns, or × tokens."""
    return operand_map(x.mT, min(across, 256), depth) if tokens else operand_map(x, depth)


def end_of(tokens: Tokens | None) -> int | None:
    """What of it a request depends on: the activation."""
    return None if tokens is None else tokens.activation


def token_constants(activation: int | None) -> dict[str, int]:
    """Constants of a request for rows of tokens, which None is not."""
    return {} if activation is None else {"TOKENS": 1, **activation_constant(activation)}


def bias_of(tokens: Tokens | None) -> Argument:
    """Where the bias is, 0 for none."""
    return 0 if tokens is None or tokens.bias is None else tokens.bias.data_ptr()


class Cut(NamedTuple):
    """How spmm cuts its work.

    Attributes:
        wide: columns of x that a warpgroup takes.
        groups: warpgroups side by side.
        depth: inner positions of a stage of x.
        left: stages of S, of 64 inner positions.
        right: stages of x.
        alone: one CTA a multiprocessor, else one a tile.
    """

    wide: int
    groups: int
    depth: int
    left: int
    right: int
    alone: bool

    @property
    def across(self) -> int:
        """Columns of x that a CTA takes."""
        return self.wide * self.groups

    def threads(self, size: int) -> int:
        """Threads of a CTA; a whole warpgroup produces where registers are short."""
        consumers = 2 * size * self.groups
        return consumers + (128 if self.wide == 256 and consumers == 256 else 32)

    def shared(self, size: int, tokens: bool = False) -> int:
        """Dynamic shared memory of a CTA, bytes."""
        rings = self.left * size * 128 + self.right * self.across * self.depth * 2
        # What large results and rows of tokens leave through, 1 KiB a warp, and room to align.
        staging = 64 * size * self.groups if self.alone or tokens else 0
        return rings + staging + 1024


def tile(size: int, width: int) -> Cut:
    """How spmm is cut for blocks of this size and x of this width.

    Wide tiles read the values fewer times, which matters when L2 is the limit; narrow ones leave
    room for several CTAs on a multiprocessor, which hide each other's beginnings and ends.
    """
    if width <= 64:
        return Cut(64, 1, 64, 4, 4, False)
    if width <= 128:
        return Cut(128, 1, 64, 4, 4, False) if size == 64 else Cut(128, 1, 64, 3, 3, False)
    return Cut(256, 1, 32, 4, 9, True) if size == 128 else Cut(256, 2, 32, 3, 6, True)


# The same for rows of tokens, the largest first, and what a tile costs where a multiprocessor has
# many, relatively. Stages are 64 deep, so that TMA reads whole lines.
TOKEN_CUTS = {
    64: {
        Cut(128, 2, 64, 4, 4, True): 20,
        Cut(128, 1, 64, 4, 4, False): 10,
        Cut(64, 1, 64, 4, 4, False): 7,
    },
    128: {
        Cut(256, 1, 64, 4, 4, True): 20,
        Cut(128, 1, 64, 3, 3, False): 14,
        Cut(64, 1, 64, 4, 4, False): 8,
    },
}


def token_tile(several: int, size: int, lines: int, width: int) -> Cut:
    """How spmm is cut for rows of tokens; however it is, it adds up in the same order.

    Args:
        several: multiprocessors.
        size: side of a block.
        lines: of blocks, of all matrices.
        width: tokens.
    """
    costs = TOKEN_CUTS[size]
    return min(costs, key=lambda cut: -(-lines * -(-width // cut.across) // several) * costs[cut])


# Beyond this many tiles a CTA, a walk by strides is even enough.
SCHEDULED = 16
# Tiles of one launch, whose lists take 16 bytes each.
TILES = 1 << 20


def walks(records: Tensor, across: int, matrices: int, several: int) -> Tensor:
    """Which tiles each CTA takes, in which order; kept with the records.

    Args:
        records: int32 (lines, 3) of ``plans.cuda_block``, the longest first.
        across: column tiles.
        matrices: matrices that share the records.
        several: CTAs that share the tiles; 0 = a CTA for each.

    Returns:
        int32 (ctas, most, 4): line, first element in its table, elements, matrix * across + column
        tile; elements are −1 after a CTA's last tile. Few tiles are dealt out by their length,
        neighbours in rounds (which reads the records back from the device), many by strides that
        turn round.
    """

    def make() -> Tensor:
        lines, repeats = records.shape[0], across * matrices
        ctas = min(several, lines * repeats) or lines * repeats
        if ctas < lines * repeats <= SCHEDULED * ctas:
            # A tile costs about as much as an element besides its elements.
            costs = np.tile(records[:, 2].cpu().numpy() + 1.0, repeats)
            order = torch.from_numpy(dealt(costs, ctas))
        else:
            order = _strided(lines, repeats, ctas)
        order = order.to(records.device)
        rank, repeat = order % lines, order // lines
        tiles = torch.cat([records[rank], repeat[..., None].to(torch.int32)], -1)
        tiles[order < 0] = -1
        return tiles.contiguous()

    return derived(records, ("walks", across, matrices, several), make)


def walked(
    records: Tensor, across: int, several: int, *tensors: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """What each launch is for: matrices of at most ``TILES`` tiles together; mostly all at once.

    Args:
        records: see ``walks``.
        across: likewise.
        several: likewise.
        *tensors: (F, …) each.

    Yields:
        ``walks`` of some matrices, then these of each tensor.
    """
    step = max(1, TILES // max(1, records.shape[0] * across))
    for start in range(0, tensors[0].shape[0], step):
        some = [t[start : start + step] for t in tensors]
        yield walks(records, across, some[0].shape[0], several), *some


def _strided(lines: int, repeats: int, ctas: int) -> Tensor:
    """Tiles in turn, −1 after the last; every other turn goes backwards, so that sums even out."""
    turns = -(-lines * repeats // ctas)
    tile = torch.arange(turns * ctas).view(turns, ctas)
    tile[1::2] = tile[1::2].flip(1)
    return torch.where(tile < lines * repeats, tile, -1).T


@functools.lru_cache(maxsize=256)
def sddmm_request(size: int, dtype: torch.dtype, panels: int, stages: int) -> Request:
    """The sddmm kernel for D of up to 64 · panels."""
    constants = {"SIZE": size, "DTYPE": CODES[dtype], "PANELS": panels, "STAGES": stages}
    return request("sddmm_block_sm90", constants, flush=True)


def sddmm_shared(size: int, panels: int, stages: int) -> int:
    """Dynamic shared memory of an sddmm CTA, bytes: Q, stages of 64 keys, results."""
    return panels * (size + stages * 64) * 128 + size * 128 + 1024


@functools.lru_cache(maxsize=256)
def spmm_request(
    size: int,
    dtype: torch.dtype,
    cut: Cut,
    transposed: bool,
    partial: bool,
    tokens: int | None = None,
) -> Request:
    """The spmm kernel; ``partial`` writes float32."""
    constants = {
        "SIZE": size,
        "DTYPE": CODES[dtype],
        "WIDE": cut.wide,
        "GROUPS": cut.groups,
        "DEPTH": cut.depth,
        "STAGES_A": cut.left,
        "STAGES_B": cut.right,
        "TRANSPOSED": int(transposed),
        "PARTIAL": int(partial),
    }
    constants |= token_constants(tokens)
    return request("spmm_block_sm90", constants, flush=True)
