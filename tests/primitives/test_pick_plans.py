"""Values of single entries that are picked out of dense tiles: plans, cuts, and who takes them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layer_plans import asked, entries

from mixgrain.cuda.device import pretending
from mixgrain.formats import patterns as P
from mixgrain.formats.sparsify import sparsify
from mixgrain.primitives.cuda import dense_tile_sm90, row_weights_sm90
from mixgrain.primitives.cuda.parts import gaps
from mixgrain.primitives.dispatch import TABLE
from mixgrain.primitives.plans import cuda_pick, cuda_row
from mixgrain.primitives.plans.plan import split


@pytest.mark.parametrize("wide", dense_tile_sm90.STAGES)
@given(
    rows=st.integers(1, 400),
    columns=st.integers(1, 600),
    d=st.sampled_from([0.0005, 0.1, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_every_entry_is_picked_once(rows, columns, d, seed, wide):
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=g) < d
    dense = torch.where(kept, torch.arange(1.0, rows * columns + 1).view(rows, columns), 0)
    s = sparsify(dense, "row")
    part, tall = cuda_row.part(s.layout), dense_tile_sm90.TALL
    indices, items = part.tensors[:2]
    made = cuda_pick.picks(items, indices, rows, columns, tall, wide)
    assert sorted(made.slots.tolist()) == list(range(s.layout.slots))
    assert made.tiles[:, 2:].flatten().tolist() == sorted(made.tiles[:, 2:].flatten().tolist())
    end, seen = 0, set()
    for row, column, first, last in made.tiles.tolist():
        assert first == end < last and row % tall == 0 and column % wide == 0
        assert (row, column) not in seen
        end, seen = last, seen | {(row, column)}
        spot, slot = made.spots[first:last].long() & 0xFFFF, made.slots[first:last].long()
        assert torch.equal(dense[row + spot // wide, column + spot % wide], s.values[slot])
        assert (slot.diff() > 0).all()
    assert end == s.layout.slots


@pytest.mark.parametrize(
    ("shape", "d", "tokens", "taken"),
    [
        ((4096, 4096), 0.1, 64, True),
        ((4096, 4096), 0.1, 4096, True),
        ((768, 3072), 0.1, 1024, True),
        # Little to gather.
        ((4096, 4096), 0.0005, 2048, False),
        # Rows that TMA cannot read.
        ((1024, 1028), 0.2, 2048, False),
        ((1028, 1024), 0.2, 2048, False),
    ],
)
def test_who_takes_a_gradient(shape, d, tokens, taken):
    layout = entries(*shape, d).layout
    found = asked(layout, tokens, "90a", "token_gradients", of=0)
    assert (found == ["sddmm_pick_sm90"]) == taken, found
    other = asked(layout, tokens, "80", "token_gradients", of=0)
    assert other[:2] == ["turn", "turn"] and set(other[2:]) == {"sddmm_row"}


def test_slots_that_nothing_keeps():
    """A mixed layout has some behind its rows, which kernels that gather clear and this not."""
    layout = P.random(0.02, 0).to_layout("mixed", 1024, 1024)
    slots, _, _, parts = split(TABLE["linear"][type(layout)]["cuda"](layout))
    assert [part.kind for part in parts] == ["crow"] and slots == layout.slots > layout.nnz
    assert gaps(parts, slots) == []
    assert gaps(parts, slots, cleared=False) == [(layout.nnz, slots)]
    assert asked(layout, 2048, "90a", "token_gradients", of=0) == ["sddmm_pick_sm90"]


def test_the_number_of_matrices_has_no_part_in_the_choice():
    """A sum is the same in any batch."""
    with pretending("90a", multiprocessors=132):
        part = cuda_row.part(entries(1024, 1024, 0.1).layout)
        for free in (1, 3, 1000):
            x = torch.empty(free, 1, 256, 1024, dtype=torch.half, device="meta").mT
            assert row_weights_sm90.takes(part, x, x, None, torch.half)
