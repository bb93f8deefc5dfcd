"""NMLayout on sm_90a: wgmma.sp and TMA for 2:4 and 1:2 of halves, and 1:2 of float32 as TF32.

Launch code for one product of a batch of matrices; ``nm.py`` decides when it is taken.
"""

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

from .parts import CODES

# Row tiles that go through all columns together; see Tiles in the kernel.
BAND = 8
# Bytes of shared memory a CTA may have, less what is static.
MOST = 232_448 - 1024


class Cut(NamedTuple):
    """How the product is cut.

    Attributes:
        groups: warpgroups of a CTA, 64 rows each.
        wide: columns of x that a CTA takes.
        cluster: CTAs, one below the other, that share x.
        stages: of TMA.
    """

    groups: int
    wide: int
    cluster: int
    stages: int

    @property
    def rows(self) -> int:
        """Rows of S that a CTA takes."""
        return 64 * self.groups

    @property
    def stage(self) -> int:
        """Bytes of a stage: x, values, metadata of 128 bytes of dense rows."""
        return -(-(self.wide * 128 + self.rows * 72) // 1024) * 1024

    def shared(self, turned: bool) -> int:
        """Dynamic shared memory of a CTA, bytes."""
        return self.stages * self.stage + (self.groups * 64 * 128 if turned else 0) + 1024


def cut_of(rows: int, width: int, matrices: int, several: int) -> Cut:
    """How a product of this size is cut for this many multiprocessors.

    Large tiles read x and values fewer times; a product that has few of them takes smaller ones, so
    that every multiprocessor has work.
    """
    for groups, wide, cluster in ((2, 256, 2), (2, 128, 2), (2, 64, 1), (1, 64, 1)):
        if wide >= 2 * width and wide > 64:
            continue
        tiles = -(-rows // (64 * groups)) * -(-width // wide) * matrices
        if tiles >= several or (groups, wide) == (1, 64):
            break
    if rows <= 64 * groups:
        cluster = 1
    stage = Cut(groups, wide, cluster, 1).stage
    stages = min(8, (MOST - groups * 64 * 128 - 1024) // stage)
    return Cut(groups, wide, cluster, stages)


@functools.lru_cache(maxsize=256)
def spmm_request(
    dtype: torch.dtype, cut: Cut, major: bool, turned: bool, partial: bool
) -> Request:
    """The kernel; ``major``: columns of x lie side by side; ``partial`` writes float32."""
    constants = {
        "DTYPE": CODES[dtype],
        "GROUPS": cut.groups,
        "WIDE": cut.wide,
        "CLUSTER": cut.cluster,
        "STAGES": cut.stages,
        "DEPTH": 1,
        "MAJOR": int(major),
        "TURNED": int(turned),
        "PARTIAL": int(partial),
    }
    return request("spmm_nm_sm90", constants, flush=True)


def values_map(values: Tensor, rows: int, packed: int, box: tuple[int, int]) -> np.ndarray:
    """(F, E · rows · packed), contiguous, as (F · E, rows, packed); box: columns, rows."""
    each = values.element_size()
    matrices = values.shape[0] * values.shape[1] // (rows * packed)
    return descriptor(
        values.data_ptr(),
        values.dtype,
        (packed, rows, matrices),
        (packed * each, rows * packed * each),
        (*box, 1),
        box[0] * each,
    )


def metadata_map(metadata: Tensor, rows: int, lines: int) -> np.ndarray:
    """(E, padded rows, words) int16 as (E, lines, padded rows) words of 32 bits.

    Args:
        metadata: in hardware order.
        rows: of a tile.
        lines: of a stage, 64 bytes of dense row each.
    """
    entries, padded, words = metadata.shape
    # The copy engine does not look at what it moves: 32 bits are 32 bits.
    return descriptor(
        metadata.data_ptr(),
        torch.float32,
        (padded, words // 2, entries),
        (padded * 4, padded * words * 2),
        (rows, lines, 1),
        0,
    )


def x_map(x: Tensor, major: bool, box: tuple[int, int]) -> np.ndarray:
    """(F, E, inner, N) with N contiguous (major) or inner contiguous; box: contiguous, other."""
    free, entries, inner, width = x.shape
    size = x.element_size()
    dims = (width, inner) if major else (inner, width)
    strides = tuple(x.stride(d) * size for d in (2 if major else 3, 1, 0))
    return descriptor(x.data_ptr(), x.dtype, (*dims, entries, free), strides, (*box, 1, 1))


def spmm(
    out: Tensor,
    values: Tensor,
    metadata: Tensor,
    x: Tensor,
    packed: int,
    scale: float,
    turned: bool = False,
    bias: Tensor | None = None,
    cut: Cut | None = None,
) -> None:
    """Write scale · S x of every matrix, or (turned) its transpose plus a bias.

    Args:
        out: (F, E, rows, N), contiguous, N % 8 == 0, of x's dtype or float32; turned: (F, E, N,
            rows), contiguous, rows % 8 == 0, of x's dtype.
        values: (F, slots) of x's dtype, contiguous, 16-byte aligned.
        metadata: int16 (E, padded rows, words) in hardware order.
        x: (F, E, inner, N), its rows at multiples of 16 bytes and contiguous, or its columns.
        packed: values of a stored row.
        scale: multiplies the product.
        turned: write the transpose.
        bias: (rows,) of x's dtype, added before rounding; turned only.
        cut: how to cut it; None = as measured.
    """
    free, entries = out.shape[:2]
    width, inner = x.shape[3], x.shape[2]
    rows = out.shape[3] if turned else out.shape[2]
    device, size = x.device.index, x.element_size()
    several = facts(device).multiprocessors
    cut = cut or cut_of(rows, width, free * entries, several)
    major = x.stride(3) == 1 and not (x.stride(2) == 1 and width == 1)
    panel = 128 // size
    down, across = -(-rows // (cut.rows * cut.cluster)), -(-width // cut.wide)
    count = down * across * free * entries
    box = (64, panel) if major else (panel, cut.wide // cut.cluster)
    staged = (
        descriptor(
            out.data_ptr(),
            out.dtype,
            (rows, width, free * entries),
            (rows * size, rows * width * size),
            (64, 64, 1),
        )
        if turned and size == 2
        else values_map(values, metadata.shape[1], packed, (64 // size, cut.rows))
    )
    kernel(spmm_request(x.dtype, cut, major, turned, out.dtype != x.dtype), device)(
        (min(count, several // cut.cluster) * cut.cluster,),
        cut.groups * 128 + 128,
        (
            values_map(values, metadata.shape[1], packed, (64 // size, cut.rows)),
            metadata_map(metadata, cut.rows, 2),
            x_map(x, major, box),
            staged,
            out.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            np.int32(count),
            np.int32(down),
            np.int32(across),
            np.int32(BAND),
            np.int32(entries),
            np.int32(rows),
            np.int32(inner),
            np.int32(width),
            np.float32(scale),
        ),
        cut.shared(turned),
    )
