"""BlockLayout of 64 or 128 on sm_90a: wgmma and TMA for float16 and bfloat16."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import kernel
from mixgrain.cuda.tma import descriptor

CODES = {torch.float16: 0, torch.bfloat16: 1}
# TMA stages of sddmm by panels of 64 columns of D.
SDDMM_STAGES = {1: 3, 2: 3, 3: 2, 4: 2}


def runs_here(size: int, width: int, *dtypes: torch.dtype) -> bool:
    """Whether these kernels take blocks of this size and operands of this width and dtypes."""
    alike = all(dtype in CODES and dtype == dtypes[0] for dtype in dtypes)
    return size in (64, 128) and width % 8 == 0 and alike


def _laid_out(t: Tensor) -> Tensor:
    """A copy where a dimension is broadcast: a tensor map has no stride 0."""
    return t.contiguous() if 0 in t.stride() else t


def _operand_map(t: Tensor, rows: int) -> np.ndarray:
    """(F, E, N, D), any strides but the last, in boxes of 64 columns × rows."""
    free, entries, n, width = t.shape
    size = t.element_size()
    strides = tuple(t.stride(d) * size for d in (2, 1, 0))
    return descriptor(t.data_ptr(), t.dtype, (width, n, entries, free), strides, (64, rows, 1, 1))


def _values_map(values: Tensor, shift: int, size: int, items: int) -> np.ndarray:
    """The slots of a block part, (F, items · size, size), in boxes of 64 × 64."""
    each = values.element_size()
    return descriptor(
        values.data_ptr() + shift * each,
        values.dtype,
        (size, items * size, values.shape[0]),
        (size * each, values.stride(0) * each),
        (64, 64, 1),
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
    q, k = _laid_out(q), _laid_out(k)
    panels = -(-q.shape[-1] // 64)
    stages = SDDMM_STAGES[panels]
    wanted = sddmm_request(size, q.dtype, panels, stages)
    kernel(wanted, q.device.index)(
        (chunks.shape[0], values.shape[0]),
        size * 2 + 32,
        (
            _operand_map(q, size),
            _operand_map(k, 64),
            _values_map(values, shift, size, items.shape[0]),
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
    items: Tensor,
    listed: Tensor | None,
    bounds: Tensor,
    order: Tensor,
    masks: Tensor,
    used: Tensor,
    scale: float,
    add: bool = False,
) -> None:
    """Write (or add to a float32 out) scale · S x, or scale · Sᵀ x when ``listed`` is given.

    Args:
        out: (F, E, rows, D), contiguous; x's dtype, or float32 for partial results.
        values: (F, slots) of x's dtype, contiguous.
        x: (F, E, inner, D), rows 16-byte aligned.
        shift: first slot of the part.
        size: side of a block, 64 or 128.
        items: int32 (n, 4), entry, block row, block column, mask of every block.
        listed: None, or int32 (n,), items in column-major order for the transpose.
        bounds: int32, where each block row's (column's) items start.
        order: int32, block rows by falling number of items.
        masks: uint8 (M, size, size // 8).
        used: uint8 (M, size // 8), inner positions with a kept element.
        scale: multiplies the product.
        add: add to out instead of overwriting it; float32 only.
    """
    free, entries, rows, width = out.shape
    if 0 in (free, order.shape[0], width):
        return
    x = _laid_out(x)
    cut = tile(size, width)
    partial = out.dtype == torch.float32
    wanted = spmm_request(size, x.dtype, cut, listed is not None, partial)
    device = x.device.index
    across, lines = -(-width // (cut.wide * cut.groups)), order.shape[0]
    tiles = free * lines * across
    kernel(wanted, device)(
        (min(tiles, facts(device).multiprocessors) if cut.persistent else tiles,),
        cut.threads(size),
        (
            _values_map(values, shift, size, items.shape[0]),
            _operand_map(x, 64),
            # An unused map still has to be one.
            _operand_map(x, 64) if partial else _operand_map(out, size),
            items.data_ptr(),
            0 if listed is None else listed.data_ptr(),
            bounds.data_ptr(),
            order.data_ptr(),
            masks.data_ptr(),
            used.data_ptr(),
            np.int32(lines // entries),
            np.int32(lines),
            np.int32(across),
            np.int32(free),
            np.float32(scale),
            out.data_ptr() if partial else 0,
            np.int32(rows),
            np.int32(width),
            np.int32(add),
        ),
        cut.shared(size),
    )


class Cut(NamedTuple):
    """How spmm cuts its work.

    Attributes:
        wide: columns of x that a warpgroup takes.
        groups: warpgroups side by side.
        stages: TMA stages of 64 inner positions.
        persistent: one CTA a multiprocessor, else one a tile.
    """

    wide: int
    groups: int
    stages: int
    persistent: bool

    def threads(self, size: int) -> int:
        """Threads of a CTA; a whole warpgroup produces where registers are short."""
        consumers = 2 * size * self.groups
        return consumers + (128 if self.wide == 256 and consumers == 256 else 32)

    def shared(self, size: int) -> int:
        """Dynamic shared memory of a CTA, bytes."""
        across = self.wide * self.groups
        results = 2 * size * across if self.persistent else 0
        return self.stages * (size + across) * 128 + results + 1024


def tile(size: int, width: int) -> Cut:
    """How spmm is cut for blocks of this size and x of this width.

    Wide tiles read the values fewer times, which matters when L2 is the limit; narrow ones leave
    room for several CTAs on a multiprocessor, which hide each other's beginnings and ends.
    """
    if width <= 64:
        return Cut(64, 1, 4, False)
    if width <= 128:
        return Cut(128, 1, 4 if size == 64 else 3, False)
    return Cut(256, 1, 3, True) if size == 128 else Cut(256, 2, 2, True)


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
    size: int, dtype: torch.dtype, cut: Cut, transposed: bool, partial: bool
) -> Request:
    """The spmm kernel; ``partial`` writes float32."""
    constants = {
        "SIZE": size,
        "DTYPE": CODES[dtype],
        "WIDE": cut.wide,
        "GROUPS": cut.groups,
        "STAGES": cut.stages,
        "TRANSPOSED": int(transposed),
        "PERSISTENT": int(cut.persistent),
        "PARTIAL": int(partial),
    }
    return request("spmm_block_sm90", constants, flush=True)
