"""Patterns that are a few intervals of keys for each row, as runs of units.

Windows, documents, sinks and what ``&`` and ``|`` make of them: the units of a line are a few runs,
which follow from the ends of its rows' intervals. Nothing here costs time for each unit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .pattern import Frame, Pattern
from .units import (
    KEY_BITS,
    UNIT,
    Bools,
    Ints,
    Joined,
    Units,
    Words,
    distinct,
    kinds,
    low_bits,
    numbered,
    ordered,
    ragged,
    sorted_unique,
    with_joined,
)

# Partial units that are worth listing here.
MOST_PARTIAL = 1 << 14
# Intervals of a row.
MOST_BANDS = 4


class Bands(NamedTuple):
    """Intervals of all rows, padded to whole lines; they may overlap.

    Attributes:
        lo: (K, lines, 64).
        hi: (K, lines, 64); lo == hi where nothing is kept.
    """

    lo: Ints
    hi: Ints


def bands_of(core: Pattern, frame: Frame) -> Bands | None:
    """The intervals of a flat pattern; None if it has too many or they are not known at once."""
    found = core.bands(frame)
    if found is None or len(found) > MOST_BANDS:
        return None
    lines = -(-frame.nq // UNIT)
    if frame.nq == lines * UNIT and len(found) == 1:
        lo, hi = (end.numpy().reshape(1, lines, UNIT) for end in found[0])
        return Bands(lo, hi)
    both = np.empty((2, len(found), lines * UNIT), np.int64)
    for band, ends in enumerate(found):
        for side in (0, 1):
            both[side, band, : frame.nq] = ends[side].numpy()
    # Behind the last row nothing is kept; as large as its end, so that ends still rise.
    both[:, :, frame.nq :] = both[1, :, frame.nq - 1, None]
    low, high = both.reshape(2, len(found), lines, UNIT)
    return Bands(low, high)


class Reach(NamedTuple):
    """Key units of each band and line, (K, lines) each.

    Attributes:
        low: the first unit that some row touches.
        first: the first one inside all rows' intervals.
        last: one past the last one inside all rows' intervals.
        high: one past the last one that some row touches.
        started: the first one behind all rows' starts.
        ending: the first one not before all rows' ends.
    """

    low: Ints
    first: Ints
    last: Ints
    high: Ints
    started: Ints
    ending: Ints


def _reach(bands: Bands) -> Reach:
    lo, hi = bands
    # Mostly ends rise, so that the first and the last row tell; an empty row costs an empty unit.
    falls = None
    if _falls(lo) or _falls(hi):
        falls = ((lo[:, :, 1:] < lo[:, :, :-1]) | (hi[:, :, 1:] < hi[:, :, :-1])).any((0, 2))
    ends = [lo[:, :, 0], lo[:, :, -1], hi[:, :, 0], hi[:, :, -1]]
    if falls is not None:
        ends = [end.copy() for end in ends]
        some_lo, some_hi = lo[:, falls], hi[:, falls]
        there = some_lo < some_hi
        ends[0][:, falls] = np.where(there, some_lo, 1 << 40).min(2)
        ends[1][:, falls] = some_lo.max(2)
        ends[2][:, falls] = some_hi.min(2)
        ends[3][:, falls] = np.where(there, some_hi, 0).max(2)
    high = (ends[3] + UNIT - 1) >> 6
    low = np.minimum(ends[0] >> 6, high)
    started, ending = (ends[1] + UNIT - 1) >> 6, ends[2] >> 6
    first = np.minimum(np.maximum(started, low), high)
    return Reach(low, first, np.minimum(np.maximum(ending, first), high), high, started, ending)


def _falls(ends: Ints) -> bool:
    flat = ends.reshape(len(ends), -1)
    return bool((flat[:, 1:] < flat[:, :-1]).any())


def banded_units(
    bands: Bands, dropped: dict[int, int], joined: Joined | None, frame: Frame
) -> Units | None:
    """The units that intervals touch.

    Args:
        bands: the intervals.
        dropped: columns left out: words by key unit.
        joined: whole rows and columns of units that are kept as well, or None.
        frame: the rectangle.

    Returns:
        None if too many units would have to be looked at one by one.
    """
    count, lines, _ = bands.lo.shape
    reach = _reach(bands)
    low, first, last, high, *_ = reach
    if int((high - low - last + first).sum()) > MOST_PARTIAL:
        return None
    line = np.broadcast_to(np.arange(lines), (count, lines)).ravel()
    start, stop = first, last
    if count > 1:
        order = first.argsort(0, kind="stable")
        start, stop = np.take_along_axis(first, order, 0), np.take_along_axis(last, order, 0)
        covered = np.maximum.accumulate(np.where(start < stop, stop, 0), 0)
        start[1:] = np.maximum(start[1:], covered[:-1])
    run = (start < stop).ravel()
    run_line, start, stop = line[run], start.ravel()[run], stop.ravel()[run]
    begin = np.concatenate([low.ravel(), last.ravel()])
    which, at = ragged(np.concatenate([(first - low).ravel(), (high - last).ravel()]))
    cell_line, cell_key = line[which % len(line)], begin[which] + at
    if count > 1:
        cell = sorted_unique(cell_line << KEY_BITS | cell_key)
        cell_line, cell_key = cell >> KEY_BITS, cell & ((1 << KEY_BITS) - 1)
        inside = np.zeros(len(cell), bool)
        for band in range(count):
            inside |= (first[band][cell_line] <= cell_key) & (cell_key < last[band][cell_line])
        cell_line, cell_key = cell_line[~inside], cell_key[~inside]
    if joined is not None:
        run_line, start, stop = with_joined((run_line, start, stop), joined, frame)
        (first_row, last_row), (first_key, last_key) = (
            (low_end >> 6, (high_end + UNIT - 1) >> 6) for low_end, high_end in joined
        )
        open_ = ~(_inside(cell_line, first_row, last_row) | _inside(cell_key, first_key, last_key))
        cell_line, cell_key = cell_line[open_], cell_key[open_]
    lost_line, lost_key = line[:0], line[:0]
    if dropped:
        at_units = np.array(sorted(dropped))
        (run_line, start, stop), (lost_line, lost_key) = _split(run_line, start, stop, at_units)
    if len(cell_line) > MOST_PARTIAL:
        return None
    mask, words = _cut_cells(bands, reach, cell_line, cell_key, dropped)
    if len(lost_key):
        # Whole but for columns that are left out.
        number = np.searchsorted(at_units, lost_key) + len(words)
        columns = np.array([~dropped[unit] & 2**64 - 1 for unit in at_units.tolist()], np.uint64)
        words = np.concatenate([words, np.repeat(columns, UNIT).reshape(-1, UNIT)])
        cell_line = np.concatenate([cell_line, lost_line])
        cell_key = np.concatenate([cell_key, lost_key])
        mask = np.concatenate([mask, np.where((words[number] != 0).any(1), number, -2)])
    if (mask == -2).any():
        kept = mask != -2
        cell_line, cell_key, mask = cell_line[kept], cell_key[kept], mask[kept]
    return ordered(
        np.concatenate([run_line, cell_line]), np.concatenate([start, cell_key]),
        np.concatenate([stop - start, np.ones_like(cell_key)]),
        np.concatenate([np.full(len(run_line), -1), mask]), words,
    )  # fmt: skip


def _inside(numbers: Ints, first: Ints, last: Ints) -> Bools:
    """Which numbers lie in one of a few ranges."""
    found = np.zeros(len(numbers), bool)
    for low, high in zip(first.tolist(), last.tolist(), strict=True):
        found |= (low <= numbers) & (numbers < high)
    return found


def _split(
    line: Ints, start: Ints, stop: Ints, at: Ints
) -> tuple[tuple[Ints, Ints, Ints], tuple[Ints, Ints]]:
    """Runs without some units, and the units (line, key) they lose."""
    first, last = np.searchsorted(at, start), np.searchsorted(at, stop)
    which, n = ragged(last - first)
    lost = line[which], at[first[which] + n]
    piece, n = ragged(last - first + 1)
    left = first[piece] + n
    ends = np.append(at, 1 << 40)
    begin = np.where(n == 0, start[piece], ends[left - 1] + 1)
    end = np.minimum(ends[left], stop[piece])
    kept = begin < end
    return (line[piece][kept], begin[kept], end[kept]), lost


def _cut_cells(
    bands: Bands, reach: Reach, line: Ints, key: Ints, dropped: dict[int, int]
) -> tuple[Ints, Words]:
    """The mask of each unit, −1 = full, −2 = empty; the distinct masks."""
    count = len(bands.lo)
    if not len(line):
        return line, np.zeros((0, UNIT), np.uint64)
    # Cells are alike if their lines' ends are, and lie alike to them.
    sign = np.zeros_like(key)
    for band in range(count):
        touched = (reach.low[band][line] <= key) & (key < reach.high[band][line])
        for side, edge, of in zip("<>", reach[4:], bands, strict=True):
            # Behind all starts, or before all ends, it does not matter where those lie.
            where = edge[band][line]
            matters = touched & (where > key if side == "<" else where <= key)
            if not matters.any():
                continue
            place = of[band, line, 0] - (key << 6) + (1 << 19)
            if band:  # there is room for two sides
                sign = kinds(sign)[1]
            sign = sign << 32 | np.where(matters, place << 11 | _shapes(of[band])[line], 0)
    if dropped:
        lost = np.zeros(int(key.max()) + 1, np.uint64)
        for unit, word in dropped.items():
            if unit < len(lost):
                lost[unit] = word
        sign = kinds(sign)[1] << KEY_BITS | np.where(lost[key] > 0, key + 1, 0)
    first, kind = kinds(sign)
    line, key = line[first], key[first]
    table = low_bits()
    words = np.zeros((len(first), UNIT), np.uint64)
    base = (key << 6)[:, None]
    for band in range(count):
        lower, upper = (np.minimum(np.maximum(ends[band][line] - base, 0), UNIT) for ends in bands)
        words |= table[np.maximum(upper, lower)] ^ table[lower]
    if dropped:
        words &= ~lost[key][:, None]
    first, same = distinct(words)
    return numbered(words[first], same[kind])


def _shapes(ends: Ints) -> Ints:
    """(lines,): equal for lines whose ends differ by one number; neighbours are compared only."""
    flat = ends.reshape(-1)
    step = flat[1:] - flat[:-1]
    kind = np.zeros(len(ends), np.int64)
    kind[((step[UNIT:] != step[:-UNIT]).nonzero()[0] >> 6) + 1] = 1
    return kind.cumsum()
