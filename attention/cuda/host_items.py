"""Work items made on the host, from runs of units: what ``items`` makes from single cells."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mixgrain.formats.units import KEY_BITS, Bools, Ints, Units, ragged, sorted_unique

from .items import FEW, LONG, SHORTEST, SHORTEST_WIDE, TURN

NOT_ITS = -2
Ints32 = npt.NDArray[np.int32]


class HostLines(NamedTuple):
    """Units of 64 queries of all distinct patterns; those of neighbours first, by pattern.

    Attributes:
        pattern: (L,), the distinct pattern of each line.
        unit: (L,), its query unit; gathered ones from ``PACKED`` on.
        to_slot: (L,), results have to be merged with others.
    """

    pattern: Ints
    unit: Ints
    to_slot: Bools


class HostItems(NamedTuple):
    """As of ``items.Items``, in arrays."""

    items: Ints32
    steps: Ints32
    costs: Ints
    item_counts: list[int]
    slot_counts: list[int]
    slot_line: Ints
    slot_pattern: Ints


def host_limits(counts: Ints, pattern: Ints, patterns: int, D: int) -> Ints:
    """See ``items.limits``."""
    total = np.bincount(pattern, counts, patterns).astype(np.int64)
    lines = np.bincount(pattern[counts > 0], minlength=patterns)
    share = np.minimum(LONG * total // (2 * np.maximum(lines, 1)), total // FEW)
    limit: Ints = (np.maximum(share, SHORTEST if D <= 128 else SHORTEST_WIDE) + 3) // 4 * 4
    return limit


def host_items(units: Units, lines: HostLines, patterns: int, D: int) -> HostItems:
    """Pair neighbouring lines, long ones with long ones; cut what is long.

    Args:
        units: runs of all patterns; no line has a unit twice.
        lines: all lines.
        patterns: number of distinct patterns.
        D: head dimension.
    """
    counts = np.bincount(units.line, units.length, len(lines.unit)).astype(np.int64)
    limit = host_limits(counts, lines.pattern, patterns, D)
    long = counts > limit[lines.pattern]
    if patterns == 1 and not long.any():
        # Neighbours as they are.
        place = np.arange(len(counts))
        line = np.full(((len(counts) + 1) // 2, 2), -1)
        line.reshape(-1)[: len(counts)] = place
        pattern = np.zeros(len(line), np.int64)
        alone = long = pattern > 0
    else:
        line, place, pattern, long = _paired(lines.pattern, long, patterns)
        # A long line without a partner: both warpgroups work on it.
        alone = long & (line[:, 1] < 0)
    own = np.where(line >= 0, counts[line], 0)
    steps, length = _steps(units, place, own)
    for item in alone.nonzero()[0].tolist():
        first = int(length[:item].sum())
        piece = steps[first : first + int(length[item])]
        second = np.arange(len(piece)) // TURN % 2 > 0
        piece[second, 2] = piece[second, 1]
        piece[second, 1] = NOT_ITS
        own[item] = (~second).sum(), second.sum()
        line[item, 1] = line[item, 0]
    return _cut(steps, length, own, line, lines, pattern, long, alone, limit, patterns)


def _paired(pattern: Ints, long: Bools, patterns: int) -> tuple[Ints, Ints, Ints, Bools]:
    """Lines of each item, −1 = none; the place of each line; pattern and length of each item."""
    kind = 2 * pattern + long
    kept = np.argsort(kind, kind="stable")
    kind = kind[kept]
    members = np.bincount(kind, minlength=2 * patterns)
    pairs = (members + 1) // 2
    rank = np.arange(len(kept)) - (members.cumsum() - members)[kind]
    at = (pairs.cumsum() - pairs)[kind] + rank // 2
    line = np.full((int(pairs.sum()), 2), -1)
    line[at, rank % 2] = kept
    place = np.empty(len(kept), np.int64)
    place[kept] = 2 * at + rank % 2
    kind = np.repeat(np.arange(2 * patterns), pairs)
    return line, place, kind // 2, kind % 2 > 0


def _steps(units: Units, place: Ints, own: Ints) -> tuple[Ints32, Ints]:
    """int32 (S, 4) steps by item in the order of ``items``, and how many each item has.

    Args:
        units: runs of all patterns.
        place: twice the item of each line, plus its warpgroup.
        own: units of each warpgroup.
    """
    items = len(own)
    to = place[units.line]
    low = (to >> 1) << KEY_BITS | units.key
    high = low + units.length
    found = []
    for group in (0, 1):
        mine = ((to & 1) == group).nonzero()[0]
        start = low[mine]
        if len(start) > 1 and (start[1:] < start[:-1]).any():
            order = np.argsort(start, kind="stable")
            mine, start = mine[order], start[order]
        found.append((start, high[mine], units.mask[mine]))
    edges = sorted_unique(np.concatenate([low, high]))
    left, size = edges[:-1], np.diff(edges)
    masks = np.empty((2, len(left)), np.int64)
    for group, (start, stop, mask) in enumerate(found):
        if not len(start):
            masks[group] = NOT_ITS
            continue
        which = np.searchsorted(start, left, "right") - 1
        masks[group] = np.where((which >= 0) & (left < stop[which]), mask[which], NOT_ITS)
    there = (masks != NOT_ITS).any(0)
    left, size, masks = left[there], size[there], masks[:, there]
    item = left >> KEY_BITS
    mine = masks != NOT_ITS
    both = mine.all(0)
    shared = np.bincount(item, size * both, items).astype(np.int64)
    if not both.all():
        left, size, masks = _arranged(left, size, masks, both, item, shared)
    # What every step of a run has in common, repeated.
    ends = size.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    steps = np.zeros((total, 4), np.int32)
    steps[:, 0] = np.repeat((left & ((1 << KEY_BITS) - 1)) - (ends - size), size)
    steps[:, 0] += np.arange(total, dtype=np.int32)
    steps[:, 1] = np.repeat(masks[0].astype(np.int32), size)
    steps[:, 2] = np.repeat(masks[1].astype(np.int32), size)
    return steps, own.sum(1) - shared


def _arranged(
    left: Ints, size: Ints, masks: Ints, both: Bools, item: Ints, shared: Ints
) -> tuple[Ints, Ints, Ints]:
    """Runs of steps in the order of ``items._arranged``."""
    items = len(shared)
    single = (~both).nonzero()[0]
    group = (masks[0, single] == NOT_ITS).astype(np.int64)
    which, at = ragged(size[single])
    of = 2 * item[single][which] + group[which]
    mine = np.bincount(of, minlength=2 * items)
    # Rank of a step among those of its warpgroup: by group first, then back.
    order = np.argsort(of, kind="stable")
    rank = np.empty(len(of), np.int64)
    rank[order] = np.arange(len(of)) - (mine.cumsum() - mine)[of[order]]
    odd = (mine[of] & 1 > 0) & (rank == mine[of] - 1)
    turn = np.where(odd, 1 << 30, 2 * (rank >> 1) + 1) + (of & 1)
    # The last one of an odd number of both's stands before the odd ones of one.
    split = np.zeros(len(left), bool)
    pairs = (mine.reshape(-1, 2) > 1).any(1)
    last = np.full(items, -1)
    last[item[both]] = both.nonzero()[0]
    split[last[(shared & 1 > 0) & pairs & (last >= 0)]] = True
    tail = split.nonzero()[0]
    rest = size - split
    runs = (both & (rest > 0)).nonzero()[0]
    key = np.concatenate([
        item[runs] << 34, item[tail] << 34 | (1 << 30) - 1,
        item[single][which] << 34 | turn,
    ])  # fmt: skip
    begin = np.concatenate([left[runs], left[tail] + rest[tail], left[single][which] + at])
    long = np.concatenate([rest[runs], np.ones(len(tail) + len(at), np.int64)])
    source = np.concatenate([runs, tail, single[which]])
    order = np.argsort(key, kind="stable")
    return begin[order], long[order], masks[:, source[order]]


def _cut(
    steps: Ints32,
    length: Ints,
    own: Ints,
    line: Ints,
    lines: HostLines,
    pattern: Ints,
    long: Bools,
    alone: Bools,
    limit: Ints,
    patterns: int,
) -> HostItems:
    """Even pieces of the long items, and where results go."""
    begin = length.cumsum() - length
    cuts = np.ones_like(length)
    n = length
    if long.any():
        most = np.where(long, limit[pattern], np.maximum(length, 1))
        cuts = np.maximum((length + most - 1) // most, 1)
        size = ((length + cuts - 1) // cuts + 2 * TURN - 1) // (2 * TURN) * (2 * TURN)
        size = np.where(long, size, np.maximum(length, 1))
        cuts = np.maximum((length + size - 1) // size, 1)
        item, at = ragged(cuts)
        at *= size[item]
        n = np.minimum(size[item], length[item] - at)
        begin = begin[item] + at
        running = np.zeros((len(steps) + 1, 2), np.int64)
        np.cumsum(steps[:, 1:3] != NOT_ITS, 0, out=running[1:])
        own = running[begin + n] - running[begin]
        line, pattern, cuts, alone = line[item], pattern[item], cuts[item], alone[item]
    there = line >= 0
    unit = np.where(there, lines.unit[line], -1)
    slot = there & (lines.to_slot[line] | ((cuts > 1) | alone)[:, None])
    # Nothing to do and nothing to say.
    unit[slot & (own == 0)] = -1
    slot &= own > 0
    slot_item, slot_group = slot.nonzero()
    slot_pattern = pattern[slot_item]
    slots = np.bincount(slot_pattern, minlength=patterns)
    items = np.zeros((len(n), 8), np.int32)
    items[:, :2], items[:, 2], items[:, 3], items[:, 4] = unit, begin, n, pattern
    items[:, 5:7] = -1
    number = np.arange(len(slot_item)) - (slots.cumsum() - slots)[slot_pattern]
    items[slot_item, 5 + slot_group] = number
    return HostItems(
        items, steps, own.sum(1) + own.max(1) + 4,
        np.bincount(pattern, minlength=patterns).tolist(), slots.tolist(),
        line[slot_item, slot_group], slot_pattern,
    )  # fmt: skip
