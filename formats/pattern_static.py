"""Patterns given by a formula in positions: window, dilated, globals, documents and others."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import LayoutError
from .pattern import UNBOUND, Cut, Factored, Frame, Interval, Pattern
from .runs import Runs, empty, from_interval, ragged_arange, repeated
from .source import Source, sorted_positions

# Stands for an unbounded radius: beyond every position, and no sum with one overflows.
UNBOUNDED = 1 << 62


@dataclass(frozen=True, eq=False, repr=False)
class Full(Pattern):
    """Every pair."""

    def interval(self, frame: Frame, rows: Tensor) -> Interval:
        return torch.zeros_like(rows), torch.full_like(rows, frame.nk)

    def cuts(self, frame: Frame) -> list[Cut]:
        return [Cut(0, frame.nk, -UNBOUND, UNBOUND)]

    def coarse(self, frame: Frame, size: int) -> bool:
        return True

    def __repr__(self) -> str:
        return "full()"


@dataclass(frozen=True, eq=False, repr=False)
class Causal(Pattern):
    """Keys up to the query's own position."""

    def interval(self, frame: Frame, rows: Tensor) -> Interval:
        return torch.zeros_like(rows), (rows + (frame.shift + 1)).clamp_(0, frame.nk)

    def cuts(self, frame: Frame) -> list[Cut]:
        return [Cut(0, frame.nk, -UNBOUND, frame.shift + 1)]

    def __repr__(self) -> str:
        return "causal()"


@dataclass(frozen=True, eq=False, repr=False)
class Window(Pattern):
    """Keys from `left` before to `right` after the query's position, both included."""

    left: int
    right: int

    def interval(self, frame: Frame, rows: Tensor) -> Interval:
        lo = (rows + (frame.shift - self.left)).clamp_(0, frame.nk)
        hi = (rows + (frame.shift + self.right + 1)).clamp_(0, frame.nk)
        return lo, hi

    def cuts(self, frame: Frame) -> list[Cut]:
        left = max(frame.shift - self.left, -UNBOUND)
        return [Cut(0, frame.nk, left, min(frame.shift + self.right + 1, UNBOUND))]

    def __repr__(self) -> str:
        sides = [radius_text(self.left), radius_text(self.right)]
        return f"window({', '.join(sides[:1] if self.left == self.right else sides)})"


@dataclass(frozen=True, eq=False, repr=False)
class BlockWindow(Pattern):
    """Blocks of `size` keys at most `radius` blocks away from the query's own block."""

    size: int
    radius: int

    def coarse(self, frame: Frame, size: int) -> bool:
        return self.size % size == 0 and frame.shift % self.size == 0

    def interval(self, frame: Frame, rows: Tensor) -> Interval:
        own = (rows + frame.shift) // self.size
        # Bounds the products below whatever the radius; no block lies further off than this.
        radius = min(self.radius, (frame.nq + frame.nk) // self.size + 1)
        lo = ((own - radius) * self.size).clamp_(0, frame.nk)
        return lo, ((own + radius + 1) * self.size).clamp_(0, frame.nk)

    def __repr__(self) -> str:
        return f"block_window({self.size}, {self.radius})"


@dataclass(frozen=True, eq=False, repr=False)
class Dilated(Pattern):
    """The own position and `radius` keys on each side of it, `step` apart."""

    radius: int
    step: int

    def runs(self, frame: Frame, rows: Tensor) -> Runs:
        found = self.interval(frame, rows)
        if found is not None:
            return from_interval(*found)
        at = rows + frame.shift
        first = (-(at // self.step)).clamp_(-self.radius, self.radius + 1)
        last = ((frame.nk - 1 - at) // self.step).clamp_(-self.radius - 1, self.radius)
        counts = (last - first + 1).clamp_(min=0)
        row, k = ragged_arange(counts)
        lo = at[row] + (first[row] + k) * self.step
        offsets = torch.zeros(rows.numel() + 1, dtype=torch.int64, device=rows.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        return Runs(offsets, lo, lo + 1)

    def interval(self, frame: Frame, rows: Tensor) -> Interval | None:
        if self.step > 1 and self.radius > 0:
            return None
        return Window(self.radius, self.radius).interval(frame, rows)

    def runs_bound(self, frame: Frame) -> int:
        return min(2 * self.radius, frame.nk // self.step) + 1

    def __repr__(self) -> str:
        return f"dilated({radius_text(self.radius)}, {self.step})"


@dataclass(frozen=True, eq=False, repr=False)
class Globals(Pattern):
    """Listed positions as queries that see every key, as keys that every query sees, or both."""

    positions: Source
    as_queries: bool
    as_keys: bool

    def runs(self, frame: Frame, rows: Tensor) -> Runs:
        keys = self._keys(frame)
        # A listed row is one run of all keys; every other one is the list of keys.
        shared = _key_runs(keys)
        listed = self._listed(frame, rows)
        if not bool(listed.any()):
            return repeated(*shared, rows.numel())
        full = torch.tensor([[0], [frame.nk]], device=rows.device)[:, : min(frame.nk, 1)]
        lo, hi = (torch.cat(ends) for ends in zip(shared, full, strict=True))
        table = Runs(torch.tensor([0, len(shared[0]), len(lo)], device=rows.device), lo, hi)
        return table.select(listed.long())

    def interval(self, frame: Frame, rows: Tensor) -> Interval | None:
        keys = self._keys(frame)
        count = keys.numel()
        if count and int(keys[-1]) - int(keys[0]) != count - 1:
            return None
        first = int(keys[0]) if count else 0
        listed = self._listed(frame, rows)
        return torch.where(listed, 0, first), torch.where(listed, frame.nk, first + count)

    def factor(self, frame: Frame) -> Factored:
        keys = self._keys(frame)
        same = self.as_queries and self.as_keys and frame.nq == frame.nk
        return Factored(None, keys if same else self._queries(frame), keys)

    def runs_bound(self, frame: Frame) -> int:
        return max(1, self.positions.tensor.numel() if self.as_keys else 1)

    def _sorted(self, frame: Frame) -> Tensor:
        return sorted_positions(self.positions, frame.device, self)

    def _keys(self, frame: Frame) -> Tensor:
        keys = self._sorted(frame)
        return _between(keys, 0, frame.nk) if self.as_keys else keys[:0]

    def _queries(self, frame: Frame) -> Tensor:
        if not self.as_queries:
            return self._sorted(frame)[:0]
        return _between(self._sorted(frame) - frame.shift, 0, frame.nq)

    def _listed(self, frame: Frame, rows: Tensor) -> Tensor:
        queries = self._queries(frame)
        if not queries.numel():
            return torch.zeros_like(rows, dtype=torch.bool)
        slot = torch.searchsorted(queries, rows.contiguous()).clamp_(max=queries.numel() - 1)
        return queries[slot] == rows

    def __repr__(self) -> str:
        role = {(True, True): "tokens", (True, False): "queries", (False, True): "keys"}
        return f"global_{role[self.as_queries, self.as_keys]}({source_text(self.positions)})"


@dataclass(frozen=True, eq=False, repr=False)
class Sinks(Pattern):
    """The first `n` keys for every row."""

    n: int

    def interval(self, frame: Frame, rows: Tensor) -> Interval:
        return torch.zeros_like(rows), torch.full_like(rows, min(self.n, frame.nk))

    def cuts(self, frame: Frame) -> list[Cut]:
        return [Cut(0, min(self.n, frame.nk), -UNBOUND, UNBOUND)]

    def factor(self, frame: Frame) -> Factored:
        keys = torch.arange(min(self.n, frame.nk), device=frame.device)
        return Factored(None, keys[:0], keys)

    def __repr__(self) -> str:
        return f"sinks({self.n})"


@dataclass(frozen=True, eq=False)
class _Groups:
    """Positions by document: `of` (N) int64 numbers the documents, `runs` lists their positions.

    The last row of `runs` is empty: queries outside every document use it.
    """

    of: Tensor
    runs: Runs


@dataclass(frozen=True, eq=False, repr=False)
class Documents(Pattern):
    """Pairs of positions with equal ids."""

    ids: Source

    def check(self, frame: Frame) -> None:
        given = self.ids.tensor.numel()
        if given != frame.nk:
            raise LayoutError(
                f"documents: {given} ids given for {frame.nk} keys; give one id per key "
                "(a query takes the id at its position)"
            )

    def runs(self, frame: Frame, rows: Tensor) -> Runs:
        self.check(frame)
        if not frame.nk:
            return empty(rows.numel(), rows.device)
        groups = self._groups(frame)
        return groups.runs.select(self._of(groups, frame, rows))

    def interval(self, frame: Frame, rows: Tensor) -> Interval | None:
        self.check(frame)
        if not frame.nk:
            return rows * 0, rows * 0
        groups = self._groups(frame)
        if groups.runs.num_runs != groups.runs.num_rows - 1:
            return None
        of = self._of(groups, frame, rows)
        none = torch.zeros(1, dtype=torch.int64, device=rows.device)
        return torch.cat((groups.runs.lo, none))[of], torch.cat((groups.runs.hi, none))[of]

    def stretches(self, frame: Frame) -> tuple[Tensor, Tensor, Tensor] | None:
        self.check(frame)
        if frame.device.type != "cpu" or not frame.nk:
            return None
        edges = self.ids.derive("edges", frame.device, _document_edges)
        if edges is None:
            return None
        if not frame.shift:
            return edges[:-1], edges[:-1], edges[1:]
        # Documents that end before the first query; queries before the first position.
        begun = edges[max(0, int((edges <= frame.shift).sum()) - 1) :]
        rows, lo, hi = (begun[:-1] - frame.shift).clamp_(min=0), begun[:-1], begun[1:]
        if frame.shift > 0:
            return rows, lo, hi
        rows, lo, hi = (torch.nn.functional.pad(end, (1, 0)) for end in (rows, lo, hi))
        return rows, lo, hi

    def runs_bound(self, frame: Frame) -> int:
        return max(1, (frame.nk + 1) // 2)

    def _groups(self, frame: Frame) -> _Groups:
        return self.ids.derive("groups", frame.device, _groups)

    def _of(self, groups: _Groups, frame: Frame, rows: Tensor) -> Tensor:
        at = rows + frame.shift
        return torch.where(at < 0, groups.runs.num_rows - 1, groups.of[at.clamp(min=0)])

    def __repr__(self) -> str:
        return f"documents({source_text(self.ids)})"


def _groups(ids: Tensor) -> _Groups:
    # Documents are few and long: what is sorted is the stretches of equal ids, not the ids.
    change = torch.ones(ids.numel() + 1, dtype=torch.bool, device=ids.device)
    change[1:-1] = ids[1:] != ids[:-1]
    edges = torch.nonzero(change).flatten()
    lo, hi = edges[:-1], edges[1:]
    unique, group = torch.unique(ids[lo], return_inverse=True)
    order = torch.argsort(group, stable=True)
    rows = torch.arange(unique.numel() + 2, device=ids.device)
    offsets = torch.searchsorted(group[order], rows)
    return _Groups(torch.repeat_interleave(group, hi - lo), Runs(offsets, lo[order], hi[order]))


def _document_edges(ids: Tensor) -> Tensor | None:
    """Where each document begins, and the last one ends; None if one is in pieces.

    On the host, where numpy does such things at a fraction of the cost.
    """
    plain = ids.numpy()
    inner = (plain[1:] != plain[:-1]).nonzero()[0]
    edges = np.concatenate(([0], inner + 1, [len(plain)]))
    first = plain[edges[:-1]]
    if not (first[1:] > first[:-1]).all() and len(np.unique(first)) < len(first):
        return None
    return torch.from_numpy(edges)


def _between(rising: Tensor, least: int, end: int) -> Tensor:
    """The members of a rising list from ``least`` up to ``end``."""
    if rising.device.type == "cpu":  # where numpy is quicker
        plain = rising.numpy()
        if not len(plain) or (plain[0] >= least and plain[-1] < end):
            return rising
        first, last = np.searchsorted(plain, (least, end)).tolist()
        return rising[first:last]
    return rising[(rising >= least) & (rising < end)]


def _key_runs(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of the runs of sorted unique keys."""
    if not keys.numel():
        return keys, keys
    fresh = torch.ones(keys.numel() + 1, dtype=torch.bool, device=keys.device)
    fresh[1:-1] = keys[1:] != keys[:-1] + 1
    return keys[fresh[:-1]], keys[fresh[1:]] + 1


def radius_text(radius: int) -> str:
    """A radius as the caller wrote it."""
    return "inf" if radius >= UNBOUNDED else str(radius)


def source_text(source: Source) -> str:
    """A 1-D CPU source as a list, the middle left out; anything else by its shape and device."""
    tensor = source.tensor
    if tensor.device.type != "cpu" or tensor.ndim != 1:
        return f"<{tuple(tensor.shape)} on {tensor.device}>"
    if tensor.numel() <= 8:
        return str(tensor.tolist())
    ends = [*map(str, tensor[:3].tolist()), "…", str(int(tensor[-1]))]
    return f"[{', '.join(ends)}; {tensor.numel()} in all]"
