"""Patterns whose queries stand where a cache says, and patterns listed row by row."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from mixgrain.formats.errors import LayoutError
from mixgrain.formats.pattern import Factored, Frame, Interval, Pattern
from mixgrain.formats.runs import Runs, clip


@dataclass(frozen=True, eq=False, repr=False)
class Placed(Pattern):
    """A flat pattern whose query row 0 stands at key position `first`.

    The suffix law puts the last query at the last key. A static cache breaks it: its keys go on
    behind the last query. The term is asked in a frame long enough for both, and what lies behind
    the real keys is cut off.
    """

    term: Pattern
    first: int

    def runs(self, frame: Frame, rows: Tensor) -> Runs:
        found = self.term.runs(self._around(frame), rows)
        none = rows.new_zeros(rows.shape)
        return clip(found, none, none + frame.nk)

    def interval(self, frame: Frame, rows: Tensor) -> Interval | None:
        found = self.term.interval(self._around(frame), rows)
        return (
            None if found is None else (found[0].clamp(max=frame.nk), found[1].clamp(max=frame.nk))
        )

    def factor(self, frame: Frame) -> Factored:
        found = self.term.factor(self._around(frame))
        core = None if found.core is None else Placed(found.core, self.first)
        queries, keys = found.queries, found.keys
        return Factored(core, queries[queries < frame.nq], keys[keys < frame.nk])

    def runs_bound(self, frame: Frame) -> int:
        return self.term.runs_bound(self._around(frame))

    def check(self, frame: Frame) -> None:
        self.term.check(self._around(frame))

    def _around(self, frame: Frame) -> Frame:
        nk = max(frame.nk, self.first + frame.nq)
        return Frame(nk - self.first, nk, frame.device)

    def __repr__(self) -> str:
        return f"placed({self.term!r}, first={self.first})"


@dataclass(frozen=True, eq=False, repr=False)
class Listed(Pattern):
    """The kept keys of every row, given as runs; named in caches by their content."""

    table: Runs
    nk: int
    digest: bytes

    @classmethod
    def of(cls, table: Runs, nk: int) -> Listed:
        """The pattern of runs over nk keys; reads them once."""
        made = hashlib.blake2b(digest_size=16)
        for part in (table.offsets, table.lo, table.hi):
            made.update(part.cpu().numpy().tobytes())
        return cls(table, nk, made.digest())

    def expression_key(self) -> Hashable:
        return (type(self), self.table.num_rows, self.nk, self.digest)

    def check(self, frame: Frame) -> None:
        shape = (self.table.num_rows, self.nk)
        if shape != (frame.nq, frame.nk):
            raise LayoutError(
                f"{self!r}: {frame.nq} × {frame.nk} (queries × keys) was asked for; its shape is "
                "fixed"
            )

    def runs(self, frame: Frame, rows: Tensor) -> Runs:
        self.check(frame)
        held = self.table
        if held.lo.device != frame.device:
            held = Runs(*(part.to(frame.device) for part in (held.offsets, held.lo, held.hi)))
        return held.select(rows)

    def runs_bound(self, frame: Frame) -> int:
        return max(1, (frame.nk + 1) // 2)

    def __repr__(self) -> str:
        return f"listed(<{self.table.num_rows}x{self.nk}, {self.table.num_runs} runs>)"
