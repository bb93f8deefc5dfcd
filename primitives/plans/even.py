"""Tiles dealt out to CTAs that walk them, loads about equal."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

# How much more than the least the most loaded may have for tiles to be taken in rounds.
SLACK = 1.02


def dealt(costs: NDArray[np.float64], walkers: int) -> NDArray[np.int64]:
    """Tiles of each walker, in the order that it takes them.

    Neighbouring tiles, which read the same columns, go out in rounds of one to each walker where
    that comes out even: L2 then holds what they share. Else the longest tile goes to whoever has
    least, and so on.

    Args:
        costs: of each tile, not negative.
        walkers: how many there are, at least one.

    Returns:
        (walkers, most), −1 after the last tile of each.
    """
    rounds = _exchanged(_rounds(costs, walkers), costs)
    most = _loads(rounds, costs).max(initial=0)
    if most <= SLACK * max(costs.sum() / walkers, costs.max(initial=0)):
        return rounds
    greedy = _exchanged(_greedy(costs, walkers), costs)
    return rounds if most <= SLACK * _loads(greedy, costs).max() else _in_order(greedy)


def _rounds(costs: NDArray[np.float64], walkers: int) -> NDArray[np.int64]:
    """In each round the longest tile for the walker with the least so far."""
    turns = -(-len(costs) // walkers)
    made, loads = np.full((walkers, turns), -1), np.zeros(walkers)
    for turn in range(turns):
        tiles = np.arange(turn * walkers, min((turn + 1) * walkers, len(costs)))
        tiles = tiles[np.argsort(-costs[tiles], kind="stable")]
        least = np.argsort(loads, kind="stable")[: len(tiles)]
        made[least, turn] = tiles
        loads[least] += costs[tiles]
    return made


def _greedy(costs: NDArray[np.float64], walkers: int) -> NDArray[np.int64]:
    """The longest tile of all for the walker with the least so far."""
    mine: list[list[int]] = [[] for _ in range(walkers)]
    heap = [(0.0, walker) for walker in range(walkers)]
    for tile in np.argsort(-costs, kind="stable").tolist():
        load, walker = heap[0]
        heapq.heapreplace(heap, (load + costs[tile], walker))
        mine[walker].append(tile)
    most = max(map(len, mine))
    return np.array([own + [-1] * (most - len(own)) for own in mine])


def _exchanged(made: NDArray[np.int64], costs: NDArray[np.float64]) -> NDArray[np.int64]:
    """Tiles of one turn exchanged between the walker with most and another, while most falls."""
    priced = np.append(costs, 0.0)[made]  # no tile costs nothing
    loads = priced.sum(1)
    for _ in range(4 * len(made)):
        top = int(loads.argmax())
        moved = priced[top] - priced
        gaps = (loads[top] - loads)[:, None]
        # The larger of the two loads afterwards.
        worst = np.where(
            (moved > 0) & (moved < gaps), loads[top] - np.minimum(moved, gaps - moved), np.inf
        )
        other, turn = divmod(int(worst.argmin()), made.shape[1])
        if not np.isfinite(worst[other, turn]):
            break
        made[[top, other], turn] = made[[other, top], turn]
        priced[[top, other], turn] = priced[[other, top], turn]
        loads[[top, other]] = priced[[top, other]].sum(1)
    return made


def _in_order(made: NDArray[np.int64]) -> NDArray[np.int64]:
    """Every walker's tiles ascending, none last."""
    most = made.max(initial=0) + 1
    made = np.sort(np.where(made < 0, most, made), 1)
    return np.where(made == most, -1, made)


def _loads(made: NDArray[np.int64], costs: NDArray[np.float64]) -> NDArray[np.float64]:
    loads: NDArray[np.float64] = np.append(costs, 0.0)[made].sum(1)
    return loads
