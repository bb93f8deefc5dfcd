"""Who computes which tile: all of them once, each by the CTA that is free first."""

import heapq
import itertools

import numpy as np
import pytest
import torch

from mixgrain import patterns as P
from mixgrain.attention.cuda.plan import Work, build, unpack
from mixgrain.attention.cuda.tables import APART, DEALT, tables

pytestmark = pytest.mark.gpu
KINDS = {
    "any": lambda rng, n: rng.integers(1, 500, n),
    "equal": lambda rng, n: np.full(n, 200),
    "falling": lambda rng, n: np.sort(rng.integers(1, 2000, n))[::-1],
    "few values": lambda rng, n: rng.integers(1, 4, n),
    "heavy tails": lambda rng, n: (1 + 1e4 * rng.pareto(1.2, n)).astype(np.int64),
}


def made_up(costs: list[int]) -> Work:
    """A plan of one pattern whose items cost so much."""
    count, blank = len(costs), torch.zeros(0, dtype=torch.int32, device="cuda")
    items = torch.zeros(count, 8, dtype=torch.int32, device="cuda")
    tensors = dict.fromkeys(Work._fields[:13], blank) | {
        "items": items, "costs": torch.tensor(costs, dtype=torch.int32, device="cuda"),
    }  # fmt: skip
    starts = ((0, count), (0, 5), (0, 3))
    return Work(*tensors.values(), (64, 64), (1, 1), (0,), 2, 1, 0, *starts, (1,))


def walked(found) -> list[list[tuple[int, int]]]:
    """The tiles of every CTA."""
    starts, tiles = found.starts.tolist(), [tuple(t) for t in found.tiles.tolist()]
    return [tiles[a:b] for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tile_goes_to_the_cta_that_is_free_first(kind) -> None:
    rng = np.random.default_rng(0)
    for _ in range(8):
        count, heads = int(rng.integers(1, 1400)), int(rng.integers(1, 4))
        ctas = int(rng.integers(1, 300))
        costs = KINDS[kind](rng, count).astype(np.int64).tolist()
        # One section: by falling cost, the matrices of each item together.
        order = sorted(range(count), key=lambda item: (-costs[item], item))
        tiles = [(item, matrix) for item in order for matrix in range(heads)]
        mine = walked(tables(made_up(costs), (1, heads, heads), 1, ctas))
        if len(tiles) > DEALT * ctas:
            assert sorted(itertools.chain(*mine)) == sorted(tiles)
            continue
        streams = min(ctas, len(tiles))
        free = [(0, cta) for cta in range(streams)]
        right: list[list[tuple[int, int]]] = [[] for _ in range(streams)]
        for tile in tiles:
            load, cta = free[0]
            right[cta].append(tile)
            heapq.heapreplace(free, (load + costs[tile[0]], cta))
        assert mine == right


def test_more_items_than_are_sorted_in_shared_memory() -> None:
    costs = np.random.default_rng(1).integers(1, 10_000, 5000).tolist()
    mine = walked(tables(made_up(costs), (1, 1, 1), 1, 200))
    assert sorted(itertools.chain(*mine)) == [(item, 0) for item in range(5000)]
    for tiles in mine:
        loads = [costs[item] for item, _ in tiles]
        assert loads == sorted(loads, reverse=True)


def test_sections_come_one_after_the_other() -> None:
    # Eight key heads in two sections: none of the second before any of the first but at the end.
    costs = [300] * 40 + [100] * 60
    found = tables(made_up(costs), (2, 8, 4), 6 << 20, 64)
    mine = walked(found)
    expected = [(item, matrix) for item in range(100) for matrix in range(16)]
    assert sorted(itertools.chain(*mine)) == expected
    late = 0
    for tiles in mine:
        sections = [matrix // 8 for _, matrix in tiles]
        while sections and tiles[len(sections) - 1][0] >= 40 and sections != sorted(sections):
            sections.pop()
            late += 1
        assert sections == sorted(sections)
    assert late <= 64


def test_many_matrices_of_a_section() -> None:
    mine = walked(tables(made_up([5, 3]), (4096, 16, 1), 1 << 12, 132))
    assert len(mine) == 132
    expected = [(item, matrix) for item in range(2) for matrix in range(1 << 16)]
    assert sorted(itertools.chain(*mine)) == expected


def test_what_each_matrix_finds() -> None:
    heads = [P.window(30), P.longformer(9, [7, 60]), P.window(30) | P.random(0.01, 1), P.causal()]
    layout = P.per_head(heads).to_layout("mixed", 700, 700, device="cuda")
    work = unpack(*build(layout, 64))
    found = tables(work, (3, 4, 2), 1 << 20, 132)
    entry = torch.tensor(work.entry).repeat(3, 1)
    assert torch.equal(found.query_patterns.cpu().long(), entry)
    assert torch.equal(found.key_patterns.cpu().long(), entry)
    merges, rows = torch.tensor(work.merge_starts), torch.tensor(work.row_starts)
    longer, flat = torch.tensor(work.row_longer), entry.flatten()
    ranges = torch.stack([merges[flat], merges.diff()[flat]], 1)
    assert torch.equal(found.merge_ranges.cpu().long(), ranges)
    first, second = found.row_ranges.cpu().long()
    none = torch.zeros_like(flat)
    assert torch.equal(first, torch.stack([rows[flat], longer[flat], 700 * flat, none], 1))
    count = (rows.diff() - longer)[flat]
    right = torch.stack([rows[flat] + longer[flat], count, 700 * flat, none], 1)
    assert torch.equal(second, right)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("ctas", [1, 7, 132, 5000])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 2), (2, 64, 64), (5, 6, 3)], ids=str)
def test_every_tile_is_walked_once(shape, ctas, apart) -> None:
    groups = 3 if apart else 1
    heads = [P.window(30), P.longformer(9, [7, 60])] * (shape[1] // 2)
    pattern = P.per_head(heads) if heads else P.causal()
    work = unpack(*build(pattern.to_layout("mixed", 4096, 4096, device="cuda"), 64, groups=3))
    head_bytes = 7 << 20 if shape[0] == 5 else 1 << 20  # five sections of three key heads, or one
    found = tables(work, shape, head_bytes, ctas, groups)
    starts, tiles = found.starts.tolist(), [tuple(t) for t in found.tiles.tolist()]
    assert starts[0] == 0 and starts[-1] == len(tiles) == len(set(tiles))
    assert starts == sorted(starts) and len(starts) - 1 == min(ctas, len(tiles))
    expected = [
        (item, matrix, group)
        for matrix in range(shape[0] * shape[1])
        for u in [work.entry[matrix % len(work.entry)]]
        for item in range(work.item_starts[u], work.item_starts[u + 1])
        for group in range(groups)
    ]
    items = [(code % (1 << APART), code >> APART, matrix) for code, matrix in tiles]
    walked = [
        (item, matrix, group)
        for item, left, matrix in items
        for group in range(groups)
        if not left >> group & 1
    ]
    assert sorted(walked) == sorted(expected)
    # Parts only where every one has a CTA of its own, and as many as there is room for.
    whole = len(expected) // groups
    fitting = [n for n in (2, groups) if apart and n * whole <= ctas]
    assert len(tiles) == whole * max([1, *fitting])
    costs = work.costs.tolist()
    loads = [sum(costs[item] for item, _, _ in items[a:b]) for a, b in itertools.pairwise(starts)]
    assert max(loads) <= 1.1 * sum(loads) / len(loads) + max(costs)
    assert tables(work, shape, head_bytes, ctas, groups) is found
