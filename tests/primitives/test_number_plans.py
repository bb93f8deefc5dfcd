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
    down, over = found.table.shape
    assert down % 8 == 0 and over % (wide // 16) == 0 and down >= lines and over >= across
    assert found.table[rows.long(), columns.long()].tolist() == number.tolist()
    assert int((found.table >= 0).sum()) == len(rows)
    keeping = {(r // 8, c // (wide // 16)) for r, c in places.tolist()}
    listed = [tuple(tile) for tile in found.tiles.tolist()]
    assert len(listed) == len(keeping) and set(listed) == keeping
    assert listed == sorted(listed, key=lambda tile: tile[::-1])
