"""The split of a new pattern on the host, from runs of units; see ``units``.

The same decisions as ``split`` makes for "mixed" with blocks of 64, for the patterns where they
follow from the ends of intervals: blocks, and keys and queries that are shared. Whatever might
leave single entries or private panels is left to ``split``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .bands import Bands, banded_units, bands_of
from .costs import Costs
from .leftovers import sparse_limit
from .pattern import Frame, Pattern
from .split import cheaper_shared
from .units import (
    UNIT,
    Ends,
    Ints,
    Joined,
    Units,
    coarse_runs,
    coarse_units,
    ones,
    sorted_unique,
    with_joined,
)

# Runs of keys that every row sees, as blocks.
MOST_KEY_RUNS = 2


class Split(NamedTuple):
    """A flat pattern, split.

    Attributes:
        units: the blocks.
        queries: rows of the panel over all keys, rising.
        keys: columns of the panel for all other rows, rising.
    """

    units: Units
    queries: Ints
    keys: Ints


def split_directly(flat: Pattern, frame: Frame, costs: Costs) -> Split | None:
    """Blocks of 64 and shared panels of a flat pattern; None where ``split`` has to decide.

    Args:
        flat: a flat pattern; its tensors lie on the CPU.
        frame: the rectangle, on the CPU.
        costs: rates.
    """
    flat.check(frame)
    if not (frame.nq and frame.nk):
        return None
    found = flat.factor(frame)
    queries, keys = found.queries.numpy(), found.keys.numpy()
    if found.core is not None and found.core.coarse(frame, UNIT):
        return _coarse(found.core, queries, keys, frame, costs)
    lines = -(-frame.nq // UNIT)
    nothing = np.zeros((1, lines, UNIT), np.int64)
    bands: Bands | None = Bands(nothing, nothing)
    if found.core is not None:
        bands = bands_of(found.core, frame)
    if bands is None:
        return None
    shared = _shared(bands, queries, keys, frame, costs)
    if shared is None:
        return None
    panel_keys = keys if shared[0] else keys[:0]
    panel_queries = queries if shared[1] else queries[:0]
    start, stop = _runs(keys[len(panel_keys) :])
    if len(start) > MOST_KEY_RUNS:
        return None
    lo, hi = bands
    rows = _runs(queries[len(panel_queries) :])
    if (len(start) or len(rows[0])) and _whole(rows, (start, stop), frame):
        joined: Joined | None = Joined(rows, (start, stop))
        start, queries = start[:0], panel_queries
    else:
        joined = None
    if len(start):
        ends = np.empty((2, len(start), lines * UNIT), np.int64)
        ends[0], ends[1] = start[:, None], stop[:, None]
        ends[0, :, frame.nq :] = stop[:, None]
        more = ends.reshape(2, -1, lines, UNIT)
        lo, hi = np.concatenate([lo, more[0]]), np.concatenate([hi, more[1]])
    if len(queries):
        lo, hi = lo.copy(), hi.copy()
        for band, (starts, ends) in enumerate(zip(lo, hi, strict=True)):
            starts.reshape(-1)[queries] = 0
            ends.reshape(-1)[queries] = 0 if band or len(panel_queries) else frame.nk
    units = banded_units(Bands(lo, hi), _bits(panel_keys), joined, frame)
    if units is None or not _plain(units, costs):
        return None
    return Split(units, panel_queries, panel_keys)


def _coarse(core: Pattern, queries: Ints, keys: Ints, frame: Frame, costs: Costs) -> Split | None:
    """Whole units; keys and queries only where they are whole units, too."""
    runs = coarse_runs(core, frame)
    if len(queries) or len(keys):
        joined = Joined(_runs(queries), _runs(keys))
        edges = _edges(*joined, frame)
        if (edges % UNIT).any() or _shared(None, queries, keys, frame, costs) != (False, False):
            return None
        runs = with_joined(runs, joined, frame)
    units = coarse_units(runs, frame)
    # Positions of an edge may be too few for a block.
    return Split(units, queries[:0], keys[:0]) if _plain(units, costs) else None


def _edges(rows: Ends, columns: Ends, frame: Frame) -> Ints:
    """Ends of runs of rows and columns that are no edge of the matrix."""
    (first, last), (start, stop) = rows, columns
    return np.concatenate([start, stop[stop < frame.nk], first, last[last < frame.nq]])


def _whole(rows: Ends, columns: Ends, frame: Frame) -> bool:
    """Whether runs of rows and columns are whole units, none of which hangs over an edge."""
    if frame.nq % UNIT or (_edges(rows, columns, frame) % UNIT).any():
        return False
    return not frame.nk % UNIT or not (len(rows[0]) or (columns[1] == frame.nk).any())


def _runs(members: Ints) -> tuple[Ints, Ints]:
    """Ends of the runs of rising numbers."""
    if not len(members):
        return members, members
    fresh = np.ones(len(members) + 1, bool)
    fresh[1:-1] = members[1:] != members[:-1] + 1
    return members[fresh[:-1]], members[fresh[1:]] + 1


def _bits(keys: Ints) -> dict[int, int]:
    """Words of some columns by key unit."""
    bits: dict[int, int] = {}
    for key in keys.tolist():
        bits[key >> 6] = bits.get(key >> 6, 0) | 1 << (key & 63)
    return bits


def _shared(
    bands: Bands | None, queries: Ints, keys: Ints, frame: Frame, costs: Costs
) -> tuple[bool, bool] | None:
    """Whether keys, and queries, become panels; None where that depends on more than one band.

    Without bands, only whether they may be panels at all: nothing of them is there already.
    """
    if not (len(keys) or len(queries)):
        return False, False
    columns, rows = sorted_unique(keys >> 6), sorted_unique(queries >> 6)
    covered = 0.0, 0.0
    if bands is not None:
        if len(bands.lo) > 1:
            return None
        lines = -(-frame.nq // UNIT)
        sample = np.arange(0, lines, max(1, lines // 32))
        some = rows[:: max(1, len(rows) // 32)]
        everything = np.arange(-(-frame.nk // UNIT))
        covered = _covered(bands, sample, columns), _covered(bands, some, everything)
    members, places = (len(keys), len(queries)), (len(columns), len(rows))
    return cheaper_shared(members, places, covered, frame, UNIT, costs)


def _covered(bands: Bands, lines: Ints, columns: Ints) -> float:
    """The part of some key units that the first rows of some lines touch."""
    if not len(lines) or not len(columns):
        return 0.0
    lo, hi = bands.lo[0, lines, 0], bands.hi[0, lines, 0]
    low = np.searchsorted(columns, lo >> 6)
    high = np.searchsorted(columns, (hi - 1) >> 6, "right")
    touched = int(np.where(lo < hi, high - low, 0).sum())
    return min(1.0, touched / (len(lines) * len(columns)))


def _plain(units: Units, costs: Costs) -> bool:
    """Whether nothing could be saved by taking sparse units apart."""
    cut = units.mask[units.mask >= 0]
    times = np.bincount(cut, minlength=len(units.words))
    block, most = costs.block_seconds(UNIT), sparse_limit(UNIT, costs)
    if not len(cut) or len(cut) * block < costs.launch_seconds:
        return True
    kept = ones(units.words).sum(1)
    columns = ones(np.bitwise_or.reduce(units.words, 1))
    few = columns * costs.private_column_seconds(UNIT) <= block / 2
    light = (kept <= most) | few
    return int(times[light].sum()) * block < costs.launch_seconds
