"""Lines of blocks two by two, so that what both ask of x comes in once for both.

A line is a block row, or a block column where the product is with the transpose. Scattered blocks
leave a choice of partners: of 64 lines that have a fifth of all blocks each, the best pairs ask
for a fifth less than single lines do.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .even import evened

# Rounds of assignments, after which little is gained.
ROUNDS = 64
# Tiles that are dealt one by one; more of them go round. And tiles of a cluster that are evened
# out.
DEALT, EVENED = 1 << 14, 16


class Pairs(NamedTuple):
    """Pairs of lines and what they have.

    Attributes:
        partners: int64 (P, 2), rows of the records, −1 where there is no other.
        records: int32 (lines, 3) that they are rows of.
        bounds: int64 (P + 1,) into elements.
        elements: int32 (U, 4), of each pair by inner block: inner block, item of the one line and
            of the other, −1 = none, 0.
        blocks: items in all.
    """

    partners: NDArray[np.int64]
    records: NDArray[np.int32]
    bounds: NDArray[np.int64]
    elements: NDArray[np.int32]
    blocks: int


def pairs(table: NDArray[np.int32], records: NDArray[np.int32]) -> Pairs:
    """Pairs of lines that share most.

    Args:
        table: (n, 4) of ``cuda_block.wgmma``: item, inner block, then what does not matter.
        records: (lines, 3) of it: line, first in table, elements.
    """
    sizes = records[:, 2].astype(np.int64)
    row = np.repeat(np.arange(len(records)), sizes)
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    at = np.repeat(records[:, 1], sizes) + within
    # The last line is none.
    items = np.full((len(records) + 1, int(table[:, 1].max()) + 1 if len(table) else 1), -1)
    items[row, table[at, 1]] = table[at, 0]
    partners = paired(items[:-1] >= 0)
    held = items[partners]  # P, 2, inner
    pair, inner = np.nonzero((held >= 0).any(1))
    elements = np.zeros((len(pair), 4), np.int32)
    elements[:, 0], elements[:, 1:3] = inner, held[pair, :, inner]
    bounds = np.searchsorted(pair, np.arange(len(partners) + 1))
    return Pairs(partners, records, bounds, elements, len(table))


def paired(has: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Pairs of lines with as much in common as can be found.

    Each round splits all pairs, puts their lines on two sides at random, and takes the best
    assignment of one side to the other; which is no worse than the pairs were.

    Args:
        has: (lines, inner), what each of them has.

    Returns:
        (pairs, 2), the lesser line first, −1 for the partner of an odd one; by their first lines.
    """
    from scipy.optimize import linear_sum_assignment  # here: import mixgrain loads no scipy

    count = len(has)
    made = np.arange(count + count % 2).reshape(-1, 2)
    # What an odd line has for a partner is a line that has nothing.
    sets = np.zeros((made.size, has.shape[1]), np.float32)
    sets[:count] = has
    shared = sets @ sets.T
    sides = np.random.default_rng(0)
    for _ in range(ROUNDS):
        one, other = sides.permuted(made, axis=1).T
        ones, others = linear_sum_assignment(shared[np.ix_(one, other)], maximize=True)
        made = np.stack([one[ones], other[others]], 1)
    made = np.sort(made, 1)
    made = made[np.argsort(made[:, 0])]
    return np.where(made < count, made, -1)


def tiles(
    found: Pairs, size: int, wide: int, across: int, matrices: int, clusters: int
) -> NDArray[np.int32]:
    """The tiles of each CTA of ``spmm_pair_sm90``, loads about equal.

    Args:
        found: the pairs.
        size: side of a block.
        wide: columns of x of a tile.
        across: tiles side by side.
        matrices: how many share the pairs.
        clusters: of two CTAs, of the grid.

    Returns:
        int32 (CTAs, most, 4), those of a cluster one after the other: line (−1 = none), the pair's
        first element · 2 + whether the line is the other, its elements (−1 after the last tile),
        matrix · across + column tile.
    """
    # What a tile brings in; its beginning and end cost about as much as an element.
    blocks = np.where(found.partners >= 0, found.records[found.partners, 2], 0)
    first, elements = found.bounds[:-1], np.diff(found.bounds)
    costs = (wide * elements + size * blocks.sum(1) + wide).astype(float)
    repeats, lines = across * matrices, len(costs)
    every = np.tile(costs, repeats)
    mine = _dealt(every, min(clusters, len(every)))
    if sum(map(len, mine)) <= EVENED * len(mine):
        evened(mine, every.tolist())
    longest = max(map(len, mine))
    # The same columns at about the same time: L2 then holds what they share.
    at = np.array([sorted(own) + [-1] * (longest - len(own)) for own in mine])
    repeat, pair = np.divmod(at, lines)
    # The larger line goes to the CTA of a cluster that has had less so far.
    more = np.where(at < 0, 0, blocks[pair, 0] - blocks[pair, 1])
    swap, ahead = np.zeros_like(at), np.zeros(len(at), np.int64)
    every = np.arange(len(at))
    for place in np.argsort(-np.abs(more), axis=1, kind="stable").T:
        by = more[every, place]
        swap[every, place] = ahead * by > 0
        ahead += np.where(ahead * by > 0, -by, by)
    other = np.stack([swap, 1 - swap], 1)  # clusters, 2, most
    partner = found.partners[pair[:, None], other]
    made = np.zeros((*other.shape, 4), np.int32)
    made[..., 0] = np.where(partner >= 0, found.records[partner, 0], -1)
    made[..., 1] = 2 * first[pair][:, None] + other
    made[..., 2] = np.where(at < 0, -1, elements[pair])[:, None]
    made[..., 3] = repeat[:, None]
    return made.reshape(-1, longest, 4)


def _dealt(costs: NDArray[np.float64], clusters: int) -> list[list[int]]:
    """Tiles of each cluster."""
    order = np.argsort(-costs, kind="stable")
    if len(order) > DEALT:  # in turn, every other turn backwards
        turns = -(-len(order) // clusters)
        dealt = np.full(turns * clusters, -1)
        dealt[: len(order)] = order
        rounds = dealt.reshape(turns, clusters)
        rounds[1::2] = rounds[1::2, ::-1]
        return [[at for at in own if at >= 0] for own in rounds.T.tolist()]
    mine: list[list[int]] = [[] for _ in range(clusters)]
    heap = [(0.0, cluster) for cluster in range(clusters)]
    for at in order.tolist():
        load, cluster = heap[0]
        heapq.heapreplace(heap, (load + costs[at], cluster))
        mine[cluster].append(at)
    return mine
