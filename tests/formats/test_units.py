"""Arrays of units of 64: what is alike is told apart from what is not."""

import itertools

import numpy as np
import pytest

from mixgrain.formats import units


@pytest.mark.parametrize("word", [1, (1 << 40) - 1, 0xFFFFFFFFFFFFFFFF])
def test_equal_words_in_other_places_are_another_kind(word, monkeypatch) -> None:
    # Pairs of places with the same middle, and runs: what masks of bands and lists look like.
    rows = np.zeros((64 * 63 // 2, 64), np.uint64)
    for row, (a, b) in zip(rows, itertools.combinations(range(64), 2), strict=True):
        row[[a, b]] = word
    rows = np.concatenate([rows, np.tril(np.full((64, 64), word, np.uint64), -2), rows])
    monkeypatch.setattr(np, "unique", None)  # the slow way, for digests that meet
    first, kind = units.distinct(rows)
    assert len(first) == len({row.tobytes() for row in rows})
    assert np.array_equal(rows[first[kind]], rows)
