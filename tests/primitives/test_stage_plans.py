"""Tiles in stages of 64 inner positions, and how the kernel on wgmma is cut."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixgrain.formats.tile import TileLayout
from mixgrain.primitives.cuda import tile_sm90
from mixgrain.primitives.plans import cuda_tile, cuda_tile_stages


@pytest.mark.parametrize("groups, cluster", [(2, 1), (4, 1), (4, 2), (2, 4)])
@given(
    rows=st.integers(1, 700),
    columns=st.integers(1, 400),
    d=st.sampled_from([0.02, 0.2, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_stages_hold_every_tile_once(groups, cluster, rows, columns, d, seed):
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(-(-rows // 16), -(-columns // 16), generator=g) < d
    layout = TileLayout.from_tile_mask(kept, (rows, columns))
    part, per = cuda_tile.part(layout), 4 * groups
    for tables, inner, mask in (
        (part.tensors[:2], columns, kept),
        (part.tensors[2:], rows, kept.T),
    ):
        made = cuda_tile_stages.stages(*tables, groups, cluster, inner)
        assert made.capacity in cuda_tile_stages.CAPACITIES
        assert made.table.shape[1] == 2 * per + 4 + made.capacity
        assert made.table.shape[1] % 4 == 0 and made.table.is_contiguous()
        lines = mask.shape[0]
        numbers = torch.full(mask.shape, -1)
        numbers[cuda_tile.lines_of(tables[0]), tables[1][:, 0].long()] = tables[1][:, 1].long()
        found, seen = torch.full_like(numbers, -1), 0
        clusters = -(-lines // (per * cluster))
        assert sorted(made.spans[:, 0].tolist()) == list(range(clusters))
        assert len(made.table) == cluster * int(made.spans[:, 2].sum())
        for (which, first, count), rank in itertools.product(made.spans.tolist(), range(cluster)):
            start, before = cluster * first + rank * count, -1
            of_first = made.table[cluster * first :][:count, 2 * per]
            assert torch.equal(made.table[start : start + count, 2 * per], of_first)
            for record in made.table[start : start + count]:
                notes, (at, tiles, *rest) = record[: 2 * per], record[2 * per :][:4].tolist()
                items = record[2 * per + 4 :]
                assert rest == [0, 0] and before < at and 0 <= tiles <= made.capacity
                assert not items[tiles:].any()
                before, used = at, []
                slots = notes.view(per, 2)[:, :1].contiguous().view(torch.uint8)
                for line in range(per):
                    word, four = int(notes[2 * line + 1]), range(line // 4 * 4, line // 4 * 4 + 4)
                    for quarter in range(4):
                        slot = int(slots[line, quarter])
                        there = any(slots[n, quarter] != 255 for n in four)
                        over = (4 * at + quarter + 1) * 16 > inner
                        assert word >> quarter & 1 == there
                        assert word >> (4 + quarter) & 1 == (there and over)
                        if slot != 255:
                            used.append(slot)
                            to = ((which * cluster + rank) * per + line, 4 * at + quarter)
                            assert found[to] == -1
                            found[to] = items[slot]
                assert sorted(used) == list(range(tiles))
                seen += tiles
        assert torch.equal(found, numbers) and seen == layout.tiles


def test_cuts_fit():
    """Shared memory of a multiprocessor: stages, what results leave through, lists and barriers."""
    for tokens, cuts in tile_sm90.CUTS.items():
        for cut in cuts:
            for capacity in cuda_tile_stages.CAPACITIES:
                stages = cut.stages(capacity)
                static = stages * (32 * cut.groups + 16) + (stages + 5) * (4 * (4 + capacity) + 8)
                assert 3 <= stages <= tile_sm90.STAGES
                assert cut.shared(capacity, tokens) + static <= 227 * 1024


@pytest.mark.parametrize("tokens", [False, True])
def test_the_cheapest_cut_is_taken(tokens):
    """More columns of x never cost less; the cut does not change with the order of its list."""
    for lines, tiles in ((48, 461), (256, 13107), (512, 262_144)):
        before = 0.0
        for width in (8, 64, 128, 256, 1024, 4096):
            given = (132, lines, tiles, 16 * lines, width, 1)
            cut = tile_sm90.choose(*given, tokens)
            costs = [tile_sm90.cost(other, *given) for other in tile_sm90.CUTS[tokens]]
            assert cut in tile_sm90.CUTS[tokens] and tile_sm90.cost(cut, *given) == min(costs)
            assert min(costs) >= before
            before = min(costs)
