"""Rows of single entries times few rows of tokens: spmm_row_few."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.derived import derived
from mixgrain.cuda.device import DeviceFacts, facts
from mixgrain.cuda.launch import kernel

from ..plans import cuda_row
from ..plans.plan import PartPlan
from .parts import CODES, MOST_MATRICES, activation_constant, aligned_values, of_layer

WARPS = 32
# Tokens of a CTA.
TOKENS = (1, 2, 4, 8)
# Tokens that this is faster for than kernels for many.
MOST = 16
# Inner positions, which 16 bits count, and with them the place for zeros.
MOST_INNER = (1 << 16) - 8


def shared(inner: int, tokens: int) -> int:
    """Dynamic shared memory of a CTA, bytes."""
    return (inner + 8) * tokens * 2


def tokens_of(there: DeviceFacts, inner: int, width: int) -> int:
    """Tokens of a CTA, 0 where x has no room in shared memory."""
    room = there.shared_bytes - 2048  # the driver keeps some
    fitting = [n for n in TOKENS if shared(inner, n) <= room]
    whole = [n for n in fitting if n >= width]
    if whole:
        return whole[0]
    return fitting[-1] if fitting and 2 * fitting[-1] >= width else 0  # in two turns


def takes(
    parts: list[PartPlan], values: Tensor, x: Tensor, keep: Tensor | None, dtype: torch.dtype
) -> bool:
    """Whether ``spmm`` is for this product with S, not its transpose.

    Args:
        parts: of the plan.
        values: (F, slots).
        x: (F, E, inner, D), any strides.
        keep: run-time mask or None.
        dtype: of the result.
    """
    part = parts[0]
    if len(parts) > 1 or part.kind != "crow" or part.starts[0]:
        return False
    if not of_layer(keep, (values.dtype, dtype), x):
        return False
    _, _, inner, width = x.shape
    if (
        not 0 < width <= MOST
        or inner % 8
        or inner > MOST_INNER
        or part.tensors[0].numel() >= 1 << 31
    ):
        return False
    return tokens_of(facts(x.device.index), inner, width) > 0


def spmm(
    out: Tensor,
    values: Tensor,
    x: Tensor,
    part: PartPlan,
    scale: float,
    bias: Tensor | None = None,
    activation: int = 0,
) -> None:
    """Scale · S x plus the bias of each row, activated, to rows of tokens.

    Args:
        out: (F, 1, D, rows), contiguous.
        values: (F, slots).
        x: (F, 1, inner, D), as ``takes`` says.
        part: from ``plans.cuda_row``.
        scale: multiplies the product.
        bias: (rows,) of x's dtype, contiguous, or None.
        activation: a code of ``activations``, applied before rounding; 0 = none.
    """
    _, _, width, rows = out.shape
    inner, device = x.shape[2], x.device.index
    values, (columns, items) = aligned_values(values), part.tensors[:2]
    tokens = tokens_of(facts(device), inner, width)
    ctas = ctas_of(facts(device), rows, -(-width // tokens))
    dealt = derived(items, ("dealt", ctas), lambda: cuda_row.dealt_rows(items, rows, ctas, WARPS))
    places = derived(items, "places", lambda: cuda_row.places(columns))
    run = kernel(few_request(tokens, x.dtype, activation), device)
    for start in range(0, out.shape[0], MOST_MATRICES):
        to, weights, right = (t[start : start + MOST_MATRICES] for t in (out, values, x))
        run(
            (ctas, -(-width // tokens), to.shape[0]),
            32 * WARPS,
            (
                right.data_ptr(),
                *(np.int64(right.stride(d)) for d in (0, 3)),
                weights.data_ptr(),
                np.int64(weights.shape[1]),
                places.data_ptr(),
                dealt.data_ptr(),
                np.int32(dealt.shape[0]),
                np.float32(scale),
                0 if bias is None else bias.data_ptr(),
                to.data_ptr(),
                np.int32(rows),
                np.int32(inner),
                np.int32(width),
            ),
            shared(inner, tokens),
        )


def ctas_of(there: DeviceFacts, rows: int, turns: int) -> int:
    """CTAs that share the rows: with those of all turns one for each multiprocessor."""
    return min(max(there.multiprocessors // turns, 1), -(-rows // WARPS))


@functools.lru_cache(maxsize=256)
def few_request(tokens: int, dtype: torch.dtype, activation: int = 0) -> Request:
    """The kernel for so many tokens of a CTA."""
    constants = {"TOKENS_OF_CTA": tokens, "WARPS": WARPS, "DTYPE": CODES[dtype]}
    constants |= activation_constant(activation)
    return request("spmm_row_few", constants, flush=True)
