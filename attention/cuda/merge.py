"""The merge of partial attentions."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.device import hopper
from mixgrain.cuda.launch import kernel
from mixgrain.primitives.cuda.parts import CODES

from .plan import Work


@functools.lru_cache(maxsize=64)
def merge_request(dtype: torch.dtype, width: int) -> Request:
    """The kernel for an output of this dtype and width."""
    constants = {"DTYPE": CODES[dtype], "DIM": -(-width // 128) * 128}
    return request("fused_merge", constants, flush=dtype != torch.float32)


def merge(
    out: Tensor,
    lse: Tensor,
    partial: tuple[Tensor, Tensor],
    work: Work,
    ranges: Tensor,
    sink: Tensor | None,
) -> None:
    """Write the rows that the plan merges.

    Args:
        out: (B, Hq, nq, Dv), contiguous.
        lse: (B, Hq, nq), float32, contiguous.
        partial: float32 (B · Hq, slots, 64, Dv) and (B · Hq, slots, 64), contiguous.
        work: the plan.
        ranges: int32 (B · Hq, 2), first merged row of each matrix's pattern, and their number.
        sink: float32 (Hq,), or None.
    """
    _, heads, nq, width = out.shape
    most = max(b - a for a, b in zip(work.merge_starts[:-1], work.merge_starts[1:], strict=True))
    kernel(merge_request(out.dtype, width), out.device.index)(
        (-(-most // 4), ranges.shape[0]),
        128,
        (
            out.data_ptr(),
            lse.data_ptr(),
            partial[0].data_ptr(),
            partial[1].data_ptr(),
            np.int64(partial[1].shape[1] * partial[1].shape[2]),
            ranges.data_ptr(),
            work.merge_rows.data_ptr(),
            work.merge_ptr.data_ptr(),
            work.merge_from.data_ptr(),
            0 if sink is None else sink.data_ptr(),
            np.int32(heads),
            np.int32(nq),
            np.int32(width),
        ),
        early=hopper(out.device),
    )
