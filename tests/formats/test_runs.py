"""Runs against bool matrices: every function, on random and on extreme rows."""

from __future__ import annotations

import pytest
import torch

from mixgrain.formats import runs as R
from mixgrain.formats.errors import LayoutError

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st


@st.composite
def masks(draw, rows=None, keys=None):
    rows = draw(st.integers(0, 6)) if rows is None else rows
    keys = draw(st.integers(0, 12)) if keys is None else keys
    kind = draw(st.sampled_from(["random", "full", "empty"]))
    if kind != "random":
        return torch.full((rows, keys), kind == "full")
    bits = draw(st.lists(st.booleans(), min_size=rows * keys, max_size=rows * keys))
    return torch.tensor(bits, dtype=torch.bool).reshape(rows, keys)


@st.composite
def pairs(draw):
    a = draw(masks())
    return a, draw(masks(*a.shape))


def dense(runs: R.Runs, nk: int) -> torch.Tensor:
    """The definition: run by run."""
    runs.validate(nk)
    mask = torch.zeros(runs.num_rows, nk, dtype=torch.bool)
    for row in range(runs.num_rows):
        for k in range(int(runs.offsets[row]), int(runs.offsets[row + 1])):
            mask[row, int(runs.lo[k]) : int(runs.hi[k])] = True
    return mask


@given(masks())
def test_from_mask_and_back(mask) -> None:
    assert torch.equal(dense(R.from_mask(mask), mask.shape[1]), mask)


@given(masks())
def test_from_sorted_pairs_gives_the_same_arrays(mask) -> None:
    a = R.from_mask(mask)
    b = R.from_sorted_pairs(*mask.nonzero(as_tuple=True), num_rows=mask.shape[0])
    for field in ("offsets", "lo", "hi"):
        assert torch.equal(getattr(a, field), getattr(b, field))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 8), st.integers(1, 5)), max_size=20))
def test_from_intervals_merges(spans) -> None:
    expected = torch.zeros(4, 13, dtype=torch.bool)
    for row, lo, length in spans:
        expected[row, lo : lo + length] = True
    table = torch.tensor(spans, dtype=torch.int64).reshape(-1, 3)
    runs = R.from_intervals(table[:, 0], table[:, 1], table[:, 1] + table[:, 2], 4, 13)
    assert torch.equal(dense(runs, 13), expected)


@given(pairs())
def test_set_operations(both) -> None:
    a, b = both
    nk = a.shape[1]
    x, y = R.from_mask(a), R.from_mask(b)
    assert torch.equal(dense(R.union(x, y, nk=nk), nk), a | b)
    assert torch.equal(dense(R.union(x, y, R.complement(x, nk), nk=nk), nk), a | b | ~a)
    assert torch.equal(dense(R.intersection(x, y, nk), nk), a & b)
    assert torch.equal(dense(R.difference(x, y, nk), nk), a & ~b)
    assert torch.equal(dense(R.complement(x, nk), nk), ~a)


@given(masks())
def test_counts(mask) -> None:
    rows, nk = mask.shape
    runs = R.from_mask(mask)
    assert runs.num_rows == rows
    assert torch.equal(runs.lengths(), mask.sum(1))
    assert runs.nnz() == int(mask.sum())
    for first, last in ((0, nk), (nk // 3, nk // 2), (nk, nk)):
        assert torch.equal(runs.inside(first, last), mask[:, first:last].sum(1))
    keys = torch.arange(0, nk, 3)
    assert torch.equal(runs.among(keys), mask[:, keys].sum(1))


@given(masks())
def test_expand_and_pairs(mask) -> None:
    row, col = mask.nonzero(as_tuple=True)
    runs = R.from_mask(mask)
    offsets, columns = runs.expand()
    assert torch.equal(columns, col)
    assert torch.equal(offsets.diff(), mask.sum(1))
    assert offsets[0] == 0
    assert all(torch.equal(x, y) for x, y in zip(runs.pairs(), (row, col), strict=True))


@given(masks(), st.data())
def test_select_repeats_and_reorders(mask, data) -> None:
    rows, nk = mask.shape
    chosen = data.draw(st.lists(st.integers(0, rows - 1), max_size=9)) if rows else []
    index = torch.tensor(chosen, dtype=torch.int64)
    assert torch.equal(dense(R.from_mask(mask).select(index), nk), mask[index])


@given(masks(), st.data())
def test_clip(mask, data) -> None:
    rows, nk = mask.shape
    end = st.lists(st.integers(0, nk), min_size=rows, max_size=rows)
    lo, hi = (torch.tensor(data.draw(end), dtype=torch.int64) for _ in range(2))
    j = torch.arange(nk)
    expected = mask & (j >= lo[:, None]) & (j < hi[:, None])
    assert torch.equal(dense(R.clip(R.from_mask(mask), lo, hi), nk), expected)


@given(st.lists(masks(keys=7), min_size=1, max_size=4))
def test_stacked(parts) -> None:
    runs = R.stacked([R.from_mask(part) for part in parts])
    assert torch.equal(dense(runs, 7), torch.cat(parts))


def test_from_interval_and_repeated() -> None:
    lo, hi = torch.tensor([0, 2, 3]), torch.tensor([2, 2, 5])
    assert R.from_interval(lo, hi).lengths().tolist() == [2, 0, 2]
    twice = R.repeated(torch.tensor([1, 4]), torch.tensor([2, 6]), 3)
    assert dense(twice, 6).int().tolist() == [[0, 1, 0, 0, 1, 1]] * 3
    assert R.empty(4, torch.device("cpu")).lengths().tolist() == [0] * 4


def test_ragged_arange() -> None:
    row, step = R.ragged_arange(torch.tensor([2, 0, 3]))
    assert (row.tolist(), step.tolist()) == ([0, 0, 2, 2, 2], [0, 1, 0, 1, 2])


@pytest.mark.parametrize(
    "offsets, lo, hi",
    [
        ([1, 1], [0], [1]),  # does not start with 0
        ([0, 2], [0], [1]),  # does not end with the number of runs
        ([0, 2], [0, 2], [2, 3]),  # adjacent
        ([0, 2], [4, 0], [5, 1]),  # not rising
        ([0, 1], [2], [2]),  # empty
        ([0, 1], [4], [9]),  # beyond the keys
    ],
)
def test_validate_finds(offsets, lo, hi) -> None:
    with pytest.raises(LayoutError, match="Runs:"):
        R.Runs(*(torch.tensor(x) for x in (offsets, lo, hi))).validate(6)


def test_rows_times_keys_beyond_32_bits() -> None:
    nk, rows = 1 << 33, 1 << 10
    lo = torch.arange(rows)
    a = R.from_interval(lo, lo + 5)
    b = R.from_interval(lo + 3, torch.full_like(lo, nk))
    assert R.union(a, b, nk=nk).nnz() == int((nk - lo).sum())
    assert R.intersection(a, b, nk).nnz() == 2 * rows
