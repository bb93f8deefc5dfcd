"""What every layout has in common: the protocol and its identity.

A layout says which positions of an (nq, nk) matrix are kept and where in a flat run of *slots* each
of them lies; it never holds values. Layouts may vary over heads and batch: ``lead = (b, h)`` with 1
for a dimension over which positions are shared. The ``b * h`` *entries* are numbered in C order,
entry ``e`` has the positions of the distinct pattern ``entry[e]`` (equal entries are stored once),
and its slots are ``entry_slots[e] … entry_slots[e + 1]`` of the layout's slots.

A slot is *dead* when it stands for no kept position (padding, masked positions of partial blocks).
Every primitive treats dead slots as absent on input, writes exact zeros there and gives them no
gradient.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .arguments import as_device
from .tracing import ByIdentity, constant, keep, kept

_keys = itertools.count(1)

# The key of every layout that torch.compile traces the making of: it has no identity yet.
TRACED = 0


def next_key() -> int:
    """A number no other layout of this process has; plans are cached under it."""
    return next(_keys)


class Layout(ByIdentity, ABC):
    """Positions of the kept entries of an (nq, nk) matrix, one pattern per (batch, head) entry.

    Concrete layouts are frozen dataclasses (``eq=False``: identity is ``key``) whose tensor fields
    hold the positions. Attributes common to all:

    Attributes:
        shape: (nq, nk), rows and columns of one entry.
        lead: (b, h); 1 where positions are shared over that dimension.
        entry: b * h ints in C order, the distinct pattern each entry uses.
        entry_slots: b * h + 1 ints, where each entry's slots start; the last is ``slots``.
        nnz: live slots, all entries together.
        key: process-wide identity; survives pytree flattening and ``to``.
    """

    kind: ClassVar[str]
    shape: tuple[int, int]
    lead: tuple[int, int]
    entry: tuple[int, ...]
    entry_slots: tuple[int, ...]
    nnz: int
    key: int

    @property
    def slots(self) -> int:
        """Number of slots over all entries, dead ones included."""
        return self.entry_slots[-1]

    @property
    def entries(self) -> int:
        """Number of (batch, head) entries: b * h."""
        return len(self.entry)

    @property
    def density(self) -> float:
        """Kept positions over all positions."""
        total = self.shape[0] * self.shape[1] * self.entries
        return self.nnz / total if total else 0.0

    @property
    def parts(self) -> tuple[Layout, ...]:
        """The disjoint layouts this one is made of; itself alone unless mixed."""
        return (self,)

    @property
    def part_offsets(self) -> tuple[int, ...]:
        """Where each part's slots start in the last axis of ``values``, and the end."""
        return (0, self.slots)

    @property
    def home(self) -> torch.device | None:
        """Device of the index tensors; None for a layout without any, which is at home anywhere."""
        if not torch.compiler.is_dynamo_compiling():
            return self._home
        if self.key != TRACED:
            known: torch.device | None = fact(self, "_home")
            return known
        made: torch.device = cast(Any, self).metadata.device  # an NMLayout
        return made

    @functools.cached_property
    def _home(self) -> torch.device | None:
        return next((tensor.device for tensor in self.tensors()), None)

    @property
    def device(self) -> torch.device:
        """Device of the index tensors; the CPU when there are none."""
        return self.home or torch.device("cpu")

    def tensors(self) -> list[Tensor]:
        """The index tensors, in field order, those of parts included."""
        found: list[Tensor] = []
        for field in fields(cast(Any, self)):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, Layout):
                found.extend(value.tensors())
        return found

    def to(self, device: torch.device | str) -> Self:
        """The same positions with index tensors on ``device``; the same object if already there."""
        device = as_device(f"{type(self).__name__}.to", device)
        if self.device == device:
            return self
        changed: dict[str, Any] = {}
        for field in fields(cast(Any, self)):
            value = getattr(self, field.name)
            if isinstance(value, Tensor | Layout):
                changed[field.name] = value.to(device)
        return cast(Self, replace(cast(Any, self), **changed))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and same_positions(self, other)

    def __hash__(self) -> int:
        return hash(self.key)

    def __getstate__(self) -> dict[str, Any]:
        # Fields alone: what was worked out from them belongs to this key and device.
        return {field.name: getattr(self, field.name) for field in fields(cast(Any, self))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickled key may already stand for another layout of this process.
        self.__dict__.update(state, key=next_key())

    @abstractmethod
    def live(self) -> Tensor | None:
        """Bool (slots,): which slots stand for a kept position; None when all do."""

    @abstractmethod
    def indices(self) -> tuple[Tensor, Tensor]:
        """(row, column) of every slot within its entry, int64 (slots,).

        Dead slots name some position inside the shape, so that both can index tables safely.
        """

    @property
    @abstractmethod
    def T(self) -> Layout:
        """The layout of the transposed matrix, in its own canonical slot order."""

    @abstractmethod
    def transpose_slots(self) -> Tensor:
        """The slot of this layout that each slot of ``T`` takes its value from.

        int64 (slots of ``T``,); −1 for slots of ``T`` that are padding.
        """

    @abstractmethod
    def validate(self) -> None:
        """Raise LayoutError naming the first field at fault, or return None."""

    def slot_entry(self) -> Tensor:
        """int64 (slots,): the entry each slot belongs to."""
        counts = torch.tensor(
            [b - a for a, b in itertools.pairwise(self.entry_slots)], device=self.device
        )
        return torch.repeat_interleave(torch.arange(self.entries, device=self.device), counts)

    def mask(self) -> Tensor:
        """The definition: bool (b, h, nq, nk), True where kept. Slow and O(nq * nk); for tests."""
        out = torch.zeros(self.entries, *self.shape, dtype=torch.bool, device=self.device)
        row, column = self.indices()
        live = self.live()
        where = slice(None) if live is None else live
        out[self.slot_entry()[where], row[where], column[where]] = True
        return out.reshape(*self.lead, *self.shape)

    def __repr__(self) -> str:
        lead = "" if self.lead == (1, 1) else f", lead={self.lead}"
        return (
            f"{type(self).__name__}({self.shape[0]}×{self.shape[1]}{lead}, nnz={self.nnz}, "
            f"density={self.density:.4g}, slots={self.slots})"
        )


def fact(layout: Layout, name: str) -> Any:
    """An attribute of a layout, or what its method of this name returns.

    torch.compile reads it when it traces a call, if the layout is there by then, and keeps it: most
    facts follow from index tensors, whose contents a tracer does not know.
    """
    if torch.compiler.is_dynamo_compiling() and layout.key != TRACED:
        (known,) = _known(layout, name)
        return take(known) if isinstance(known, str) else known
    found = getattr(layout, name)
    return found() if callable(found) else found


@constant
def _known(layout: Layout, name: str) -> tuple[Any]:
    found = fact(layout, name)
    return (put(found) if isinstance(found, Layout) else found,)


def put(layout: Layout) -> str:
    """Lay a layout where traced code can ``take`` it from, under the name returned."""
    return keep(f"layout {layout.key} on {layout.device}", layout)


def take(name: str) -> Any:
    """The layout that was ``put`` there."""
    return getattr(kept, name)


def same_positions(a: Layout, b: Layout) -> bool:
    """Whether two layouts are known to hold the same positions in the same slots."""
    return a is b or (a.key == b.key and a.key != TRACED)


def register_layout(cls: type[Any]) -> type[Any]:
    """Make a layout dataclass a pytree.

    Tensors and nested layouts are leaves or subtrees, all else (the key included) is structure.
    """
    names = [field.name for field in fields(cls)]

    def flatten(layout: Any) -> tuple[list[Any], Any]:
        values = [getattr(layout, name) for name in names]
        dynamic = [isinstance(value, Tensor | Layout) for value in values]
        children = [value for value, use in zip(values, dynamic, strict=True) if use]
        context = tuple(None if use else value for value, use in zip(values, dynamic, strict=True))
        return children, (context, tuple(dynamic))

    def unflatten(children: Any, context: Any) -> Any:
        static, dynamic = context
        source = iter(children)
        values = [next(source) if use else old for old, use in zip(static, dynamic, strict=True)]
        return cls(**dict(zip(names, values, strict=True)))

    pytree.register_pytree_node(
        cls, flatten, unflatten, serialized_type_name=f"mixgrain.{cls.__name__}"
    )
    return cls


def entry_slots_of(entry: Sequence[int], slots_of_distinct: Sequence[int]) -> tuple[int, ...]:
    """Where each entry's slots start, from the number of slots of each distinct pattern."""
    return (0, *itertools.accumulate(slots_of_distinct[u] for u in entry))
