"""spmm of RowLayout by dense tiles on a GPU: exact on integers, exact per element, repeatable."""

import pytest
import torch
from cases import CASES, Case, density, operands, row_layout
from test_cuda_block import (
    DEVICE,
    adjoint,
    build,
    close,
    integers,
    poisoned,  # noqa: F401  # a fixture for all tests here: outputs hold NaN before they are written
)
from test_cuda_row import check_exact, non_finite

from mixgrain.cuda.device import facts
from mixgrain.formats.cache import clear_caches
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives import reference
from mixgrain.primitives.cuda import expand_sm90
from mixgrain.primitives.cuda import spmm as launching
from mixgrain.primitives.linear import linear
from mixgrain.primitives.spmm import spmm

pytestmark = pytest.mark.gpu

DTYPES = (torch.float16, torch.bfloat16)
# Parts of a CTA's columns, whole ones, and several CTAs.
WIDTHS = (1, 8, 64, 72, 128, 136, 256, 264, 520)


@pytest.fixture(autouse=True)
def hopper():
    if not facts(0).hopper:
        pytest.skip("spmm_expand_sm90 needs sm_90a")


@pytest.fixture(
    params=[(1, 64), (1, 128), (2, 128)], ids=["all, 64", "all, 128", "every other"], autouse=True
)
def step(request, monkeypatch):
    """Which lines are expanded, and their rows, whatever that costs."""
    every, tall = request.param
    clear_caches()  # of calls prepared for other kernels
    monkeypatch.setattr(
        expand_sm90, "chosen", lambda sizes, *_: torch.arange(len(sizes)) % every == 0
    )
    monkeypatch.setattr(expand_sm90, "tall_of", lambda *_: tall)
    yield every
    clear_caches()


@pytest.fixture
def all_expanded(step, monkeypatch):
    """Every line is; nothing is left to gather."""
    if step > 1:
        pytest.skip("of what is expanded alone")
    monkeypatch.delitem(launching._KINDS, "crow")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_cases(name, dtype):
    case = CASES[name]
    layout, there = build("row", case)
    q, k = operands(name, dtype)
    shape = reference.sddmm(q.double(), k.double(), layout).values.shape
    values = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    s, t = SparseTensor(layout, values), SparseTensor(there, values.to(DEVICE))
    close(spmm(t, k.to(DEVICE)), reference.spmm(s, k), case.shape[1], dtype)
    expected_t = reference.dense_of(s).mT @ q.double()
    close(spmm(t.T, q.to(DEVICE)), expected_t, case.shape[0], dtype)
    close(adjoint(t, q.to(DEVICE)), expected_t, case.shape[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_integers_are_exact(width, dtype):
    case = Case((300, 333), density(0.3), free=(2,), lead=(1, 2), dim=width)
    check_exact(case, dtype, dtype, seed=width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5000), (5000, 3), (2, 513), (700, 600)])
def test_full_rows_take_several_pieces(shape, dtype):
    """Every position: 8192 entries of a tile; rows of more than one item beside."""
    check_exact(Case(shape, density(2.0), free=(2,), dim=136), dtype, dtype, seed=1)


@pytest.mark.parametrize("width", [64, 128, 256])
def test_many_tiles_of_a_cta(width):
    """Lines of 7 chunks, some of them full: chunks go to the filling warps across tiles."""
    rows, inner = 128 * 6 * facts(0).multiprocessors, 448
    held = torch.arange(inner) < 64
    every = torch.arange(rows) % 5 == 0
    mask = (every[:, None] & held) | (torch.arange(inner) == (torch.arange(rows) % inner)[:, None])
    layout = row_layout(mask[None], (0,), (1, 1)).to(DEVICE)
    values = integers(layout.slots, seed=1)
    x = integers(inner, width, seed=2)
    dense = torch.zeros(rows, inner)
    dense[mask] = values
    ours = spmm(SparseTensor(layout, values.to(DEVICE).half()), x.to(DEVICE).half())
    assert torch.equal(ours.cpu(), (dense @ x).half())


@pytest.mark.parametrize("width", [64, 128, 264])
def test_short_lines_before_long_ones(width):
    """A warp that had nothing to fill for some tiles still knows which stages are free."""
    rows, inner = 128 * 3 * facts(0).multiprocessors, 1024
    long = torch.arange(rows) // 128 % 3 == 0
    mask = torch.zeros(rows, inner, dtype=torch.bool)
    mask[:, 5] = True
    mask |= long[:, None] & (torch.arange(inner) % 32 == (torch.arange(rows) % 32)[:, None])
    layout = row_layout(mask[None], (0,), (1, 1)).to(DEVICE)
    values = integers(3, layout.slots, seed=1)
    x = integers(3, inner, width, seed=2)
    dense = torch.zeros(3, rows, inner)
    dense[:, mask] = values
    ours = spmm(SparseTensor(layout, values.to(DEVICE).half()), x.to(DEVICE).half())
    assert torch.equal(ours.cpu(), (dense @ x).half())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 72, 264])
def test_only_rows_that_keep_a_key_see_it(width, dtype):
    """NaN and infinity in x reach exactly the rows that keep their key, in their columns."""
    case = Case((237, 140), density(0.3), dim=width)
    layout, there = build("row", case)
    x, expected = non_finite(layout, integers(140, width, seed=4), None)
    values = torch.ones(layout.slots, device=DEVICE, dtype=dtype)
    ours = spmm(SparseTensor(there, values), x.to(DEVICE, dtype)).cpu()
    torch.testing.assert_close(ours.float(), expected, rtol=0, atol=0, equal_nan=True)
    y, expected = non_finite(layout.T, integers(237, width, seed=5), None)
    ours = spmm(SparseTensor(there, values).T, y.to(DEVICE, dtype)).cpu()
    torch.testing.assert_close(ours.float(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_keep_their_sign(dtype):
    mask = torch.zeros(1, 130, 70, dtype=torch.bool)
    mask[0, 0, [1, 2]], mask[0, 1, [2, 3]], mask[0, 2, [1, 3]] = True, True, True
    mask[0, 129, 5] = True
    layout = row_layout(mask, (0,), (1, 1)).to(DEVICE)
    x = torch.ones(70, 8, dtype=dtype, device=DEVICE)
    x[1], x[2, 1:], x[3, 2] = torch.inf, -torch.inf, torch.nan
    values = torch.tensor([1, 1, -2, 1, -1, 1, torch.inf], dtype=dtype, device=DEVICE)
    out = spmm(SparseTensor(layout, values), x).cpu().float()
    inf, nan = torch.inf, torch.nan
    assert out[0].tolist() == [inf, *[nan] * 7] or out[0, 0] == inf
    assert out[0, 1:].isnan().all()
    assert out[1, 0] == -1 and out[1, 1] == inf and out[1, 2].isnan()
    assert out[2, 0] == -inf and out[2, 2].isnan()
    assert (out[129] == inf).all() and not out[3:129].any()


def test_a_repeat_has_the_same_bits(all_expanded):
    case = Case((1000, 1500), density(0.1), free=(2,), dim=264)
    _, there = build("row", case)
    g = torch.Generator().manual_seed(0)
    values = torch.randn(2, there.slots, generator=g).to(DEVICE, torch.float16)
    k = torch.randn(2, 1500, 264, generator=g).to(DEVICE, torch.float16)
    q = torch.randn(2, 1000, 264, generator=g).to(DEVICE, torch.float16)
    k[0, 7] = torch.nan
    s = SparseTensor(there, values)
    first, first_t = spmm(s, k), spmm(s.T, q)
    for _ in range(50):
        torch.testing.assert_close(spmm(s, k), first, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(spmm(s.T, q), first_t)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_what_is_computed_beside_it(dtype, all_expanded):
    shape, width = (300, 700), 136
    g = torch.Generator().manual_seed(0)
    masks = torch.rand(3, *shape, generator=g) < torch.tensor([0.9, 0.02, 0.3])[:, None, None]
    many = row_layout(masks, (0, 1, 2), (1, 3)).to(DEVICE)
    q = torch.randn(4, 3, shape[0], width, generator=g).to(DEVICE, dtype)
    k = torch.randn(4, 3, shape[1], width, generator=g).to(DEVICE, dtype)
    values = torch.randn(4, many.slots, generator=g).to(DEVICE, dtype)
    s = SparseTensor(many, values)
    out, out_t = spmm(s, k), adjoint(s, q)
    k[3, 2, 5] = torch.nan  # beside the others
    assert torch.equal(spmm(s, k)[:3], out[:3])
    starts = many.entry_slots
    for e in range(3):
        alone = row_layout(masks[e : e + 1], (0,), (1, 1)).to(DEVICE)
        one = SparseTensor(alone, values[2, starts[e] : starts[e + 1]].contiguous())
        assert torch.equal(spmm(one, k[2, e]), out[2, e])
        assert torch.equal(adjoint(one, q[2, e]), out_t[2, e])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [5, 200])
def test_linear_and_its_gradients(tokens, dtype):
    layout, there = build("row", Case((260, 300), density(0.3), dim=8))
    x, bias, made = integers(tokens, 300, seed=1), integers(260, seed=2), []
    values, grad = integers(layout.slots, seed=3), integers(tokens, 260, seed=4)
    for where, here, kind in ((DEVICE, there, dtype), ("cpu", layout, torch.float64)):
        some = [t.to(where, kind).requires_grad_() for t in (x, values, bias)]
        out = linear(some[0], SparseTensor(here, some[1]), some[2])
        made.append((out, *torch.autograd.grad(out, some, grad.to(where, kind))))
    for ours, theirs in zip(*made, strict=True):
        assert torch.equal(ours.cpu(), theirs.to(dtype))
