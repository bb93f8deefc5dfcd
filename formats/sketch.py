"""What a new pattern keeps, in the few terms a plan can be made from on the device.

The same decisions as ``split`` makes for "mixed" with blocks of 64, for the patterns where they
follow from the ends of intervals: blocks, and keys and queries that are shared. Whatever might
leave single entries or private panels is left to ``split``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .costs import Costs
from .pattern import UNBOUND, Cut, Frame, Pattern
from .pattern_algebra import And
from .split import cheaper_shared

# A unit is 64 queries × 64 keys, a line the units of 64 neighbouring queries.
UNIT = 64
# Intervals of a row, besides runs of keys that every row sees.
MOST_BANDS, MOST_KEY_RUNS = 4, 2

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
#: First members of runs, and one past the last ones.
Ends = tuple[Ints, Ints]


class Band(NamedTuple):
    """One interval of keys for every row, which may be empty and may overlap others.

    Attributes:
        cut: what it is at most.
        low: where row r begins at the least, at ``r >> shift``; None = the cut is all.
        high: where it ends at the most, one past the last key.
        shift: 0 = of every row, 6 = of every line.
        rows: the first rows of stretches, rising from 0 on, where low and high are of those.
    """

    cut: Cut
    low: Ints | None = None
    high: Ints | None = None
    shift: int = 0
    rows: Ints | None = None

    def at(self, rows: Ints) -> Ends:
        """Ends of the intervals of some rows; empty where they do not begin before they end."""
        low = np.maximum(rows + self.cut.left, self.cut.least)
        high = np.minimum(rows + self.cut.right, self.cut.most)
        if self.low is None or self.high is None:
            return low, high
        if self.rows is None:
            at = rows >> self.shift
        else:
            at = np.searchsorted(self.rows, rows, "right") - 1
        return np.maximum(low, self.low[at]), np.minimum(high, self.high[at])


class Sketch(NamedTuple):
    """A flat pattern: what is kept is in a band, a unit, a line or a column of units, or listed.

    Attributes:
        bands: intervals.
        units: (lines, key units), kept whole; or None.
        lines: (n, 2), ranges of lines that are kept whole.
        columns: (n, 2), ranges of key units, likewise.
        queries: rows that see every key, to be gathered, rising.
        keys: keys that all other rows see, to be gathered, rising.
    """

    bands: tuple[Band, ...]
    units: Bools | None
    lines: Ints
    columns: Ints
    queries: Ints
    keys: Ints


_NONE = np.zeros(0, np.int64)
_NO_RANGES = np.zeros((0, 2), np.int64)


def sketch(flat: Pattern, frame: Frame, costs: Costs, large: bool = False) -> Sketch | None:
    """A flat pattern in few terms; None where ``split`` has to decide.

    Args:
        flat: a flat pattern.
        frame: the rectangle, on the CPU.
        costs: rates.
        large: too large a rectangle to look at all of its units.

    Raises:
        LayoutError: a pattern of another fixed shape.
    """
    flat.check(frame)
    if not (frame.nq and frame.nk):
        return None
    found = flat.factor(frame)
    keys = found.keys.numpy()
    queries = keys if found.queries is found.keys else found.queries.numpy()
    core, listed = found.core, bool(len(queries) or len(keys))
    if core is not None and core.coarse(frame, UNIT):
        coarse = _coarse(core, frame, large)
        if coarse is None:
            return None
        bands, units = coarse
        lines = columns = _NO_RANGES
        if listed:
            runs = _runs(keys)
            rows = runs if queries is keys else _runs(queries)
            if not _even(rows, runs, frame):
                return None
            if _shared(None, queries, keys, frame, costs) != (False, False):
                return None
            lines, columns = _in_units(rows), _in_units(runs)
        return Sketch(bands, units, lines, columns, _NONE, _NONE)
    known = () if core is None else _bands(core, frame)
    if known is None or len(known) > MOST_BANDS:
        return None
    bands = known
    if not listed:
        return Sketch(bands, None, _NO_RANGES, _NO_RANGES, _NONE, _NONE)
    shared = _shared(bands, queries, keys, frame, costs)
    if shared is None:
        return None
    panel_keys, keys = (keys, _NONE) if shared[0] else (_NONE, keys)
    panel_queries, queries = (queries, _NONE) if shared[1] else (_NONE, queries)
    runs = _runs(keys)
    if len(runs[0]) > MOST_KEY_RUNS:
        return None
    rows = runs if queries is keys else _runs(queries)
    if (len(runs[0]) or len(rows[0])) and _whole(rows, runs, frame):
        return Sketch(
            bands + _strips(runs), None, _in_units(rows), _NO_RANGES, panel_queries, panel_keys
        )
    bands += _strips(runs)
    if len(rows[0]):
        # Rows of their own see everything.
        low, high = np.zeros(frame.nq, np.int64), np.zeros(frame.nq, np.int64)
        high[queries] = frame.nk
        bands += (Band(_whole_cut(frame), low, high),)
    return Sketch(bands, None, _NO_RANGES, _NO_RANGES, panel_queries, panel_keys)


def _strips(runs: Ends) -> tuple[Band, ...]:
    """Runs of keys that every row sees."""
    return tuple(
        Band(Cut(start, stop, -UNBOUND, UNBOUND))
        for start, stop in zip(*(e.tolist() for e in runs), strict=True)
    )


def _whole_cut(frame: Frame) -> Cut:
    return Cut(0, frame.nk, -UNBOUND, UNBOUND)


def _bands(core: Pattern, frame: Frame) -> tuple[Band, ...] | None:
    """Intervals of all rows, in numbers where those say it; None if they are not known at once."""
    found = core.cuts(frame)
    if found is not None:
        return tuple(Band(cut) for cut in found)
    cuts = [_whole_cut(frame)]
    if isinstance(core, And):
        # One term may be of any intervals.
        known = [(term, term.cuts(frame)) for term in core.terms]
        rest = [term for term, some in known if some is None]
        if len(rest) == 1:
            (core,) = rest
            for _, some in known:
                cuts = cuts if some is None else [a.meet(b) for a in cuts for b in some]
    stretches = core.stretches(frame)
    if stretches is not None:
        first, low, high = (ends.numpy() for ends in stretches)
        return tuple(Band(cut, low, high, rows=first) for cut in cuts)
    ends = core.bands(frame)
    if ends is None:
        return None
    return tuple(Band(cut, low.numpy(), high.numpy()) for cut in cuts for low, high in ends)


def _coarse(
    core: Pattern, frame: Frame, large: bool
) -> tuple[tuple[Band, ...], Bools | None] | None:
    """A pattern of whole units: an interval of every line if that is all, else its units.

    None where those are too many.
    """
    known = None if large else core.block_mask(frame, UNIT)
    if known is not None:
        return (), known.cpu().numpy()
    first = torch.arange(0, frame.nq, UNIT)
    ends = core.interval(frame, first)
    if ends is not None:
        return (Band(_whole_cut(frame), ends[0].numpy(), ends[1].numpy(), 6),), None
    if large:
        return None
    runs = core.runs(frame, first)
    line = np.repeat(np.arange(runs.num_rows), np.diff(runs.offsets.numpy()))
    edges = np.zeros((len(first), -(-frame.nk // UNIT) + 1), np.int8)
    np.add.at(edges, (line, runs.lo.numpy() >> 6), 1)
    np.add.at(edges, (line, (runs.hi.numpy() + UNIT - 1) >> 6), -1)
    return (), edges.cumsum(1, np.int8)[:, :-1] > 0


def _runs(members: Ints) -> Ends:
    """Ends of the runs of rising numbers."""
    if not len(members):
        return members, members
    if members[-1] - members[0] == len(members) - 1:
        return members[:1], members[-1:] + 1
    fresh = np.ones(len(members) + 1, bool)
    fresh[1:-1] = members[1:] != members[:-1] + 1
    return members[fresh[:-1]], members[fresh[1:]] + 1


def _in_units(ends: Ends) -> Ints:
    """(n, 2): runs of rows or keys that are whole units, as ranges of those."""
    units = np.empty((len(ends[0]), 2), np.int64)
    units[:, 0], units[:, 1] = ends[0] >> 6, (ends[1] + (UNIT - 1)) >> 6
    return units


def _even(rows: Ends, columns: Ends, frame: Frame) -> bool:
    """Whether runs of rows and columns end with units, or with the matrix."""
    (first, last), (start, stop) = rows, columns
    edges = (*start.tolist(), *first.tolist())
    if any(edge % UNIT for edge in edges):
        return False
    pairs = ((stop, frame.nk), (last, frame.nq))
    return not any(edge % UNIT and edge < end for ends, end in pairs for edge in ends.tolist())


def _whole(rows: Ends, columns: Ends, frame: Frame) -> bool:
    """Whether runs of rows and columns are whole units, none of which hangs over an edge."""
    if frame.nq % UNIT or not _even(rows, columns, frame):
        return False
    return not frame.nk % UNIT or not (len(rows[0]) or (columns[1] == frame.nk).any())


def _places(members: Ints) -> Ints:
    """The units of rising numbers."""
    units = members >> 6
    if len(units) and units[0] == units[-1]:
        return units[:1]
    fresh = np.ones(len(units), bool)
    np.not_equal(units[1:], units[:-1], out=fresh[1:])
    return units[fresh]


def _shared(
    bands: tuple[Band, ...] | None, queries: Ints, keys: Ints, frame: Frame, costs: Costs
) -> tuple[bool, bool] | None:
    """Whether keys, and queries, become panels; None where that depends on more than one band.

    Without bands, only whether they may be panels at all: nothing of them is there already.
    """
    if bands is not None and len(bands) > 1:
        return None
    columns = _places(keys)
    rows = columns if queries is keys else _places(queries)
    covered = _covered(bands[0], rows, columns, frame) if bands else (0.0, 0.0)
    members, places = (len(keys), len(queries)), (len(columns), len(rows))
    return cheaper_shared(members, places, covered, frame, UNIT, costs)


def _covered(band: Band, rows: Ints, columns: Ints, frame: Frame) -> tuple[float, float]:
    """The part of some key units that the first rows of lines touch; of all, those of some lines.

    A sample: of every 32nd line or so.
    """
    lines, wide = -(-frame.nq // UNIT), -(-frame.nk // UNIT)
    sample = np.arange(0, lines, max(1, lines // 32))
    some = rows[:: max(1, len(rows) // 32)]
    low, high = band.at(np.concatenate((sample, some)) * UNIT)
    high = np.where(low < high, high + (UNIT - 1), low)
    first, last, count = low >> 6, high >> 6, len(sample)
    queries = int((last[count:] - first[count:]).sum()) / max(1, len(some) * wide)
    here = columns.searchsorted(last[:count]) - columns.searchsorted(first[:count])
    return min(1.0, int(here.sum()) / max(1, count * len(columns))), min(1.0, queries)
