"""Runs of units on the host: what plans of new patterns are made of.

A unit is 64 queries × 64 keys, a *line* the units of 64 neighbouring queries. Integer work on a few
thousand numbers takes microseconds on the host, which is less than one kernel launch each on a
device; so all of this is numpy.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .pattern import Frame, Pattern

UNIT = 64
# Bits of key units in sort keys.
KEY_BITS = 26

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]
ALL = np.uint64(2**64 - 1)


class Units(NamedTuple):
    """Kept units of a flat pattern as runs of neighbours, by line and key.

    Attributes:
        line: (n,), rising.
        key: (n,), first key unit of each run.
        length: (n,), units of each run; 1 under a mask.
        mask: (n,), −1 = every position kept, else a row of words.
        words: (M, 64), bit c of a word says that column c of its row is kept.
    """

    line: Ints
    key: Ints
    length: Ints
    mask: Ints
    words: Words


# (line, first unit, one past the last) of runs of whole units.
Runs = tuple[Ints, Ints, Ints]
# First members of runs of rows or columns, and one past the last ones.
Ends = tuple[Ints, Ints]


class Joined(NamedTuple):
    """Rows that see every key, and keys that every row sees, in runs that are whole units."""

    rows: Ends
    columns: Ends


@functools.cache
def low_bits() -> Words:
    """(65,): the word with so many low bits."""
    return np.array([(1 << n) - 1 for n in range(UNIT + 1)], np.uint64)


def ragged(counts: Ints) -> tuple[Ints, Ints]:
    """(which, at): counts[i] times i, and 0 … counts[i] − 1."""
    ends = counts.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(total) - np.repeat(ends - counts, counts)


def with_joined(runs: Runs, joined: Joined, frame: Frame) -> Runs:
    """Runs of units together with those of whole rows and columns."""
    lines = -(-frame.nq // UNIT)
    rows, columns = joined
    every = np.arange(lines)
    which, at = ragged(((rows[1] + UNIT - 1) >> 6) - (rows[0] >> 6))
    whole = (rows[0] >> 6)[which] + at
    parts = [runs]
    parts += [
        (every, np.full(lines, int(lo) >> 6), np.full(lines, (int(hi) + UNIT - 1) >> 6))
        for lo, hi in zip(*columns, strict=True)
    ]
    parts.append((whole, np.zeros_like(whole), np.full(len(whole), -(-frame.nk // UNIT))))
    line, start, stop = (np.concatenate(part) for part in zip(*parts, strict=True))
    start, stop = line << KEY_BITS | start, line << KEY_BITS | stop
    order = np.argsort(start, kind="stable")
    start, reach = start[order], np.maximum.accumulate(stop[order])
    fresh = np.ones(len(start) + 1, bool)
    fresh[1:-1] = start[1:] > reach[:-1]
    first, last = start[fresh[:-1]], reach[fresh[1:]]
    low = (1 << KEY_BITS) - 1
    return first >> KEY_BITS, first & low, last & low


def sorted_unique(numbers: Ints) -> Ints:
    """Distinct numbers, rising."""
    rising = np.sort(numbers)
    fresh = np.ones(len(rising), bool)
    np.not_equal(rising[1:], rising[:-1], out=fresh[1:])
    return rising[fresh]


def ordered(line: Ints, key: Ints, length: Ints, mask: Ints, words: Words) -> Units:
    """Units of runs in any order."""
    order = np.argsort(line << KEY_BITS | key, kind="stable")
    return Units(line[order], key[order], length[order], mask[order], words)


def kinds(numbers: Ints | Words) -> tuple[Ints, Ints]:
    """One of each kind of equal numbers, and the kind of each."""
    order = np.argsort(numbers, kind="stable")
    rising = numbers[order]
    fresh = np.ones(len(rising), bool)
    np.not_equal(rising[1:], rising[:-1], out=fresh[1:])
    kind = np.empty_like(order)
    kind[order] = fresh.cumsum() - 1
    return order[fresh], kind


def distinct(rows: Words) -> tuple[Ints, Ints]:
    """A row of each kind, and the kind of each row."""
    # Factors out of step: with evenly spaced ones, equal words in two places would weigh as much as
    # in two others with the same middle.
    factors = np.arange(1, rows.shape[1] + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    factors = (factors ^ factors >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9) | np.uint64(1)
    digest = ((rows ^ rows >> np.uint64(29)) * factors).sum(1)
    first, kind = kinds(digest ^ digest >> np.uint64(32))
    if not np.array_equal(rows[first[kind]], rows):
        _, first, kind = np.unique(rows, True, True, axis=0)
    return first, kind.reshape(-1)


def ones(words: Words) -> Ints:
    """Set bits of each word."""
    x = words - ((words >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + (x >> np.uint64(2) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    counts: Ints = (x * np.uint64(0x0101010101010101) >> np.uint64(56)).astype(np.int64)
    return counts


def numbered(words: Words, kind: Ints) -> tuple[Ints, Words]:
    """Masks that cut something: −1 for full ones, −2 for empty ones; those that are left."""
    full, empty = (words == ALL).all(1), (words == 0).all(1)
    cut = ~(full | empty)
    number = np.where(full, -1, np.where(empty, -2, cut.cumsum() - 1))
    return number[kind], words[cut]


def coarse_runs(core: Pattern, frame: Frame) -> Runs:
    """(line, start, stop) of runs of units of a pattern of whole units; see ``Pattern.coarse``."""
    known = core.block_mask(frame, UNIT)
    if known is not None:
        mask = known.numpy()
        padded = np.zeros((mask.shape[0], mask.shape[1] + 2), bool)
        padded[:, 1:-1] = mask
        ends = (padded[:, 1:] != padded[:, :-1]).reshape(-1).nonzero()[0]
        line, start = np.divmod(ends[::2], mask.shape[1] + 1)
        return line, start, start + ends[1::2] - ends[::2]
    runs = core.runs(frame, torch.arange(0, frame.nq, UNIT))
    line = np.repeat(np.arange(runs.num_rows), np.diff(runs.offsets.numpy()))
    return line, runs.lo.numpy() >> 6, (runs.hi.numpy() + UNIT - 1) >> 6


def coarse_units(runs: Runs, frame: Frame) -> Units:
    """Runs of whole units; what hangs over the edge of the matrix is masked."""
    line, start, stop = runs
    mask = np.full(len(line), -1)
    right, down = frame.nk % UNIT, frame.nq % UNIT
    if not (right or down):
        return Units(line, start, stop - start, mask, np.zeros((0, UNIT), np.uint64))
    corner_line, corner_key = frame.nq // UNIT, frame.nk // UNIT
    # Columns at the right edge, all of the last line.
    over = (stop > corner_key) if right else np.zeros(len(line), bool)
    below = (line == corner_line) if down else np.zeros(len(line), bool)
    which, at = ragged(np.where(below, stop - start, over))
    key = np.where(below[which], start[which] + at, corner_key)
    rows = np.arange(UNIT) < np.where(below[which], down, UNIT)[:, None]
    last = (key == corner_key) & bool(right)
    columns = low_bits()[np.where(last, right, UNIT)]
    words = np.where(rows, columns[:, None], np.uint64(0))
    cut, table = line[which], words
    if len(which):
        first, kind = distinct(words)
        mask_of, table = numbered(words[first], kind)
    else:
        mask_of, table = which, np.zeros((0, UNIT), np.uint64)
    stop = np.where(below, start, np.where(over, corner_key, stop))
    kept = start < stop
    return ordered(
        np.concatenate([line[kept], cut]), np.concatenate([start[kept], key]),
        np.concatenate([(stop - start)[kept], np.ones_like(key)]),
        np.concatenate([mask[kept], mask_of]), table,
    )  # fmt: skip
