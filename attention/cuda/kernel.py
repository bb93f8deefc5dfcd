"""The fused kernel of sm_90a: its cut by head dimension, its request, one launch of it."""

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
# Head dimensions the kernel is compiled for; others read as zeros up to the next of these.
DIMS = (32, 64, 96, 128, 192, 256)
UNIT = 64  # rows of a query unit, keys of a key unit
PACKED = 1 << 24  # units from here on lie in the gathered tensors


class Cut(NamedTuple):
    """How the kernel is compiled for a head dimension.

    Attributes:
        dim: head dimension, padded.
        stages: key units that each ring holds, one ring for K, one for V.
        groups: consumer warpgroups, each with a query unit of an item.
        streams: independent streams of items in a CTA.
        queries: places for query units, more than groups.
    """

    dim: int
    stages: int
    groups: int
    streams: int = 1
    queries: int = 4

    @property
    def threads(self) -> int:
        """Threads of a CTA: consumers, and a warpgroup that brings and writes."""
        return 128 * (self.groups * self.streams + 1)

    @property
    def shared(self) -> int:
        """Dynamic shared memory of a CTA, bytes."""
        units = self.streams * (self.queries + 2 * self.stages)
        return units * -(-self.dim // 64) * 8192 + 1024


def cut(width: int) -> Cut:
    """The cut for a head dimension, 8 … 256."""
    dim = next(d for d in DIMS if d >= width)
    stages = {32: 5, 64: 5, 96: 4, 128: 4, 192: 3, 256: 2}[dim]
    queries = {32: 4, 64: 4, 96: 6, 128: 6, 192: 3, 256: 3}[dim]
    return Cut(dim, stages, groups(width), 2 if dim <= 64 else 1, queries)


def groups(width: int) -> int:
    """Query units of an item: what registers have room for in a stream."""
    return 3 if 64 < width <= 128 else 2


@functools.lru_cache(maxsize=64)
def fused_request(dtype: torch.dtype, how: Cut, masked: bool = False) -> Request:
    """The kernel of a cut, with or without a run-time mask of keys."""
    constants = {
        "DTYPE": CODES[dtype],
        "DIM": how.dim,
        "STAGES": how.stages,
        "GROUPS": how.groups,
        "STREAMS": how.streams,
        "QUERIES": how.queries,
        "MASKED": int(masked),
    }
    return request("fused_sm90", constants, flush=True)


def heads_map(t: Tensor) -> np.ndarray:
    """(B, H, N, D), any strides but the last, in boxes of one unit × 64 columns."""
    batch, heads, n, width = t.shape
    size = t.element_size()
    strides = tuple(t.stride(d) * size for d in (2, 1, 0))
    return descriptor(t.data_ptr(), t.dtype, (width, n, heads, batch), strides, (64, UNIT, 1, 1))


def positive(scale: float, q: Tensor, packed: Tensor) -> tuple[float, Tensor, Tensor]:
    """A positive scale, and q and gathered q for it: kernels take maxima before they scale."""
    if scale > 0:
        return scale, q, packed
    factor = 0 if scale == 0 else -1
    turned = torch.mul(q, factor)
    return -scale or 1.0, turned, turned if packed is q else torch.mul(packed, factor)


def walks(dtype: torch.dtype, width: int, device: int) -> int:
    """Streams of items that fill a device."""
    return facts(device).multiprocessors * cut(width).streams


def fused(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    tiles: Tensor,
    items: Tensor,
    steps: Tensor,
    masks: Tensor,
    scale: float,
    sink: Tensor | None = None,
    packed: tuple[Tensor, Tensor, Tensor] | None = None,
    partial: tuple[Tensor, Tensor] | None = None,
    keep: tuple[Tensor, Tensor | None] | None = None,
    how: Cut | None = None,
) -> None:
    """Write attention over the units of a plan.

    Args:
        out: (B, Hq, nq, D), contiguous, of q's dtype.
        lse: (B, Hq, nq), float32, contiguous; None to do without.
        q: (B, Hq, nq, D), rows 16-byte aligned, no dimension broadcast.
        k: (B, Hkv, nk, D), likewise.
        v: (B, Hkv, nk, D), likewise.
        starts: int32 (walks + 1,), where the tiles of each CTA's stream start.
        tiles: int32 (t, 2), item and matrix b * Hq + h.
        items: int32 (n, 8); see the kernel.
        steps: int32 (s, 4); see the kernel.
        masks: int32 (m, 128), bits of partial units.
        scale: multiplies scores.
        sink: (Hq,), float32.
        packed: gathered q (B, Hq, …, D), k and v (B, Hkv or Hq, …, D).
        partial: float32 (B * Hq, slots, 64, D) and (B * Hq, slots, 64), contiguous.
        keep: bits of keys that a mask keeps, int32 (B, units, 2), and of the gathered ones
            (B, Hkv or Hq, units, 2); see ``keep``.
        how: another cut than ``cut(D)``.
    """
    _, heads, rows, width = q.shape
    how = how or cut(width)
    pq, pk, pv = packed or (q, k, v)
    bits = (None, None) if keep is None else keep
    # What gathered the packed rows is the launch before this one.
    early = packed is not None and keep is None and scale > 0
    scale, q, pq = positive(scale, q, pq)
    kernel(fused_request(q.dtype, how, keep is not None), q.device.index)(
        (-(-(starts.shape[0] - 1) // how.streams),),
        how.threads,
        (
            heads_map(q),
            heads_map(k),
            heads_map(v),
            heads_map(pq),
            heads_map(pk),
            heads_map(pv),
            heads_map(out),
            starts.data_ptr(),
            np.int32(starts.shape[0] - 1),
            tiles.data_ptr(),
            items.data_ptr(),
            steps.data_ptr(),
            masks.data_ptr(),
            *(0 if t is None else t.data_ptr() for t in bits),
            *(np.int32(0 if t is None else t.shape[-2]) for t in bits),
            0 if sink is None else sink.data_ptr(),
            np.float32(scale),
            np.int32(heads),
            np.int32(heads // k.shape[1]),
            np.int32(heads // pk.shape[1]),
            0 if lse is None else lse.data_ptr(),
            np.int32(rows),
            np.int32(width),
            0 if partial is None else partial[0].data_ptr(),
            0 if partial is None else partial[1].data_ptr(),
            np.int32(0 if partial is None else partial[0].shape[1]),
        ),
        how.shared,
        early,
    )
