"""The short way of attend: eager calls of the fused CUDA kernels whose signature was seen.

As of ``primitives.eager``: the first call of a signature goes the long way, with every check and
through the operator; the signature of an equal call proves what the checks would, and it goes to
the prepared launches directly.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mixgrain.cuda.errors import CudaError
from mixgrain.formats.cache import LRU
from mixgrain.formats.errors import BackendUnavailableError
from mixgrain.formats.layout import Layout
from mixgrain.formats.pattern import Pattern
from mixgrain.primitives.eager import address, plain, tf32


class Call(Protocol):
    """A call of one signature: given tensors and their addresses, output and lse."""

    def __call__(
        self, given: list[Tensor], addresses: list[int], /
    ) -> tuple[Tensor, Tensor | None]: ...


# Patterns and layouts whose calls are kept, and signatures of each.
POSITIONS, SIGNATURES = 128, 64
_Calls = dict[Hashable, Call]
_calls: LRU[_Calls] = LRU(POSITIONS)


class Signature(NamedTuple):
    """All that checks, plans and launches look at.

    Attributes:
        positions: the pattern or layout.
        rest: everything else.
    """

    positions: Hashable
    rest: tuple[Hashable, ...]


def signature(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Pattern | Layout,
    scale: float | None,
    key_mask: Tensor | None,
    enable_gqa: bool,
    sink_logits: Tensor | None,
    return_lse: bool,
    impl: str,
) -> Signature | None:
    """The signature of a call; None where it has to go the long way. Arguments as of ``attend``."""
    if torch.compiler.is_dynamo_compiling() or not plain():
        return None
    if type(impl) is not str or type(enable_gqa) is not bool or type(return_lse) is not bool:
        return None
    if scale is not None and type(scale) not in (float, int):
        return None
    if q is None or k is None or v is None:
        return None
    rest: list[Hashable] = [impl, scale, enable_gqa, return_lse]
    differentiable = torch.is_grad_enabled()
    for t in (q, k, v, key_mask, sink_logits):
        if t is None:
            rest.append(None)
        elif (at := address(t)) < 0 or not t.is_cuda or (differentiable and t.requires_grad):
            return None
        else:
            rest += (t.shape, t.stride(), t.dtype, at & 15, t.get_device())
    if q.dtype is torch.float32:
        rest.append(tf32())
    if isinstance(kept, Pattern):
        return Signature(kept.expression_key(), tuple(rest))
    if isinstance(kept, Layout):
        return Signature((kept.key, kept._home), tuple(rest))
    return None


def find(seen: Signature) -> Call | None:
    """The call of a signature, if it was kept."""
    calls = _calls.peek(seen.positions)
    return None if calls is None else calls.get(seen.rest)


def run(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Output and lse of tensors of the call's signature; an lse that it does not ask for may lack.

    Raises:
        BackendUnavailableError: the driver refused a launch.
    """
    if key_mask is not None:
        key_mask = key_mask.expand(q.shape[0], k.shape[2])
    given = [t for t in (q, k, v, key_mask, sink_logits) if t is not None]
    try:
        o, lse = call(given, [t.data_ptr() for t in given])
    except CudaError as error:
        raise BackendUnavailableError(f"attend: {error}") from error
    return o, lse


def learn(seen: Signature, call: Call | None) -> None:
    """Keep the call of a signature; None where its results need more than its launches."""
    if call is None:
        return
    kept = _calls.get(seen.positions, dict)
    if len(kept) >= SIGNATURES:
        kept.clear()
    kept[seen.rest] = call
