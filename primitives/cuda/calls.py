"""Prepared calls of the operators: each signature is planned once and then only run.

A signature is everything that launch code looks at: the operator, the plan, shapes, strides, dtypes
and 16-byte alignment of the tensors, the scalars, and torch's TF32 switch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from mixgrain.cuda.prepared import Prepared
from mixgrain.cuda.recording import Recording, recorded
from mixgrain.formats.cache import LRU

from .parts import tf32

V = TypeVar("V")
# Plans whose prepared calls are kept, and signatures of each.
PLANS, SIGNATURES = 128, 64


class Signatures(dict[Hashable, V]):
    """Values of the signatures of one plan, the oldest dropped when there are too many."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def keep(self, key: Hashable, value: V) -> None:
        """Store a value."""
        with self._lock:
            while len(self) >= SIGNATURES:
                del self[next(iter(self))]
            self[key] = value


_calls: LRU[Signatures[Prepared]] = LRU(PLANS)


def of(
    name: str, function: Callable[..., Any], arguments: tuple[Any, ...], alone: bool = False
) -> Prepared:
    """The prepared call of an operator for arguments like these.

    Args:
        name: the operator.
        function: its launch code.
        arguments: of the operator: tensors or None, the plan's tensors, dims and name, scalars.
        alone: of several results the first only.

    While a CUDA graph is captured nothing is kept: its tensors, the plan's among them, may be
    copies that live as long as the capture.
    """
    plan: Hashable = ()
    key: list[Any] = [name, alone]
    single = False
    for at, given in enumerate(arguments):
        if isinstance(given, Tensor):
            key += (given.shape, given.stride(), given.dtype, given.data_ptr() & 15)
            single = single or given.dtype == torch.float32
        elif isinstance(given, list):
            if not plan:
                dims, kinds = arguments[at + 1 : at + 3]
                places = tuple((t.data_ptr(), t.numel()) for t in given)
                plan = (arguments[0].device, kinds, tuple(dims), places)
        else:
            key.append(given)
    if single:
        key.append(tf32(torch.float32))
    signatures = _calls.get(plan, Signatures)
    found = signatures.get(tuple(key))
    if found is None:
        found = prepare(function, arguments, alone)
        if not torch.cuda.is_current_stream_capturing():
            signatures.keep(tuple(key), found)
    return found


def prepare(
    function: Callable[..., Any], arguments: tuple[Any, ...], alone: bool = False
) -> Prepared:
    """Record launch code on descriptions of the arguments; see ``of``."""
    recording = Recording(arguments[0].device.index)
    described = [
        recording.given(a, a.data_ptr() & 15) if isinstance(a, Tensor) else a for a in arguments
    ]
    with recorded(recording):
        result = function(*described)
    if alone and isinstance(result, tuple):
        result = result[0]
    plan = next(a for a in arguments if isinstance(a, list))
    return Prepared(recording, result, plan)


def given(arguments: tuple[Any, ...]) -> list[Tensor]:
    """The tensors a prepared call takes, in the order of its slots."""
    return [a for a in arguments if isinstance(a, Tensor)]
