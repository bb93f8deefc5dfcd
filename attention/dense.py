"""Torch's own attention for calls of which every query keeps the same keys, one after the other.

Only those, where it is the faster: if a pattern drops positions within what torch computes, a NaN
among their values reaches the rows beside them (``is_causal``), and anything but causality is a
mask in memory. One query keeps such keys under causality and windows, too.
"""

from __future__ import annotations

import math
import operator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mixgrain.cuda.device import facts
from mixgrain.cuda.errors import CudaError
from mixgrain.formats.layout import Layout
from mixgrain.formats.pattern import Frame, Pattern
from mixgrain.formats.tracing import constant
from mixgrain.primitives.eager import tf32

from .cpu import stride_order

# Torch's kernels in the order to try; none = torch's own order.
Backends = tuple[SDPBackend, ...]
CUDNN: Backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
# cuDNN compiles for every shape, 35 ms: not for a cache that grows with every call.
FLASH: Backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
WIDEST = 256
# On CPUs torch is the faster for these, forward and backward; of float16 its backward is slower.
CPU = (torch.bfloat16, torch.float32, torch.float64)
CUDA = (torch.float16, torch.bfloat16, torch.float32)
# One query: query heads, and bytes of K and V, from which on ours is faster by more than planning
# every length of a cache costs. Of fewer heads torch's kernel splits the keys.
HEADS, BYTES = 200, 256 << 20


class Handed(NamedTuple):
    """What torch's attention is given.

    Attributes:
        first: the first key.
        end: one past the last key.
        backends: torch's kernels.
    """

    first: int
    end: int
    backends: Backends


def chosen(kept: Pattern | Layout, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Handed | None:
    """What torch is given of a call without mask, sink and lse; None where ours is the faster.

    Arguments as of ``attend``, checked.
    """
    nq, nk, d = q.shape[2], k.shape[2], q.shape[3]
    if not (q.numel() and nk and d == v.shape[3] and 0.0 < scale < math.inf):
        return None
    if not (q.stride(3) == k.stride(3) == v.stride(3) == 1):  # else torch stores every score
        return None
    if forward_ad._current_level >= 0:
        return None
    lead = q.shape[0], q.shape[1], k.shape[1]
    asked = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    return choose(kept, q.device, q.dtype, lead, nq, nk, d, asked)


def choose(
    kept: Pattern | Layout,
    device: torch.device,
    dtype: torch.dtype,
    lead: tuple[int, int, int],
    nq: int,
    nk: int,
    d: int,
    asked: bool = False,
) -> Handed | None:
    """What torch is given if it computes what ``attend`` does, and faster; else None.

    Args:
        kept: the pattern or layout.
        device: where.
        dtype: of q, k and v.
        lead: batch entries, query heads and key heads.
        nq: queries, at least one.
        nk: keys, at least one.
        d: head dimension, of values, too.
        asked: whether a gradient is asked for; on CUDA the fused kernels have none.
    """
    if isinstance(kept, Layout):
        return None
    known = {"cpu": CPU, "cuda": CUDA}.get(device.type, ())
    if dtype not in known:
        return None
    # Where torch has no kernel it stores every score: of float32 in groups of heads, too.
    grouped = dtype == torch.float32 and lead[1] != lead[2]
    if device.type == "cuda" and (d > WIDEST or d % 8 or grouped):
        return None
    keys = same_keys(kept, nq, nk)
    if keys is None:
        return None
    if asked or device.type == "cpu":
        return Handed(*keys, ())
    found = forward(device, dtype, lead, nq, keys[1] - keys[0], d)
    return None if found is None else Handed(*keys, found)


def forward(
    device: torch.device, dtype: torch.dtype, lead: tuple[int, int, int], nq: int, nk: int, d: int
) -> Backends | None:
    """Torch's kernels if they are the faster without gradients; arguments as of ``choose``.

    Measured: ``dense-*`` in benchmarks/h200.json. Where torch's kernels win a few microseconds,
    they cost more than that on the host: such calls are not handed over.
    """
    batch, hq, hk = lead
    if nq == 1 and dtype != torch.float32:
        # Ours reads the keys once for each head of a group, and plans each length.
        many = batch * hq > HEADS and 2 * batch * hk * nk * d * dtype.itemsize >= BYTES
        return None if many and hq == hk and _hopper(device.index) else FLASH
    if not _hopper(device.index):  # torch's kernels are made for each device, ours for this one
        return ()
    if dtype == torch.float32:  # torch's has no TF32
        return () if d > 64 and not _tf32() else None
    return CUDNN if d > 192 and min(nq, nk) >= 1024 else None


def same_keys(kept: Pattern, nq: int, nk: int) -> tuple[int, int] | None:
    """First and end of the keys that every query keeps; None if they differ, or there are none.

    None also where that is not known at once.
    """
    nq, nk = operator.index(nq), operator.index(nk)
    found = kept.cuts(Frame(nq, nk, torch.device("cpu"))) or []
    # Of the last row and of the first: where they agree, so do all between.
    spans = [
        (max(c.least, c.left + nq - 1), min(c.most, c.right))
        for c in found
        if max(c.least, c.left) == max(c.least, c.left + nq - 1)
        and min(c.most, c.right) == min(c.most, c.right + nq - 1)
    ]
    if (0, nk) in spans:
        return 0, nk
    return spans[0] if len(found) == len(spans) == 1 and spans[0][0] < spans[0][1] else None


@constant
def _hopper(index: int | None) -> bool:
    try:
        return facts(torch.cuda.current_device() if index is None else index).hopper
    except CudaError:
        return False


@constant
def _tf32() -> bool:
    return tf32() == "tf32"


class Dense:
    """Calls of one signature, as the short way of ``attend`` keeps them."""

    def __init__(self, scale: float | None, handed: Handed) -> None:
        self.scale, self.handed = scale, handed

    def __call__(self, given: list[Tensor], addresses: list[int]) -> tuple[Tensor, None]:
        """The output of q, k and v; there is no lse."""
        q, k, v = given
        return dense(q, k, v, self.scale, self.handed), None


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float | None, handed: Handed) -> Tensor:
    """Torch's attention of every query to some keys, in q's stride order."""
    first, end, backends = handed
    if end - first < k.shape[2]:
        k, v = k[:, :, first:end], v[:, :, first:end]
    grouped = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210 - not symbolic if traced
    if backends:
        with sdpa_kernel(list(backends), set_priority=True):
            o = scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    else:
        o = scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    order, back = stride_order(q)
    return o.permute(order).contiguous().permute(back)
