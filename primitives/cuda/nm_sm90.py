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
from mixgrain.cuda.launch import Argument, kernel
from mixgrain.cuda.tma import descriptor

from .nm_stored import Stored
from .parts import CODES, MOST_MATRICES, activation_constant

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


# Microseconds of a stage of each cut, when a multiprocessor has one CTA of it; measured.
STAGE_US = {(2, 256): 0.56, (2, 128): 0.39, (2, 64): 0.33, (1, 64): 0.28}


def cut_of(rows: int, width: int, matrices: int, several: int) -> Cut:
    """How a product of this size is cut for this many multiprocessors.

    Large tiles read x and values fewer times; a product that has few of them takes smaller ones, so
    that every multiprocessor has work.
    """
    cost = {}
    for (groups, wide), each in STAGE_US.items():
        tiles = -(-rows // (64 * groups)) * -(-width // wide) * matrices
        cost[groups, wide] = -(-tiles // several) * each
    groups, wide = min(cost, key=lambda cut: cost[cut])
    # Sharing x spares L2, which pays when it is busy for long.
    tiles = -(-rows // (64 * groups)) * -(-width // wide) * matrices
    cluster = 2 if wide >= 128 and rows > 64 * groups and tiles >= 6 * several else 1
    stage = Cut(groups, wide, cluster, 1).stage
    stages = min(4 if wide == 256 else 8, (MOST - groups * 64 * 128 - 1024) // stage)
    return Cut(groups, wide, cluster, stages)


@functools.lru_cache(maxsize=256)
def spmm_request(
    dtype: torch.dtype, cut: Cut, major: bool, turned: bool, partial: bool, activation: int = 0
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
    constants |= activation_constant(activation)
    return request("spmm_nm_sm90", constants, flush=True)


# The share of all multiprocessors that clusters of so many CTAs find room on; one cluster too many
# would begin when the others end.
CLUSTERED = {2: 1.0, 4: 0.88}


class Thin(NamedTuple):
    """How a product with few columns is cut.

    Attributes:
        groups: warpgroups of a CTA, 64 rows each.
        wide: columns of x, at least.
        split: CTAs that share the inner dimension.
        stages: of TMA.
    """

    groups: int
    wide: int
    split: int
    stages: int

    @property
    def stage(self) -> int:
        """Bytes of a stage: x, values, metadata of 256 bytes of dense rows."""
        return -(-(self.wide * 256 + 64 * self.groups * 144) // 1024) * 1024


def thin_of(rows: int, width: int, inner: int, matrices: int, several: int) -> Thin:
    """How a product with few columns is cut: about two CTAs for each multiprocessor.

    They keep the memory busy; more of them read x, and wait for each other, more than it gains.
    """
    wide = next((w for w in (8, 16, 32) if width <= w), 64)
    groups = 2 if wide == 64 and rows >= 8192 else 1
    tiles = -(-rows // (64 * groups)) * -(-width // wide) * matrices
    split = 4
    while split > 1 and (
        inner < 512 * split or tiles * split * groups > 2 * several * CLUSTERED[split]
    ):
        split //= 2
    return _staged(groups, wide, split, tiles, several)


def _staged(groups: int, wide: int, split: int, tiles: int, several: int) -> Thin:
    # Bytes under way hide the latency: all shared memory, for the CTAs that are there at once.
    resident = max(1, min(4 // groups, -(-tiles * split // several)))
    stage = Thin(groups, wide, split, 1).stage
    return Thin(groups, wide, split, max(3, min(8, (MOST // resident - 2048) // stage)))


def best_of(rows: int, width: int, inner: int, matrices: int, several: int) -> Cut | Thin:
    """How a linear is cut: along the inner dimension too where there are few tiles."""
    thin = thin_of(rows, width, inner, matrices, several)
    if width <= 64:
        return thin
    if -(-rows // 64) * -(-width // 64) * matrices <= several and thin.split > 1:
        return thin
    tiles = -(-rows // 128) * -(-width // 128) * matrices
    if 2 * tiles <= several and inner >= 1024:
        return _staged(2, 128, 2, tiles, several)
    return cut_of(rows, width, matrices, several)


@functools.lru_cache(maxsize=256)
def thin_request(dtype: torch.dtype, cut: Thin, activation: int = 0) -> Request:
    """The kernel of few columns."""
    constants = {
        "DTYPE": CODES[dtype],
        "GROUPS": cut.groups,
        "WIDE": cut.wide,
        "SPLIT": cut.split,
        "STAGES": cut.stages,
        "DEPTH": 2,
    }
    constants |= activation_constant(activation)
    return request("spmm_nm_thin_sm90", constants, flush=True)


def values_map(values: Tensor, s: Stored, box: tuple[int, int]) -> np.ndarray:
    """(F, E · lines · packed), contiguous, as (F · E, lines, packed); box: columns, rows."""
    each = values.element_size()
    return descriptor(
        values.data_ptr(),
        values.dtype,
        (s.packed, s.lines, values.shape[0] * s.entries),
        (s.packed * each, s.lines * s.packed * each),
        (*box, 1),
        box[0] * each,
    )


def metadata_of(s: Stored) -> tuple[Argument, ...]:
    """Metadata as (E, 64 bytes of dense row, stored rows) words of 32 bits."""
    return s.metadata.data_ptr(), np.int32(s.lines), np.int32(s.words // (4 * s.lines))


def x_map(x: Tensor, major: bool, box: tuple[int, int]) -> np.ndarray:
    """(F, E, inner, N) with N contiguous (major) or inner contiguous; box: contiguous, other."""
    free, entries, inner, width = x.shape
    dims = (width, inner, entries, free) if major else (inner, width, entries, free)
    # Of a single element the stride is never taken, but has to be one.
    lone = -(-dims[0] * x.element_size() // 16) * 16
    strides = tuple(
        x.stride(d) * x.element_size() if x.shape[d] > 1 else lone
        for d in (2 if major else 3, 1, 0)
    )
    return descriptor(x.data_ptr(), x.dtype, dims, strides, (*box, 1, 1))


def spmm(
    out: Tensor,
    values: Tensor,
    s: Stored,
    x: Tensor,
    major: bool,
    scale: float,
    turned: bool = False,
    bias: Tensor | None = None,
    cut: Cut | Thin | None = None,
    activation: int = 0,
) -> None:
    """Write scale · S x of every matrix, or (turned) its transpose plus a bias, activated.

    Args:
        out: (F, E, rows, N), contiguous, N % 8 == 0, of x's dtype or float32; turned: (F, E, N,
            rows rounded up to 8), contiguous, of x's dtype.
        values: (F, slots) of x's dtype, contiguous, 16-byte aligned.
        s: the matrices, metadata in hardware order: "2:4" or "1:2-half"; of float32 "1:2-float32".
        x: (F, E, columns, N), N or (of float32 always) the columns contiguous, 16-byte aligned.
        major: whether N is the contiguous one.
        scale: multiplies the product.
        turned: write the transpose.
        bias: (rows,) of x's dtype, added before rounding; turned only.
        cut: how to cut it; None = as measured.
        activation: a code of ``activations``, applied before rounding; 0 = none; turned only.
    """
    width, size, device = x.shape[3], x.element_size(), x.device.index
    matrices, several = out.shape[0] * s.entries, facts(x.device.index).multiprocessors
    if cut is None and turned and not major and matrices * -(-width // 64) <= MOST_MATRICES:
        cut = best_of(s.rows, width, s.columns, matrices, several)
    if isinstance(cut, Thin):
        _thin(out, values, s, x, scale, bias, cut, activation)
        return
    cut = cut or cut_of(s.rows, width, matrices, several)
    panel = 128 // size
    down, across = -(-s.rows // (cut.rows * cut.cluster)), -(-width // cut.wide)
    count = down * across * matrices
    box = (64, panel) if major else (panel, cut.wide // cut.cluster)
    left = values_map(values, s, (64 // size, cut.rows))
    staged = left  # not used
    if turned and size == 2:
        pitch = out.shape[3]
        dims, strides = (pitch, width, matrices), (pitch * 2, pitch * width * 2)
        staged = descriptor(out.data_ptr(), out.dtype, dims, strides, (64, 64, 1))
    wanted = spmm_request(x.dtype, cut, major, turned, out.dtype != x.dtype, activation)
    kernel(wanted, device)(
        (min(count, several // cut.cluster) * cut.cluster,),
        cut.groups * 128 + 128,
        (
            left,
            x_map(x, major, box),
            staged,
            *metadata_of(s),
            out.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            np.int32(count),
            np.int32(down),
            np.int32(across),
            np.int32(BAND),
            np.int32(s.entries),
            np.int32(s.rows),
            np.int32(out.shape[3] if turned else s.rows),
            np.int32(s.columns),
            np.int32(width),
            np.float32(scale),
        ),
        cut.shared(turned),
    )


def _thin(
    out: Tensor,
    values: Tensor,
    s: Stored,
    x: Tensor,
    scale: float,
    bias: Tensor | None,
    cut: Thin,
    activation: int,
) -> None:
    """Write x Sᵀ for at most 64 columns of x; see `spmm`."""
    size, rows, across = x.element_size(), 64 * cut.groups, -(-x.shape[3] // cut.wide)
    kernel(thin_request(x.dtype, cut, activation), x.device.index)(
        (-(-s.rows // rows) * cut.split, across * out.shape[0] * s.entries),
        cut.groups * 128 + 32,
        (
            values_map(values, s, (128 // size, rows)),
            x_map(x, False, (128 // size, cut.wide)),
            *metadata_of(s),
            out.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            np.int32(across),
            np.int32(s.entries),
            np.int32(s.rows),
            np.int32(out.shape[3]),
            np.int32(s.columns),
            np.int32(x.shape[3]),
            np.float32(scale),
        ),
        cut.stages * cut.stage + 1024,
    )
