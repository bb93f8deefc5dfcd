"""The algebra of patterns: union, intersection and complement, and the table over heads."""

import operator
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from .errors import LayoutError, ShapeError
from .pattern import Cut, Factored, Frame, Interval, Pattern
from .runs import Runs, clip, complement, empty, from_interval, intersection, union

V = TypeVar("V")


@dataclass(frozen=True, eq=False, repr=False)
class Or(Pattern):
    """The union of flat patterns."""

    terms: tuple[Pattern, ...]
    _binding: ClassVar[int] = 1

    def runs(self, frame: Frame, rows: Tensor) -> Runs:
        return union(*(term.runs(frame, rows) for term in self.terms), nk=frame.nk)

    def interval(self, frame: Frame, rows: Tensor) -> Interval | None:
        joined: Interval | None = None
        for term in self.terms:
            found = term.interval(frame, rows)
            if found is None:
                return None
            joined = found if joined is None else _join(joined, found)
            if joined is None:
                return None
        return joined

    def bands(self, frame: Frame) -> list[Interval] | None:
        return _paired((term.bands(frame) for term in self.terms), operator.add)

    def cuts(self, frame: Frame) -> list[Cut] | None:
        return _paired((term.cuts(frame) for term in self.terms), operator.add)

    def coarse(self, frame: Frame, size: int) -> bool:
        return all(term.coarse(frame, size) for term in self.terms)

    def factor(self, frame: Frame) -> Factored:
        parts = [term.factor(frame) for term in self.terms]
        cores = tuple(part.core for part in parts if part.core is not None)
        core = (Or(cores) if len(cores) > 1 else cores[0]) if cores else None
        return Factored(
            core, _listed_once([part.queries for part in parts]),
            _listed_once([part.keys for part in parts]),
        )  # fmt: skip

    def runs_bound(self, frame: Frame) -> int:
        return sum(term.runs_bound(frame) for term in self.terms)

    def __repr__(self) -> str:
        return " | ".join(_text(term, self._binding) for term in self.terms)


@dataclass(frozen=True, eq=False, repr=False)
class And(Pattern):
    """The intersection of flat patterns."""

    terms: tuple[Pattern, ...]
    _binding: ClassVar[int] = 2

    def runs(self, frame: Frame, rows: Tensor) -> Runs:
        # The terms that are intervals cost no sort: the runs of the others are cut to them.
        window: Interval | None = None
        ragged: list[Runs] = []
        for term in self.terms:
            found = term.interval(frame, rows)
            if found is None:
                ragged.append(term.runs(frame, rows))
            else:
                window = found if window is None else _meet(window, found)
        if not ragged:
            return from_interval(*window) if window is not None else empty(0, frame.device)
        runs = reduce(lambda a, b: intersection(a, b, frame.nk), ragged)
        return runs if window is None else clip(runs, *window)

    def interval(self, frame: Frame, rows: Tensor) -> Interval | None:
        found = [term.interval(frame, rows) for term in self.terms]
        known = [one for one in found if one is not None]
        return reduce(_meet, known) if len(known) == len(found) else None

    def bands(self, frame: Frame) -> list[Interval] | None:
        found = (term.bands(frame) for term in self.terms)
        return _paired(found, lambda met, more: [_meet(a, b) for a in met for b in more])

    def cuts(self, frame: Frame) -> list[Cut] | None:
        found = (term.cuts(frame) for term in self.terms)
        return _paired(found, lambda met, more: [a.meet(b) for a in met for b in more])

    def coarse(self, frame: Frame, size: int) -> bool:
        return all(term.coarse(frame, size) for term in self.terms)

    def runs_bound(self, frame: Frame) -> int:
        return sum(term.runs_bound(frame) for term in self.terms)

    def __repr__(self) -> str:
        return " & ".join(_text(term, self._binding) for term in self.terms)


@dataclass(frozen=True, eq=False, repr=False)
class Not(Pattern):
    """The complement of a flat pattern."""

    term: Pattern
    _binding: ClassVar[int] = 3

    def runs(self, frame: Frame, rows: Tensor) -> Runs:
        return complement(self.term.runs(frame, rows), frame.nk)

    def interval(self, frame: Frame, rows: Tensor) -> Interval | None:
        found = self.term.interval(frame, rows)
        if found is None:
            return None
        lo, hi = found
        none, left, right = lo == hi, lo == 0, hi == frame.nk
        if not bool((none | left | right).all()):
            return None
        # What an interval at one edge leaves is the rest up to the other edge.
        start = torch.where(none, 0, torch.where(left, hi, 0))
        end = torch.where(none | left, frame.nk, lo)
        return start, end

    def coarse(self, frame: Frame, size: int) -> bool:
        return self.term.coarse(frame, size)

    def runs_bound(self, frame: Frame) -> int:
        return self.term.runs_bound(frame) + 1

    def __repr__(self) -> str:
        return f"~{_text(self.term, self._binding)}"


@dataclass(frozen=True, eq=False, repr=False)
class Batched(Pattern):
    """A table of flat patterns over (batch entries, heads); see per_head and per_batch."""

    shape: tuple[int, int]
    index: tuple[int, ...]
    patterns: tuple[Pattern, ...]
    over_batch: bool

    @property
    def leading_dims(self) -> int:
        return 2 if self.over_batch else 1

    @property
    def lead(self) -> tuple[int, int]:
        return self.shape

    @property
    def entry(self) -> tuple[int, ...]:
        return self.index

    @property
    def distinct(self) -> tuple[Pattern, ...]:
        return self.patterns

    def runs(self, frame: Frame, rows: Tensor) -> Runs:
        raise LayoutError(
            f"{self!r}: differs between heads or batch entries, so it has no single list of rows; "
            "ask the patterns in .distinct, which .entry assigns to the leading entries"
        )

    def factor(self, frame: Frame) -> Factored:
        raise LayoutError(f"{self!r}: ask the patterns in .distinct for their factors")

    def __repr__(self) -> str:
        b, h = self.shape
        table = [
            [repr(self.patterns[k]) for k in self.index[i * h : (i + 1) * h]] for i in range(b)
        ]
        heads = [row[0] if h == 1 else f"per_head([{_listed(row)}])" for row in table]
        if not self.over_batch:
            return f"per_head([{_listed(table[0])}])"
        return f"per_batch([{_listed(heads)}])"


def _listed_once(lists: list[Tensor]) -> Tensor:
    """All members of rising lists without repeats, rising."""
    some = [listed for listed in lists if listed.numel()]
    return torch.unique(torch.cat(some)) if len(some) > 1 else (some or lists)[0]


def table(lead: tuple[int, int], items: list[Pattern], over_batch: bool) -> Batched:
    """A Batched of one flat pattern per leading entry in C order; equal ones are stored once."""
    first: dict[Hashable, int] = {}
    index = tuple(first.setdefault(item.expression_key(), len(first)) for item in items)
    kept = tuple(items[index.index(k)] for k in range(len(first)))
    return Batched(lead, index, kept, over_batch)


def broadcast(leads: list[tuple[int, int]], who: str) -> tuple[int, int]:
    """The common (b, h) of several leads, each size equal or 1.

    Raises:
        ShapeError: sizes that differ and are not 1.
    """
    common = []
    for axis, name in enumerate(("batch entries", "heads")):
        sizes = {lead[axis] for lead in leads} - {1}
        if len(sizes) > 1:
            raise ShapeError(
                f"{who}: patterns for {' and '.join(map(str, sorted(sizes)))} {name} given; "
                "give both the same number, or one that holds for all"
            )
        common.append(sizes.pop() if sizes else 1)
    return common[0], common[1]


def at(pattern: Pattern, b: int, h: int) -> Pattern:
    """The flat pattern of leading entry (b, h), broadcast where the pattern's own size is 1."""
    batch, heads = pattern.lead
    return pattern.distinct[
        pattern.entry[(b if batch > 1 else 0) * heads + (h if heads > 1 else 0)]
    ]


def either(a: Pattern, b: Pattern) -> Pattern:
    """The union a | b, entry by entry of the common leading dimensions."""
    return _combine(Or, "|", a, b)


def both(a: Pattern, b: Pattern) -> Pattern:
    """The intersection a & b, entry by entry of the common leading dimensions."""
    return _combine(And, "&", a, b)


def negated(pattern: Pattern) -> Pattern:
    """The complement ~pattern, entry by entry."""
    if isinstance(pattern, Batched):
        items = [negated(pattern.patterns[k]) for k in pattern.index]
        return table(pattern.shape, items, pattern.over_batch)
    return pattern.term if isinstance(pattern, Not) else Not(pattern)


def _combine(kind: type[Or] | type[And], sign: str, a: Pattern, b: Pattern) -> Pattern:
    if not isinstance(a, Batched) and not isinstance(b, Batched):
        return _joined(kind, a, b)
    lead = broadcast([a.lead, b.lead], sign)
    pairs = [(at(a, i, j), at(b, i, j)) for i in range(lead[0]) for j in range(lead[1])]
    over_batch = any(isinstance(p, Batched) and p.over_batch for p in (a, b))
    return table(lead, [_joined(kind, x, y) for x, y in pairs], over_batch)


def _joined(kind: type[Or] | type[And], a: Pattern, b: Pattern) -> Pattern:
    first = a.terms if isinstance(a, kind) else (a,)
    second = b.terms if isinstance(b, kind) else (b,)
    return kind((*first, *second))


def _paired(
    found: Iterable[list[V] | None], put: Callable[[list[V], list[V]], list[V]]
) -> list[V] | None:
    """What all terms say, put together; None as soon as one says nothing."""
    made: list[V] | None = None
    for some in found:
        if some is None:
            return None
        made = some if made is None else put(made, some)
    return made


def _join(a: Interval, b: Interval) -> Interval | None:
    """The union of two intervals per row, or None if some row's do not touch."""
    (a_lo, a_hi), (b_lo, b_hi) = a, b
    a_none, b_none = a_lo == a_hi, b_lo == b_hi
    touching = ((a_lo <= b_hi) & (b_lo <= a_hi)) | a_none | b_none
    if not bool(touching.all()):
        return None
    lo = torch.where(a_none, b_lo, torch.where(b_none, a_lo, torch.minimum(a_lo, b_lo)))
    hi = torch.where(a_none, b_hi, torch.where(b_none, a_hi, torch.maximum(a_hi, b_hi)))
    return lo, hi


def _meet(a: Interval, b: Interval) -> Interval:
    lo, hi = torch.maximum(a[0], b[0]), torch.minimum(a[1], b[1])
    return lo, torch.maximum(lo, hi)


def _text(pattern: Pattern, binding: int) -> str:
    return repr(pattern) if pattern._binding > binding else f"({pattern!r})"


def _listed(texts: list[str]) -> str:
    """Comma-separated, the middle of a long list left out."""
    shown = texts if len(texts) <= 6 else [*texts[:3], "…", *texts[-1:]]
    return ", ".join(shown)
