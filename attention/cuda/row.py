"""Attention over single entries on CUDA cores."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import kernel
from mixgrain.primitives.cuda.parts import CODES
from mixgrain.primitives.cuda.row import WARPS, spread

from .plan import Work

# CTAs of a grid for each multiprocessor: a few items for each warp, so that their loads overlap.
CTAS = 16


def _resident(lanes: int, vectors: int, exact: bool) -> int:
    """CTAs that registers leave room for: less where a lane holds several pieces or indices."""
    return 2 if vectors > 2 else 4 if vectors == 1 and lanes >= 8 and exact else 3


@functools.lru_cache(maxsize=256)
def row_request(
    dtype: torch.dtype,
    key_pieces: int,
    value_pieces: int,
    sink: bool,
    keep: bool,
    short: bool,
    early: bool = True,
) -> Request:
    """The kernel for rows of K and V of so many pieces of 16 bytes; for items of a few keys."""
    pieces = max(key_pieces, value_pieces)
    lanes, vectors, passes = spread(pieces, 16 // dtype.itemsize)
    assert passes == 1
    exact = lanes * vectors == key_pieces == value_pieces
    constants = {
        "DTYPE": CODES[dtype],
        "LANES": lanes,
        "VECTORS": vectors,
        "EXACT": int(exact),
        "SINK": int(sink),
        "KEEP": int(keep),
        "SHORT": int(short),
        "EARLY": int(early),
        "CTAS": _resident(lanes, vectors, exact),
    }
    return request("fused_row", constants, flush=dtype != torch.float32)


def rows(
    out: Tensor,
    lse: Tensor,
    partial: tuple[Tensor, Tensor] | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    scale: float,
    work: Work,
    ranges: Tensor,
    sink: Tensor | None,
) -> None:
    """Write the rows, or partial rows, of single entries.

    Args:
        out: (B, Hq, nq, Dv), contiguous.
        lse: (B, Hq, nq), float32, contiguous.
        partial: float32 (B · Hq, slots, 64, Dv) and (B · Hq, slots, 64), contiguous.
        q: (B, Hq, nq, D), rows 16-byte aligned.
        k: (B, Hkv, nk, D), likewise; rows less than 4 GiB apart.
        v: (B, Hkv, nk, Dv), likewise.
        keep: bool (B, nk), or None.
        scale: multiplies scores.
        work: the plan.
        ranges: int32 (2, B · Hq, 4), first longer item of each matrix's pattern, their number,
            first of its row offsets, 0; the same of short items.
        sink: float32 (Hq,), or None.
    """
    batch, heads, nq, _ = q.shape
    size, device = q.element_size(), q.device.index
    pieces = k.shape[3] * size // 16, v.shape[3] * size // 16
    sizes = [b - a for a, b in itertools.pairwise(work.row_starts)]
    short = max(n - m for n, m in zip(sizes, work.row_longer, strict=True))
    for few, most in ((False, max(work.row_longer)), (True, short)):
        wanted = row_request(q.dtype, *pieces, sink is not None, keep is not None, few)
        lanes = dict(wanted.constants)["LANES"] if few else 32
        # One head after the other, so that K and V stay in L2.
        ctas = min(-(-most * lanes // (32 * WARPS)), CTAS * facts(device).multiprocessors)
        if not ctas:
            continue
        kernel(wanted, device)(
            (ctas, batch * heads),
            32 * WARPS,
            (
                out.data_ptr(),
                lse.data_ptr(),
                0 if partial is None else partial[0].data_ptr(),
                0 if partial is None else partial[1].data_ptr(),
                np.int64(0 if partial is None else partial[1].shape[1] * partial[1].shape[2]),
                q.data_ptr(),
                *map(np.int64, q.stride()[:3]),
                k.data_ptr(),
                *map(np.int64, k.stride()[:2]),
                np.uint32(k.stride(2) * size),
                v.data_ptr(),
                *map(np.int64, v.stride()[:2]),
                np.uint32(v.stride(2) * size),
                0 if keep is None else keep.data_ptr(),
                *map(np.int64, (0, 0) if keep is None else keep.stride()),
                ranges[int(few)].data_ptr(),
                work.row_items.data_ptr(),
                work.row_offsets.data_ptr(),
                work.columns.data_ptr(),
                0 if sink is None else sink.data_ptr(),
                np.int32(heads),
                np.int32(heads // k.shape[1]),
                np.int32(nq),
                *map(np.int32, pieces),
                np.float32(scale),
            ),
        )
