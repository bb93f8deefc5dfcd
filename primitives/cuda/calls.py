"""Prepared calls of the operators: each signature is planned once and then only run.

A signature is everything that launch code looks at: the operator, the plan, shapes, strides, dtypes
and 16-byte alignment of the tensors, the scalars, and torch's TF32 switch. The first tensor of an
N:M plan, its metadata, is one of the call's: it may have been chosen by score a moment ago.
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
from mixgrain.formats.errors import ShapeError

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

    Raises:
        ShapeError: the tensors are on several devices, as a hook of saved tensors may leave them.
    """
    plan: Hashable = ()
    key: list[Any] = [name]
    single = False
    for at, given in enumerate(arguments):
        if isinstance(given, Tensor):
            key += (
                given.shape, given.stride(), given.dtype, given.data_ptr() & 15, given.get_device(),
            )  # fmt: skip
            single = single or given.dtype == torch.float32
        elif isinstance(given, list):
            if not plan:
                dims, kinds = arguments[at + 1 : at + 3]
                own, fixed = _loose(arguments, at)
                for t in own:
                    key += (t.shape, t.stride(), t.dtype, t.data_ptr() & 15)
                places = tuple((t.data_ptr(), t.numel()) for t in fixed)
                plan = (arguments[0].device, kinds, tuple(dims), places)
        else:
            key.append(given)
    if single:
        key.append(tf32(torch.float32))
    signatures = _calls.get(plan, Signatures)
    found = signatures.get(tuple(key))
    if found is None:
        _on_one_device(name, arguments)
        with using(arguments[0].device.index):
            found = prepare(function, arguments)
            if not torch.cuda.is_current_stream_capturing():
                signatures.keep(tuple(key), found)
    return found


def _on_one_device(name: str, arguments: tuple[Any, ...]) -> None:
    there = {str(a.device): None for a in arguments if isinstance(a, Tensor)}
    if len(there) > 1:
        raise ShapeError(
            f"{name}: tensors on {' and '.join(there)}; give all of them on one device; what is "
            "unpacked of a saved tensor has to be where it was"
        )


def prepare(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Prepared:
    """Record launch code on descriptions of the arguments; see ``of``."""
    recording = Recording(arguments[0].device.index)
    described = describe(recording, arguments)
    at = next(at for at, a in enumerate(arguments) if isinstance(a, list))
    with recorded(recording):
        result = function(*described)
    return Prepared(recording, result, _loose(arguments, at)[1])


def describe(recording: Recording, arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments as launch code sees them; the tensors of a call become slots in this order."""
    described: list[Any] = []
    for at, a in enumerate(arguments):
        if isinstance(a, Tensor):
            described.append(_described(recording, a))
        elif isinstance(a, list) and a and isinstance(a[0], Tensor):
            own, fixed = _loose(arguments, at)
            described.append([*(_described(recording, t) for t in own), *fixed])
        else:
            described.append(a)
    return described


def together(
    works: Sequence[tuple[Callable[..., Any], Work]],
    operands: Sequence[Tensor | None],
    keep: Tensor | None,
    keep_rows: bool,
    plan: Plan,
    indexed: bool = False,
) -> Prepared:
    """Several operators on the same positions in one prepared call.

    Args:
        works: launch code and what it is to work on.
        operands: what the operators take besides the mask, folded.
        keep: the run-time mask, folded, or None.
        keep_rows: it is over rows.
        plan: of the layout for all the operators.
        indexed: the last operand stands for the first tensor of the plan.

    Returns:
        A call that takes the operands and the mask, those that are None left out; it returns the
        wanted results of all operators, alone if there is one.
    """
    device = next(t.device.index for t in operands if t is not None)
    recording = Recording(device)
    described = [None if t is None else _described(recording, t) for t in (*operands, keep)]
    fixed = plan.tensors[1:] if indexed else plan.tensors
    if indexed:
        index: Any = described[-2]
        plan = plan._replace(tensors=[index, *fixed])
    results: list[Any] = []
    with using(device):
        with recorded(recording):
            for launch_code, work in works:
                given = [described[n] for n in work.operands]
                mask = described[-1:] if work.op == "prune" else (described[-1], keep_rows)
                made = launch_code(*given, *mask, *plan, *work.scalars)
                several = made if isinstance(made, tuple) else (made,)
                results += several[: len(work.results)]
        alone = len(results) == 1
        return Prepared(recording, results[0] if alone else tuple(results), fixed)


def _described(recording: Recording, t: Tensor) -> Operand:
    return recording.given(t, 0 if t.is_meta else t.data_ptr() & 15)


def given(arguments: tuple[Any, ...]) -> list[Tensor]:
    """The tensors a prepared call takes, in the order of its slots."""
    found: list[Tensor] = []
    for at, a in enumerate(arguments):
        if isinstance(a, Tensor):
            found.append(a)
        elif isinstance(a, list) and a and isinstance(a[0], Tensor):
            found += _loose(arguments, at)[0]
    return found


def _loose(arguments: tuple[Any, ...], at: int) -> tuple[list[Tensor], list[Tensor]]:
    """Of the plan whose tensors are argument ``at``: those of this call, those that stay."""
    tensors, kinds = arguments[at], arguments[at + 2]
    first = 1 if kinds.startswith("nm") else 0
    return tensors[:first], tensors[first:]
