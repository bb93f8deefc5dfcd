"""Who computes which tile: each goes to the CTA that is free first."""

import heapq
import itertools

import numpy as np
import pytest

from mixgrain.attention.cuda import walk

KINDS = {
    "any": lambda rng, n: rng.integers(1, 500, n),
    "equal": lambda rng, n: np.full(n, 200),
    "falling": lambda rng, n: np.sort(rng.integers(1, 2000, n))[::-1],
    "few values": lambda rng, n: rng.integers(1, 4, n),
    "heavy tails": lambda rng, n: (1 + 1e4 * rng.pareto(1.2, n)).astype(np.int64),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tile_goes_to_the_cta_that_is_free_first(kind) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        total = int(rng.integers(1, 4096))
        ctas = int(rng.integers(1, min(total, 300) + 1))
        costs = KINDS[kind](rng, total).astype(np.int64)
        free = [(0, cta) for cta in range(ctas)]
        mine: list[list[int]] = [[] for _ in range(ctas)]
        for tile, cost in enumerate(costs.tolist()):
            load, cta = free[0]
            mine[cta].append(tile)
            heapq.heapreplace(free, (load + cost, cta))
        starts, tiles = walk._dealt(costs, ctas)
        assert [tiles[a:b].tolist() for a, b in itertools.pairwise(starts)] == mine
