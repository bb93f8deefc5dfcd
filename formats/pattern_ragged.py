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
from .pattern import Frame, Pattern
from .pattern_algebra import table
from .pattern_fixed import require_shape
from .pattern_queries import chunked_runs
from .runs import Runs, changes, empty, from_intervals, from_sorted_pairs, paired, turned
from .source import Source


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


def sorted_positions(layout: Layout) -> tuple[Tensor, Tensor]:
    """The kept positions of every entry in C order.

    Returns:
        key: int64 (nnz,), (entry · nq + row) · nk + column, rising.
        slot: int64 (nnz,), the slot of each.
    """
    nq, nk = layout.shape
    row, column = layout.indices()
    key = (layout.slot_entry() * nq + row) * nk + column
    live = layout.live()
    slot = torch.arange(layout.slots, device=key.device)
    if live is not None:
        key, slot = key[live], slot[live]
    if bool((key[1:] <= key[:-1]).any()):
        key, order = key.sort()
        slot = slot[order]
    return key, slot


def distinct_runs(layout: Layout, key: Tensor) -> list[Runs]:
    """The kept keys of each distinct pattern of a layout, from its ``sorted_positions``."""
    nq, nk = layout.shape
    area = nq * nk
    first = [layout.entry.index(u) for u in range(max(layout.entry) + 1)]
    ends = torch.tensor([[e * area, (e + 1) * area] for e in first], device=key.device)
    found = []
    for u, (start, stop) in enumerate(torch.searchsorted(key, ends).tolist()):
        inside = key[start:stop] - first[u] * area
        found.append(from_sorted_pairs(inside // max(nk, 1), inside % max(nk, 1), nq))
    return found


def from_layout(layout: Layout) -> Pattern:
    """The pattern of a layout's kept positions; see patterns.from_layout."""
    if not isinstance(layout, Layout):
        raise LayoutError(
            f"from_layout: {type(layout).__name__} given, a layout expected; of a SparseTensor "
            "pass s.layout"
        )
    runs = distinct_runs(layout, sorted_positions(layout)[0])
    lead = None if layout.lead == (1, 1) else layout.lead
    return ragged([runs[u] for u in layout.entry], lead, layout.shape, "from_layout")


def runs_over_rows(flat: Pattern, frame: Frame, most: int) -> Runs | None:
    """The rows that keep each key, as runs, or None if there are more than `most` runs.

    Works through chunks of rows, so that it costs the pattern's own runs and `most`.
    """
    none = torch.empty(0, dtype=torch.int64, device=frame.device)
    above, starts, ends = empty(1, frame.device), [(none, none)], [(none, none)]
    found = 0
    for rows, runs in chunked_runs(flat, frame):
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
