"""Which CTA computes which item of which matrix, in which order."""

from __future__ import annotations

import heapq
import itertools

import numpy as np

Ints = np.typing.NDArray[np.int64]

# Bytes of K and V that are worked on at a time: what stays in L2 beside Q and the output.
RESIDENT = 24 << 20
# The end is as many of the shortest items as take every CTA this part of its longest item's time.
SPARE = 4
# Fewer tiles than this at once are dealt singly, so many at a time.
FEW, SINGLY = 24, 256
# With more tiles than this for every CTA, a walk by strides is even enough.
DEALT = 32
# A tile: its item; from this bit on, the warpgroups that leave it to other tiles.
APART = 28


def walk(
    costs: np.typing.NDArray[np.int32],
    item_starts: tuple[int, ...],
    pattern: Ints,
    shape: tuple[int, int, int],
    head_bytes: int,
    ctas: int,
) -> tuple[Ints, Ints, Ints]:
    """Heads whose keys fit L2 together are worked on together, longest items first.

    The shortest items of all of them come last: an end made of the last heads alone is ragged.

    Args:
        costs: of every item.
        item_starts: the items of each pattern.
        pattern: (matrices,), the pattern of each matrix.
        shape: batch entries, query heads, key heads.
        head_bytes: bytes of K and V of one key head.
        ctas: persistent CTAs, at most.

    Returns:
        Where each CTA's tiles start; item and matrix of all tiles.
    """
    batch, heads, kv = shape
    longest = []
    for start, stop in itertools.pairwise(item_starts):
        longest.append(start + np.argsort(-costs[start:stop], kind="stable"))
    # As many sections of key heads as L2 needs, of about equal size.
    together = max(1, RESIDENT // max(head_bytes, 1))
    sections = -(-batch * kv // together)
    of = np.arange(batch * heads) // (heads // kv) * sections // (batch * kv)
    dearest = int(max((costs[i[0]] for i in longest if len(i)), default=0))
    spare = ctas * dearest // (SPARE * max(sections, 1))
    parts, late = [], []
    edges = np.searchsorted(of, np.arange(sections + 1))
    for first, last in itertools.pairwise(edges.tolist()):
        mine = np.arange(first, last)
        same = {u: mine[pattern[mine] == u] for u in dict.fromkeys(pattern[mine].tolist())}
        item = np.concatenate([np.repeat(longest[u], len(m)) for u, m in same.items()])
        matrix = np.concatenate([np.tile(m, len(longest[u])) for u, m in same.items()])
        if len(same) > 1:
            order = np.argsort(-costs[item], kind="stable")
            item, matrix = item[order], matrix[order]
        cut = len(item) - int((costs[item][::-1].cumsum() <= spare).sum())
        parts.append((item[:cut], matrix[:cut]))
        late.append((item[cut:], matrix[cut:]))
    item, matrix = (np.concatenate(axis) for axis in zip(*parts, *late, strict=True))
    end = len(item) - sum(len(of) for of, _ in late)
    order = end + np.argsort(-costs[item[end:]], kind="stable")
    item[end:], matrix[end:] = item[order], matrix[order]
    total = len(item)
    ctas = max(1, min(ctas, total))
    if ctas < total <= DEALT * ctas:
        first, turn = _dealt(costs[item].astype(np.int64), ctas)
    else:
        first, turn = _strided(total, ctas)
    return first, item[turn], matrix[turn]


def taken_apart(item: Ints, matrix: Ints, ctas: int, groups: int) -> tuple[Ints, Ints, Ints]:
    """Tiles in two or more where CTAs would have nothing to do: a CTA for every part.

    Results are the same: a warpgroup sees the same keys in the same order.

    Args:
        item: of every tile.
        matrix: likewise.
        ctas: persistent CTAs, at least twice as many as tiles.
        groups: warpgroups of an item.

    Returns:
        As of ``walk``; items with the warpgroups that leave them to others from bit ``APART`` on.
    """
    every = (1 << groups) - 1
    if groups * len(item) <= ctas:
        parts = [every ^ (1 << group) for group in range(groups)]
    else:
        parts = [1 << (groups - 1), every >> 1]  # all but the last one, the last one
    item = (item[:, None] | np.array(parts) << APART).reshape(-1)
    return np.arange(len(item) + 1), item, matrix.repeat(len(parts))


def _dealt(costs: Ints, ctas: int) -> tuple[Ints, Ints]:
    """Each tile to the CTA that is free first, the lower number where several are.

    CTAs in the order in which they are free take the next tiles one each, as long as none of those
    that have just taken one would be free again before the next; where that holds for few at a
    time, tiles are dealt singly.
    """
    total = len(costs)
    taker = np.empty(total, np.int64)
    load = np.zeros(ctas, np.int64)
    at = 0
    while at < total:
        turn = np.argsort(load, kind="stable")[: total - at]
        before = load[turn]
        after = before + costs[at : at + len(turn)]
        again = (before[1:] >= np.minimum.accumulate(after)[:-1]).nonzero()[0]
        count = int(again[0]) + 1 if len(again) else len(turn)
        taker[at : at + count] = turn[:count]
        load[turn[:count]] = after[:count]
        at += count
        if count >= FEW:
            continue
        free = (load * ctas + np.arange(ctas)).tolist()
        heapq.heapify(free)
        singly = []
        for cost in costs[at : at + SINGLY].tolist():
            first = free[0]
            singly.append(first % ctas)
            heapq.heapreplace(free, first + cost * ctas)
        taker[at : at + len(singly)] = singly
        at += len(singly)
        load = np.empty(ctas, np.int64)
        left = np.array(free)
        load[left % ctas] = left // ctas
    starts = np.zeros(ctas + 1, np.int64)
    starts[1:] = np.bincount(taker, minlength=ctas).cumsum()
    return starts, np.argsort(taker, kind="stable")


def _strided(total: int, ctas: int) -> tuple[Ints, Ints]:
    """Tiles in turn; every other turn goes backwards, so that all end together."""
    turns = -(-total // ctas)
    tile = np.arange(turns * ctas).reshape(turns, ctas)
    tile[1::2] = tile[1::2, ::-1].copy()
    tile = tile.T
    kept = tile < total
    return np.concatenate([[0], kept.sum(1).cumsum()]), tile[kept]
