"""Block lines two by two: how they are paired and dealt, and the same bits as line by line."""

import numpy as np
import pytest
import torch

from mixgrain import patterns as P
from mixgrain.formats.cache import clear_caches
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives.cuda import pair_sm90
from mixgrain.primitives.plans import cuda_pairs
from mixgrain.primitives.spmm import spmm


def lines_of(kept):
    """Table and records of a boolean matrix of blocks, as ``plans.cuda_block`` has them."""
    line, inner = np.nonzero(kept)
    item = np.arange(len(line))
    table = np.stack([item, inner, 0 * item - 1, 0 * item], 1).astype(np.int32)
    counts = np.bincount(line, minlength=len(kept))
    order = np.argsort(-counts, kind="stable")
    records = np.stack([order, (np.cumsum(counts) - counts)[order], counts[order]], 1)
    return table, records.astype(np.int32)


def random(lines, inner, density, seed=0):
    return np.random.default_rng(seed).random((lines, inner)) < density


CASES = {
    "a fifth": random(64, 64, 0.2),
    "few": random(64, 64, 0.05),
    "odd": random(63, 40, 0.3),
    "all": np.ones((8, 9), bool),
    "empty lines": random(20, 16, 0.05) & (np.arange(20) % 3 > 0)[:, None],
    "nothing": np.zeros((4, 4), bool),
    "one line": np.ones((1, 5), bool),
    "band": abs(np.arange(30)[:, None] - np.arange(30)) <= 1,
}


@pytest.mark.parametrize("kept", CASES.values(), ids=CASES)
def test_pairs_have_what_their_lines_have(kept):
    found = cuda_pairs.pairs(*lines_of(kept))
    assert sorted(found.lines[found.lines >= 0].tolist()) == list(range(len(kept)))
    assert (found.lines < 0).sum() == len(kept) % 2
    item = np.full(kept.shape, -1)
    item[kept] = np.arange(kept.sum())
    for pair, (first, last) in zip(
        found.lines, zip(found.bounds, found.bounds[1:], strict=False), strict=True
    ):
        elements = found.elements[first:last]
        assert (np.diff(elements[:, 0]) > 0).all()
        assert (elements[:, 1:3] >= 0).any(1).all()
        for line, column in zip(pair, (1, 2), strict=True):
            mine = elements[elements[:, column] >= 0]
            if line < 0:
                assert not len(mine)
                continue
            assert mine[:, 0].tolist() == np.flatnonzero(kept[line]).tolist()
            assert mine[:, column].tolist() == item[line, kept[line]].tolist()


def test_partners_have_much_in_common():
    kept = CASES["a fifth"]
    found = cuda_pairs.pairs(*lines_of(kept))
    assert len(found.elements) < 0.82 * kept.sum()  # at random .9
    twins = np.repeat(random(32, 64, 0.2), 2, 0)[np.random.default_rng(1).permutation(64)]
    assert len(cuda_pairs.pairs(*lines_of(twins)).elements) == twins.sum() // 2


@pytest.mark.parametrize("matrices", [1, 3])
@pytest.mark.parametrize("width", [129, 384, 1000, 4096])
@pytest.mark.parametrize("kept", CASES.values(), ids=CASES)
def test_tiles_are_every_pair_and_column_once(kept, width, matrices):
    found = cuda_pairs.pairs(*lines_of(kept))
    made = cuda_pairs.tiles(found, width, matrices, 132)
    what, where = made[:, :, 0], made[:, :, 1]
    there = what[..., 3] >= 0
    assert there[:, 0].all()
    assert (there[:, :-1] >= there[:, 1:]).all()
    pair_of = {tuple(lines): n for n, lines in enumerate(found.lines.tolist())}
    units, seen = -(-width // 128), np.zeros((matrices, len(found.lines), -(-width // 128)), int)
    for (one, other, first, size), (matrix, column, groups, _) in zip(
        what[there].tolist(), where[there].tolist(), strict=True
    ):
        pair = pair_of[one, other]
        assert (first, first + size) == tuple(found.bounds[pair : pair + 2])
        assert 1 <= groups <= 3
        assert column % 128 == 0
        seen[matrix, pair, column // 128 : column // 128 + groups] += 1
        assert column // 128 + groups <= units
    assert (seen == 1).all()
    if width == 4096 and matrices == 1 and len(kept) == 64:
        load = (where[..., 2] * np.maximum(what[..., 3], 0)).sum(1)
        assert load.max() <= 1.15 * load.sum() / 132


def test_many_tiles_go_round():
    found = cuda_pairs.pairs(*lines_of(CASES["a fifth"]))
    made = cuda_pairs.tiles(found, 4096, 60, 132)
    there = made[:, :, 0, 3] >= 0
    assert there.sum() > cuda_pairs.DEALT
    load = (made[:, :, 1, 2] * np.maximum(made[:, :, 0, 3], 0)).sum(1)
    assert load.max() <= 1.05 * load.mean()


@pytest.fixture(params=[1, 2], ids=["one matrix", "two"])
def matrices(request):
    return request.param


def product(kept, width, dtype, matrices, transposed, single, monkeypatch):
    clear_caches()
    if single:
        monkeypatch.setattr(pair_sm90, "spmm", lambda *_: False)
    g = torch.Generator().manual_seed(0)
    layout = P.blocks(torch.from_numpy(kept), 64).to_layout(
        "block", 64 * kept.shape[0], 64 * kept.shape[1], size=64
    )
    layout = layout.to("cuda")
    values = torch.randn(matrices, layout.slots, generator=g).to("cuda", dtype)
    inner = 64 * kept.shape[0 if transposed else 1]
    x = torch.randn(matrices, inner, width, generator=g).to("cuda", dtype)
    s = SparseTensor(layout, values[0] if matrices == 1 else values)
    made = spmm(s.T if transposed else s, x[0] if matrices == 1 else x)
    dense = s.to_dense().double()
    right = (dense.mT if transposed else dense) @ (x[0] if matrices == 1 else x).double()
    monkeypatch.undo()
    clear_caches()
    return made, right


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [136, 384, 1000, 2048])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["a fifth", "odd", "all", "empty lines", "band"])
def test_the_bits_of_single_lines(name, dtype, width, transposed, matrices, monkeypatch):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no Hopper")
    used = []
    run = pair_sm90.spmm
    monkeypatch.setattr(pair_sm90, "LEAST", 0)
    monkeypatch.setattr(pair_sm90, "SHARE", 1.0)
    monkeypatch.setattr(pair_sm90, "spmm", lambda *a: used.append(run(*a)) or used[-1])
    made, right = product(CASES[name], width, dtype, matrices, transposed, False, monkeypatch)
    assert used == [True]
    torch.testing.assert_close(
        made.double(), right, rtol=2e-2, atol=2e-2 * float(right.abs().max())
    )
    alone, _ = product(CASES[name], width, dtype, matrices, transposed, True, monkeypatch)
    assert torch.equal(made, alone)
