"""Fused attention over arbitrary CSR, against a kernel that only gathers the same rows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import mixgrain as mg
from mixgrain.formats.row import RowLayout

from .work import L2_BYTES, Work, dots, launched, random, wrapped

N, HEADS, D = 131_072, 8, 64
KEYS = 32  # of a row of csr-random
EDGES, EXPONENT = 4_000_000, -1.2  # of csr-powerlaw
PIECE = 256  # entries of a warp of the gathering kernel

# Sums of the 32-bit words of every K and V row that a piece of a row names: what is read counts,
# and additions cost next to nothing. A row of 64 two-byte elements is 8 lanes wide.
GATHER = r"""
extern "C" __global__ void __launch_bounds__(256)
gather_only(const uint4 *k, const uint4 *v, const int *columns, const int4 *pieces, int count,
            int n, unsigned *out) {
    const int piece = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (piece >= count) return;
    const int4 mine = pieces[piece];
    const size_t head = static_cast<size_t>(blockIdx.y) * n;
    unsigned sum = 0;
#pragma unroll 8
    for (int e = lane / 8; e < mine.z; e += 4) {
        const size_t at = (head + __ldg(columns + mine.y + e)) * 8 + lane % 8;
        const uint4 a = __ldg(k + at), b = __ldg(v + at);
        sum += a.x + a.y + a.z + a.w + b.x + b.y + b.z + b.w;
    }
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, d);
    if (lane == 0) atomicAdd(out + head + mine.x, sum);
}
"""


def lengths(kind: str, draw: np.random.Generator) -> np.ndarray:
    """Entries of every row."""
    if kind == "random":
        return np.full(N, KEYS)
    weights = np.arange(1, N + 1) ** EXPONENT
    low, high = 0.0, float(N) * N
    for _ in range(100):  # scaled so that the clipped lengths add up
        middle = (low + high) / 2
        few = np.minimum(np.rint(middle * weights), N).sum() < EDGES
        low, high = (middle, high) if few else (low, middle)
    return draw.permutation(np.minimum(np.rint(high * weights), N).astype(np.int64))


@functools.cache
def layout(kind: str) -> RowLayout:
    """csr-random or csr-powerlaw, on the device."""
    draw = np.random.default_rng(0)
    counts = lengths(kind, draw)
    rows = [np.sort(draw.choice(N, int(c), replace=False, shuffle=False)) for c in counts]
    offsets = torch.from_numpy(np.concatenate([[0], counts.cumsum()]))
    columns = torch.from_numpy(np.concatenate(rows).astype(np.int32))
    return RowLayout.from_csr((N, N), offsets.cuda(), columns.cuda())


def gather_only(k: Tensor, v: Tensor, kept: RowLayout) -> Callable[[], Tensor]:
    """A call that gathers K and V and returns int32 (1, heads, N), the sums of their words."""
    import cupy

    counts = kept.row_offsets.diff().cpu()
    cuts = (counts + PIECE - 1) // PIECE
    row = torch.repeat_interleave(torch.arange(N), cuts)
    at = (torch.arange(len(row)) - (cuts.cumsum(0) - cuts)[row]) * PIECE
    size = torch.minimum(counts[row] - at, torch.tensor(PIECE))
    first = kept.row_offsets[:-1].cpu()[row] + at
    order = torch.argsort(size, descending=True, stable=True)
    pieces = torch.stack([row, first, size, size], 1)[order].int().cuda()
    run = cupy.RawKernel(GATHER, "gather_only", options=("-std=c++17",), backend="nvrtc")

    def call() -> Tensor:
        out = torch.zeros(1, HEADS, N, dtype=torch.int32, device="cuda")
        given = (k.data_ptr(), v.data_ptr(), kept.columns.data_ptr(), pieces.data_ptr())
        arguments = (*given, np.int32(len(pieces)), np.int32(N), out.data_ptr())
        launched(run, (-(-len(pieces) // 8), HEADS), 256, arguments)
        return out

    return call


def _sums(k: Tensor, v: Tensor, kept: RowLayout, row: Tensor) -> Tensor:
    """What gather_only should return."""
    words = k.view(torch.int32).long().sum(-1) + v.view(torch.int32).long().sum(-1)
    total: Tensor = words.new_zeros(words.shape).index_add_(
        2, row, words[:, :, kept.columns.long()]
    )
    return wrapped(total)


def _first_head(q: Tensor, k: Tensor, v: Tensor, kept: RowLayout, row: Tensor) -> Tensor:
    """(1, 1, N, D) in float64."""
    column = kept.columns.long()
    s = dots(q[0, 0], k[0, 0], row, column) * D**-0.5
    top = s.new_full((N,), -torch.inf).scatter_reduce_(0, row, s, "amax")
    p = (s - top[row]).exp()
    total = s.new_zeros(N).index_add_(0, row, p)
    out: Tensor = s.new_zeros(N, D)
    for i, j, w in zip(*(t.split(1 << 20) for t in (row, column, p)), strict=True):
        out.index_add_(0, i, w[:, None] * v[0, 0, j].double())
    out /= total.clamp(min=1e-300)[:, None]
    return out[None, None]


def csr(kind: str) -> Work:
    """Attention over a graph; the peer reads as much and computes nothing."""
    kept = layout(kind)
    q, k, v = (random(1, HEADS, N, D, dtype=torch.bfloat16, seed=s) for s in range(3))
    row = torch.repeat_interleave(torch.arange(N, device="cuda"), kept.row_offsets.diff())
    return Work(
        id=f"fused-csr-{kind}",
        ours=lambda: mg.attend(q, k, v, kept, impl="fused"),
        peers={"gather only": gather_only(k, v, kept)},
        oracle=lambda: _first_head(q, k, v, kept, row),
        oracles={"gather only": lambda: _sums(k, v, kept, row)},
        floor_ms=kept.nnz * HEADS * 2 * D * 2 / L2_BYTES * 1e3,
        floor="rows of K and V for every kept entry through L2 at 8.9 TB/s",
        shape=f"{kept.nnz:,} edges, B1 H{HEADS} N{N} D{D} bfloat16",
        tolerance=2e-2,
    )


GRAPHS: dict[str, Callable[[], Work]] = {
    "fused-csr-random": functools.partial(csr, "random"),
    "fused-csr-powerlaw": functools.partial(csr, "powerlaw"),
}
