"""Plans: what an operation needs to know of a layout, flattened to tensors, ints and a name.

The custom operators take nothing else, so they run below any tracing; Python resolves a layout to
its plan once and keeps it by ``layout.key``. One plan serves every CPU operation.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from mixgrain.formats.cache import LRU
from mixgrain.formats.layout import Layout
from mixgrain.formats.tracing import untraced

V = TypeVar("V")


class Plan(NamedTuple):
    """What crosses the operator boundary.

    Attributes:
        tensors: index tensors of all parts, one part after the other.
        dims: [slots, nq, nk, entries, *entry, then for each part: number of tensors, number of
            scalars, entries + 1 slot positions, scalars].
        name: kinds of the parts joined by "+", e.g. "block+panel"; "" for a layout without parts.
    """

    tensors: list[Tensor]
    dims: list[int]
    name: str


class PartPlan(NamedTuple):
    """One regular part of a layout.

    Attributes:
        kind: "block", "panel", "row", "nm" or "tile"; picks the class that computes on it.
        tensors: its index tensors.
        scalars: its sizes.
        starts: entries + 1 positions in the last axis of values, where each entry's slots start.
    """

    kind: str
    tensors: list[Tensor]
    scalars: list[int]
    starts: list[int]


def join(layout: Layout, parts: list[PartPlan]) -> Plan:
    """The plan of a layout made of these parts."""
    dims = [layout.slots, *layout.shape, layout.entries, *layout.entry]
    for part in parts:
        dims += [len(part.tensors), len(part.scalars), *part.starts, *part.scalars]
    tensors = [t for part in parts for t in part.tensors]
    return Plan(tensors, dims, "+".join(part.kind for part in parts))


def split(plan: Plan) -> tuple[int, tuple[int, int], list[int], list[PartPlan]]:
    """The inverse of ``join``: (slots, shape, entry, parts)."""
    tensors, dims, name = plan
    slots, rows, cols, entries = dims[:4]
    entry = list(dims[4 : 4 + entries])
    at, first = 4 + entries, 0
    parts = []
    for kind in name.split("+") if name else ():
        count, scalars = dims[at], dims[at + 1]
        starts = list(dims[at + 2 : at + 3 + entries])
        at += 3 + entries
        parts.append(
            PartPlan(kind, tensors[first : first + count], list(dims[at : at + scalars]), starts)
        )
        at, first = at + scalars, first + count
    return slots, (rows, cols), entry, parts


class _Memo(LRU[V]):
    """An LRU that traced code can read: torch.compile cannot enter locks."""

    def peek(self, key: Hashable) -> V | None:
        """What is there, without counting as a use."""
        return self._values.get(key)


_plans: _Memo[Plan] = _Memo(128)
_validated: _Memo[bool] = _Memo(4096)


def trust(layout: Layout) -> None:
    """Note that a layout was made by this library a moment ago and needs no validation."""
    _validated.get(abs(layout.key), lambda: True)


def trusted(layout: Layout) -> bool:
    """Whether a layout was validated, or made by this library; counts as a use."""
    return LRU.peek(_validated, abs(layout.key)) is not None


def validate_once(layout: Layout) -> None:
    """Validate a layout the first time it is seen; later calls are free.

    Handed-in or loaded indices would otherwise reach kernels unchecked. A transposed layout has the
    negated key of its source and counts as the same.
    """
    key = abs(layout.key)
    if not (torch.compiler.is_compiling() and _validated.peek(key)):
        _validated.get(key, lambda: _passes(layout))


def _passes(layout: Layout) -> bool:
    layout.validate()  # raises otherwise
    return True


def cached(layout: Layout, make: Callable[[], Plan], variety: str = "") -> Plan:
    """The plan of a layout on its device, made once; the layout is validated before.

    Args:
        layout: the positions; a layout keeps its key when it is moved.
        make: makes the plan.
        variety: tells several plans of one layout and device apart.
    """
    key = (layout.key, layout.device, variety)
    if torch.compiler.is_compiling():
        found = _plans.peek(key)
        return _planned_outside(key, layout, make) if found is None else found
    return _planned(key, layout, make)


def _planned(key: Hashable, layout: Layout, make: Callable[[], Plan]) -> Plan:
    def build() -> Plan:
        validate_once(layout)
        return make()

    return _plans.get(key, build)


# Planning reads index tensors on the host, so under torch.compile it breaks the graph the first
# time; call a function once before compiling it with fullgraph=True.
_planned_outside: Callable[[Hashable, Layout, Callable[[], Plan]], Plan] = untraced(_planned)
