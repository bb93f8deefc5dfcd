"""Torch's own attention for calls of which every query keeps the same keys, one after the other.

Only those, on the devices where it was measured to be the faster: if a pattern drops positions
within what torch computes, a NaN among their values reaches the rows beside them (``is_causal``),
and anything but causality is a mask in memory. One query keeps such keys under windows, too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mixgrain.cuda.device import facts
from mixgrain.cuda.errors import CudaError
from mixgrain.formats.layout import Layout
from mixgrain.formats.pattern import Frame, Pattern
from mixgrain.primitives.lately import tf32

from .cpu import in_stride_order
from .cuda.choice import WIDEST

# One query: query heads, and bytes of K and V, from which on ours is faster by more than planning
# every length of a cache costs. Of fewer heads torch's kernel splits the keys.
HEADS, BYTES = 200, 256 << 20


class Handed(NamedTuple):
    """What torch's attention is given.

    Attributes:
        first: the first key.
        end: one past the last key.
        engine: which of torch's kernels: "flash", "cudnn" or "efficient".
    """

    first: int
    end: int
    engine: str


def handed_over(
    kept: Pattern | Layout, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Handed | None:
    """What torch is given of an eager call without mask, sink and lse; None where it is ours.

    Arguments as of ``attend``, checked.
    """
    if torch.compiler.is_dynamo_compiling() or q.device.type != "cuda":
        return None
    nq, nk, d = q.shape[2], k.shape[2], q.shape[3]
    if not (q.numel() and nk and d == v.shape[3]):
        return None
    if not 0.0 < scale < math.inf or not all(_readable(t) for t in (q, k, v)):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        return None
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return None
    found = rule(kept, q.device, q.dtype, (q.shape[0], q.shape[1], k.shape[1]), nq, nk, d)
    if found is not None and found.engine == "cudnn" and not _cudnn_takes(q, k, v):
        return None
    return found


def _readable(t: Tensor) -> bool:
    """Whether torch's kernels read rows where they lie, 16 bytes at once."""
    places = (t.storage_offset(), *t.stride()[:3])
    return t.stride(3) == 1 and all(n * t.element_size() % 16 == 0 for n in places)


def _cudnn_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if torch.are_deterministic_algorithms_enabled():
        return False
    grouped = q.shape[1] != k.shape[1]
    asked = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, grouped)
    return bool(torch.backends.cuda.can_use_cudnn_attention(asked))


def rule(
    kept: Pattern | Layout,
    device: torch.device,
    dtype: torch.dtype,
    lead: tuple[int, int, int],
    nq: int,
    nk: int,
    d: int,
) -> Handed | None:
    """What torch is given where it computes the same without gradients, and faster; else None.

    Measured on Hopper only: ``dense-*`` in benchmarks/h200.json. Where torch's kernels win a few
    microseconds, they cost more than that on the host: such calls are not handed over.

    Args:
        kept: the pattern or layout.
        device: where.
        dtype: of q, k and v.
        lead: batch entries, query heads and key heads.
        nq: queries, at least one.
        nk: keys, at least one.
        d: head dimension, of values, too.
    """
    if isinstance(kept, Layout) or device.type != "cuda" or d > WIDEST or d % 8:
        return None
    if not _hopper(device.index):
        return None
    keys = same_keys(kept, nq, nk)
    if keys is None:
        return None
    (batch, hq, hk), length = lead, keys[1] - keys[0]
    if dtype == torch.float32:  # torch's kernel has neither TF32 nor groups of heads
        return Handed(*keys, "efficient") if d > 64 and hq == hk and tf32() != "tf32" else None
    if dtype not in (torch.float16, torch.bfloat16):
        return None
    if nq == 1:
        # Ours plans each length, and takes a group's heads by reshaping them. cuDNN compiles for
        # every shape, 35 ms: not for a cache that grows with every call.
        many = batch * hq > HEADS and 2 * batch * hk * length * d * dtype.itemsize >= BYTES
        return None if many and hq == hk else Handed(*keys, "flash")
    return Handed(*keys, "cudnn") if d > 192 and min(nq, length) >= 1024 else None


def same_keys(kept: Pattern, nq: int, nk: int) -> tuple[int, int] | None:
    """First and end of the keys that every query keeps; None if they differ, or there are none.

    None also where that is not known at once.
    """
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


def _hopper(index: int | None) -> bool:
    try:
        return facts(torch.cuda.current_device() if index is None else index).hopper
    except CudaError:
        return False


class Call:
    """Calls of one signature, as the short way of ``attend`` keeps them."""

    def __init__(self, scale: float, handed: Handed) -> None:
        self.scale, self.handed = scale, handed

    def __call__(self, given: list[Tensor], addresses: list[int]) -> tuple[Tensor, None]:
        """The output of q, k and v; there is no lse."""
        q, k, v = given
        return run(q, k, v, self.scale, self.handed), None


def run(q: Tensor, k: Tensor, v: Tensor, scale: float, handed: Handed) -> Tensor:
    """Torch's attention of every query to some keys, in q's stride order.

    The operators themselves: the context manager that chooses among them sets flags of the whole
    process, which other threads would see.
    """
    first, end, engine = handed
    if end - first < k.shape[2]:
        k, v = k[:, :, first:end], v[:, :, first:end]
    aten = torch.ops.aten
    if engine == "flash":
        o = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
    elif engine == "cudnn":
        o = aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, scale=scale)[0]
    else:
        o = aten._scaled_dot_product_efficient_attention(q, k, v, None, False, scale=scale)[0]
    return in_stride_order(o, q)
