"""The end of a linear layer whose sums lie by features: bias, activation, rounding."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.launch import kernel

from .parts import CODES, MOST_MATRICES, activation_constant


def finish(
    sums: list[Tensor], bias: Tensor | None, tokens: int, dtype: torch.dtype, activation: int
) -> Tensor:
    """Rows of tokens, (F, tokens, rows) of ``dtype``, from sums by features; one kernel.

    Args:
        sums: one or two (F, 1, rows, tokens or more), contiguous, to be added up: float32, or of
            ``dtype`` where nothing is left to do but to turn them.
        bias: (rows,) of ``dtype``, contiguous, or None.
        tokens: how many there are.
        dtype: of the result.
        activation: a code of ``activations``; 0 = none.
    """
    free, _, rows, pitch = sums[0].shape
    out = sums[0].new_empty((free, tokens, rows), dtype=dtype)
    if not out.numel():
        return out
    wanted = finish_request(dtype, sums[0].dtype, len(sums) == 2, activation)
    run = kernel(wanted, out.device.index)
    for start in range(0, free, MOST_MATRICES):
        to, first, second = (t[start : start + MOST_MATRICES] for t in (out, sums[0], sums[-1]))
        run(
            (-(-tokens // 32) * -(-rows // 64), to.shape[0], 1),
            256,
            (
                to.data_ptr(),
                first.data_ptr(),
                second.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                *map(np.int32, (rows, tokens, pitch)),
            ),
        )
    return out


@functools.lru_cache(maxsize=64)
def finish_request(dtype: torch.dtype, sums: torch.dtype, two: bool, activation: int) -> Request:
    """The kernel for sums of this dtype; ``two`` of them are added up."""
    constants = {"DTYPE": CODES[dtype], "VALUES": CODES[sums], "TWO": int(two)}
    constants |= activation_constant(activation)
    return request("spmm_finish", constants, flush=dtype != torch.float32)
