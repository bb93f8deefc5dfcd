"""N:M matrices on a GPU: spmm, linear, sampled scores and gradients, against dense float64."""

import pytest
import torch
from cases import BUILDERS, CASES, masks_of, operands
from test_cuda_block import DEVICE, DTYPES, adjoint, close, dead_of, integers, key_mask, zero_bits
from test_cuda_block import poisoned as poisoned  # a fixture
from torch import Tensor

from mixgrain.cuda.device import facts
from mixgrain.formats.cache import clear_caches
from mixgrain.formats.nm import NMLayout, choose
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives import reference
from mixgrain.primitives.cuda import nm, nm_dense, nm_sm90
from mixgrain.primitives.cuda.nm_stored import stored
from mixgrain.primitives.linear import linear
from mixgrain.primitives.sddmm import sddmm
from mixgrain.primitives.spmm import spmm

pytestmark = pytest.mark.gpu
RATIOS = ((2, 4), (1, 2), (1, 4), (3, 8), (5, 7))


@pytest.fixture(params=[False, True], ids=["best", "portable"])
def portable(request, monkeypatch):
    """The kernels that this device would take, then those that every device can."""
    if not request.param:
        yield False
        return
    clear_caches()  # of calls prepared for the others
    monkeypatch.setattr(nm, "_hopper", lambda device: False)
    yield True
    clear_caches()


def layout_of(
    shape: tuple[int, int],
    ratio: tuple[int, int],
    dtype: torch.dtype,
    lead: tuple[int, int] = (1, 1),
    seed: int = 0,
) -> NMLayout:
    """Positions at random."""
    g = torch.Generator().manual_seed(seed)
    choice = choose(torch.rand(lead[0] * lead[1], *shape, generator=g), None, *ratio)
    return NMLayout.from_choice(choice, shape, *ratio, lead=lead, dtype=dtype)


def poison(layout: NMLayout, values: Tensor) -> Tensor:
    """The values with NaN at dead slots."""
    live = layout.live()
    return values if live is None else values.masked_fill(~live, torch.nan)


def pair(layout: NMLayout, values: Tensor, dtype: torch.dtype) -> tuple[SparseTensor, SparseTensor]:
    """On the CPU in float64 and on the device."""
    there = values.to(DEVICE, dtype)
    return SparseTensor(layout, values.double()), SparseTensor(layout.to(DEVICE), there)


# Every case of the table's list


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_cases(name, dtype, portable):
    case = CASES[name]
    layout = BUILDERS["nm"](case, *masks_of(case))
    there = layout.to(DEVICE)
    q, k = operands(name, dtype)
    for mask in (None, key_mask(case)):
        moved = None if mask is None else mask.to(DEVICE)
        ours = sddmm(q.to(DEVICE), k.to(DEVICE), there, 0.5, moved)
        expected = reference.sddmm(q.double(), k.double(), layout, 0.5, mask)
        close(ours.values, expected.values, case.dim, dtype)
        dead = dead_of(expected)
        assert zero_bits(ours.values.cpu()[dead])
        g = torch.Generator().manual_seed(2)
        values = torch.randn(ours.values.shape, generator=g).to(dtype)
        values[dead] = torch.nan
        s, t = SparseTensor(layout, values, mask), SparseTensor(there, values.to(DEVICE), moved)
        close(spmm(t, k.to(DEVICE)), reference.spmm(s, k), case.shape[1], dtype)
        expected_t = reference.dense_of(s).mT @ q.double()
        close(spmm(t.T, q.to(DEVICE)), expected_t, case.shape[0], dtype)
        close(adjoint(t, q.to(DEVICE)), expected_t, case.shape[0], dtype)
        close(adjoint(t.T, k.to(DEVICE)), reference.spmm(s, k), case.shape[1], dtype)


# Exactness: small integers

SHAPES = ((64, 64), (31, 65), (200, 1033))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", RATIOS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("width", [8, 64, 100, 264])
def test_integers_are_exact_in_spmm(width, shape, ratio, dtype, portable):
    layout = layout_of(shape, ratio, dtype, lead=(1, 3), seed=width)
    values = poison(layout, integers(2, layout.slots // 3 * 3, seed=1))
    k, q = integers(2, 3, shape[1], width, seed=2), integers(2, 3, shape[0], width, seed=3)
    s, t = pair(layout, values, dtype)
    x, y = k.to(DEVICE, dtype), q.to(DEVICE, dtype)
    assert torch.equal(spmm(t, x).cpu(), spmm(s, k.double()).to(dtype))
    assert torch.equal(spmm(t, x.mT.contiguous().mT).cpu(), spmm(s, k.double()).to(dtype))
    assert torch.equal(adjoint(t, y).cpu(), adjoint(s, q.double()).to(dtype))
    scores = sddmm(y, x, layout.to(DEVICE)).values.cpu()
    assert torch.equal(scores, sddmm(q.double(), k.double(), layout).values.to(dtype))
    turned = sddmm(y.mT.contiguous().mT, x.mT.contiguous().mT, layout.to(DEVICE)).values.cpu()
    assert torch.equal(scores, turned)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", RATIOS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 33, 64, 300])
def test_integers_are_exact_in_linear(tokens, shape, ratio, dtype, portable):
    layout = layout_of(shape, ratio, dtype, seed=tokens)
    s, t = pair(layout, poison(layout, integers(layout.slots, seed=1)), dtype)
    x, bias, grad = (
        integers(tokens, shape[1], seed=2),
        integers(shape[0]),
        integers(tokens, shape[0]),
    )
    sides = []
    for w, to in ((s, {"dtype": torch.float64}), (t, {"device": DEVICE, "dtype": dtype})):
        given = [v.to(**to).requires_grad_() for v in (x, bias)]
        values = w.values.detach().requires_grad_()
        for b in (None, given[1]):
            y = linear(given[0], w.with_values(values), b)
            assert y.is_contiguous()
            sides.append(y)
        sides += torch.autograd.grad(y, (*given, values), grad.to(**to))
    for theirs, ours in zip(sides[:5], sides[5:], strict=True):
        assert torch.equal(ours.detach().cpu(), theirs.detach().to(dtype))


@pytest.mark.parametrize("tokens", [1, 3, 200])
@pytest.mark.parametrize(
    "cut", ["whole", "cluster", "wide", "short", "thin", "thin, split", "thinnest"]
)
def test_every_cut_of_sparse_wgmma_is_exact(cut, tokens):
    if not facts(0).hopper:
        pytest.skip("sm_90a only")
    cuts = {
        "whole": nm_sm90.Cut(2, 256, 1, 4),
        "cluster": nm_sm90.Cut(2, 256, 2, 4),
        "wide": nm_sm90.Cut(2, 128, 2, 3),
        "short": nm_sm90.Cut(1, 64, 1, 2),
        "thin": nm_sm90.Thin(1, 64, 1, 3),
        "thin, split": nm_sm90.Thin(2, 128, 4, 3),
        "thinnest": nm_sm90.Thin(1, 8, 2, 4),
    }
    shape = (700, 1000)
    layout = layout_of(shape, (2, 4), torch.float16)
    values = poison(layout, integers(layout.slots, seed=1))
    x = integers(tokens, shape[1], seed=2)
    s, t = pair(layout, values, torch.float16)
    part = stored(nm_part(t.layout), shape, 1)
    out = torch.full((1, 1, tokens, 704), torch.nan, device=DEVICE, dtype=torch.float16)
    right = x.to(DEVICE).half().T[None, None]
    nm_sm90.spmm(out, t.values[None], part, right, False, 1.0, True, None, cuts[cut])
    assert torch.equal(out[0, 0, :, :700].cpu(), linear(x.double(), s).half())


def nm_part(layout: NMLayout):
    from mixgrain.primitives.plans import nm as plans
    from mixgrain.primitives.plans.plan import split

    return split(plans.plan(layout))[3][0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ratio", [(2, 4), (1, 2)], ids=str)
@pytest.mark.parametrize("shape", [(256, 128), (257, 71), (300, 1033), (513, 130), (1000, 258)])
def test_halves_that_are_spread_are_exact(shape, ratio, dtype, poisoned):
    """Of one CTA and of several that are not full; short last groups; rows that nobody has."""
    layout = layout_of(shape, ratio, dtype)
    values = integers(layout.slots, seed=1)
    dense = SparseTensor(layout, values.double()).to_dense()
    # Every row of the weight by itself, then many of them added up.
    x = torch.cat([torch.eye(shape[0]), integers(nm_dense.TOKENS, shape[0], seed=2, most=1)])
    t = SparseTensor(layout.to(DEVICE), poison(layout, values).to(DEVICE, dtype))
    part = stored(nm_part(t.layout), shape, 1)
    ours = nm_dense.product(t.values[None], part, x.to(DEVICE, dtype))
    assert torch.equal(ours.cpu(), (x.double() @ dense).to(dtype))


# What must not depend on anything else


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_repeat_and_do_not_depend_on_the_batch(dtype, portable):
    layout = layout_of((300, 280), (2, 4), dtype, seed=4)
    g = torch.Generator(DEVICE).manual_seed(0)
    values, x, y = (
        torch.randn(5, *shape, device=DEVICE, generator=g).to(dtype)
        for shape in ((layout.slots,), (280, 64), (300, 64))
    )
    s = SparseTensor(layout.to(DEVICE), values)
    o, t, v = spmm(s, x), adjoint(s, y), sddmm(y, x, s.layout).values
    assert torch.equal(o, spmm(s, x))
    assert torch.equal(t, adjoint(s, y))
    assert torch.equal(v, sddmm(y, x, s.layout).values)
    one = s.with_values(values[3])
    assert torch.equal(spmm(one, x[3]), o[3])
    assert torch.equal(adjoint(one, y[3]), t[3])
    assert torch.equal(sddmm(y[3], x[3], s.layout).values, v[3])


@pytest.mark.parametrize("tokens", [1, 16, 600])
def test_linear_repeats(tokens, portable):
    layout = layout_of((520, 1100), (2, 4), torch.float16)
    w = SparseTensor(layout.to(DEVICE), torch.randn(layout.slots, device=DEVICE).half())
    x = torch.randn(tokens, 1100, device=DEVICE).half()
    first = linear(x, w)
    for _ in range(5):
        assert torch.equal(first, linear(x, w))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_of_columns_that_no_row_keeps_reaches_nothing(dtype, portable):
    """And unchosen elements are never multiplied, where sparse tensor cores do the work."""
    choice = torch.tensor([0, 1], dtype=torch.uint8).expand(1, 70, 25, 2).contiguous()
    layout = NMLayout.from_choice(choice, (70, 100), 2, 4, dtype=dtype)
    values = torch.randn(layout.slots, generator=torch.Generator().manual_seed(0)).to(dtype)
    s = SparseTensor(layout.to(DEVICE), poison(layout, values).to(DEVICE))
    x = torch.randn(100, 72, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    hurt = x.clone()
    hurt.view(25, 4, 72)[:, 2:] = torch.nan
    assert torch.equal(spmm(s, hurt), spmm(s, x))
    assert torch.equal(linear(hurt.T.contiguous(), s), linear(x.T.contiguous(), s))
    mask = torch.ones(100, dtype=torch.bool, device=DEVICE)
    mask[::5] = False
    masked = SparseTensor(s.layout, s.values, mask)
    clean = spmm(masked, x)
    hurt[::5] = torch.nan
    assert torch.equal(spmm(masked, hurt), clean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_any_stride(dtype, portable):
    layout = layout_of((70, 90), (2, 4), dtype)
    s, t = pair(layout, integers(layout.slots, seed=3), dtype)
    k = integers(90, 40, seed=2)
    expected = spmm(s, k.double()).to(dtype)
    plain = k.to(DEVICE, dtype)
    views = {
        "columns first": plain.T.contiguous().T,
        "odd start": torch.cat([plain[..., :1], plain], -1)[..., 1:],
        "wide rows": torch.cat([plain, plain], -1)[..., :40],
        "every other row": plain.repeat_interleave(2, 0)[::2],
    }
    for what, view in views.items():
        assert torch.equal(spmm(t, view).cpu(), expected), what
        assert torch.equal(linear(view.T, t).cpu(), expected.T), what
    odd = torch.cat([t.values[:1], t.values])[1:]
    assert torch.equal(spmm(t.with_values(odd), plain).cpu(), expected)
    row = plain[:, :1].expand(90, 40)
    assert torch.equal(spmm(t, row).cpu(), spmm(s, k[:, :1].expand(90, 40).double()).to(dtype))


# Precision and gradients


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [4, 512])
def test_half_precision_is_as_good_as_torchs(dtype, tokens, portable):
    """Root mean square error within 1.05 of F.linear's in the same precision, largest within 2."""
    layout = layout_of((384, 768), (2, 4), dtype)
    g = torch.Generator().manual_seed(1)
    values, x = torch.randn(layout.slots, generator=g), torch.randn(tokens, 768, generator=g)
    s = SparseTensor(layout, values.to(dtype))
    w, x = s.to_dense().double(), x.to(dtype)
    exact = x.double() @ w.T
    theirs = torch.nn.functional.linear(x.to(DEVICE), w.to(DEVICE, dtype)).cpu().double() - exact
    ours = linear(x.to(DEVICE), SparseTensor(layout.to(DEVICE), s.values.to(DEVICE))).cpu().double()
    ours = ours - exact
    assert ours.square().mean() ** 0.5 <= 1.05 * theirs.square().mean() ** 0.5
    assert ours.abs().max() <= 2 * theirs.abs().max()


@pytest.mark.parametrize("ratio", RATIOS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_linear_against_float64(dtype, ratio, portable):
    layout = layout_of((130, 200), ratio, dtype)
    g = torch.Generator().manual_seed(1)
    values, x, grad, bias = (
        torch.randn(*shape, generator=g).to(dtype)
        for shape in ((layout.slots,), (3, 70, 200), (3, 70, 130), (130,))
    )
    results = []
    for device, to in (("cpu", torch.float64), (DEVICE, dtype)):
        given = [t.to(device, to).requires_grad_() for t in (x, values, bias)]
        y = linear(given[0], SparseTensor(layout.to(device), given[1]), given[2])
        results.append([y, *torch.autograd.grad(y, given, grad.to(device, to))])
    for theirs, ours, inner in zip(*results, (200, 130, 210, 210), strict=True):
        close(ours.detach(), theirs.detach(), inner, dtype)


def test_tf32_follows_torch():
    layout = layout_of((128, 256), (1, 2), torch.float32)
    _, t = pair(layout, torch.randn(layout.slots), torch.float32)
    x = torch.randn(192, 256)
    exactly = linear(x.double(), SparseTensor(layout, t.values.cpu().double()))
    errors = []
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            for right in (linear(x.to(DEVICE), t), spmm(t, x.T.contiguous().to(DEVICE)).T):
                errors.append(float((right.cpu().double() - exactly).abs().max()))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert max(errors[:2]) < 5e-5
    assert min(errors[2:]) > 1e-4
    assert max(errors[2:]) < 5e-2


@pytest.mark.parametrize("values, x", [(torch.half, torch.float32), (torch.float32, torch.half)])
def test_values_of_another_dtype(values, x):
    layout = layout_of((100, 130), (2, 4), values)
    held, k = integers(layout.slots, seed=3), integers(130, 40, seed=2)
    s = SparseTensor(layout.to(DEVICE), held.to(DEVICE, values))
    assert torch.equal(spmm(s, k.to(DEVICE, x)).cpu(), spmm(SparseTensor(layout, held), k).to(x))


def test_capture_and_replay(portable):
    layout = layout_of((256, 256), (2, 4), torch.half).to(DEVICE)
    w = SparseTensor(layout, torch.randn(layout.slots, device=DEVICE).half())
    x = torch.randn(256, 256, device=DEVICE).half()
    for _ in range(2):
        expected = linear(linear(x, w), w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = linear(linear(x, w), w)
    made.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(made, expected)
