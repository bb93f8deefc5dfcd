"""Row parts on CUDA: gathered rows on CUDA cores; exact per element, whatever the others hold."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import request
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import Argument, Kernel, kernel
from mixgrain.cuda.recording import current

from ..plans.plan import PartPlan
from .parts import CODES, mask, mask_side, runs

WARPS = 4  # row.cuh: kWarps
THREADS = 32 * WARPS
# CTAs of a multiprocessor that walk over short rows: alone, and beside other kernels.
ALONE, BESIDE = 6, 4
# Beside others, cache that is left to their shared memory, percent. Without it they could not start
# on a multiprocessor before the last of these CTAs has left it.
CARVEOUT = 100
# Elements of a gathered row that one lane holds: registers for as many float32 sums.
MOST_ELEMENTS = 16


@functools.lru_cache(maxsize=256)
def spread(pieces: int, elements: int) -> tuple[int, int, int]:
    """How a row of 16-byte pieces lies over lanes.

    Args:
        pieces: 16-byte pieces of a row.
        elements: elements of a piece.

    Returns:
        LANES that share a row, VECTORS pieces of each, and passes over the row: the least waste
        first, then few passes, then whole cache lines (8 lanes) per gathered row.
    """
    best: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None
    for exponent in range(6):
        for vectors in range(1, MOST_ELEMENTS // elements + 1):
            width = (1 << exponent) * vectors
            passes = -(-pieces // width)
            # Long rows are what all lanes are for, and several pieces a lane save shuffles only
            # where a lane looks up a single index (row.cuh: kRegisters).
            if (passes > 1 and exponent < 5) or (vectors > 1 and exponent < 3):
                continue
            cost = (passes * width, passes, abs(exponent - 3))
            if best is None or cost < best[0]:
                best = cost, (1 << exponent, vectors, passes)
    assert best is not None
    return best[1]


def _rows(t: Tensor) -> tuple[Argument, ...]:
    """Pointer, strides of free index and entry in elements, of rows in bytes."""
    strides = t.stride()
    return (
        t.data_ptr(),
        np.int64(strides[0]),
        np.int64(strides[1]),
        np.uint32(strides[2] * t.element_size()),
    )


def _classes(items: int, long: int, lanes: int) -> Iterator[tuple[int, int, bool]]:
    """First item, their number, and whether each lane group has an item of its own, per launch."""
    if lanes == 32:  # a group is a warp
        long = items
    if long:
        yield 0, long, False
    if items > long:
        yield long, items - long, True


def _beside() -> bool:
    """Whether what is launched now runs beside other kernels."""
    recording = current()
    return recording is not None and recording.beside


def _grid(
    device: int, items: int, free: int, lanes: int, vectors: int, own: bool, tiles: int = 1
) -> tuple[int, int]:
    """CTAs along items and matrices.

    Those that walk are as many as run at once: one more would begin when the others end.
    """
    units = -(-items // (32 // lanes if own else 1))
    if not own:
        return -(-units // WARPS), free
    alone = ALONE if vectors == 1 and lanes >= 8 else ALONE - 1  # as the kernels' launch bounds
    room = max(1, facts(device).multiprocessors * (BESIDE if _beside() else alone) // tiles)
    return min(-(-units * free // WARPS), room), 1


def _near(t: Tensor) -> Tensor:
    """An operand whose rows are less than 4 GiB apart: kernels multiply 32-bit strides."""
    return t if t.stride(2) * t.element_size() < 2**32 else t.contiguous()


@functools.lru_cache(maxsize=1024)
def _sddmm_kernel(
    device: int,
    width: int,
    operand: torch.dtype,
    out: torch.dtype,
    side: int,
    own: bool,
    beside: bool,
) -> Kernel:
    elements = 16 // operand.itemsize
    pieces = width // elements
    lanes, vectors, passes = spread(pieces, elements)
    constants = {
        "DTYPE": CODES[operand],
        "OUT": CODES[out],
        "LANES": lanes,
        "VECTORS": vectors,
        "EXACT": int(lanes * vectors * passes == pieces),
        "LOOP": int(passes > 1),
        "KEEP": side,
        "OWN": int(own),
        "BESIDE": int(beside),
    }
    return kernel(request("sddmm_row", constants), device, CARVEOUT if beside else None)


def sddmm_row(
    values: Tensor,
    q: Tensor,
    k: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    part: PartPlan,
    scale: float,
) -> None:
    """Write scale · q kᵀ to the slots of a row part; see ``block.sddmm`` for the arguments."""
    columns, items = part.tensors[:2]
    if not columns.numel():
        return
    width, device = q.shape[3], q.device.index
    side = mask_side(keep, not keep_rows)
    q, k = _near(q), _near(k)
    pieces = width * q.element_size() // 16
    lanes, vectors, _ = spread(pieces, 16 // q.element_size())
    first = part.starts[0] * values.element_size()
    for start, many, own in _classes(items.shape[0], part.scalars[1], lanes):
        run = _sddmm_kernel(device, width, q.dtype, values.dtype, side, own, own and _beside())
        for kept, out, left, right in runs(keep, values, q, k):
            run(
                _grid(device, many, out.shape[0], lanes, vectors, own),
                THREADS,
                (
                    out.data_ptr() + first,
                    np.int64(values.shape[1]),
                    *_rows(left),
                    *_rows(right),
                    *mask(kept),
                    items.data_ptr() + 16 * start,
                    columns.data_ptr(),
                    np.int32(many),
                    np.int32(out.shape[0]),
                    np.int32(q.shape[2]),
                    np.int32(pieces),
                    np.float32(scale),
                    np.int64(columns.numel()),
                    np.int32(part.scalars[4] if start == 0 else 0),
                ),
            )


@functools.lru_cache(maxsize=1024)
def _spmm_kernel(
    device: int,
    width: int,
    operand: torch.dtype,
    value: torch.dtype,
    out: torch.dtype,
    order: int,
    side: int,
    add: bool,
    own: bool,
    beside: bool,
) -> tuple[Kernel, int]:
    """The kernel and its number of column tiles."""
    elements = 16 // operand.itemsize
    pieces = width // elements
    lanes, vectors, tiles = spread(pieces, elements)
    constants = {
        "DTYPE": CODES[operand],
        "VALUES": CODES[value],
        "OUT": CODES[out],
        "LANES": lanes,
        "VECTORS": vectors,
        "EXACT": int(lanes * vectors * tiles == pieces),
        "KEEP": side,
        "ORDER": order,
        "ADD": int(add),
        "OWN": int(own),
        "BESIDE": int(beside),
    }
    return kernel(request("spmm_row", constants), device, CARVEOUT if beside else None), tiles


@functools.lru_cache(maxsize=64)
def _merge_kernel(device: int, out: torch.dtype, add: bool) -> Kernel:
    return kernel(request("spmm_row_merge", {"OUT": CODES[out], "ADD": int(add)}), device)


def spmm_row(
    out: Tensor,
    values: Tensor,
    x: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    part: PartPlan,
    scale: float,
    transposed: bool,
    add: bool,
) -> None:
    """Write, or add, scale · S x of a row part; see ``block.spmm`` for the arguments."""
    if transposed:
        indices, order, items, splits = part.tensors[3:7]
        places, ordered = order.data_ptr(), 1 if order.dtype == torch.int32 else 2
    else:
        indices, items, splits = part.tensors[:3]
        places, ordered = 0, 0
    partials, long = part.scalars[2:4] if transposed else part.scalars[:2]
    width, device = x.shape[3], x.device.index
    # Kernels name the gathered side first: rows of S are what its transpose gathers.
    side = mask_side(keep, keep_rows == transposed)
    x = _near(x)
    pieces = width * x.element_size() // 16
    lanes, vectors, _ = spread(pieces, 16 // x.element_size())
    first = part.starts[0] * values.element_size()
    for kept, to, weights, rows in runs(keep, out, values, x):
        free, lines = to.shape[0], np.int32(out.shape[2])
        made = x.new_empty(free, partials, width, dtype=torch.float32) if partials else None
        target = (to.data_ptr(), *map(np.int64, to.stride()[:3]))
        space = (made.data_ptr() if made is not None else 0, np.int64(partials * width))
        for start, many, own in _classes(items.shape[0], long, lanes):
            beside = own and _beside()
            run, tiles = _spmm_kernel(
                device, width, x.dtype, values.dtype, out.dtype, ordered, side, add, own, beside
            )
            run(
                (*_grid(device, many, free, lanes, vectors, own, tiles), tiles),
                THREADS,
                (
                    *target,
                    *space,
                    weights.data_ptr() + first,
                    np.int64(values.shape[1]),
                    *_rows(rows),
                    *mask(kept),
                    items.data_ptr() + 16 * start,
                    indices.data_ptr(),
                    places,
                    np.int32(many),
                    np.int32(free),
                    lines,
                    np.int32(pieces),
                    np.float32(scale),
                ),
            )
        if made is not None:
            _merge_kernel(device, out.dtype, add)(
                (splits.shape[0], -(-width // (4 * THREADS)), free),
                THREADS,
                (*target, *space, splits.data_ptr(), lines, np.int32(width)),
            )
