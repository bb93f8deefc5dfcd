"""Lines of blocks two by two, so that what both ask of x comes in once for both.

A line is a block row, or a block column where the product is with the transpose. Scattered blocks
leave a choice of partners: of 64 lines that have a fifth of all blocks each, the best pairs ask
for a fifth less than single lines do.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .even import dealt

# Rounds of assignments; more find less than a hundredth.
ROUNDS = 16


class Pairs(NamedTuple):
    """Pairs of lines and what they have.

    Attributes:
        partners: int64 (P, 2), rows of the records, −1 where there is no other.
        records: int32 (lines, 3) that they are rows of.
        bounds: int64 (P + 1,) into steps.
        steps: int32 (U, 4), of each pair: inner block of the one line, of the other, item of the
            one, of the other; −1 = it has nothing to do. The same inner block: both read it.
        reads: int64 (P,), inner blocks that either line of a pair has.
        blocks: items in all.
    """

    partners: NDArray[np.int64]
    records: NDArray[np.int32]
    bounds: NDArray[np.int64]
    steps: NDArray[np.int32]
    reads: NDArray[np.int64]
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
    has = held[pair, :, inner] >= 0
    # Between two inner blocks that both read they go on side by side, each in order of its own.
    shared = has.all(1)
    begins = shared | (np.diff(pair, prepend=-1) > 0)
    stretch = np.cumsum(begins) - 1
    before: NDArray[np.int64] = np.cumsum(has, 0) - has
    place: NDArray[np.int64] = before - before[begins][stretch]
    keys = stretch[:, None] * items.shape[1] + place
    kept = np.unique(keys[has])
    steps = np.full((len(kept), 4), -1, np.int32)
    for line in range(2):
        own = has[:, line]
        step = np.searchsorted(kept, keys[own, line])
        steps[step, line], steps[step, 2 + line] = inner[own], held[pair[own], line, inner[own]]
    of = pair[begins][kept // items.shape[1]]
    bounds = np.searchsorted(of, np.arange(len(partners) + 1))
    reads = np.bincount(pair, minlength=len(partners))
    return Pairs(partners, records, bounds, steps, reads, len(table))


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
        first step · 2 + whether the line is the other, its steps (−1 after the last tile),
        matrix · across + column tile.
    """
    # What a tile brings in; its beginning and end cost about as much as an element.
    blocks = np.where(found.partners >= 0, found.records[found.partners, 2], 0)
    first, steps = found.bounds[:-1], np.diff(found.bounds)
    costs = (wide * found.reads + size * blocks.sum(1) + wide).astype(float)
    repeats, lines = across * matrices, len(costs)
    at = dealt(np.tile(costs, repeats), min(clusters, lines * repeats))
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
    made[..., 2] = np.where(at < 0, -1, steps[pair])[:, None]
    made[..., 3] = repeat[:, None]
    return made.reshape(-1, at.shape[1], 4)
