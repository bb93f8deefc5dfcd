"""Where tiles lie among dense tiles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixgrain.primitives.plans.cuda_numbers import numbers


@pytest.mark.parametrize("wide", [128, 256])
@given(
    lines=st.integers(1, 40),
    across=st.integers(1, 60),
    d=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_every_tile_is_found_once(wide, lines, across, d, seed):
    g = torch.Generator().manual_seed(seed)
    places = (torch.rand(lines, across, generator=g) < d).nonzero().int()
    rows, columns = places.unbind(1)
    number = torch.randperm(len(rows), generator=g).int()
    found = numbers(rows, columns, number, lines, across, 128, wide)
    down, over = 8, wide // 16
    assert found.numbers.shape == (len(found.tiles), down, over) and found.numbers.is_contiguous()
    listed = [tuple(tile) for tile in found.tiles.tolist()]
    assert len(set(listed)) == len(listed)
    assert listed == sorted(listed, key=lambda tile: tile[::-1])  # columns of them
    back = torch.full((-(-lines // down) * down, -(-across // over) * over), -1, dtype=torch.int32)
    for (row, column), tile in zip(listed, found.numbers, strict=True):
        assert (tile >= 0).any()
        back[row * down : (row + 1) * down, column * over : (column + 1) * over] = tile
    right = torch.full_like(back, -1)
    right[rows.long(), columns.long()] = number
    assert torch.equal(back, right)
