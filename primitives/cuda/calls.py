"""Prepared calls of the operators: each signature is planned once and then only run.

A signature is everything that launch code looks at: the operator, the plan, shapes, strides, dtypes
and 16-byte alignment of the tensors, the scalars, and torch's TF32 switch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from mixgrain.cuda.device import using
from mixgrain.cuda.prepared import Prepared
from mixgrain.cuda.recording import Operand, Recording, recorded
from mixgrain.formats.cache import LRU

from ..gradients import Work
from ..plans.plan import Plan
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


def of(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Prepared:
    """The prepared call of an operator for arguments like these.

    Args:
        name: the operator.
        function: its launch code.
        arguments: of the operator: tensors or None, the plan's tensors, dims and name, scalars.

    While a CUDA graph is captured nothing is kept: its tensors, the plan's among them, may be
    copies that live as long as the capture.
    """
    plan: Hashable = ()
    key: list[Any] = [name]
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
        with using(arguments[0].device.index):
            found = prepare(function, arguments)
            if not torch.cuda.is_current_stream_capturing():
                signatures.keep(tuple(key), found)
    return found


def prepare(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Prepared:
    """Record launch code on descriptions of the arguments; see ``of``."""
    recording = Recording(arguments[0].device.index)
    described = [_described(recording, a) if isinstance(a, Tensor) else a for a in arguments]
    with recorded(recording):
        result = function(*described)
    plan = next(a for a in arguments if isinstance(a, list))
    return Prepared(recording, result, plan)


def together(
    works: Sequence[tuple[Callable[..., Any], Work]],
    operands: Sequence[Tensor | None],
    keep: Tensor | None,
    keep_rows: bool,
    plan: Plan,
) -> Prepared:
    """Several operators on the same positions in one prepared call.

    Args:
        works: launch code and what it is to work on.
        operands: what the operators take besides the mask, folded.
        keep: the run-time mask, folded, or None.
        keep_rows: it is over rows.
        plan: of the layout for all the operators.

    Returns:
        A call that takes the operands and the mask, those that are None left out; it returns the
        wanted results of all operators, alone if there is one.
    """
    device = next(t.device.index for t in operands if t is not None)
    recording = Recording(device)
    described = [None if t is None else _described(recording, t) for t in (*operands, keep)]
    results: list[Any] = []
    with using(device):
        with recorded(recording):
            for launch_code, work in works:
                given = [described[n] for n in work.operands]
                made = launch_code(*given, described[-1], keep_rows, *plan, *work.scalars)
                several = made if isinstance(made, tuple) else (made,)
                results += several[: len(work.results)]
        alone = len(results) == 1
        return Prepared(recording, results[0] if alone else tuple(results), plan.tensors)


def _described(recording: Recording, t: Tensor) -> Operand:
    return recording.given(t, t.data_ptr() & 15)


def given(arguments: tuple[Any, ...]) -> list[Tensor]:
    """The tensors a prepared call takes, in the order of its slots."""
    return [a for a in arguments if isinstance(a, Tensor)]
