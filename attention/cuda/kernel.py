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
GROUPS = 2  # query units of an item
PACKED = 1 << 24  # units from here on lie in the gathered tensors


class Cut(NamedTuple):
    """How a CTA cuts its work.

    Attributes:
        dim: head dimension compiled for.
        stages: pairs of key units that each ring holds, one ring for K, one for V.
        pair: key units that a warpgroup takes at a time, 1 or 2.
        pingpong: whether the warpgroups take turns at the tensor cores.
    """

    dim: int
    stages: int
    pair: int
    pingpong: bool

    @property
    def threads(self) -> int:
        """Threads of a CTA: consumers and a producer warpgroup."""
        return 128 * (GROUPS + 1)

    @property
    def shared(self) -> int:
        """Dynamic shared memory of a CTA, bytes."""
        return (GROUPS + 2 * self.stages * self.pair) * -(-self.dim // 64) * 8192 + 1024


def cut(width: int) -> Cut:
    """The cut for a head dimension, 8 … 256."""
    dim = next(d for d in DIMS if d >= width)
    stages = {32: 6, 64: 6, 96: 3, 128: 3, 192: 3, 256: 2}[dim]
    return Cut(dim, stages, 1 if dim > 128 else 2, True)


@functools.lru_cache(maxsize=64)
def fused_request(dtype: torch.dtype, how: Cut) -> Request:
    """The kernel of a cut."""
    constants = {
        "DTYPE": CODES[dtype],
        "DIM": how.dim,
        "STAGES": how.stages,
        "PAIR": how.pair,
        "PINGPONG": int(how.pingpong),
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
    q, packed = (t * (0 if scale == 0 else -1) for t in (q, packed))
    return -scale or 1.0, q, packed


def ctas(device: int) -> int:
    """Persistent CTAs that fill a device."""
    return facts(device).multiprocessors


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
    how: Cut | None = None,
) -> None:
    """Write attention over the units of a plan.

    Args:
        out: (B, Hq, nq, D), contiguous, of q's dtype.
        lse: (B, Hq, nq), float32, contiguous; None to do without.
        q: (B, Hq, nq, D), rows 16-byte aligned, no dimension broadcast.
        k: (B, Hkv, nk, D), likewise.
        v: (B, Hkv, nk, D), likewise.
        starts: int32 (ctas + 1,), where each CTA's tiles start.
        tiles: int32 (t, 2), item and matrix b * Hq + h.
        items: int32 (n, 8); see the kernel.
        steps: int32 (s, 4); see the kernel.
        masks: int32 (m, 128), bits of partial units.
        scale: multiplies scores.
        sink: (Hq,), float32.
        packed: gathered q (B, Hq, …, D), k and v (B, Hkv or Hq, …, D).
        partial: float32 (B * Hq, slots, 64, D) and (B * Hq, slots, 64), contiguous.
        how: another cut than ``cut(D)``.
    """
    _, heads, rows, width = q.shape
    how = how or cut(width)
    pq, pk, pv = packed or (q, k, v)
    scale, q, pq = positive(scale, q, pq)
    kernel(fused_request(q.dtype, how), q.device.index)(
        (starts.shape[0] - 1,),
        how.threads,
        (
            heads_map(q),
            heads_map(k),
            heads_map(v),
            heads_map(pq),
            heads_map(pk),
            heads_map(pv),
            starts.data_ptr(),
            tiles.data_ptr(),
            items.data_ptr(),
            steps.data_ptr(),
            masks.data_ptr(),
            0 if sink is None else sink.data_ptr(),
            np.float32(scale),
            np.int32(heads),
            np.int32(heads // k.shape[1]),
            np.int32(heads // pk.shape[1]),
            out.data_ptr(),
            0 if lse is None else lse.data_ptr(),
            np.int32(rows),
            np.int32(width),
            0 if partial is None else partial[0].data_ptr(),
            0 if partial is None else partial[1].data_ptr(),
            np.int32(0 if partial is None else partial[0].shape[1]),
        ),
        how.shared,
    )
