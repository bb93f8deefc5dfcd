"""Random patterns: counts, distinctness, fairness, and the same draw for every shape and run."""

from __future__ import annotations

import math

import pytest
import torch
from pattern_checks import check_forms, check_suffix
from predicates import SIDES, bigbird_fixed, mask_of

from mixgrain.formats import draw
from mixgrain.formats import patterns as P

FROZEN_WORDS = [-6523613405836042406, -2152535657050944081, -4616330145664149646]
FROZEN_ROWS = [[8, 9, 18, 31, 39], [7, 15, 22, 23, 25], [5, 6, 16, 20, 36], [16, 34, 38, 43, 49]]
FROZEN_BLOCKS = [12, 13, 14, 15, 48, 49]


@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("nk", SIDES)
def test_random_counts_are_the_density_rounded(density, nk) -> None:
    counts = P.random(density, 3).dense(70, nk).sum(1)
    assert bool((counts >= math.floor(nk * density)).all())
    assert bool((counts <= math.ceil(nk * density)).all())


def test_random_density_is_met_on_average() -> None:
    # 4,000 rows of 0.35 keys: the count has variance below 1/4 a row, so 4 sigma are 127 keys.
    assert abs(P.random(0.005, 0).nnz(4000, 70) - 4000 * 0.35) < 127


@pytest.mark.parametrize("nk", [5, 64, 70])
def test_random_keys_are_fair(nk) -> None:
    """Chi-squared over keys, over pairs of neighbours in a row, and over rows."""
    rows, kept = 4000, 2
    mask = P.random(kept / nk, 11).dense(rows, nk).double()
    expected = mask.sum() / nk
    chi = ((mask.sum(0) - expected) ** 2 / expected).sum()
    assert chi < nk - 1 + 5 * math.sqrt(2 * (nk - 1))
    pairs = mask.T @ mask
    pairs = pairs[torch.ones(nk, nk).triu(1).bool()]
    expected = pairs.mean()
    chi = ((pairs - expected) ** 2 / expected).sum()
    assert chi < len(pairs) + 5 * math.sqrt(2 * len(pairs))
    assert (mask[1:] * mask[:-1]).sum() < 2 * rows * kept * kept / nk


def test_seeds_differ_and_repeat() -> None:
    a = P.random(0.3, 1).dense(64, 64)
    assert torch.equal(P.random(0.3, 1).dense(64, 64), a)
    assert torch.equal(P.random(0.3, 1 + (1 << 64)).dense(64, 64), a)
    for seed in (0, 2, -1, 1 << 63):
        assert 0.1 < (P.random(0.3, seed).dense(64, 64) & a).sum() / a.sum() < 0.5


def test_the_draw_is_frozen() -> None:
    """Layouts on other devices, machines and versions keep the same pairs."""
    assert draw.words(0, torch.arange(-1, 2), 0).tolist() == FROZEN_WORDS
    assert [P.random(0.1, 7).row(i, 4, 50).tolist() for i in range(4)] == FROZEN_ROWS
    assert P.random_blocks(2, 4, 7).row(3, 4, 50).tolist() == FROZEN_BLOCKS


@pytest.mark.parametrize("size", [*range(1, 34), 63, 64, 65, 1000])
def test_distinct_is_a_bijection(size) -> None:
    keys = torch.arange(5) * 1234567
    full = torch.full((5,), size)
    row, number = draw.distinct(keys, full, full)
    assert torch.equal(row, torch.arange(5).repeat_interleave(size))
    assert torch.equal(number, torch.arange(size).repeat(5))


def test_distinct_of_rows_that_differ() -> None:
    counts, sizes = torch.tensor([0, 3, 0, 1, 2]), torch.tensor([5, 3, 0, 1, 1 << 39])
    row, number = draw.distinct(torch.arange(5), counts, sizes)
    assert row.tolist() == [1, 1, 1, 3, 4, 4]
    assert number[:4].tolist() == [0, 1, 2, 0]
    assert 0 <= number[4] < number[5] < 1 << 39


@pytest.mark.parametrize("per_row, size", [(0, 4), (1, 1), (2, 4), (3, 7), (99, 16), (2, 100)])
@pytest.mark.parametrize("nk", SIDES)
def test_random_blocks_are_whole_and_counted(per_row, size, nk) -> None:
    columns = -(-nk // size)
    for nq in SIDES:
        mask = P.random_blocks(per_row, size, 5).dense(nq, nk)
        for i in range(nq):
            held = [mask[i, j * size : (j + 1) * size] for j in range(columns)]
            assert all(part.all() or not part.any() for part in held)
            assert sum(bool(part.any()) for part in held) == min(per_row, columns)
            if i and (i + nk - nq) % size:  # the same block row as the row before
                assert torch.equal(mask[i], mask[i - 1])


@pytest.mark.parametrize(
    "size, window, random, globals_", [(4, 1, 2, 1), (7, 0, 3, 2), (3, 2, 9, 0)]
)
@pytest.mark.parametrize("nk", SIDES)
def test_bigbird_draws_outside_window_and_globals(size, window, random, globals_, nk) -> None:
    keep = bigbird_fixed(size, window, globals_)
    columns = -(-nk // size)
    for nq in SIDES:
        mask = P.bigbird(size, window, random, globals_, 3).dense(nq, nk)
        fixed = mask_of(keep, nq, nk)
        assert bool((mask | ~fixed).all())
        for i in range(nq):
            own = math.floor((i + nk - nq) / size)
            free = [j for j in range(globals_, columns) if abs(j - own) > window]
            drawn = [j for j in free if mask[i, j * size]]
            assert len(drawn) == (len(free) if fixed[i].all() else min(random, len(free)))
            row = fixed[i].clone()
            for j in drawn:
                row[j * size : (j + 1) * size] = True
            assert torch.equal(mask[i], row)


PATTERNS = {
    "random": P.random(0.2, 1),
    "random, full": P.random(1.0, 1),
    "random blocks": P.random_blocks(2, 8, 1),
    "bigbird": P.bigbird(4, 1, 2, 1, 1),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_forms_and_suffix(name) -> None:
    for nq, nk in ((0, 7), (7, 0), (1, 1), (64, 64), (33, 70), (70, 33)):
        check_forms(PATTERNS[name], PATTERNS[name].dense(nq, nk))
    for nk in SIDES:
        check_suffix(PATTERNS[name], nk)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PATTERNS)
def test_the_gpu_draws_the_same(name) -> None:
    mask = PATTERNS[name].dense(300, 500)
    assert torch.equal(PATTERNS[name].dense(300, 500, device="cuda").cpu(), mask)
