"""Softmax of blocks beside entries: the blocks take one look once the entries' rows are known."""

import pytest
import torch
from cases import CASES, block_layout, masks_of, row_layout
from test_cuda_block import DEVICE, DTYPES, key_mask, poisoned  # noqa: F401  # outputs hold NaN
from test_cuda_softmax import check, near, scores

from mixgrain.cuda.device import pretending
from mixgrain.formats.cache import clear_caches
from mixgrain.formats.mixed import MixedLayout
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives.cuda import warm
from mixgrain.primitives.cuda.rowwise import Call
from mixgrain.primitives.dispatch import TABLE
from mixgrain.primitives.softmax import softmax, softmax_backward


def beside(masks, entry=(0,), lead=(1, 1), size=64, cut=0.7):
    """Blocks of the first columns, entries of the others."""
    nq, nk = masks.shape[1:]
    first = torch.arange(nk) < cut * nk
    return MixedLayout.from_parts(
        (nq, nk),
        block_layout(masks & first, entry, lead, size),
        None,
        row_layout(masks & ~first, entry, lead),
        lead,
        tuple(entry),
    )


def drawn(nq, nk, seed=0):
    """Rows of every number of kept elements, the second of none in blocks, the third of none."""
    g = torch.Generator().manual_seed(seed)
    masks = torch.rand(1, nq, nk, generator=g) < torch.rand(nq, 1, generator=g)
    masks[:, 1, : nk * 7 // 10 + 1] = False
    masks[:, 2] = False
    masks[:, 3, nk // 2 :] = False  # none in entries
    return masks


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("blocks", [3, 40])
def test_blocks_are_looked_at_once(blocks, arch):
    layout = beside(drawn(140, blocks * 64 * 10 // 7))
    with pretending(arch):
        plan = TABLE["softmax"][MixedLayout]["cuda"](layout)
        values = torch.empty(2, layout.slots, dtype=torch.float16, device="meta")
        shared = (None, False, *plan, torch.float16)
        forward = warm._asked("softmax", (values, *shared, True))
        backward = warm._asked("softmax_backward", (values, values, None, *shared))
    for asked in (forward, backward):
        names = [wanted.name for wanted in asked]
        phases = [dict(wanted.constants)["PHASE"] for wanted in asked]
        of_blocks = {p for name, p in zip(names, phases, strict=True) if name == "rowwise_block"}
        assert of_blocks == {3}
        assert set(names) == {"rowwise_row", "rowwise_block"}
        assert phases == sorted(phases, key=[1, 3, 2].index)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size, blocks", [(16, 3), (16, 20), (32, 5), (64, 9), (64, 40), (128, 8)])
def test_lengths(size, blocks, dtype):
    nk = blocks * size * 10 // 7
    layout = beside(drawn(2 * size + 3, nk), size=size)
    g = torch.Generator().manual_seed(1)
    for mask in (None, torch.rand(nk, generator=g) < 0.8):
        check(layout, layout.to(DEVICE), scores(layout, (2,), dtype), mask, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_cases(name, dtype):
    case = CASES[name]
    masks, entry = masks_of(case)
    layout = beside(masks, entry, case.lead, case.size, 0.5)
    for mask in (None, key_mask(case)):
        for out in {dtype, torch.float32}:
            check(layout, layout.to(DEVICE), scores(layout, case.free, dtype), mask, out)


@pytest.mark.gpu
def test_special_values():
    """−inf is absent, NaN and +inf spoil their row alone, in whichever part they lie."""
    layout = beside(drawn(70, 300), size=16)
    values = scores(layout, (), torch.float32)
    row, column = layout.indices()
    values[(row == 10) & (column < 200)] = -torch.inf
    values[(row == 11) & (column > 200)] = -torch.inf
    values[row == 12] = -torch.inf
    values[(row == 13) & (column == int(column[row == 13].min()))] = torch.nan
    values[(row == 14) & (column == int(column[row == 14].max()))] = torch.nan
    values[(row == 15) & (column == int(column[row == 15].max()))] = torch.inf
    values[(row == 16) & (column == int(column[row == 16].min()))] = torch.inf
    expected, theirs = softmax(SparseTensor(layout, values.double()), return_lse=True)
    there = SparseTensor(layout.to(DEVICE), values.to(DEVICE))
    p, lse = softmax(there, return_lse=True)
    near(p.values, expected.values, torch.float32)
    near(lse, theirs, torch.float32, times=4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_as_joined_afterwards(dtype, monkeypatch):
    layout = beside(drawn(200, 900)).to(DEVICE)
    g = torch.Generator().manual_seed(3)
    values, grad = torch.randn(2, 3, layout.slots, generator=g).to(DEVICE, dtype)
    rows = torch.randn(3, 200, generator=g).to(DEVICE)

    def both():
        p, lse = softmax(SparseTensor(layout, values), return_lse=True)
        return p.values, lse, softmax_backward(p, grad, rows).values

    ours = both()
    clear_caches()  # calls that were seen before are not made anew
    with monkeypatch.context() as patch:
        patch.setattr(Call, "last", None)
        theirs = both()
    clear_caches()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
    for _ in range(100):
        for mine, again in zip(ours, both(), strict=True):
            assert torch.equal(mine, again)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["row", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_short_rows_of_many_matrices(dtype, kind, masked):
    """CTAs take the rows of several matrices: as many bits as of each matrix alone."""
    n, free = 500, 509
    g = torch.Generator().manual_seed(0)
    masks = torch.rand(1, n, n, generator=g) < 0.05
    masks[:, 7], masks[:, 8, :20] = False, True
    layout = (row_layout(masks, (0,), (1, 1)) if kind == "row" else beside(masks)).to(DEVICE)
    mask = (torch.rand(n, generator=g) < 0.7).to(DEVICE) if masked else None
    values, grad = torch.randn(2, free, 1, 1, layout.slots, generator=g).to(DEVICE, dtype)
    many = SparseTensor(layout, values, mask)
    p, lse = softmax(many, return_lse=True)
    back = softmax_backward(p, grad)
    for f in (0, 1, 2, 3, 255, 256, 507, 508):
        one, alone = softmax(SparseTensor(layout, values[f], mask), return_lse=True)
        assert torch.equal(one.values, p.values[f])
        assert torch.equal(alone, lse[f])
        assert torch.equal(softmax_backward(one, grad[f]).values, back.values[f])
