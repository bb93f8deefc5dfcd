"""The fused kernel on mma.sync: its cuts by dtype and head dimension, one launch of it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import kernel
from mixgrain.cuda.steps import by_value
from mixgrain.primitives.cuda.parts import CODES, tf32

from .kernel import positive

# What an SM sets aside of its shared memory for each CTA, bytes.
RESERVED = 1024


class Cut(NamedTuple):
    """How a CTA cuts its work.

    Attributes:
        dim: head dimension compiled for.
        units: query units of an item that are computed at once; 1: an item is walked twice.
        hold: query units of which a warp holds 16 rows.
        keys: keys between two barriers.
        stages: stages of as many keys, K and V by turns; with four, K and V come together.
    """

    dim: int
    units: int
    hold: int
    keys: int
    stages: int

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 128 * self.units // self.hold

    def shared(self, itemsize: int) -> int:
        """Dynamic shared memory of a CTA, bytes."""
        return (64 * self.units + self.keys * self.stages) * self.dim * itemsize + 128

    def resident(self, itemsize: int, most: int) -> int:
        """CTAs of an SM of which one CTA can have `most` bytes of shared memory."""
        room = (most + RESERVED) // (self.shared(itemsize) + RESERVED)
        return min(room, 256 // self.threads)


# By what multiplies ("half", "tf32", float32 in "full") and head dimension: where a CTA can have
# 163 KB of shared memory (sm_80, 90, 100), and where it can have 99 KB (sm_86, 89, 120).
LARGE = 163 * 1024
CUTS = {
    "half": {
        32: (Cut(32, 2, 2, 64, 4), Cut(32, 2, 2, 64, 4)),
        64: (Cut(64, 2, 2, 64, 4), Cut(64, 2, 2, 64, 4)),
        96: (Cut(96, 2, 2, 64, 4), Cut(96, 2, 2, 64, 2)),
        128: (Cut(128, 2, 2, 64, 2), Cut(128, 2, 2, 32, 2)),
        192: (Cut(192, 2, 1, 64, 3), Cut(192, 2, 1, 64, 2)),
        256: (Cut(256, 2, 1, 64, 3), Cut(256, 2, 1, 32, 2)),
    },
    "tf32": {
        32: (Cut(32, 2, 2, 64, 3), Cut(32, 2, 2, 64, 3)),
        64: (Cut(64, 2, 2, 64, 3), Cut(64, 2, 2, 32, 2)),
        96: (Cut(96, 2, 2, 32, 2), Cut(96, 2, 2, 32, 2)),
        128: (Cut(128, 2, 2, 32, 2), Cut(128, 2, 2, 32, 2)),
        192: (Cut(192, 2, 1, 32, 2), Cut(192, 1, 1, 32, 2)),
        256: (Cut(256, 2, 1, 16, 2), Cut(256, 1, 1, 16, 2)),
    },
    "full": {
        32: (Cut(32, 2, 2, 32, 3), Cut(32, 2, 2, 32, 3)),
        64: (Cut(64, 2, 2, 32, 3), Cut(64, 2, 2, 32, 2)),
        96: (Cut(96, 2, 2, 16, 3), Cut(96, 2, 2, 16, 2)),
        128: (Cut(128, 2, 2, 16, 2), Cut(128, 2, 2, 16, 2)),
        192: (Cut(192, 2, 1, 16, 2), Cut(192, 1, 1, 16, 3)),
        256: (Cut(256, 1, 1, 16, 2), Cut(256, 1, 1, 16, 2)),
    },
}
#: fused_walk.cuh: Operands and Plan.
OPERANDS = np.dtype(
    {
        "names": ["operand", "sizes", "inverses"],
        "formats": [(np.int64, (6, 4)), (np.int32, 6), (np.float32, 3)],
        "itemsize": 232,
    }
)


def cut(dtype: torch.dtype, width: int, rounded: bool, most: int) -> Cut:
    """The cut for a head dimension of 8 … 256.

    Args:
        dtype: of the operands.
        width: head dimension.
        rounded: whether float32 is rounded to TF32.
        most: shared memory that a CTA can have, bytes.
    """
    table = CUTS["half" if dtype != torch.float32 else "tf32" if rounded else "full"]
    return table[next(d for d in table if d >= width)][most < LARGE]


@functools.lru_cache(maxsize=256)
def fused_request(dtype: torch.dtype, how: Cut, rounded: bool) -> Request:
    """The kernel of a cut."""
    constants = {
        "DTYPE": CODES[dtype],
        "TF32": int(rounded),
        "DIM": how.dim,
        "UNITS": how.units,
        "HOLD": how.hold,
        "KEYS": how.keys,
        "STAGES": how.stages,
        "RESIDENT": 256 // how.threads,
    }
    return request("fused_mma", constants, flush=dtype != torch.float32)


def walks(dtype: torch.dtype, width: int, device: int) -> int:
    """Persistent CTAs that fill a device."""
    have = facts(device)
    how = cut(dtype, width, tf32(dtype), have.shared_bytes)
    return have.multiprocessors * how.resident(dtype.itemsize, have.shared_bytes)


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
    """Write attention over the units of a plan; arguments as of ``kernel.fused``, but for these.

    Args:
        out: (B, Hq, nq, D), contiguous, of q's dtype; that may be float32, too.
        lse: (B, Hq, nq), float32, contiguous; None to do without.
        q: (B, Hq, nq, D), rows 16-byte aligned.
        k: (B, Hkv, nk, D), likewise.
        v: (B, Hkv, nk, D), likewise.
        starts: int32 (walks + 1,), where each CTA's tiles start.
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
        how: another cut than ``cut(…)``.
    """
    _, heads, rows, width = q.shape
    rounded = tf32(q.dtype)
    how = how or cut(q.dtype, width, rounded, facts(q.device.index).shared_bytes)
    pq, pk, pv = packed or (q, k, v)
    scale, q, pq = positive(scale, q, pq)
    size = q.element_size()
    operands = np.zeros(1, OPERANDS)
    given = (q, k, v, pq, pk, pv)
    operands["operand"][0] = [(0, *(t.stride(d) * size for d in range(3))) for t in given]
    places = [(32 * n, t.data_ptr()) for n, t in enumerate(given)]
    ratios = heads // k.shape[1], heads // pk.shape[1]
    sizes = heads, pk.shape[1], rows, k.shape[2], pk.shape[2] // 64, width
    operands["sizes"][0] = sizes
    operands["inverses"][0] = [1 / n for n in (heads, *ratios)]
    plan = np.array([[t.data_ptr() for t in (starts, tiles, items, steps)]], np.int64)
    bits = (None, None) if keep is None else keep
    kernel(fused_request(q.dtype, how, rounded), q.device.index)(
        (starts.shape[0] - 1,),
        how.threads,
        (
            by_value(operands, places),
            plan.view("V32")[0],
            masks.data_ptr(),
            *(0 if t is None else t.data_ptr() for t in bits),
            0 if sink is None else sink.data_ptr(),
            np.float32(scale),
            out.data_ptr(),
            0 if lse is None else lse.data_ptr(),
            0 if partial is None else partial[0].data_ptr(),
            0 if partial is None else partial[1].data_ptr(),
            np.int32(0 if partial is None else partial[0].shape[1]),
        ),
        how.shared(size),
    )
