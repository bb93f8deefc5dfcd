"""The short way of attend: eager calls of the fused CUDA kernels whose signature was seen.

As of ``primitives.eager``: the first call of a signature goes the long way, with every check and
through the operator; the signature of an equal call proves what the checks would, and it goes to
the prepared launches directly.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mixgrain.cuda.errors import CudaError
from mixgrain.formats.cache import LRU
from mixgrain.formats.errors import BackendUnavailableError
from mixgrain.formats.layout import Layout
from mixgrain.formats.pattern import Pattern
from mixgrain.primitives.lately import Signatures
from mixgrain.primitives.looks import TENSORS, address, plain


class Call(Protocol):
    """A call of one signature: given tensors and their addresses, output and lse."""

    def __call__(
        self, given: list[Tensor], addresses: list[int], /
    ) -> tuple[Tensor, Tensor | None]: ...


# Patterns and layouts whose calls are kept.
POSITIONS = 128
_calls: LRU[Signatures[Call]] = LRU(POSITIONS)


class Signature(NamedTuple):
    """All that checks, plans and launches look at.

    Attributes:
        positions: the pattern or layout.
        rest: what else is no tensor.
        given: the tensors that there are.
    """

    positions: Hashable
    rest: tuple[Hashable, ...]
    given: tuple[Tensor, ...]


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
    if type(q) not in TENSORS or not q.is_cuda:
        return None
    if type(impl) is not str or type(enable_gqa) is not bool or type(return_lse) is not bool:
        return None
    if scale is not None and type(scale) not in (float, int):
        return None
    if k is None or v is None:
        return None
    given = [q, k, v]
    if key_mask is not None:
        given.append(key_mask)
    if sink_logits is not None:
        given.append(sink_logits)
    if torch.is_grad_enabled():
        for t in given:
            if type(t) not in TENSORS or t.requires_grad:
                return None
    rest = impl, scale, enable_gqa, return_lse, key_mask is None, sink_logits is None
    if isinstance(kept, Pattern):
        return Signature(kept.expression_key(), rest, tuple(given))
    if isinstance(kept, Layout):
        return Signature((kept.key, kept._home), rest, tuple(given))
    return None


def find(seen: Signature) -> tuple[Call, list[int]] | None:
    """The call of a signature, if it was kept, and the addresses of its tensors."""
    calls = _calls.peek(seen.positions)
    return None if calls is None else calls.find(seen.given, seen.rest)


def run(
    call: Call,
    addresses: list[int],
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
    given = [q, k, v]
    if key_mask is not None:
        given.append(key_mask.expand(q.shape[0], k.shape[2]))
    if sink_logits is not None:
        given.append(sink_logits)
    try:
        o, lse = call(given, addresses)
    except CudaError as error:
        raise BackendUnavailableError(f"attend: {error}") from error
    return o, lse


def learn(seen: Signature, make: Callable[[], Call | None]) -> None:
    """Keep the call of a signature, where calls mean what they say and tensors are what they seem.

    Args:
        seen: the signature.
        make: makes the call; None where its results need more than its launches.
    """
    if not plain():
        return
    pointers = [address(t) for t in seen.given]
    if -1 in pointers or not all(t.is_cuda for t in seen.given):
        return
    if torch.cuda.is_current_stream_capturing():
        return  # plans may be copies that live as long as the capture
    call = make()
    if call is not None:
        _calls.get(seen.positions, Signatures).keep(seen.given, pointers, seen.rest, call)
