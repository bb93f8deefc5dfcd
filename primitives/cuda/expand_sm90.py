"""SpMM of a RowLayout on sm_90a: entries expanded to dense tiles on chip, and wgmma on those.

Dense tiles cost what they cost, however few entries they hold, but nothing more for an entry: where
x has many columns, that is less than gathering a row of x for each. Lines of 128 rows that are too
sparse for it stay with the kernel that gathers.
"""

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

from ..plans import cuda_expand
from ..plans.plan import PartPlan
from .block_sm90 import CODES, laid_out, operand_map, walked

# Stages of 64 inner positions of S and x, by columns of a CTA.
STAGES = {64: 8, 128: 6, 256: 4}
# Cycles of a multiprocessor: of a tile, by rows and columns of a CTA, and of each entry in it.
TILE = {64: {64: 480, 128: 600, 256: 780}, 128: {64: 600, 128: 730, 256: 1150}}
ENTRY = 0.8
# Bytes of rows of x that it gathers in a cycle.
GATHER = 44


def _hopper(index: int) -> bool:
    return facts(index).hopper


class Lines(NamedTuple):
    """Who computes which lines.

    Attributes:
        records: int32 (n, 3), of those expanded; None where none is.
        items: row items of the others, and
        splits: their splits, as in ``plans.cuda_row``; None where all are expanded.
        numbers: partial results and long items of these.
    """

    records: Tensor | None
    items: Tensor | None
    splits: Tensor | None
    numbers: list[int]


def spmm(
    out: Tensor, values: Tensor, x: Tensor, part: PartPlan, scale: float, transposed: bool
) -> PartPlan | None:
    """Write scale · S x, or scale · Sᵀ x when transposed, of the lines that this is fastest for.

    Args:
        out: (F, E, rows, D), contiguous.
        values: (F, slots), contiguous.
        x: (F, E, inner, D), rows 16-byte aligned.
        part: from ``plans.cuda_row``.
        scale: multiplies the product.
        transposed: multiply by the transpose.

    Returns:
        What is left of the part; None if nothing is.
    """
    order = part.tensors[4]
    there = facts(x.device.index)
    if not _hopper(there.index) or order.dtype != torch.int32 or not order.numel():
        return part
    if x.dtype not in CODES or values.dtype != x.dtype or out.dtype not in (x.dtype, torch.float32):
        return part
    entries, rows, width = out.shape[1:]
    inner, wide = x.shape[2], wide_of(width)
    # Where no line could ever be taken, nothing is counted; and the kernel's positions are ints.
    if ENTRY * -(-width // wide) >= width * 2 / GATHER or order.numel() >= 2**31 - 1024:
        return part
    tall = tall_of(rows, width, there.multiprocessors)
    indices, items = part.tensors[3 if transposed else 0], part.tensors[5 if transposed else 1]
    made = derived(
        items,
        ("lines", width),
        lambda: _lines(part, transposed, entries, rows, inner, width, there.multiprocessors),
    )
    if made.records is None:
        return part
    tables = derived(
        items,
        ("expanded", tall),
        lambda: cuda_expand.table(
            items, indices, order if transposed else None, entries, rows, inner, tall
        ),
    )
    x = laid_out(x)
    if any(x.stride(d) % 8 for d in range(3)):  # of dimensions of one index, which a map has too
        x = x.clone(memory_format=torch.contiguous_format)
    partial = out.dtype == torch.float32
    across, several = -(-width // wide), there.multiprocessors
    run = kernel(spmm_request(x.dtype, tall, wide, transposed, partial), there.index)
    for tiles, to, weights, right in walked(made.records, across, several, out, values, x):
        run(
            (tiles.shape[0],),
            2 * tall + 128,
            (
                operand_map(right, cuda_expand.INNER),
                weights.data_ptr() + part.starts[0] * values.element_size(),
                np.int64(values.shape[1]),
                tables.scattered.data_ptr(),
                tables.chunks.data_ptr(),
                tiles.data_ptr(),
                np.int32(tiles.shape[1]),
                right.data_ptr(),
                *(np.int64(right.stride(d)) for d in range(3)),
                tables.bounds.data_ptr(),
                indices.data_ptr(),
                order.data_ptr() if transposed else 0,
                np.int32(-(-rows // tall)),
                np.int32(entries),
                np.int32(across),
                np.float32(scale),
                to.data_ptr(),
                np.int32(rows),
                np.int32(width),
            ),
            shared(tall, wide),
        )
    if made.items is None or made.splits is None:
        return None
    tensors, scalars = list(part.tensors), list(part.scalars)
    at = 5 if transposed else 1
    tensors[at : at + 2] = made.items, made.splits
    at = 2 if transposed else 0
    scalars[at : at + 2] = made.numbers
    return part._replace(tensors=tensors, scalars=scalars)


def wide_of(width: int) -> int:
    """Columns of a CTA for x of this width."""
    return 64 if width <= 64 else 128 if width <= 128 else 256


def tall_of(rows: int, width: int, multiprocessors: int) -> int:
    """Rows of a CTA: fewer where there would be too few CTAs, if this were the only matrix."""
    return 128 if -(-rows // 128) * -(-width // wide_of(width)) > 0.7 * multiprocessors else 64


def shared(tall: int, wide: int) -> int:
    """Dynamic shared memory of a CTA, bytes."""
    return STAGES[wide] * 128 * (tall + wide) + 1024


def chosen(sizes: Tensor, rows: int, width: int, multiprocessors: int) -> Tensor:
    """Which lines are expanded, bool (lines,).

    Args:
        sizes: int64 (lines, 2), of ``cuda_expand.sizes``.
        rows: of the result, of one entry.
        width: columns of x.
        multiprocessors: of the device.
    """
    positions, chunks = sizes.double().unbind(1)
    wide, tall = wide_of(width), tall_of(rows, width, multiprocessors)
    across = -(-width // wide)
    tiles = TILE[tall][wide] * chunks + ENTRY * positions
    # Multiprocessors without a tile, if this were the only matrix and entry: which kernel it is
    # must not depend on the others.
    idle = max(1.0, multiprocessors / (-(-rows // tall) * across))
    return tiles * across * idle < positions * width * 2 / GATHER


def _lines(
    part: PartPlan,
    transposed: bool,
    entries: int,
    rows: int,
    inner: int,
    width: int,
    multiprocessors: int,
) -> Lines:
    indices = part.tensors[3 if transposed else 0]
    items, splits = part.tensors[5:7] if transposed else part.tensors[1:3]
    tall = tall_of(rows, width, multiprocessors)
    sizes = derived(
        items,
        ("sizes", tall),
        lambda: cuda_expand.sizes(items, indices, entries, rows, inner, tall),
    )
    taken = chosen(sizes, rows, width, multiprocessors)
    if not taken.any():
        return Lines(None, None, None, [])
    there = taken.to(items.device)
    records = cuda_expand.taken_records(sizes[:, 1].to(items.device), there)
    if taken.all():
        return Lines(records, None, None, [])
    items, splits, long = cuda_expand.left(items, splits, there, rows, tall)
    # Partial results keep their places.
    partials = part.scalars[2 if transposed else 0] if splits.shape[0] else 0
    return Lines(records, items, splits, [partials, long])


@functools.lru_cache(maxsize=64)
def spmm_request(
    dtype: torch.dtype, tall: int, wide: int, transposed: bool, partial: bool
) -> Request:
    """The kernel; ``partial`` writes float32."""
    constants = {
        "DTYPE": CODES[dtype],
        "ROWS": tall,
        "WIDE": wide,
        "STAGES": STAGES[wide],
        "TRANSPOSED": int(transposed),
        "PARTIAL": int(partial),
    }
    return request("spmm_expand_sm90", constants, flush=True)
