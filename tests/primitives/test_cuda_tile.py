"""Products with tiles of a weight and their gradients on a GPU, against dense float64."""

import pytest
import torch
from cases import BUILDERS, CASES, Case, applies, masks_of
from test_cuda_block import poisoned as poisoned  # a fixture
from torch import Tensor

from mixgrain.formats.cache import clear_caches
from mixgrain.formats.errors import UnsupportedError
from mixgrain.formats.layout import Layout
from mixgrain.formats.sparse import SparseTensor
from mixgrain.formats.tile import TileLayout
from mixgrain.primitives import reference
from mixgrain.primitives.cuda import tile, tile_mma, tile_sm90
from mixgrain.primitives.linear import linear
from mixgrain.primitives.sparse_linear import SparseLinear
from mixgrain.primitives.spmm import spmm

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32)
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
# What is chosen, then each kernel for whatever there is: (by TMA, which of the ways to cut it).
KERNELS = {
    "best": None,
    "few": "few",
    "few, listed in memory": "few, listed in memory",
    "few, long lines": "few, long lines",
    "few, no clusters": "few, no clusters",
    **{f"many, wgmma, {n}": ("wgmma", n) for n in range(len(tile_sm90.CUTS))},
    **{f"many, TMA, {n}": (True, n) for n in range(3)},
    **{f"many, {n}": (False, n) for n in range(3)},
}


@pytest.fixture(params=list(KERNELS))
def kernel(request, monkeypatch):
    """Each way of multiplying; other devices' ways run here too."""
    chosen = KERNELS[request.param]
    if isinstance(chosen, tuple) and chosen[0] and not tile._hopper(0):
        pytest.skip("TMA needs compute capability 9.0")
    clear_caches()  # of calls prepared otherwise
    if isinstance(chosen, str):
        monkeypatch.setattr(tile, "_is_few", lambda *_: True)
        if chosen == "few, listed in memory":
            monkeypatch.setattr(tile, "ROOMS", ())
        if chosen == "few, long lines":
            monkeypatch.setattr(tile, "CALL", 1e9)
        if chosen == "few, no clusters":
            monkeypatch.setattr(tile, "_hopper", lambda _: False)
    elif chosen is not None:
        how, way = chosen
        monkeypatch.setattr(tile, "_is_few", lambda *_: False)
        if how == "wgmma":
            monkeypatch.setattr(tile_sm90, "LARGE", {False: 0.0, True: 0.0})
            monkeypatch.setattr(tile_sm90, "choose", lambda *_: tile_sm90.CUTS[way])
        else:
            monkeypatch.setattr(tile_sm90, "takes", lambda *_: False)
            monkeypatch.setattr(
                tile_mma, "_choose", lambda *given: tile_mma.cuts(how, given[-1])[way]
            )
    yield request.param
    clear_caches()


def integers(*shape: int, seed: int = 0, most: int = 2) -> Tensor:
    """Small integers as float32 on the CPU."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=g).float()


def weight(rows: int, columns: int, d: float, seed: int = 0) -> tuple[TileLayout, TileLayout]:
    """Tiles kept at random, on the CPU and on the device; some lines are empty."""
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(-(-rows // 16), -(-columns // 16), generator=g) < d
    kept[1::7], kept[:, 2::9] = False, False
    layout = TileLayout.from_tile_mask(kept, (rows, columns))
    return layout, layout.to(DEVICE)


def hurt(layout: Layout, values: Tensor) -> Tensor:
    """The values with NaN at dead slots."""
    live = layout.live()
    return values if live is None else values.masked_fill(~live, torch.nan)


def gradients(function, layout, values, x, grad):
    """Result and gradients of linear or spmm."""
    values, x = values.detach().requires_grad_(), x.detach().requires_grad_()
    w = SparseTensor(layout, values)
    out = linear(x, w) if function is linear else spmm(w, x)
    out.backward(grad)
    return out.detach(), values.grad, x.grad


def exact(function, shape, tokens, d, dtype):
    layout, there = weight(*shape, d, seed=tokens)
    values = integers(layout.slots, seed=1)
    rows, columns = shape
    x, grad = integers(tokens, columns, seed=2), integers(tokens, rows, seed=3)
    if function is spmm:
        x, grad = x.T.contiguous(), grad.T.contiguous()
    theirs = gradients(function, layout, values, x, grad)
    move = (t.to(DEVICE, dtype) for t in (hurt(layout, values), x, grad))
    ours = gradients(function, there, *move)
    for what, mine, other in zip(("result", "of values", "of x"), ours, theirs, strict=True):
        assert torch.equal(mine.cpu(), other.to(dtype)), what


# Exactness: small integers, all kernels, widths and dtypes


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [1, 7, 16, 33, 64, 72, 130, 300])
@pytest.mark.parametrize("function", [linear, spmm], ids=["linear", "spmm"])
def test_integers_are_exact(function, tokens, dtype, kernel):
    exact(function, (203, 331), tokens, 0.4, dtype)


@pytest.mark.parametrize("tokens", [8, 72, 300])
@pytest.mark.parametrize("first", ["transpose", "gradient"])
def test_a_layout_and_its_transpose(first, tokens, kernel):
    """They share tensors; what is derived for one is not the other's."""
    layout, there = weight(203, 331, 0.4)
    values, y = integers(layout.slots, seed=1), integers(203, tokens, seed=2)
    expected = reference.dense_of(SparseTensor(layout, values.double())).mT @ y.double()
    w, y = SparseTensor(there, values.to(DEVICE).half()), y.to(DEVICE).half()

    def turned() -> Tensor:
        return spmm(w.T, y)

    def gradient() -> Tensor:
        x = torch.zeros(331, tokens, device=DEVICE, dtype=y.dtype, requires_grad=True)
        return torch.autograd.grad(spmm(w, x), x, y)[0]

    calls = [turned, gradient] if first == "transpose" else [gradient, turned]
    for call in calls:
        assert torch.equal(call().cpu().double(), expected.half().double())


@pytest.mark.parametrize("tokens", [1, 3, 6, 8, 12, 16, 40, 100])
def test_aligned_rows_are_exact(tokens, kernel):
    """Rows that bulk copies can read, which not every kernel takes."""
    exact(linear, (208, 720), tokens, 0.4, torch.float16)


@pytest.mark.parametrize("shape", [(16, 16), (5, 700), (700, 5), (512, 256), (1040, 264), (33, 1)])
@pytest.mark.parametrize("function", [linear, spmm], ids=["linear", "spmm"])
def test_shapes_are_exact(function, shape, kernel):
    exact(function, shape, 40, 0.7, torch.float16)


@pytest.mark.parametrize("function", [linear, spmm], ids=["linear", "spmm"])
@pytest.mark.parametrize("tokens", [1, 40, 200])
def test_float32_is_exact(function, tokens):
    exact(function, (203, 331), tokens, 0.4, torch.float32)


@pytest.mark.parametrize("d", [0.02, 2.0])
def test_long_and_short_lines_are_exact(d, kernel):
    """More cells than a head and a batch hold; stages that nothing meets."""
    exact(linear, (640, 2100), 136, d, torch.float16)
    exact(spmm, (640, 2100), 136, d, torch.float16)


@pytest.mark.parametrize("function", [linear, spmm], ids=["linear", "spmm"])
def test_a_few_lines_longer_than_all_others_are_exact(function):
    """Their segments find no room where even lines would; see ``tile_thin.cut``."""
    kept = torch.zeros(256, 512, dtype=torch.bool)
    kept[::16], kept[:, ::20] = True, True
    layout = TileLayout.from_tile_mask(kept, (4096, 8192))
    values, x = integers(layout.slots, seed=1), integers(64, 8192, seed=2)
    w = SparseTensor(layout.to(DEVICE), values.to(DEVICE, torch.half))
    there = x.to(DEVICE, torch.half)
    ours = linear(there, w) if function is linear else spmm(w, there.mT.contiguous()).mT
    theirs = x @ SparseTensor(layout, values).to_dense().mT
    assert torch.equal(ours.cpu(), theirs.half())


def test_regions_of_both_sizes_are_exact():
    """Enough regions for large ones, and more tiles in one than a CTA takes."""
    exact(linear, (3100, 3000), 24, 0.3, torch.float16)
    exact(spmm, (3100, 3000), 24, 2.0, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in CASES if applies("tile", name)])
def test_cases(name, dtype, kernel):
    case: Case = CASES[name]
    layout = BUILDERS["tile"](case, *masks_of(case))
    g = torch.Generator().manual_seed(2)
    values = torch.randn(layout.slots, generator=g).to(dtype)
    x = torch.randn(case.shape[1], case.dim, generator=g).to(dtype)
    for mask in (None, torch.rand(case.shape[1], generator=g) < 0.7):
        s = SparseTensor(layout, hurt(layout, values), mask)
        t = SparseTensor(
            layout.to(DEVICE), s.values.to(DEVICE), None if mask is None else mask.to(DEVICE)
        )
        expected = reference.spmm(s, x)
        for ours, theirs in (
            (spmm(t, x.to(DEVICE)), expected),
            (linear(x.T.to(DEVICE), t), expected.T),
            (linear(x.T.contiguous().to(DEVICE), t), expected.T),
        ):
            allowed = 1.01 * EPSILON[dtype] + 4 * EPSILON[torch.float32] * max(case.shape[1], 1)
            torch.testing.assert_close(
                ours.cpu().double(), theirs.double(), rtol=allowed, atol=8 * allowed
            )


# Biases join the sums before they are rounded


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 20, 130])
def test_bias(tokens, dtype, kernel):
    layout, there = weight(203, 331, 0.4)
    g = torch.Generator().manual_seed(4)
    values, x, bias, grad = (
        torch.randn(*n, generator=g).to(dtype)
        for n in ((layout.slots,), (tokens, 331), (203,), (tokens, 203))
    )
    given = [t.to(DEVICE).requires_grad_() for t in (values, x, bias)]
    out = linear(given[1], SparseTensor(there, given[0]), given[2])
    exactly = reference.linear(x.double(), SparseTensor(layout, values.double()), bias.double())
    # Half of a rounding step is all that the one rounding may take.
    allowed = 1.01 * EPSILON[dtype] * exactly.abs() + 331 * 4 * EPSILON[torch.float32]
    assert ((out.cpu().double() - exactly).abs() <= allowed).all()
    out.backward(grad.to(DEVICE))
    torch.testing.assert_close(
        given[2].grad.cpu().double(), grad.double().sum(0), rtol=EPSILON[dtype], atol=1e-4
    )
    plain = linear(given[1].detach(), SparseTensor(there, given[0].detach()))
    assert torch.equal(
        linear(given[1], SparseTensor(there, given[0]), torch.zeros_like(given[2])), plain
    )


# Half precision against torch's own


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [3, 500])
def test_half_precision_is_as_good_as_torchs(tokens, dtype, kernel):
    layout, there = weight(500, 1000, 0.3)
    g = torch.Generator().manual_seed(5)
    values, x, grad = (
        torch.randn(*n, generator=g).to(DEVICE, dtype)
        for n in ((layout.slots,), (tokens, 1000), (tokens, 500))
    )
    dense = SparseTensor(there, values).to_dense()
    ours = gradients(linear, there, values, x, grad)
    row, column = there.indices()
    live = there.live()

    def plain(kind):
        made = dense.to(kind), x.to(kind), grad.to(kind)
        of_values = (made[2].T @ made[1])[row, column]
        of_values = of_values if live is None else of_values * live
        return torch.nn.functional.linear(made[1], made[0]), of_values, made[2] @ made[0]

    for mine, theirs, exactly in zip(ours, plain(dtype), plain(torch.float64), strict=True):
        a, b = (t.double() - exactly for t in (mine, theirs))
        assert a.square().mean() <= 1.05**2 * b.square().mean()
        assert a.abs().max() <= 2 * b.abs().max()


# What must not depend on anything else


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_repeat(dtype, kernel):
    _, there = weight(500, 700, 0.3)
    values = torch.randn(there.slots, device=DEVICE, dtype=dtype)
    x, grad = (torch.randn(200, n, device=DEVICE, dtype=dtype) for n in (700, 500))
    first, again = (gradients(linear, there, values, x, grad) for _ in range(2))
    assert all(map(torch.equal, first, again))
    s = SparseTensor(there, values)
    alone = spmm(s, x.T.contiguous())
    batch = spmm(s, torch.stack([x.T, -x.T, x.T]))
    assert torch.equal(batch[2], alone) and torch.equal(batch[1], -alone)


def test_what_no_tile_meets_reaches_nothing(kernel):
    layout, there = weight(300, 400, 0.3)
    unused = ~layout.mask()[0, 0].any(0)
    assert unused.any()
    x, values = integers(150, 400, seed=1), integers(layout.slots, seed=2)
    spoilt = x.masked_fill(unused, torch.nan).to(DEVICE).half()
    w = SparseTensor(there, values.to(DEVICE).half())
    expected = linear(x, SparseTensor(layout, values)).half()
    assert torch.equal(linear(spoilt, w).cpu(), expected)
    assert torch.equal(spmm(w, spoilt.T.contiguous()).cpu(), expected.T)


def test_views_of_any_stride(kernel):
    layout, there = weight(90, 70, 0.5)
    values, x = integers(layout.slots, seed=1), integers(72, 70, seed=2)
    expected = linear(x, SparseTensor(layout, values)).half()
    plain, held = x.to(DEVICE).half(), values.to(DEVICE).half()
    shifted = torch.cat([held[:1], held])[1:]
    views = {
        "columns first": plain.T.contiguous().T,
        "odd start": torch.cat([plain[:, :1], plain], 1)[:, 1:],
        "wide rows": torch.cat([plain, plain.new_full((72, 10), torch.nan)], 1)[:, :70],
        "every other": plain.repeat_interleave(2, 0)[::2],
        "batch": plain.view(2, 4, 9, 70).transpose(0, 1).contiguous().transpose(0, 1),
    }
    for what, view in views.items():
        made = linear(view, SparseTensor(there, shifted)).reshape(72, 90)
        assert torch.equal(made.cpu(), expected), what
    s = SparseTensor(there, held)
    for what in ("columns first", "odd start", "wide rows", "every other"):
        assert torch.equal(spmm(s, views[what].T).cpu(), expected.T), what
    one = plain[:1].expand(72, 70)
    assert torch.equal(linear(one, s).cpu(), expected[:1].expand(72, 90))


@pytest.mark.parametrize("dtype, out", [(torch.half, torch.float32), (torch.float32, torch.half)])
def test_values_of_another_dtype(dtype, out):
    layout, there = weight(203, 331, 0.4)
    values, x = integers(layout.slots, seed=1), integers(331, 40, seed=2)
    s = SparseTensor(there, values.to(DEVICE, out))
    expected = spmm(SparseTensor(layout, values), x)
    assert torch.equal(spmm(s, x.to(DEVICE, dtype)).cpu(), expected.to(dtype))


# Gradients


def test_gradients_of_any_order_agree_with_the_cpu():
    layout, there = weight(70, 90, 0.5)
    results = []
    for device, on in (("cpu", layout), (DEVICE, there)):
        g = torch.Generator().manual_seed(3)
        values, x, bias = (
            torch.randn(*n, generator=g).to(device).requires_grad_()
            for n in ((layout.slots,), (11, 90), (70,))
        )
        y = linear(x, SparseTensor(on, values), bias)
        first = torch.autograd.grad((y**2).sum(), (values, x, bias), create_graph=True)
        second = torch.autograd.grad(sum((t**2).sum() for t in first), (values, x, bias))
        results.append([t.detach().cpu() for t in (y, *first, *second)])
    for theirs, ours in zip(*results, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * scale)


def test_dead_slots_get_no_gradient():
    layout, there = weight(41, 37, 2.0)
    live = layout.live()
    assert live is not None
    for dtype in DTYPES:
        values = torch.randn(there.slots, device=DEVICE, dtype=dtype)
        x, grad = (torch.randn(9, n, device=DEVICE, dtype=dtype) for n in (37, 41))
        _, made, _ = gradients(linear, there, values, x, grad)
        assert not made.cpu()[~live].any() and made.cpu()[live].all()


def test_tf32_follows_torch():
    layout, there = weight(64, 64, 2.0)
    g = torch.Generator().manual_seed(0)
    values, x = torch.randn(layout.slots, generator=g), torch.randn(64, 64, generator=g)
    exactly = reference.linear(x.double(), SparseTensor(layout, values.double()))
    errors = []
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            ours = linear(x.to(DEVICE), SparseTensor(there, values.to(DEVICE))).cpu().double()
            errors.append(float((ours - exactly).abs().max()))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors[0] < 2e-5
    assert 1e-4 < errors[1] < 3e-2


def test_float64_says_what_to_do():
    _, there = weight(64, 64, 0.5)
    w = SparseTensor(there, torch.zeros(there.slots, dtype=torch.float64, device=DEVICE))
    with pytest.raises(UnsupportedError, match="float"):
        linear(torch.zeros(3, 64, dtype=torch.float64, device=DEVICE), w)


# The device's own


@pytest.mark.parametrize("tokens", [1, 300])
def test_capture_and_replay(tokens, kernel):
    _, there = weight(500, 700, 0.3)
    w = SparseTensor(there, torch.randn(there.slots, device=DEVICE).half())
    x, bias = (torch.randn(*n, device=DEVICE).half() for n in ((tokens, 700), (500,)))
    for _ in range(2):
        expected = linear(x, w, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = linear(x, w, bias)
    made.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(made, expected)


def test_a_compiled_layer():
    _, there = weight(160, 320, 0.4)
    layer = SparseLinear(320, 160, there, device=DEVICE, dtype=torch.half)
    x = torch.randn(130, 320, device=DEVICE).half().requires_grad_()
    expected = layer(x)
    expected.backward(torch.ones_like(expected))
    wanted = [x.grad.clone(), layer.values.grad.clone(), layer.bias.grad.clone()]
    x.grad = None
    layer.zero_grad()
    made = torch.compile(layer, fullgraph=True)(x)
    made.backward(torch.ones_like(made))
    assert torch.equal(made, expected)
    for ours, theirs in zip((x.grad, layer.values.grad, layer.bias.grad), wanted, strict=True):
        assert torch.equal(ours, theirs)
