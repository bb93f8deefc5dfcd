"""Patterns of a fixed shape, given as ragged intervals of keys or of rows.

Both are what other libraries' exact masks say, and both cost their intervals, never the positions:

          0 1 2 3 4 5     keys of each row     rows of each key
        0 x x . . x .     [0,2) [4,5)          key 0: [0,3)
        1 x x x . . .     [0,3)                key 1: [0,2)
        2 x . . . . .     [0,1)                key 2: [1,2)   key 4: [0,1)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import LayoutError
from .layout import Layout
from .layout_runs import layout_runs
from .pattern import Frame, Interval, Pattern
from .pattern_algebra import table
from .pattern_fixed import require_shape
from .pattern_queries import chunked_runs
from .runs import Runs, changes, empty, from_intervals, paired, turned
from .source import Source

# Comparing neighbouring rows takes about 30 numbers a run.
RUNS_PER_CHUNK = 1 << 19


@dataclass(frozen=True, eq=False, repr=False)
class Ragged(Pattern):
    """Runs over the keys of each row; ``who`` is the constructor that errors name."""

    offsets: Source
    lo: Source
    hi: Source
    shape: tuple[int, int]
    who: str

    def check(self, frame: Frame) -> None:
        require_shape(self.who, self.shape, frame)

    def runs(self, frame: Frame, rows: Tensor) -> Runs:
        self.check(frame)
        return _held(self, frame.device).select(rows)

    def interval(self, frame: Frame, rows: Tensor) -> Interval | None:
        self.check(frame)
        ends = self.offsets.derive("ends", frame.device, _ends, self.lo, self.hi)
        return None if ends is None else (ends[0][rows], ends[1][rows])

    def runs_bound(self, frame: Frame) -> int:
        return max(1, min(self.lo.base.numel(), (frame.nk + 1) // 2))

    def __repr__(self) -> str:
        return f"{self.who}(<{self.lo.base.numel()} runs of {self.shape[0]}x{self.shape[1]}>)"


@dataclass(frozen=True, eq=False, repr=False)
class Columns(Pattern):
    """Runs over the rows of each key; ``who`` is the constructor that errors name."""

    offsets: Source
    lo: Source
    hi: Source
    shape: tuple[int, int]
    who: str

    def check(self, frame: Frame) -> None:
        require_shape(self.who, self.shape, frame)

    def runs(self, frame: Frame, rows: Tensor) -> Runs:
        self.check(frame)
        kept = _held(self, frame.device)
        # Runs of key numbers over the rows asked for, which are then the columns of the transpose.
        lo, hi = torch.searchsorted(rows, kept.lo), torch.searchsorted(rows, kept.hi)
        met = lo < hi
        key = kept.row_of_run()[met]
        asked = from_intervals(key, lo[met], hi[met], frame.nk, rows.numel())
        return turned(asked, rows.numel())

    def runs_bound(self, frame: Frame) -> int:
        return max(1, min(self.lo.base.numel(), (frame.nk + 1) // 2))

    def __repr__(self) -> str:
        return f"{self.who}(<{self.lo.base.numel()} runs of {self.shape[0]}x{self.shape[1]}>)"


def _held(pattern: Ragged | Columns, device: torch.device) -> Runs:
    return pattern.offsets.derive("runs", device, Runs, pattern.lo, pattern.hi)


def _ends(*arrays: Tensor) -> Interval | None:
    """The only run of each row as lo and hi, both 0 where there is none; None if some have more."""
    runs = Runs(*arrays)
    some = runs.counts() > 0
    if runs.num_runs != int(some.sum()):
        return None
    lo = torch.zeros(runs.num_rows, dtype=torch.int64, device=some.device)
    hi = torch.zeros_like(lo)
    lo[some], hi[some] = runs.lo, runs.hi
    return lo, hi


def ragged(
    entries: list[Runs],
    lead: tuple[int, int] | None,
    shape: tuple[int, int],
    who: str,
    kind: type[Ragged] | type[Columns] = Ragged,
) -> Pattern:
    """A pattern from the Runs of each leading entry.

    Args:
        entries: b · h Runs in C order, equal ones preferably the same object.
        lead: (b, h), or None for one pattern that holds for all heads.
        shape: (nq, nk).
        who: the constructor's name.
        kind: Ragged for runs over keys, Columns for runs over rows.
    """
    made: dict[int, Pattern] = {}
    for runs in entries:
        if id(runs) not in made:
            ends = Source(runs.lo), Source(runs.hi)
            made[id(runs)] = kind(Source(runs.offsets), *ends, shape, who)
    items = [made[id(runs)] for runs in entries]
    return items[0] if lead is None else table(lead, items, over_batch=lead[0] > 1)


def from_layout(layout: Layout) -> Pattern:
    """The pattern of a layout's kept positions; see patterns.from_layout."""
    if not isinstance(layout, Layout):
        raise LayoutError(
            f"from_layout: {type(layout).__name__} given, a layout expected; of a SparseTensor "
            "pass s.layout"
        )
    runs = layout_runs(layout)
    lead = None if layout.lead == (1, 1) else layout.lead
    return ragged([runs[u] for u in layout.entry], lead, layout.shape, "from_layout")


def runs_over_rows(flat: Pattern, frame: Frame, most: int) -> Runs | None:
    """The rows that keep each key, as runs, or None if there are more than `most` runs.

    Works through chunks of rows, so that it costs the pattern's own runs and `most`.
    """
    none = torch.empty(0, dtype=torch.int64, device=frame.device)
    above, starts, ends = empty(1, frame.device), [(none, none)], [(none, none)]
    found = 0
    for rows, runs in chunked_runs(flat, frame, budget=RUNS_PER_CHUNK):
        opened, closed = changes(runs, above, frame.nk)
        found += opened.nnz()
        if found > most:
            return None
        for changed, into in ((opened, starts), (closed, ends)):
            row, col = changed.pairs()
            into.append((rows[row], col))
        above = runs.select(torch.tensor([runs.num_rows - 1], device=frame.device))
    still = above.expand()[1]
    ends.append((torch.full_like(still, frame.nq), still))
    (row, col), (end_row, end_col) = (
        [torch.cat(parts) for parts in zip(*pairs, strict=True)] for pairs in (starts, ends)
    )
    return paired(row, col, end_row, end_col, frame.nk)
