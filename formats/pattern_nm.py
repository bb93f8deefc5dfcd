"""P.nm: the n largest of every m neighbouring scores, within a static pattern."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NoReturn

import torch
from torch import Tensor

from .errors import LayoutError
from .pattern import Factored, Frame, Interval, Pattern
from .pattern_algebra import both
from .pattern_queries import chunked_runs
from .runs import Runs

if TYPE_CHECKING:
    from .costs import Costs
    from .layout import Layout


@dataclass(frozen=True, eq=False, repr=False)
class NM(Pattern):
    """Of every m neighbouring keys the n with the largest scores, among those `within` keeps.

    Which keys these are depends on the scores, so only counts are known beforehand.
    """

    n: int
    m: int
    within: Pattern | None = None
    _binding: ClassVar[int] = 2
    _static: ClassVar[bool] = False

    @property
    def lead(self) -> tuple[int, int]:
        return self.within.lead if self.within else (1, 1)

    @property
    def entry(self) -> tuple[int, ...]:
        return self.within.entry if self.within else (0,)

    @property
    def leading_dims(self) -> int:
        return self.within.leading_dims if self.within else 0

    @property
    def distinct(self) -> tuple[Pattern, ...]:
        if self.within is None or not self.within.leading_dims:
            return (self,)
        return tuple(NM(self.n, self.m, flat) for flat in self.within.distinct)

    def nnz(self, nq: int, nk: int) -> int:
        """Pairs that a run keeps: min(n, live keys) of every group, over all leading entries."""
        frame = self._frame(nq, nk)
        if self.within is None:
            groups, rest = divmod(nk, self.m)
            return nq * (groups * self.n + min(self.n, rest))
        self.within.check(frame)
        counts = [self._count(flat, frame) for flat in self.within.distinct]
        return sum(counts[k] for k in self.within.entry)

    def _count(self, flat: Pattern, frame: Frame) -> int:
        return sum(self._kept(runs, frame) for _, runs in chunked_runs(flat, frame))

    def _kept(self, runs: Runs, frame: Frame) -> int:
        """Sum of min(n, live) over the groups of some rows.

        A run covers the groups between its first and last one whole, and these belong to no other
        run; the two at its ends may be shared with its neighbours, so their counts are added up
        first.
        """
        first, last = runs.lo // self.m, (runs.hi - 1) // self.m
        whole = (last - first - 1).clamp_(min=0)
        in_first = torch.minimum(runs.hi, (first + 1) * self.m) - runs.lo
        in_last = torch.where(last > first, runs.hi - last * self.m, 0)
        base = runs.row_of_run() * (frame.nk // self.m + 1)
        groups = torch.stack((base + first, base + last), 1).flatten()
        _, slot = torch.unique_consecutive(groups, return_inverse=True)
        live = torch.zeros_like(groups).index_add_(
            0, slot, torch.stack((in_first, in_last), 1).flatten()
        )
        return int(whole.sum()) * self.n + int(live.clamp_(max=self.n).sum())

    def _meet(self, other: Pattern) -> Pattern | None:
        if isinstance(other, NM):
            self._refuse("& of two P.nm")
        return NM(self.n, self.m, other if self.within is None else both(self.within, other))

    def _refuse(self, what: str) -> NoReturn:
        raise LayoutError(
            f"{self!r}: no {what}, because P.nm chooses by score at run time; combine it with "
            "static patterns by & and pass it to sddmm or attend"
        )

    def __or__(self, other: Pattern) -> Pattern:
        self._refuse("|")

    def __sub__(self, other: Pattern) -> Pattern:
        self._refuse("-")

    def __invert__(self) -> Pattern:
        self._refuse("~")

    def runs(self, frame: Frame, rows: Tensor) -> Runs:
        self._refuse("rows")

    def interval(self, frame: Frame, rows: Tensor) -> Interval | None:
        self._refuse("rows")

    def factor(self, frame: Frame) -> Factored:
        self._refuse("factors")

    def dense(self, nq: int, nk: int, device: torch.device | str | None = None) -> Tensor:
        """Raises LayoutError: which keys are kept depends on the scores."""
        self._refuse("dense mask")

    def row(self, i: int, nq: int, nk: int) -> Tensor:
        """Raises LayoutError: which keys are kept depends on the scores."""
        self._refuse("row")

    def block(self, i: int, j: int, size: int, nq: int, nk: int) -> str:
        """Raises LayoutError: which keys are kept depends on the scores."""
        self._refuse("block")

    def to_layout(
        self,
        kind: str,
        nq: int,
        nk: int,
        size: int = 64,
        device: torch.device | str | None = None,
        costs: "Costs | None" = None,
    ) -> "Layout":
        """Raises LayoutError: which keys are kept depends on the scores."""
        self._refuse("static layout")

    def __repr__(self) -> str:
        call = f"nm({self.n}, {self.m})"
        if self.within is None:
            return call
        inner = repr(self.within)
        return f"{call} & ({inner})" if self.within._binding < 2 else f"{call} & {inner}"
