"""Patterns: which (query, key) pairs are kept, as an expression that is evaluated row by row.

A *flat* pattern answers three questions about any rising list of query rows of a `Frame`, from the
most general to the cheapest:

    runs      the kept keys of each row as ragged intervals
    interval  the same when no row has more than one interval, else None
    factor    the pattern as  core ∪ (listed rows × all keys) ∪ (all rows × listed keys)

Patterns that differ between batch entries or heads are a `Batched` table of flat ones; `lead`,
`entry` and `distinct` describe that table for every pattern.
"""

from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from . import cache, pattern_queries
from .arguments import SIDE_LIMIT, as_device, as_index, as_integer, kind_of
from .costs import Costs, check_costs
from .errors import LayoutError, ShapeError
from .runs import Runs, from_interval
from .source import Source

if TYPE_CHECKING:
    from .layout import Layout

__all__ = ["UNBOUND", "Cut", "Factored", "Frame", "Interval", "Pattern"]

Interval = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Frame:
    """The rectangle a pattern is evaluated in: nq queries, nk keys, on `device`."""

    nq: int
    nk: int
    device: torch.device

    def __post_init__(self) -> None:
        for name in ("nq", "nk"):
            value = getattr(self, name)
            if not 0 <= value < SIDE_LIMIT:
                raise ShapeError(
                    f"{name} = {value!r} given, a number of rows or keys >= 0 expected, and below "
                    "2**31: index tensors count in int32"
                )

    @property
    def shift(self) -> int:
        """Query i stands at key position i + shift; negative if queries outnumber keys."""
        return self.nk - self.nq

    def rows(self) -> Tensor:
        """All query rows, (nq) int64."""
        return torch.arange(self.nq, device=self.device)


# Beyond every position that is planned in these terms, in either direction.
UNBOUND = 1 << 30


class Cut(NamedTuple):
    """Keys of every row, from max(least, row + left) up to min(most, row + right).

    Attributes:
        least: the first key of all rows, at least 0.
        most: one past the last key of all rows.
        left: where a row begins beside its number.
        right: where it ends, one past the last key.
    """

    least: int
    most: int
    left: int
    right: int

    def meet(self, other: "Cut") -> "Cut":
        """The keys of both."""
        return Cut(
            max(self.least, other.least), min(self.most, other.most),
            max(self.left, other.left), min(self.right, other.right),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Factored:
    """core ∪ (queries × all keys) ∪ (all rows × keys).

    Attributes:
        core: a flat pattern, or None for nothing.
        queries: int64, sorted and unique row indices within [0, nq).
        keys: int64, sorted and unique key indices within [0, nk).
    """

    core: "Pattern | None"
    queries: Tensor
    keys: Tensor


@dataclass(frozen=True, eq=False)
class Pattern:
    """A set of kept (query, key) pairs, lazy; combines with `|`, `&`, `-` and `~`.

    Query i of nq stands at key position i + nk - nq. Nothing but `dense` builds an nq × nk array.
    """

    # How tightly the expression binds when printed: | 1, & 2, ~ 3, a call 4.
    _binding: ClassVar[int] = 4
    # Whether the kept pairs are known before any score is; P.nm refuses most questions.
    _static: ClassVar[bool] = True

    # What a flat pattern defines.

    def runs(self, frame: Frame, rows: Tensor) -> Runs:
        """The kept keys of some rows.

        Args:
            frame: the rectangle.
            rows: (R) int64 query rows, rising, 0 <= row < nq, on the frame's device.

        Raises:
            LayoutError: the pattern is not flat, or has a fixed shape that the frame is not.
        """
        found = self.interval(frame, rows)
        if found is None:
            raise NotImplementedError(f"{type(self).__name__} defines neither runs nor interval")
        return from_interval(*found)

    def interval(self, frame: Frame, rows: Tensor) -> Interval | None:
        """The kept keys of some rows when none has more than one interval.

        Returns:
            lo and hi, (R) int64 with 0 <= lo <= hi <= nk and lo == hi where nothing is kept; None
            when some row has more intervals, or when finding out would cost as much as `runs`.
        """
        return None

    def bands(self, frame: Frame) -> list[Interval] | None:
        """The kept keys of all rows as a few intervals each, which may overlap.

        Returns:
            lo and hi, (nq) int64 as of ``interval``; None when they are not known at once.
        """
        stretches = self.stretches(frame)
        if stretches is not None:
            rows, lo, hi = stretches
            lengths = rows.diff(append=rows.new_tensor([frame.nq]))
            return [(lo.repeat_interleave(lengths), hi.repeat_interleave(lengths))]
        found = self.interval(frame, frame.rows())
        return None if found is None else [found]

    def cuts(self, frame: Frame) -> list[Cut] | None:
        """The kept keys of all rows in a few numbers; None where those do not say it."""
        return None

    def stretches(self, frame: Frame) -> tuple[Tensor, Tensor, Tensor] | None:
        """The kept keys where many rows one after the other keep the same interval.

        Returns:
            Of each stretch of rows, its first row, lo and hi: integers, the rows rising from 0 on;
            None where rows differ, or that is not known at once.
        """
        return None

    def coarse(self, frame: Frame, size: int) -> bool:
        """Whether blocks of size × size are known to be kept or dropped whole, row by row alike."""
        return False

    def block_mask(self, frame: Frame, size: int) -> Tensor | None:
        """Bool (block rows, block columns) if the pattern is known as blocks of this size."""
        return None

    def factor(self, frame: Frame) -> Factored:
        """The pattern as core ∪ (listed rows × all keys) ∪ (all rows × listed keys)."""
        self.check(frame)
        none = torch.empty(0, dtype=torch.int64, device=frame.device)
        return Factored(self, none, none)

    def runs_bound(self, frame: Frame) -> int:
        """No row has more runs; sizes the first chunk of rows, so a loose bound only costs time."""
        return 1

    def check(self, frame: Frame) -> None:
        """Raise LayoutError if the pattern cannot be evaluated in this rectangle."""
        for field in fields(self):
            value = getattr(self, field.name)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Pattern):
                    part.check(frame)

    # What differs between batch entries and heads.

    @property
    def leading_dims(self) -> int:
        """Leading dimensions of `dense`: 1 under per_head, 2 under per_batch, else 0."""
        return 0

    @property
    def lead(self) -> tuple[int, int]:
        """(b, h): over how many batch entries and heads the pattern differs; 1 = it does not."""
        return (1, 1)

    @property
    def entry(self) -> tuple[int, ...]:
        """For each of the b·h leading entries in C order, its index into `distinct`."""
        return (0,)

    @property
    def distinct(self) -> "tuple[Pattern, ...]":
        """The flat patterns; structurally equal expressions appear once."""
        return (self,)

    # Identity.

    def expression_key(self) -> Hashable:
        """Equal for structurally equal expressions.

        Made of classes and scalars; of tensors by reference and version, small CPU tensors by their
        bytes. Reads no device memory.
        """
        return (type(self), *(_key(getattr(self, field.name)) for field in fields(self)))

    @property
    def device(self) -> torch.device:
        """Where the pattern's tensors live: the first accelerator among them, else the CPU."""
        found = {source.base.device for source in _sources(self)}
        return next((d for d in found if d.type != "cpu"), torch.device("cpu"))

    # Operators.

    # The classes of the results are written in terms of this one, hence the late imports.

    def __or__(self, other: "Pattern") -> "Pattern":
        from .pattern_algebra import either

        if not isinstance(other, Pattern):
            return NotImplemented
        return either(self, other) if other._static else other | self

    def __and__(self, other: "Pattern") -> "Pattern":
        from .pattern_algebra import both

        if not isinstance(other, Pattern):
            return NotImplemented
        met = self._meet(other) or other._meet(self)
        return both(self, other) if met is None else met

    def __sub__(self, other: "Pattern") -> "Pattern":
        if not isinstance(other, Pattern):
            return NotImplemented
        return self & ~other

    def __invert__(self) -> "Pattern":
        from .pattern_algebra import negated

        return negated(self)

    def _meet(self, other: "Pattern") -> "Pattern | None":
        """Hook for a class (P.nm) that defines its own `&` whichever side it stands on."""
        return None

    # Queries.

    def dense(self, nq: int, nk: int, device: torch.device | str | None = None) -> Tensor:
        """The whole mask, True = kept; for tests and tiny shapes.

        Returns:
            bool (nq, nk); (H, nq, nk) under per_head; (B, 1 or H, nq, nk) under per_batch.

        Raises:
            LayoutError: the pattern has a fixed shape other than (nq, nk), or is P.nm.
        """
        return pattern_queries.dense(self, self._frame(nq, nk, device))

    def nnz(self, nq: int, nk: int) -> int:
        """Kept pairs, the total over batch entries and heads; costs at most time in the runs."""
        return pattern_queries.nnz(self, self._frame(nq, nk))

    def density(self, nq: int, nk: int) -> float:
        """Kept pairs / all pairs, over batch entries and heads; 0 for an empty rectangle."""
        frame = self._frame(nq, nk)
        total = frame.nq * frame.nk * len(self.entry)
        return self.nnz(nq, nk) / total if total else 0.0

    def row(self, i: int, nq: int, nk: int) -> Tensor:
        """The kept keys of query row i, rising, int64.

        Raises:
            LayoutError: no such row, or the pattern differs between heads or batch entries.
        """
        return pattern_queries.row(self, as_index(i, "row(i)"), self._frame(nq, nk))

    def block(self, i: int, j: int, size: int, nq: int, nk: int) -> str:
        """Whether block (i, j) of size × size pairs is "empty", "full" or "partial".

        A block at the edge counts its pairs inside the rectangle only. Under per_head and per_batch
        the answer holds for all entries together: "full" means full in each.

        Raises:
            LayoutError: no such block.
        """
        i, j = as_index(i, "block(i)"), as_index(j, "block(j)")
        size = as_integer(size, "block(size)", 1)
        return pattern_queries.block(self, i, j, size, self._frame(nq, nk))

    def to_layout(
        self,
        kind: str,
        nq: int,
        nk: int,
        size: int = 64,
        device: torch.device | str | None = None,
        costs: "Costs | None" = None,
    ) -> "Layout":
        """The kept positions encoded for a machine; the last 64 layouts are remembered.

        Args:
            kind: "block", "row" or "mixed".
            nq: number of queries.
            nk: number of keys.
            size: side of the square blocks of "block" and "mixed".
            device: where the layout's tensors go; the pattern's own device if None.
            costs: the rates that the split into parts minimises; the device's defaults if None.

        Raises:
            LayoutError: an unknown kind, another shape than a fixed one, or a miss during graph
                capture.
        """
        if torch.compiler.is_dynamo_compiling():
            from .pattern_traced import traced_layout

            return traced_layout(self, kind, nq, nk, size, device, costs)
        # Imported here: the split is written in terms of this class.
        from .split import to_layout

        nq, nk = as_index(nq, "to_layout(nq)"), as_index(nk, "to_layout(nk)")
        if not isinstance(kind, str):
            raise LayoutError(f"to_layout: kind is a {kind_of(kind)}; expected a string")
        size = as_integer(size, "to_layout(size)", 1)
        check_costs("to_layout", costs)
        target = as_device("to_layout", self.device if device is None else device)

        def make() -> "Layout":
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise LayoutError(
                    f"{self!r}: no {kind!r} layout for {nq} × {nk} yet, and a graph is being "
                    "captured; plan first: call to_layout, or run the model once, before it"
                )
            if target.type == "meta":  # where nothing can be counted
                cpu = torch.device("cpu")
                return to_layout(self, kind, nq, nk, size, cpu, costs).to(target)
            return to_layout(self, kind, nq, nk, size, target, costs)

        key = (self.expression_key(), kind, nq, nk, size, target, costs)
        return cache.layouts.get(key, make)

    def _frame(self, nq: int, nk: int, device: torch.device | str | None = None) -> Frame:
        name, device = type(self).__name__.lower(), self.device if device is None else device
        device = as_device(name, device, data=True)
        return Frame(as_index(nq, "nq"), as_index(nk, "nk"), device)

    def __repr__(self) -> str:
        shown = (getattr(self, field.name) for field in fields(self))
        return f"{type(self).__name__.lower()}({', '.join(map(repr, shown))})"


def _key(value: object) -> Hashable:
    if isinstance(value, Pattern):
        return value.expression_key()
    if isinstance(value, Source):
        return value.key()
    if isinstance(value, tuple):
        return tuple(_key(one) for one in value)
    assert isinstance(value, Hashable)
    return value


def _sources(value: object) -> list[Source]:
    if isinstance(value, Source):
        return [value]
    if isinstance(value, Pattern):
        value = tuple(getattr(value, field.name) for field in fields(value))
    return [s for one in value for s in _sources(one)] if isinstance(value, tuple) else []
