"""What a pattern costs to lay out and to count, found by looking at a few of its rows.

Nothing here grows with queries × keys. Rows are chosen in strata by a fixed hash, so the same
question has the same answer; rows that the pattern names one by one (global queries) are looked at
apart from the others, which they do not resemble.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mixgrain.formats.draw import uniform
from mixgrain.formats.errors import LayoutError
from mixgrain.formats.pattern import Frame, Pattern
from mixgrain.formats.pattern_nm import NM
from mixgrain.formats.pattern_queries import chunked_runs
from mixgrain.formats.pattern_static import Full, Globals

from .cells import Cell, grid, run_cells

# Runs that are worth a second or two, and memory for a fraction of them.
MOST_RUNS = 1 << 23
MOST_BLOCKS = 1 << 22
MOST_PANEL = 1 << 27
# Counting asks less of each run than a layout, drawing a sample of them more.
MOST_COUNTED = 1 << 25
MOST_SAMPLED = 1 << 21
RUNS_PER_CHUNK = 1 << 19
PILOT_ROWS, LONG_ROW = 16, 1 << 17
SEED = 20


@dataclass(frozen=True)
class Survey:
    """What to expect of a flat pattern in a rectangle.

    Attributes:
        runs: about how many intervals of keys it has in all.
        core_runs: the same without tokens that are listed as global, which cost nothing.
        kept: kept pairs; exact if `exact`, else an estimate.
        exact: whether `kept` was counted.
        blocks: about how many blocks its layout would hold.
        panel: about how many pairs global tokens keep.
    """

    runs: float
    core_runs: float
    kept: int
    exact: bool
    blocks: float
    panel: int

    @property
    def affordable(self) -> bool:
        """Whether a layout takes seconds and memory to match, not minutes."""
        return (
            self.core_runs <= MOST_RUNS and self.blocks <= MOST_BLOCKS and self.panel <= MOST_PANEL
        )


def static_part(pattern: Pattern) -> Pattern:
    """The pattern itself, or for N:M the one it chooses within."""
    if isinstance(pattern, NM):
        return Full() if pattern.within is None else pattern.within
    return pattern


def survey(pattern: Pattern, nq: int, nk: int, size: int = 64) -> Survey:
    """Looks at a flat pattern in nq × nk, for blocks of `size`.

    Raises:
        LayoutError: the pattern has a fixed shape other than (nq, nk).
    """
    frame = Frame(nq, nk, pattern.device)
    static = static_part(pattern)
    factored = static.factor(frame)
    runs, kept = _expected(static, frame)
    core_runs, core_kept = (0.0, 0.0)
    if factored.core is static:
        core_runs, core_kept = runs, kept
    elif factored.core is not None:
        core_runs, core_kept = _expected(factored.core, frame)
    exact = core_runs <= MOST_COUNTED
    if exact:
        kept = pattern.nnz(nq, nk)
    elif isinstance(pattern, NM):
        kept = kept * pattern.n / pattern.m
    return Survey(
        runs=runs,
        core_runs=core_runs,
        kept=round(kept),
        exact=exact,
        blocks=core_kept / size**2 + 2 * core_runs / size,
        panel=factored.queries.numel() * nk + factored.keys.numel() * nq,
    )


def check_affordable(pattern: Pattern, nq: int, nk: int) -> None:
    """Raises LayoutError if a layout of the pattern would take minutes or all memory."""
    for flat in pattern.distinct:
        found = survey(flat, nq, nk)
        if found.core_runs > MOST_RUNS or found.blocks > MOST_BLOCKS:
            raise LayoutError(
                f"{flat}: keeps {'' if found.exact else 'about '}{found.kept:,} of {nq:,} × {nk:,} "
                f"pairs, in some {found.core_runs:.2g} runs and {found.blocks:.2g} blocks of 64; at"
                f" most {MOST_RUNS:,} and {MOST_BLOCKS:,} can be planned here: ask for fewer "
                "queries and keys"
            )


def sampled_cells(
    pattern: Pattern, nq: int, nk: int, cell: Cell, runs: float
) -> tuple[Tensor, bool]:
    """Kept pairs in cells, float64 (rows, columns), and whether every row was counted.

    Args:
        pattern: a flat one.
        nq: number of queries.
        nk: number of keys.
        cell: rows and columns of a cell.
        runs: about how many runs the pattern has in all.
    """
    frame = Frame(nq, nk, pattern.device)
    down, across = grid((nq, nk), cell)
    total = torch.zeros(down, across, dtype=torch.float64)
    share = min(1.0, MOST_SAMPLED / max(runs, 1.0))
    each = max(1, int(cell[0] * share))
    whole = share == 1.0
    bounds = (torch.arange(down + 1) * cell[0]).clamp(max=nq)
    for members in _classes(pattern, frame):
        rows, weight = stratified(members, bounds, cell[0] if whole else each)
        done = 0
        for chunk, found in chunked_runs(pattern, frame, rows, RUNS_PER_CHUNK):
            part = weight[done : done + chunk.numel()]
            total += run_cells(found, chunk, part, nk, cell, down)
            done += chunk.numel()
    return total, whole


def strata_for(nq: int, runs: float) -> int:
    """Rows of a cell such that one row of each costs no more than a few times MOST_SAMPLED."""
    per_row = max(1.0, runs / max(1, nq))
    strata = max(16, int(4 * MOST_SAMPLED / per_row))
    return 1 << (max(1, -(-nq // strata)) - 1).bit_length()


@dataclass(frozen=True)
class Members:
    """Rows that are alike, without a list of them where they are nearly all.

    Attributes:
        listed: int64 (K,), rising.
        nq: rows in all.
        others: the rows meant are those not listed.
    """

    listed: Tensor
    nq: int
    others: bool

    @property
    def count(self) -> int:
        """How many rows."""
        return self.nq - self.listed.numel() if self.others else self.listed.numel()

    def before(self, rows: Tensor) -> Tensor:
        """How many members lie before each row."""
        listed = torch.searchsorted(self.listed, rows)
        return rows - listed if self.others else listed

    def at(self, index: Tensor) -> Tensor:
        """The rows that members are, by their number."""
        if not self.others:
            return self.listed[index]
        skipped = self.listed - torch.arange(self.listed.numel())
        return index + torch.searchsorted(skipped, index, right=True)


def stratified(members: Members, bounds: Tensor, each: int) -> tuple[Tensor, Tensor]:
    """About `each` of the members in every stratum, and how many rows each stands for.

    Args:
        members: what to choose from.
        bounds: int64 (S + 1,), rising: the first row of each stratum, and the end.
        each: at most so many of a stratum are chosen.

    Returns:
        int64 (R,) rising and float64 (R,), whose sum is the number of members.
    """
    first = members.before(bounds)
    first, counts = first[:-1], first.diff()
    taken = counts.clamp(max=each)
    # Each stratum is cut into `taken` pieces of nearly equal length, and each gives one row.
    owner = torch.repeat_interleave(torch.arange(counts.numel()), taken)
    k = torch.arange(owner.numel()) - (torch.cumsum(taken, 0) - taken)[owner]
    low = k * counts[owner] // taken[owner]
    length = (k + 1) * counts[owner] // taken[owner] - low
    step = (uniform(SEED, torch.arange(owner.numel()), 0) * length).long()
    return members.at(first[owner] + low + step), length.double()


def _classes(pattern: Pattern, frame: Frame) -> list[Members]:
    """All rows in two classes: those that global tokens name one by one, and the others."""
    none = torch.empty(0, dtype=torch.int64)
    listed = torch.unique(torch.cat([none, *(g.factor(frame).queries for g in _globals(pattern))]))
    both = (Members(listed, frame.nq, others=False), Members(listed, frame.nq, others=True))
    return [members for members in both if members.count]


def _globals(value: object) -> list[Globals]:
    if isinstance(value, Globals):
        return [value]
    if isinstance(value, Pattern):
        value = tuple(getattr(value, field.name) for field in fields(value))
    return [g for one in value for g in _globals(one)] if isinstance(value, tuple) else []


def _expected(pattern: Pattern, frame: Frame) -> tuple[float, float]:
    """About how many runs and kept pairs a flat pattern has, from a few rows."""
    runs = kept = 0.0
    # Where rows may be long, fewer of them say enough.
    look = PILOT_ROWS if pattern.runs_bound(frame) <= LONG_ROW else PILOT_ROWS // 4
    for members in _classes(pattern, frame):
        rows, _ = stratified(members, torch.tensor([0, frame.nq]), look)
        for chunk, found in chunked_runs(pattern, frame, rows):
            scale = members.count / rows.numel()
            runs += max(found.num_runs, chunk.numel()) * scale
            kept += found.nnz() * scale
    return runs, kept
