"""Block lines two by two: how they are paired and dealt, and the same bits as line by line."""

import numpy as np
import pytest
import torch
from test_cuda_block import adjoint, poisoned  # noqa: F401  # outputs hold NaN before

from mixgrain import patterns as P
from mixgrain.cuda.device import pretending
from mixgrain.formats.cache import clear_caches
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives.cuda import block_sm90, pair_sm90, warm
from mixgrain.primitives.dispatch import TABLE
from mixgrain.primitives.linear import linear
from mixgrain.primitives.plans import cuda_block, cuda_pairs
from mixgrain.primitives.spmm import spmm

HALF = torch.float16


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
    table, records = lines_of(kept)
    found = cuda_pairs.pairs(table, records)
    assert sorted(found.partners[found.partners >= 0].tolist()) == list(range(len(kept)))
    assert (found.partners < 0).sum() == len(kept) % 2
    item = np.full(kept.shape, -1)
    item[kept] = np.arange(kept.sum())
    assert found.reads.sum() == sum(kept[line].any(0).sum() for line in lines_in(found))
    for pair, first, last in zip(found.partners, found.bounds, found.bounds[1:], strict=False):
        steps = found.steps[first:last]
        assert (steps[:, :2] >= 0).any(1).all()
        assert ((steps[:, :2] < 0) == (steps[:, 2:] < 0)).all()
        for partner, inner, column in zip(pair, steps.T[:2], steps.T[2:], strict=True):
            mine = inner >= 0
            if partner < 0:
                assert not mine.any()
                continue
            line = int(records[partner, 0])
            assert inner[mine].tolist() == np.flatnonzero(kept[line]).tolist()
            assert column[mine].tolist() == item[line, kept[line]].tolist()
        # What both have they read at once.
        one, other = steps[:, 0], steps[:, 1]
        assert set(one[one == other]) == set(one[one >= 0]) & set(other[other >= 0])
        # And none waits while there is something for it before the next of those.
        for line in range(2):
            waits = np.flatnonzero(steps[:, line] < 0)
            ends = waits[waits + 1 < len(steps)]
            assert ((steps[ends + 1, line] < 0) | (one == other)[ends + 1]).all()


def lines_in(found):
    """Numbers of the lines of each pair."""
    return [found.records[pair[pair >= 0], 0] for pair in found.partners]


def test_partners_have_much_in_common():
    kept = CASES["a fifth"]
    found = cuda_pairs.pairs(*lines_of(kept))
    assert found.reads.sum() < 0.8 * kept.sum()  # at random .9
    assert len(found.steps) < 0.65 * kept.sum()
    twins = np.repeat(random(32, 64, 0.2), 2, 0)[np.random.default_rng(1).permutation(64)]
    assert len(cuda_pairs.pairs(*lines_of(twins)).steps) == twins.sum() // 2


@pytest.mark.parametrize("seed", range(3))
def test_more_rounds_find_little(seed, monkeypatch):
    kept = random(64, 64, 0.2, seed)

    def reads():
        return sum(kept[pair].any(0).sum() for pair in cuda_pairs.paired(kept))

    found = reads()
    monkeypatch.setattr(cuda_pairs, "ROUNDS", 400)
    assert reads() <= found <= 1.01 * reads()
    # Greedily: the line with most, and the one that has most in common with it, and so on.
    free, greedy = set(range(64)), 0
    for line in np.argsort(-kept.sum(1)).tolist():
        if line in free:
            free.remove(line)
            partner = max(free, key=lambda other: (kept[line] & kept[other]).sum())
            free.remove(partner)
            greedy += (kept[line] | kept[partner]).sum()
    assert found < greedy


@pytest.mark.parametrize("matrices", [1, 3])
@pytest.mark.parametrize("across", [1, 2, 8])
@pytest.mark.parametrize("kept", CASES.values(), ids=CASES)
def test_tiles_are_every_line_and_column_once(kept, across, matrices):
    found = cuda_pairs.pairs(*lines_of(kept))
    made = cuda_pairs.tiles(found, 64, 512, across, matrices, 66)
    assert made.shape[0] % 2 == 0
    there = made[..., 2] >= 0
    assert there[:, 0].all()
    assert (there[:, :-1] >= there[:, 1:]).all()
    # Both CTAs of a cluster are at the same columns, with partners.
    ones, others = (made[n::2][there[n::2]] for n in (0, 1))
    assert (there[::2] == there[1::2]).all()
    assert (ones[:, 1] // 2 == others[:, 1] // 2).all()
    assert (ones[:, 2:] == others[:, 2:]).all()
    assert (ones[:, 1] % 2 + others[:, 1] % 2 == 1).all()
    numbers = np.concatenate([found.records[:, 0], [-1]])
    seen = np.zeros((len(kept), across * matrices), int)
    for line, where, count, repeat in np.concatenate([ones, others]).tolist():
        if line >= 0:
            seen[line, repeat] += 1
        first = where // 2
        begins = np.flatnonzero((found.bounds[:-1] == first) & (np.diff(found.bounds) == count))
        assert line in numbers[found.partners[begins, where % 2]]
    assert (seen == 1).all()


@pytest.mark.parametrize("matrices", [1, 80])
def test_loads_are_even(matrices):
    kept = CASES["a fifth"]
    found = cuda_pairs.pairs(*lines_of(kept))
    made = cuda_pairs.tiles(found, 64, 512, 8, matrices, 66)
    reads = {2 * first: count for first, count in zip(found.bounds, found.reads, strict=False)}
    there = made[::2, :, 2] >= 0
    asked = np.vectorize(reads.get)(made[::2, :, 1] & ~1, 0) * there
    assert asked.sum() == found.reads.sum() * 8 * matrices
    assert asked.sum(1).max() <= 1.05 * asked.sum(1).mean()
    # Clusters are at about the same columns at the same time.
    at = np.where(there, made[::2, :, 3], -1)
    for turn in at.T:
        assert np.ptp(turn[turn >= 0]) <= 3
    # And so are those of a cluster's CTAs: blocks of the lines that they have.
    blocks = kept.sum(1)
    mine = np.where(made[..., 2] >= 0, blocks[made[..., 0]], 0).sum(1).reshape(-1, 2)
    assert np.ptp(mine, 1).mean() <= 0.05 * mine.mean()


def asked(layout, width, free=1, mask=0, name="spmm"):
    """Names of the kernels that a product asks for on Hopper, and how often."""
    with pretending("90a"):
        plan = TABLE["spmm"][type(layout)]["cuda"](layout)
        x = torch.empty(free, layout.entries, layout.shape[1], width, dtype=HALF, device="meta")
        values = torch.empty(free, layout.slots, dtype=HALF, device="meta")
        keep = warm._keep(layout, mask)
        given = (values, x, *keep, *plan, 1.0, HALF)
        return [wanted.name for wanted in warm._asked(name, given)]


def test_what_goes_by_pairs(monkeypatch):
    monkeypatch.setattr(pair_sm90, "LEAST", 0)
    monkeypatch.setattr(pair_sm90, "SHARE", 1.0)
    monkeypatch.setattr(pair_sm90, "TILES", 40)  # of which a matrix has 32
    pattern = P.blocks(torch.from_numpy(CASES["a fifth"][:32, :32]), 64)

    def layout(n=2048, kept=pattern, size=64):
        return kept.to_layout("block", n, n, size=size)

    pairs, single = ["spmm_pair_sm90"], ["spmm_block_sm90"]
    assert asked(layout(), 1024, name="spmm") == pairs
    assert asked(layout(), 1024, name="spmm_t") == pairs
    assert asked(layout(), 1024, free=3) == 3 * pairs
    assert asked(layout(), 1024, mask=1) != pairs
    assert asked(layout(), 1000) == asked(layout(), 128) == single
    assert (
        asked(layout(4096, P.blocks(torch.from_numpy(CASES["a fifth"][:32, :32]), 128), 128), 1024)
        == single
    )
    assert asked(layout(2000), 1024) == single  # blocks that hang over the edge
    assert asked(layout(kept=pattern & P.causal()), 1024) == single  # that are not whole
    heads = P.per_head([pattern, P.blocks(torch.from_numpy(CASES["a fifth"][32:, 32:]), 64)])
    assert asked(layout(kept=heads), 1024) == single
    monkeypatch.setattr(pair_sm90, "LEAST", 10**6)
    assert asked(layout(), 1024) == single  # too small
    monkeypatch.setattr(pair_sm90, "LEAST", 0)
    monkeypatch.setattr(pair_sm90, "SHARE", 0.5)
    clear_caches()
    assert asked(layout(), 1024) == single  # with too little in common


def weights(kept, dtype, matrices=1):
    g = torch.Generator().manual_seed(0)
    shape = tuple(64 * n for n in kept.shape)
    layout = P.blocks(torch.from_numpy(kept), 64).to_layout("block", *shape, size=64).to("cuda")
    lead = () if matrices == 1 else (matrices,)
    return SparseTensor(layout, torch.randn(*lead, layout.slots, generator=g).to("cuda", dtype))


def right_side(rows, width, dtype, matrices=1):
    lead = () if matrices == 1 else (matrices,)
    g = torch.Generator().manual_seed(1)
    return torch.randn(*lead, rows, width, generator=g).to("cuda", dtype)


@pytest.fixture
def both(monkeypatch):
    """Runs something by pairs, whatever that gains, and line by line; and what pairs were asked."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no Hopper")
    monkeypatch.setattr(pair_sm90, "LEAST", 0)
    monkeypatch.setattr(pair_sm90, "SHARE", 1.0)
    run = pair_sm90.spmm
    used = []

    def watched(*arguments):
        used.append((run(*arguments), arguments[7], arguments[0].dtype))
        return used[-1][0]

    def twice(work):
        used.clear()
        clear_caches()
        with monkeypatch.context() as patch:
            patch.setattr(pair_sm90, "spmm", watched)
            ours = work()
        clear_caches()
        with monkeypatch.context() as patch:
            patch.setattr(pair_sm90, "spmm", lambda *_: False)
            theirs = work()
        clear_caches()
        assert used
        assert all(taken for taken, *_ in used)
        return ours, theirs, used

    return twice


GPU_CASES = ["a fifth", "odd", "all", "empty lines", "band"]


@pytest.mark.gpu
@pytest.mark.parametrize("matrices", [1, 2])
@pytest.mark.parametrize("width", [192, 576, 1024, 2048])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", GPU_CASES)
def test_the_bits_of_single_lines(name, dtype, width, matrices, both):
    s = weights(CASES[name], dtype, matrices)
    x = right_side(s.shape[-1], width, dtype, matrices)
    ours, theirs, _ = both(lambda: spmm(s, x))
    right = s.to_dense().double() @ x.double()
    torch.testing.assert_close(
        ours.double(), right, rtol=2e-2, atol=2e-2 * float(right.abs().max())
    )
    assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [384, 960])
@pytest.mark.parametrize("name", GPU_CASES)
def test_the_transpose_too(name, width, both):
    s = weights(CASES[name], torch.float16)
    x = right_side(s.shape[0], width, torch.float16)
    ours, theirs, used = both(lambda: adjoint(s, x))
    assert any(transposed for _, transposed, _ in used)
    right = s.to_dense().double().mT @ x.double()
    torch.testing.assert_close(
        ours.double(), right, rtol=2e-2, atol=2e-2 * float(right.abs().max())
    )
    assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [512, 1000])
def test_layers(tokens, both, monkeypatch):
    """Rows of tokens, with the bias inside; the same where operators are watched."""
    monkeypatch.setattr(pair_sm90, "ENOUGH", 0)
    s = weights(CASES["a fifth"], torch.bfloat16)
    x, bias = (
        right_side(tokens, s.shape[1], torch.bfloat16),
        right_side(1, s.shape[0], torch.bfloat16)[0],
    )
    ours, theirs, used = both(lambda: linear(x, s, bias))
    assert {dtype for *_, dtype in used} == {torch.bfloat16}
    assert torch.equal(ours, theirs)

    def operators():
        with torch.device("cuda"):  # something watches
            return linear(x, s, bias)

    long, lines, used = both(operators)
    assert {dtype for *_, dtype in used} == {torch.bfloat16}
    assert torch.equal(long, lines) and torch.equal(long, ours)


@pytest.mark.gpu
def test_sums_that_are_kept_in_float32(both):
    """A mixed layout adds one part to another."""
    pattern = P.blocks(torch.from_numpy(CASES["a fifth"]), 64) | P.random(0.001, 0)
    layout = pattern.to_layout("mixed", 4096, 4096).to("cuda")
    assert [part.kind for part in layout.parts] == ["block", "row"]
    values = right_side(1, layout.slots, torch.bfloat16)[0]
    mixed, right = SparseTensor(layout, values), right_side(4096, 512, torch.bfloat16)
    ours, theirs, _ = both(lambda: spmm(mixed, right))
    assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_sums_are_added_to_what_is_there(both):
    s = weights(CASES["odd"], torch.float16)
    x = right_side(s.shape[1], 576, torch.float16)
    part = cuda_block.part(s.layout)
    table, records = part.tensors[10:12]
    alike = (part.tensors[0].shape[0], table, records)

    def added(add):
        out = torch.ones(1, 1, s.shape[0], 576, device="cuda")
        values = s.values[None]
        more = (*alike, False, 2.0, add)
        if not pair_sm90.spmm(out, values, x[None, None], part.starts[0], *more):
            masks = part.tensors[6:8]
            rest = (table, records, *masks, False, 2.0, add)
            block_sm90.spmm(out, values, x[None, None], part.starts[0], 64, alike[0], *rest)
        return out

    ours, theirs, _ = both(lambda: added(True))
    assert torch.equal(ours, theirs)
    alone, _, _ = both(lambda: added(False))
    assert torch.equal(ours, alone + 1)


@pytest.mark.gpu
def test_what_only_the_partner_reads_reaches_nothing(both):
    kept = CASES["a fifth"]
    s, x = weights(kept, torch.float16), right_side(4096, 512, torch.float16)
    x[64 * 5 : 64 * 6] = torch.nan
    ours, theirs, _ = both(lambda: spmm(s, x))
    there = torch.from_numpy(kept[:, 5]).repeat_interleave(64).cuda()
    assert ours[there].isnan().all()
    assert ours[~there].isfinite().all()
    assert torch.equal(ours[~there], theirs[~there])


@pytest.mark.gpu
def test_repeats_while_others_run(both):
    s = weights(CASES["a fifth"], torch.float16)
    x = right_side(s.shape[1], 4096, torch.float16)
    many, theirs, _ = both(lambda: torch.stack([spmm(s, x) for _ in range(25)]))
    assert (many == theirs[0]).all()
