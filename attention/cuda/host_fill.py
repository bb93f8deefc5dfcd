"""What ``fill`` does to cells, for runs of units on the host: few units stay masked.

A split on the host has one set of queries that see every key, in gathered lines, and one set of
keys that all other queries see. So rows of the first are free in the lines of their neighbours, and
what a unit lacks of the second may be taken back.
"""

from __future__ import annotations

import numpy as np

from mixgrain.formats.direct import Split
from mixgrain.formats.pattern import Frame
from mixgrain.formats.units import ALL, UNIT, Ints, Units, Words, kinds, low_bits

from .cells import PACKED


def free_rows(split: Split, frame: Frame) -> Words:
    """(lines,): rows of neighbours that may hold anything, gathered ones and those behind the last.

    Gathered lines keep every key, so that nothing else of these rows counts.
    """
    free = _words(split.queries, -(-frame.nq // UNIT))
    if frame.nq % UNIT:
        free[-1] |= ~low_bits()[frame.nq % UNIT]
    return free


def fill(split: Split, free: Words, frame: Frame) -> list[Units]:
    """Units of neighbours, and gathered key units of the same lines where there are any."""
    units, keys = split.units, split.keys
    open_ = free[units.line] != 0
    shared = _words(keys, -(-frame.nk // UNIT))
    if len(keys):
        open_ |= shared[units.key] != 0
    open_ = (open_ & (units.mask >= 0)).nonzero()[0]
    line, key = units.line[open_], units.key[open_]
    used = np.zeros(len(units.words), bool)
    used[units.mask[open_]] = True
    words, of = units.words[used], (used.cumsum() - 1)[units.mask[open_]]
    keeps = words != 0
    kept: Words = np.bitwise_or.reduce(words, 1)
    # A mask is alike in all rows that keep something, or it is not.
    alike = ((words == kept[:, None]) | ~keeps).all(1)
    rows = _packed(keeps)
    needed = ~free[line]
    lack = ~kept[of]
    whole = alike[of] & (needed & ~rows[of] == 0) & (needed != 0) & (lack & ~shared[key] == 0)
    mask = units.mask.copy()
    mask[open_[whole]] = -1
    left = np.zeros(len(units.words), bool)
    left[mask[mask >= 0]] = True
    number = left.cumsum() - 1
    mask = np.where(mask < 0, mask, number[mask])
    parts = [units._replace(mask=mask, words=units.words[left])]
    if len(keys):
        parts.append(_gathered(keys, free, line[whole], key[whole], lack[whole]))
    return parts


def _gathered(keys: Ints, free: Words, line: Ints, unit: Ints, back: Words) -> Units:
    """Gathered key units of all lines, without the columns that some units took back.

    Args:
        keys: gathered keys, rising.
        free: (lines,), rows that do not count.
        line: of each unit that took columns.
        unit: which it is.
        back: the columns it took.
    """
    packed = -(-len(keys) // UNIT)
    kept = np.zeros((len(free), packed * UNIT), bool)
    kept[:, : len(keys)] = (free != ALL)[:, None]
    taken = np.flatnonzero(np.unpackbits(back.view(np.uint8), bitorder="little").view(bool))
    at, column = np.divmod(taken, UNIT)
    kept[line[at], np.searchsorted(keys, unit[at] * UNIT + column)] = False
    words = _packed(kept)
    there = words.nonzero()[0]
    line, unit = np.divmod(there, packed)
    words = words[there]
    cut = (words != ALL).nonzero()[0]
    mask = np.full(len(there), -1)
    first, mask[cut] = kinds(words[cut])
    words = words[cut][first]
    table = np.broadcast_to(words[:, None], (len(words), UNIT))
    return Units(line, PACKED + unit, np.ones_like(line), mask, table)


def _words(members: Ints, units: int) -> Words:
    """(units,): the members of each unit."""
    found = np.zeros(units * UNIT, bool)
    found[members] = True
    return _packed(found)


def _packed(kept: np.typing.NDArray[np.bool_]) -> Words:
    """Words of 64 each, of a whole number of words."""
    words: Words = np.packbits(kept.reshape(-1, UNIT), 1, "little").view(np.uint64)[:, 0]
    return words
