"""Lines of blocks two by two, so that what they ask of x comes in once for both.

A line is a block row, or a block column where the product is with the transpose. Scattered blocks
leave a choice of partners: in 64 lines of which each has a fifth of all blocks, the best pairing
asks for a fifth less than single lines do.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .even import evened

# Columns of a group, and groups of a tile at most; see spmm_pair_sm90.cu.
WIDE, GROUPS = 128, 3
# Tiles that are dealt one by one; more of them go round. And tiles of a CTA that are evened out.
DEALT, EVENED = 1 << 14, 16


class Pairs(NamedTuple):
    """Pairs of lines and what they have.

    Attributes:
        lines: int64 (P, 2), −1 where there is no other.
        bounds: int64 (P + 1,) into elements.
        elements: int32 (U, 4): inner block, item of the one line and of the other, −1 = none, 0; of
            each pair by inner block.
        blocks: items in all.
    """

    lines: NDArray[np.int64]
    bounds: NDArray[np.int64]
    elements: NDArray[np.int32]
    blocks: int


def pairs(table: NDArray[np.int32], records: NDArray[np.int32]) -> Pairs:
    """Pairs of lines that share most.

    Args:
        table: (n, 4) of ``cuda_block.wgmma``: item, inner block, then what does not matter.
        records: (lines, 3) of it: line, first in table, elements.
    """
    count = len(records)
    inner = int(table[:, 1].max()) + 1 if len(table) else 1
    sizes = records[:, 2].astype(np.int64)
    line = np.repeat(records[:, 0], sizes)
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    at = np.repeat(records[:, 1], sizes) + within
    items = np.full((count + 1, inner), -1)  # the last line is none
    items[line, table[at, 1]] = table[at, 0]
    has = (items[:count] >= 0).astype(np.float32)
    lines = matched((has @ has.T).astype(np.int64))
    held = items[lines]  # P, 2, inner; −1 is the last line
    pair, block = np.nonzero((held >= 0).any(1))
    elements = np.zeros((len(pair), 4), np.int32)
    elements[:, 0], elements[:, 1:3] = block, held[pair, :, block]
    bounds = np.searchsorted(pair, np.arange(len(lines) + 1))
    return Pairs(lines, bounds, elements, len(table))


def matched(shared: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pairs of lines with much in common: greedily, then by exchanges as long as they gain.

    Args:
        shared: (lines, lines), symmetric: what two of them have in common.

    Returns:
        (pairs, 2), the lesser line first, −1 for the partner of an odd one; by their first lines.
    """
    count = len(shared)
    free = np.ones(count, bool)
    first, second = np.triu_indices(count, 1)
    found = []
    for at in np.argsort(-shared[first, second], kind="stable"):
        a, b = first[at], second[at]
        if free[a] and free[b]:
            free[a] = free[b] = False
            found.append((a, b))
            if len(found) == count // 2:
                break
    made = np.array(found, np.int64).reshape(-1, 2)
    while len(made):
        a, b = made.T
        now = shared[a, b]
        before = now[:, None] + now
        # The pairs p and q exchange their second lines, or the second of p and the first of q.
        gains = np.stack([
            shared[np.ix_(a, b)] + shared[np.ix_(b, a)] - before,
            shared[np.ix_(a, a)] + shared[np.ix_(b, b)] - before,
        ])  # fmt: skip
        gains[:, np.tri(len(made), dtype=bool)] = 0  # p < q
        best = np.flatnonzero(gains > 0)
        if not len(best):
            break
        # As many as do not touch one another, those that gain most first.
        touched = np.zeros(len(made), bool)
        for at in best[np.argsort(-gains.flat[best], kind="stable")][: 8 * len(made)]:
            way, p, q = np.unravel_index(at, gains.shape)
            if not (touched[p] or touched[q]):
                touched[p] = touched[q] = True
                other = 1 if way == 0 else 0
                made[p, 1], made[q, other] = made[q, other], made[p, 1]
    odd = np.flatnonzero(free)
    made = np.concatenate([np.sort(made, 1), np.stack([odd, np.full(len(odd), -1)], 1)])
    return made[np.argsort(made[:, 0])]


def tiles(found: Pairs, units: int, matrices: int, ctas: int) -> NDArray[np.int32]:
    """The tiles of each CTA of ``spmm_pair_sm90``, loads about equal.

    Args:
        found: the pairs.
        units: groups of 128 columns of x.
        matrices: how many share the pairs.
        ctas: of the grid.

    Returns:
        int32 (ctas or fewer, most, 2, 4), −1 for elements after a CTA's last tile.
    """
    best: tuple[float, list[list[int]], list[tuple[int, int]]] | None = None
    for narrow in range(min(units // 2, 3 * GROUPS) + 1):
        cut = _cut(units, narrow)
        if cut is None:
            continue
        costs = _costs(found, cut)
        count = matrices * costs.size
        mine, most = _dealt(costs, matrices, min(ctas, count))
        if best is None or most < best[0]:
            best = most, mine, cut
        if count > DEALT:
            break
    assert best is not None
    _, mine, cut = best
    if sum(map(len, mine)) <= EVENED * len(mine):
        evened(mine, _every(_costs(found, cut), matrices).tolist())
    longest = max(map(len, mine))
    made = np.zeros((len(mine), longest, 2, 4), np.int32)
    made[:, :, 0, 3] = -1
    first, size = found.bounds[:-1], np.diff(found.bounds)
    for cta, own in enumerate(mine):
        own.sort()  # the same columns at about the same time: L2 then holds what they share
        for place, at in enumerate(own):
            repeat, pair = divmod(at, len(found.lines))
            matrix, which = divmod(repeat, len(cut))
            column, groups = cut[which]
            made[cta, place, 0] = *found.lines[pair], first[pair], size[pair]
            made[cta, place, 1, :3] = matrix, column * WIDE, groups
    return made


def _cut(units: int, narrow: int) -> list[tuple[int, int]] | None:
    """Groups of columns as tiles, (first, groups): ``narrow`` of two, the others of three."""
    rest = units - 2 * narrow
    if rest % GROUPS and units > 1:
        return None
    sizes = [GROUPS] * (rest // GROUPS) + [2] * narrow or [1]
    return [(sum(sizes[:n]), size) for n, size in enumerate(sizes)]


def _costs(found: Pairs, cut: list[tuple[int, int]]) -> NDArray[np.float64]:
    """KiB that a tile brings in, its beginning and end as such: (pairs, tiles of a pair)."""
    size = np.diff(found.bounds)
    ends = np.cumsum(np.concatenate([[0], (found.elements[:, 1:3] >= 0).sum(1)]))
    blocks = ends[found.bounds[1:]] - ends[found.bounds[:-1]]
    groups = np.array([groups for _, groups in cut])
    made: NDArray[np.float64] = groups * (16.0 * size[:, None] + 24) + 8 * blocks[:, None] + 30
    return made


def _every(costs: NDArray[np.float64], matrices: int) -> NDArray[np.float64]:
    """Costs of all tiles, (matrix · tiles of a pair + which) · pairs + pair."""
    return np.tile(costs.T, (matrices, 1)).flatten()


def _dealt(costs: NDArray[np.float64], matrices: int, ctas: int) -> tuple[list[list[int]], float]:
    """Tiles of each CTA, numbered as ``_every`` has them, and the largest load."""
    every = _every(costs, matrices)
    order = np.argsort(-every, kind="stable")
    if len(order) > DEALT:  # in turn, every other turn backwards
        turns = -(-len(order) // ctas)
        dealt = np.full(turns * ctas, -1)
        dealt[: len(order)] = order
        rounds = dealt.reshape(turns, ctas)
        rounds[1::2] = rounds[1::2, ::-1]
        mine = [[at for at in own if at >= 0] for own in rounds.T.tolist()]
    else:
        mine, heap = [[] for _ in range(ctas)], [(0.0, cta) for cta in range(ctas)]
        for at in order.tolist():
            load, cta = heap[0]
            heapq.heapreplace(heap, (load + every[at], cta))
            mine[cta].append(at)
    return mine, max(float(every[own].sum()) for own in mine)
