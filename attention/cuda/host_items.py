"""Work items made on the host, from runs of units: what ``items`` makes from single cells."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mixgrain.formats.units import KEY_BITS, Bools, Ints, Units, ragged, sorted_unique

from .items import FEW, LONG, SHORTEST, SHORTEST_WIDE, TURN, item_cost

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


def host_items(units: Units, lines: HostLines, patterns: int, D: int, groups: int) -> HostItems:
    """Neighbouring lines together, long ones with long ones; what is long is cut.

    Args:
        units: runs of all patterns; no line has a unit twice.
        lines: all lines.
        patterns: number of distinct patterns.
        D: head dimension.
        groups: lines of an item, 2 or 3: one for each warpgroup.
    """
    counts = np.bincount(units.line, units.length, len(lines.unit)).astype(np.int64)
    limit = host_limits(counts, lines.pattern, patterns, D)
    long = counts > limit[lines.pattern]
    if patterns == 1 and not long.any():
        # Neighbours as they are.
        place = np.arange(len(counts))
        line = np.full((-(-len(counts) // groups), groups), -1)
        line.reshape(-1)[: len(counts)] = place
        pattern = np.zeros(len(line), np.int64)
        alone = long = pattern > 0
    else:
        line, place, pattern, long = _together(lines.pattern, long, patterns, groups)
        # A long line without a partner: all warpgroups work on it.
        alone = long & (line[:, 1] < 0)
    own = np.where(line >= 0, counts[line], 0)
    steps, length = _steps(units, place, len(line), groups)
    for item in alone.nonzero()[0].tolist():
        first = int(length[:item].sum())
        piece = steps[first : first + int(length[item])]
        turn = np.arange(len(piece)) // TURN % groups
        mask = piece[:, 1].copy()
        for group in range(groups):
            piece[:, 1 + group] = np.where(turn == group, mask, NOT_ITS)
        own[item] = np.bincount(turn, minlength=groups)
        line[item] = line[item, 0]
    return _cut(steps, length, own, line, lines, pattern, long, alone, limit, patterns)


def _together(
    pattern: Ints, long: Bools, patterns: int, groups: int
) -> tuple[Ints, Ints, Ints, Bools]:
    """Lines of each item, −1 = none; the place of each line; pattern and length of each item."""
    kind = 2 * pattern + long
    kept = np.argsort(kind, kind="stable")
    kind = kind[kept]
    members = np.bincount(kind, minlength=2 * patterns)
    sets = -(-members // groups)
    rank = np.arange(len(kept)) - (members.cumsum() - members)[kind]
    at = (sets.cumsum() - sets)[kind] + rank // groups
    line = np.full((int(sets.sum()), groups), -1)
    line[at, rank % groups] = kept
    place = np.empty(len(kept), np.int64)
    place[kept] = groups * at + rank % groups
    kind = np.repeat(np.arange(2 * patterns), sets)
    return line, place, kind // 2, kind % 2 > 0


def _steps(units: Units, place: Ints, items: int, groups: int) -> tuple[Ints32, Ints]:
    """int32 (S, 4) steps by item and key unit, and how many each item has.

    Args:
        units: runs of all patterns.
        place: ``groups`` times the item of each line, plus its warpgroup.
        items: how many there are.
        groups: warpgroups of an item.
    """
    to = place[units.line]
    low = (to // groups) << KEY_BITS | units.key
    high = low + units.length
    edges = sorted_unique(np.concatenate([low, high]))
    left, size = edges[:-1], np.diff(edges)
    masks = np.full((groups, len(left)), NOT_ITS, np.int64)
    for group in range(groups):
        mine = (to % groups == group).nonzero()[0]
        start = low[mine]
        if not len(start):
            continue
        if len(start) > 1 and (start[1:] < start[:-1]).any():
            order = np.argsort(start, kind="stable")
            mine, start = mine[order], start[order]
        stop, mask = high[mine], units.mask[mine]
        which = np.searchsorted(start, left, "right") - 1
        masks[group] = np.where((which >= 0) & (left < stop[which]), mask[which], NOT_ITS)
    there = (masks != NOT_ITS).any(0)
    left, size, masks = left[there], size[there], masks[:, there]
    length: Ints = np.bincount(left >> KEY_BITS, size, items).astype(np.int64)
    # What every step of a run has in common, repeated.
    ends = size.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    steps = np.full((total, 4), NOT_ITS, np.int32)
    steps[:, 0] = np.repeat((left & ((1 << KEY_BITS) - 1)) - (ends - size), size)
    steps[:, 0] += np.arange(total, dtype=np.int32)
    for group in range(groups):
        steps[:, 1 + group] = np.repeat(masks[group].astype(np.int32), size)
    return steps, length


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
    groups = line.shape[1]
    begin = length.cumsum() - length
    cuts = np.ones_like(length)
    n = length
    if long.any():
        most = np.where(long, limit[pattern], np.maximum(length, 1))
        cuts = np.maximum((length + most - 1) // most, 1)
        turns = groups * TURN
        size = ((length + cuts - 1) // cuts + turns - 1) // turns * turns
        size = np.where(long, size, np.maximum(length, 1))
        cuts = np.maximum((length + size - 1) // size, 1)
        item, at = ragged(cuts)
        at *= size[item]
        n = np.minimum(size[item], length[item] - at)
        begin = begin[item] + at
        running = np.zeros((len(steps) + 1, groups), np.int64)
        np.cumsum(steps[:, 1 : 1 + groups] != NOT_ITS, 0, out=running[1:])
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
    items = np.full((len(n), 8), -1, np.int32)
    items[:, :groups], items[:, 3], items[:, 4] = unit, begin, n
    number = np.arange(len(slot_item)) - (slots.cumsum() - slots)[slot_pattern]
    items[slot_item, 5 + slot_group] = number
    masked = np.zeros(len(steps) + 1, np.int64)
    np.cumsum((steps[:, 1:] >= 0).sum(1), out=masked[1:])
    return HostItems(
        items, steps, item_cost(own.sum(1), masked[begin + n] - masked[begin], n, groups),
        np.bincount(pattern, minlength=patterns).tolist(), slots.tolist(),
        line[slot_item, slot_group], slot_pattern,
    )  # fmt: skip
