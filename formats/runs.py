"""Runs: the kept keys of many rows as ragged lists of intervals.

Three rows over six keys, and their arrays:

    row 0   x x . x x x      offsets  0   2   2   3
    row 1   . . . . . .      lo       0   3   2
    row 2   . . x x . .      hi       2   6   4

A run is [lo, hi). Within a row the runs are rising, disjoint, not adjacent and not empty, so equal
sets have equal arrays. Set operations put all rows on one line (row · (nk + 1) + key: the gap of
one keeps the rows apart) and compare sorted ends; nothing loops over rows and nothing builds rows ×
keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .errors import LayoutError


@dataclass(frozen=True, eq=False)
class Runs:
    """Sorted, disjoint, non-adjacent, non-empty intervals [lo, hi) of keys for each of R rows.

    Attributes:
        offsets: (R + 1) int64; the runs of row r are offsets[r] .. offsets[r + 1].
        lo: (T) int64; first key of each run.
        hi: (T) int64; one past the last key of each run.
    """

    offsets: Tensor
    lo: Tensor
    hi: Tensor

    @property
    def num_rows(self) -> int:
        """R, the number of rows."""
        return self.offsets.numel() - 1

    @property
    def num_runs(self) -> int:
        """T, the number of runs over all rows."""
        return self.lo.numel()

    def counts(self) -> Tensor:
        """Runs of each row, (R) int64."""
        return self.offsets.diff()

    def row_of_run(self) -> Tensor:
        """The row of each run, (T) int64."""
        rows = torch.arange(self.num_rows, device=self.lo.device)
        return torch.repeat_interleave(rows, self.counts(), output_size=self.num_runs)

    def lengths(self) -> Tensor:
        """Kept keys of each row, (R) int64."""
        return self._sum_by_row(self.hi - self.lo)

    def nnz(self) -> int:
        """Kept keys of all rows together; synchronises."""
        return int((self.hi - self.lo).sum())

    def inside(self, first: int, last: int) -> Tensor:
        """Kept keys of each row within [first, last), (R) int64."""
        lo, hi = self.lo.clamp(first, last), self.hi.clamp(first, last)
        return self._sum_by_row(hi - lo)

    def among(self, keys: Tensor) -> Tensor:
        """How many of `keys` (sorted, unique, int64) each row keeps, (R) int64."""
        return self._sum_by_row(
            torch.searchsorted(keys, self.hi) - torch.searchsorted(keys, self.lo)
        )

    def expand(self) -> tuple[Tensor, Tensor]:
        """Every kept position as (offsets, columns), the arrays of CSR.

        Returns:
            offsets (R + 1) int64 and columns (nnz) int64, rising within each row.
        """
        run, step = ragged_arange(self.hi - self.lo)
        return prefix_sum(self.lengths()), self.lo[run] + step

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Every kept position as (row, column), both (nnz) int64, in C order."""
        run, step = ragged_arange(self.hi - self.lo)
        return self.row_of_run()[run], self.lo[run] + step

    def select(self, rows: Tensor) -> "Runs":
        """The runs of the given rows, in the order given; a row may be named more than once.

        Args:
            rows: (S) int64, 0 <= rows < R.
        """
        counts = self.counts()[rows]
        slot, step = ragged_arange(counts)
        source = self.offsets[rows][slot] + step
        return Runs(prefix_sum(counts), self.lo[source], self.hi[source])

    def validate(self, nk: int) -> None:
        """Raise LayoutError unless the class's promises hold for keys 0 .. nk - 1."""
        if self.offsets.numel() < 1 or int(self.offsets[0]) != 0:
            raise LayoutError("Runs: offsets must start with 0; build it with from_intervals")
        if int(self.offsets[-1]) != self.num_runs or bool((self.counts() < 0).any()):
            raise LayoutError(f"Runs: offsets must rise to the number of runs, {self.num_runs}")
        line_lo, line_hi = _on_line(self, nk)
        inside = (self.lo >= 0) & (self.hi <= nk) & (self.lo < self.hi)
        if not bool(inside.all()) or bool((line_lo[1:] <= line_hi[:-1]).any()):
            raise LayoutError(
                f"Runs: runs must be non-empty, sorted, non-adjacent and within [0, {nk}); "
                "build them with from_intervals"
            )

    def _sum_by_row(self, per_run: Tensor) -> Tensor:
        total = prefix_sum(per_run)
        return total[self.offsets[1:]] - total[self.offsets[:-1]]


def prefix_sum(counts: Tensor) -> Tensor:
    """Exclusive prefix sum with the total at the end: (n) int64 to (n + 1) int64."""
    total = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=total[1:])
    return total


def ragged_arange(counts: Tensor) -> tuple[Tensor, Tensor]:
    """0 .. counts[r] - 1 for every r, one after the other.

    Args:
        counts: (R) int64, not negative.

    Returns:
        row and step, both (counts.sum()) int64.
    """
    offsets = prefix_sum(counts)
    total = int(offsets[-1])
    rows = torch.arange(counts.numel(), device=counts.device)
    row = torch.repeat_interleave(rows, counts, output_size=total)
    return row, torch.arange(total, device=counts.device) - offsets[row]


def from_interval(lo: Tensor, hi: Tensor) -> Runs:
    """Runs of rows with at most one interval each; lo and hi (R) int64, lo == hi means empty."""
    kept = lo < hi
    return Runs(prefix_sum(kept), lo[kept], hi[kept])


def from_intervals(row: Tensor, lo: Tensor, hi: Tensor, num_rows: int, nk: int) -> Runs:
    """Runs covering any list of non-empty intervals; overlapping and adjacent ones merge.

    Args:
        row: (T) int64, the row of each interval.
        lo: (T) int64, first key.
        hi: (T) int64, one past the last key, lo < hi <= nk.
        num_rows: number of rows of the result.
        nk: number of keys.
    """
    base = row * (nk + 1)
    return _merge(base + lo, base + hi, num_rows, nk)


def from_sorted_pairs(row: Tensor, col: Tensor, num_rows: int) -> Runs:
    """Runs of kept positions given as (row, column) in C order without duplicates; (nnz) int64."""
    if not row.numel():
        return empty(num_rows, row.device)
    fresh = torch.ones(row.numel() + 1, dtype=torch.bool, device=row.device)
    fresh[1:-1] = (row[1:] != row[:-1]) | (col[1:] != col[:-1] + 1)
    # A run starts where its predecessor breaks off and ends where the next one starts.
    first = fresh[:-1]
    return Runs(_offsets(row[first], num_rows), col[first], col[fresh[1:]] + 1)


def from_mask(mask: Tensor) -> Runs:
    """Runs of a (rows, keys) bool matrix; its cost is the matrix."""
    edge = torch.zeros(mask.shape[0], mask.shape[1] + 1, dtype=torch.bool, device=mask.device)
    edge[:, 0] = mask[:, 0] if mask.shape[1] else False
    edge[:, 1:-1] = mask[:, 1:] & ~mask[:, :-1]
    row, lo = torch.nonzero(edge[:, :-1], as_tuple=True)
    edge[:, 0] = False
    edge[:, 1:-1] = mask[:, :-1] & ~mask[:, 1:]
    edge[:, -1] = mask[:, -1] if mask.shape[1] else False
    return Runs(_offsets(row, mask.shape[0]), lo, torch.nonzero(edge, as_tuple=True)[1])


def empty(num_rows: int, device: torch.device) -> Runs:
    """Rows that keep nothing."""
    none = torch.empty(0, dtype=torch.int64, device=device)
    return Runs(torch.zeros(num_rows + 1, dtype=torch.int64, device=device), none, none)


def repeated(lo: Tensor, hi: Tensor, num_rows: int) -> Runs:
    """The same runs, (t) int64 each, in every row."""
    offsets = torch.arange(num_rows + 1, device=lo.device) * lo.numel()
    return Runs(offsets, lo.repeat(num_rows), hi.repeat(num_rows))


def stacked(parts: Sequence[Runs]) -> Runs:
    """The rows of several Runs one after the other; at least one part."""
    ends = [part.num_runs for part in parts]
    offsets = [parts[0].offsets[:1]]
    for part, before in zip(parts, accumulate(ends, initial=0), strict=False):
        offsets.append(part.offsets[1:] + before)
    lo, hi = torch.cat([part.lo for part in parts]), torch.cat([part.hi for part in parts])
    return Runs(torch.cat(offsets), lo, hi)


def union(first: Runs, *others: Runs, nk: int) -> Runs:
    """Positions that any of several Runs over the same rows and nk keys keeps."""
    lines = [_on_line(runs, nk) for runs in (first, *others)]
    lo, hi = (torch.cat([line[end] for line in lines]) for end in (0, 1))
    return _merge(lo, hi, first.num_rows, nk)


def intersection(a: Runs, b: Runs, nk: int) -> Runs:
    """Positions that both of two Runs over the same rows and nk keys keep."""
    (a_lo, a_hi), (b_lo, b_hi) = _on_line(a, nk), _on_line(b, nk)
    lo, hi = torch.cat((a_lo, b_lo)).sort()[0], torch.cat((a_hi, b_hi)).sort()[0]
    index = torch.arange(lo.numel(), device=lo.device)
    # Two are open just after a start, or just before an end, exactly where both sets hold the key.
    starts = index + 1 - torch.searchsorted(hi, lo, right=True) == 2
    ends = torch.searchsorted(lo, hi) - index == 2
    return _off_line(lo[starts], hi[ends], a.num_rows, nk)


def complement(runs: Runs, nk: int) -> Runs:
    """Positions among nk keys that `runs` does not keep."""
    rows, device = runs.num_rows, runs.lo.device
    # A row of t runs has t + 1 gaps: 0 and the his are their starts, the los and nk their ends.
    slot = torch.arange(runs.num_runs, device=device) + runs.row_of_run()
    gap_lo = torch.zeros(runs.num_runs + rows, dtype=torch.int64, device=device)
    gap_hi = torch.full_like(gap_lo, nk)
    gap_lo[slot + 1] = runs.hi
    gap_hi[slot] = runs.lo
    kept = gap_lo < gap_hi
    offsets = runs.offsets + torch.arange(rows + 1, device=device)
    return Runs(prefix_sum(kept)[offsets], gap_lo[kept], gap_hi[kept])


def difference(a: Runs, b: Runs, nk: int) -> Runs:
    """Positions that `a` keeps and `b` does not, over the same rows and nk keys."""
    return intersection(a, complement(b, nk), nk)


def clip(runs: Runs, lo: Tensor, hi: Tensor) -> Runs:
    """Each row cut to its own interval, lo and hi (R) int64; no sort, unlike intersection."""
    row = runs.row_of_run()
    new_lo, new_hi = torch.maximum(runs.lo, lo[row]), torch.minimum(runs.hi, hi[row])
    kept = new_lo < new_hi
    return Runs(prefix_sum(kept)[runs.offsets], new_lo[kept], new_hi[kept])


def changes(runs: Runs, before: Runs, nk: int) -> tuple[Runs, Runs]:
    """What each row keeps that the row above it does not, and the reverse.

    Args:
        runs: R rows over nk keys.
        before: one row, the one above the first.
        nk: number of keys.

    Returns:
        Two Runs of R rows.
    """
    last = runs.offsets[-2] if runs.num_rows else runs.offsets[-1]
    shift = before.num_runs
    offsets = torch.cat((runs.offsets[:1], runs.offsets[:-1] + shift))
    lo, hi = torch.cat((before.lo, runs.lo[:last])), torch.cat((before.hi, runs.hi[:last]))
    above = Runs(offsets, lo, hi)
    return difference(runs, above, nk), difference(above, runs, nk)


def turned(runs: Runs, nk: int) -> Runs:
    """The transposed set: the rows that keep each of nk keys, as runs.

    A key's runs start and end where neighbouring rows differ, so it costs the runs of both sides,
    not the kept positions.
    """
    device = runs.lo.device
    # A row that keeps nothing ends what is still open.
    closed = Runs(torch.cat((runs.offsets, runs.offsets[-1:])), runs.lo, runs.hi)
    starts, ends = changes(closed, empty(1, device), nk)
    return paired(*starts.pairs(), *ends.pairs(), nk)


def paired(row: Tensor, col: Tensor, end_row: Tensor, end_col: Tensor, nk: int) -> Runs:
    """Runs over rows of each of nk keys, from the rows where they start and where they end.

    Args:
        row: (T) int64, rising for each key, where a run of key col starts.
        col: (T) int64.
        end_row: (T) int64, one past the last row of a run of key end_col.
        end_col: (T) int64, the same keys as col, each as often.
        nk: number of keys.
    """
    by_key, order = col.sort(stable=True)
    return Runs(_offsets(by_key, nk), row[order], end_row[end_col.sort(stable=True)[1]])


def _on_line(runs: Runs, nk: int) -> tuple[Tensor, Tensor]:
    base = runs.row_of_run() * (nk + 1)
    return base + runs.lo, base + runs.hi


def _off_line(lo: Tensor, hi: Tensor, num_rows: int, nk: int) -> Runs:
    row = lo // (nk + 1)
    base = row * (nk + 1)
    return Runs(_offsets(row, num_rows), lo - base, hi - base)


def _offsets(row: Tensor, num_rows: int) -> Tensor:
    """Offsets of sorted row numbers, (num_rows + 1) int64."""
    return torch.searchsorted(row, torch.arange(num_rows + 1, device=row.device))


def _merge(lo: Tensor, hi: Tensor, num_rows: int, nk: int) -> Runs:
    lo, hi = lo.sort()[0], hi.sort()[0]
    index = torch.arange(lo.numel(), device=lo.device)
    # The k-th start opens a merged run if all k earlier intervals ended strictly before it (an end
    # at the same key is adjacent, and merges); the k-th end closes one if no other interval has
    # started by then.
    opens = torch.searchsorted(hi, lo) == index
    closes = torch.searchsorted(lo, hi, right=True) == index + 1
    return _off_line(lo[opens], hi[closes], num_rows, nk)
