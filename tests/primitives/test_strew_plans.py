"""Rows of single entries that are strewn over dense tiles: plans, cuts, and who takes them."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layer_plans import asked, entries

from mixgrain.cuda.device import pretending
from mixgrain.formats.sparsify import sparsify
from mixgrain.primitives.cuda import strew_sm90
from mixgrain.primitives.plans import cuda_row, cuda_strew

SIZES = sorted({(how.tall, how.deep) for how in strew_sm90.COSTS})


def made(dense: torch.Tensor, transposed: bool, *cut: int):
    """The tables of a matrix, its values by slot, and what they are to say."""
    s = sparsify(dense, "row")
    part = cuda_row.part(s.layout)
    items, indices = (part.tensors[n] for n in ((5, 3) if transposed else (1, 0)))
    order = part.tensors[4] if transposed else None
    right = dense.T if transposed else dense
    table = cuda_strew.strewn(items, indices, order, *right.shape, *cut[:2])
    return table, cuda_strew.dealt(table, *cut[2:]), s.values, right


def strewn(
    table: cuda_strew.Strewn,
    dealt: cuda_strew.Dealt,
    values: torch.Tensor,
    shape,
    tall,
    deep,
    piece,
):
    """The matrix as the kernel spreads it, and how often each element is written."""
    lines, across = -(-shape[0] // tall), -(-shape[1] // deep)
    parts, teams = len(dealt.heads) // lines, dealt.heads.shape[1]
    found, counts = (torch.zeros(lines * tall, across * deep) for _ in range(2))
    end, done = 0, [-1] * lines
    for n, head in enumerate(dealt.heads):
        line, mine, begin = n // parts, [], end
        steps = int(head[0, 0, 2])
        for start, several, of_part, _ in head[:, 0].tolist():
            assert start == end and of_part == steps
            end += several
            team = dealt.pieces[start:end]
            assert torch.equal(head[len(mine), 1:][: len(team)], team[:2])
            assert not head[len(mine), 1:][len(team) :].any()
            # Pieces of a step follow each other; the first opens it, the last closes it.
            opens, closes = team[:, 2] % 2 == 1, team[:, 2] // 2 % 2 == 1
            assert opens.sum() == closes.sum() and opens[:1].all() and closes[-1:].all()
            assert torch.equal(opens[1:], closes[:-1])
            assert torch.equal(team[1:][~opens[1:], 2] // 4, team[:-1][~closes[:-1], 2] // 4)
            assert (team[:, 1] > 0).all() and (team[:, 1] <= piece).all()
            mine.append((team[opens, 2] // 4).tolist())
        # Teams take turns, parts follow each other.
        both = [mine[i % teams][i // teams] for i in range(steps)]
        assert sum(map(len, mine)) == steps and both == sorted(set(both))
        assert not both or both[0] > done[line]
        done[line] = max([done[line], *both])
        for first, bundles, inner, base in dealt.pieces[begin:end].tolist():
            spots = table.spots[first : first + bundles].long() & 0xFFFF
            panel, byte = spots // (tall * 128), spots % (tall * 128)
            row, column = byte // 128, panel * 64 + ((byte % 128) ^ (byte // 128 % 8 * 16)) // 2
            at = line * tall + row, inner // 4 * deep + column
            assert (column < deep).all()
            found[at] = values[base + (table.slots[first : first + bundles].long() & 0xFFFF)]
            counts.index_put_(at, torch.ones_like(found[at]), accumulate=True)
    return found[: shape[0], : shape[1]], counts[: shape[0], : shape[1]]


@pytest.mark.parametrize(("tall", "deep"), SIZES)
@pytest.mark.parametrize("transposed", [False, True])
@given(
    parts=st.sampled_from([1, 2, 4]),
    small=st.booleans(),
    teams=st.sampled_from([2, 4]),
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    d=st.sampled_from([0.003, 0.1, 0.6, 1.0]),
    seed=st.integers(0, 99),
    far=st.sampled_from([100, 1 << 16]),
)
@settings(max_examples=25, deadline=None)
def test_every_entry_has_its_place(
    rows, columns, d, seed, parts, teams, small, far, transposed, tall, deep
):
    """The last entry of a piece fills its bundles up; all others come once."""
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=g) < d
    dense = torch.where(kept, torch.arange(1.0, rows * columns + 1).view(rows, columns), 0)
    piece = 32 if small else tall * deep // 64
    with mock.patch.object(cuda_strew, "FAR", far):
        table, dealt, values, right = made(dense, transposed, tall, deep, parts, teams, piece)
    assert not len(table.slots) or (table.slots.long() & 0xFFFF).max() < far
    found, counts = strewn(table, dealt, values, right.shape, tall, deep, piece)
    assert torch.equal(found, right)
    assert torch.equal(counts > 0, right != 0)
    assert (counts > 1).sum() <= len(dealt.pieces)
    assert len(dealt.heads) == parts * -(-right.shape[0] // tall)
    steps = dealt.heads[:, 0, 0, 2].view(-1, parts)
    assert (steps.max(1).values - steps.min(1).values <= 1).all()
    ends = torch.cat([torch.zeros(1), (right != 0).sum(1).cumsum(0)])
    assert torch.equal(table.bounds.long(), ends.long())


def test_slots_far_apart():
    """Rows so long that slots of one step are further apart than 16 bits count."""
    dense = torch.arange(1.0, 64 * 4096 + 1).view(64, 4096)
    for transposed, far in ((False, 4), (True, 8)):
        table, dealt, values, right = made(dense, transposed, 64, 128, 1, 4, 128)
        found, counts = strewn(table, dealt, values, right.shape, 64, 128, 128)
        assert torch.equal(found, right) and (counts == 1).all()
        assert len(dealt.pieces[:, 3].unique()) >= far


def test_warps_look_up_neighbours():
    """What 32 threads of a warp look up at once are slots side by side."""
    table, dealt, _, _ = made(torch.ones(128, 256), False, 128, 128, 1, 2, 256)
    assert dealt.pieces[:, 1].tolist() == [256] * 16
    slots = (table.slots.long() & 0xFFFF).view(-1, cuda_strew.DEALT, cuda_strew.BUNDLE)
    assert (slots[:, 1:] - slots[:, :-1]).float().eq(1).double().mean() > 0.99


def test_cuts_fit():
    """Shared memory and threads of a multiprocessor."""
    for how in strew_sm90.COSTS:
        assert how.shared + 1024 <= 228 * 1024 - 1024
        assert how.threads <= 512


@pytest.mark.parametrize(
    ("shape", "d", "tokens", "taken", "backward"),
    [
        ((4096, 4096), 0.1, 64, True, True),
        ((4096, 4096), 0.1, 4096, True, True),
        ((1024, 4096), 0.05, 512, True, True),
        # Little to gather.
        ((4096, 4096), 0.001, 300, False, False),
        ((4096, 4096), 0.1, 16, True, True),
        # Few tokens have a kernel of their own, forward.
        ((4096, 4096), 0.1, 4, False, True),
        ((11008, 4096), 0.02, 8, False, False),
        # Rows that TMA cannot read, or whole stores not write.
        ((1024, 1028), 0.2, 256, False, False),
        ((1028, 1024), 0.2, 256, False, False),
    ],
)
def test_who_takes_a_layer(shape, d, tokens, taken, backward):
    layout = entries(*shape, d).layout
    for name in ("tokens", "linear"):
        found = asked(layout, tokens, "90a", name)
        assert (found == ["spmm_strew_sm90"]) == taken, found
        assert "spmm_strew_sm90" not in asked(layout, tokens, "90", name)
    transposed = asked(layout, tokens, "90a", "token_gradients")
    assert (transposed == ["spmm_strew_sm90"]) == backward, transposed


def test_the_number_of_matrices_has_no_part_in_the_choice():
    """A row's sum is the same in any batch."""
    with pretending("90a", multiprocessors=132):
        layout = entries(1024, 1024, 0.1).layout
        part = cuda_row.part(layout)
        for free in (1, 3, 1000):
            values = torch.empty(free, layout.slots, dtype=torch.half, device="meta")
            x = torch.empty(free, 1, 256, 1024, dtype=torch.half, device="meta").mT
            assert strew_sm90.takes([part], values, x, None, torch.half, False, 1024, False)
