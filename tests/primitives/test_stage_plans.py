"""Tiles in stages of 64 inner positions, and how the kernel on wgmma is cut."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixgrain.formats.tile import TileLayout
from mixgrain.primitives.cuda import tile_sm90
from mixgrain.primitives.plans import cuda_tile
from mixgrain.primitives.plans import cuda_tile_stages as stages


@pytest.mark.parametrize("groups", [2, 4])
@given(
    rows=st.integers(1, 700),
    columns=st.integers(1, 400),
    d=st.sampled_from([0.02, 0.2, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_stages_hold_every_tile_once(groups, rows, columns, d, seed):
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(-(-rows // 16), -(-columns // 16), generator=g) < d
    layout = TileLayout.from_tile_mask(kept, (rows, columns))
    part, per = cuda_tile.part(layout), 4 * groups
    for tables, inner, mask in (
        (part.tensors[:2], columns, kept),
        (part.tensors[2:], rows, kept.T),
    ):
        made = stages.stages(*tables, groups, inner)
        assert made.capacity in stages.CAPACITIES
        assert made.table.shape[1] == 2 * per + 4 + made.capacity
        assert made.table.shape[1] % 4 == 0 and made.table.is_contiguous()
        lines = mask.shape[0]
        numbers = torch.full(mask.shape, -1)
        numbers[cuda_tile.lines_of(tables[0]), tables[1][:, 0].long()] = tables[1][:, 1].long()
        found, seen = torch.full_like(numbers, -1), 0
        assert sorted(made.spans[:, 0].tolist()) == list(range(-(-lines // per)))
        for group, first, count in made.spans.tolist():
            before = -1
            for record in made.table[first : first + count]:
                notes, (at, tiles, *rest) = record[: 2 * per], record[2 * per :][:4].tolist()
                items = record[2 * per + 4 :]
                assert rest == [0, 0] and before < at and 1 <= tiles <= made.capacity
                assert not items[tiles:].any()
                before, used = at, []
                shorts = notes.view(torch.int16).view(per, 4).int() & 0xFFFF
                for line, quarter in itertools.product(range(per), range(4)):
                    word, four = int(shorts[line, quarter]), shorts[line // 4 * 4 :][:4, quarter]
                    there = bool((four & stages.NONE == 0).any())
                    over = (4 * at + quarter + 1) * 16 > inner
                    assert bool(word & stages.MULTIPLY) == there
                    assert bool(word & stages.OVER) == (there and over)
                    if not word & stages.NONE:
                        used.append(word >> stages.PLACE)
                        to = (group * per + line, 4 * at + quarter)
                        assert found[to] == -1
                        found[to] = items[used[-1]]
                assert sorted(used) == list(range(tiles))
                seen += tiles
        assert torch.equal(found, numbers) and seen == layout.tiles


def test_cuts_fit():
    """Into the shared memory of a multiprocessor; four warps bring a stage each."""
    for cut in tile_sm90.CUTS:
        for capacity, tokens in itertools.product(stages.CAPACITIES, (False, True)):
            assert 4 <= cut.stages(capacity) <= tile_sm90.STAGES
            assert cut.shared(capacity, tokens) + 1024 <= 228 * 1024 - 1024


def test_the_cheapest_cut_is_taken():
    """More columns of x never cost less."""
    for lines, tiles in ((48, 461), (256, 13107), (512, 262_144)):
        before = 0.0
        for width in (8, 64, 128, 256, 1024, 4096):
            given = (132, lines, tiles, 16 * lines, width, 1)
            costs = {cut: tile_sm90.cost(cut, *given) for cut in tile_sm90.CUTS}
            assert costs[tile_sm90.choose(*given)] == min(costs.values()) >= before
            before = min(costs.values())


@pytest.mark.parametrize(
    "rows, inner, d, width, us, cut",
    [  # measured on an H200: microseconds, and the cut that was fastest
        (768, 3072, 0.2, 1024, 17.3, (2, 64)),
        (2048, 2048, 0.2, 1024, 16.6, (2, 128)),
        (4096, 4096, 0.1, 4096, 93.2, (4, 128)),
        (4096, 4096, 0.2, 256, 20.8, (2, 64)),
        (4096, 4096, 0.2, 512, 24.2, (2, 128)),
        (4096, 4096, 0.2, 1024, 34.5, (4, 128)),
        (4096, 4096, 0.2, 4096, 118.6, (4, 128)),
        (11008, 4096, 0.2, 128, 24.2, (2, 128)),
        (8192, 8192, 0.2, 256, 40.3, (2, 128)),
    ],
)
def test_costs_are_what_was_measured(rows, inner, d, width, us, cut):
    lines = rows // 16
    given = (132, lines, int(lines * inner // 16 * d), inner, width, 1)
    assert tile_sm90.choose(*given) == cut
    assert tile_sm90.cost(tile_sm90.Cut(*cut), *given) == pytest.approx(us, rel=0.12)
