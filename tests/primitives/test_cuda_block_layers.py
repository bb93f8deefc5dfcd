"""Linear layers of blocks on a GPU, rows of tokens in and out, by every kernel that does them."""

import pytest
import torch
from test_cuda_block import poisoned as poisoned  # a fixture
from torch import Tensor

from mixgrain.cuda.device import facts
from mixgrain.formats import patterns as P
from mixgrain.formats.block import BlockLayout
from mixgrain.formats.cache import clear_caches
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives.activations import ACTIVATIONS
from mixgrain.primitives.cuda import (
    block_few,
    block_sm90,
    block_weights_sm90,
    pair_sm90,
    union_sm90,
)
from mixgrain.primitives.linear import linear
from mixgrain.primitives.sparse_linear import SparseLinear
from mixgrain.primitives.spmm import spmm

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

SIZES = (16, 32, 64, 128)
HALVES = (torch.float16, torch.bfloat16)
TOKENS = (1, 13, 16, 64, 100, 257)
# What is chosen; each way to cut few tokens; those of sm_90a, pairs for whole blocks of 64 only.
KERNELS = ["best", *(f"few {n}" for n in range(5)), *(f"many {n}" for n in range(3)), "pairs"]


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """Each way of multiplying, for whatever there is that it can take."""
    name, _, way = request.param.partition(" ")
    clear_caches()  # of calls prepared otherwise
    if name == "few":
        monkeypatch.setattr(block_few, "faster", lambda *_: True)
        cuts = block_few.cuts
        monkeypatch.setattr(
            block_few, "cut", lambda _, size, *__: cuts(size)[int(way) % len(cuts(size))]
        )
    elif name != "best":
        if not facts(0).hopper:
            pytest.skip("wgmma needs compute capability 9.0")
        monkeypatch.setattr(block_few, "faster", lambda *_: False)
        if name == "many":
            cuts = block_sm90.TOKEN_CUTS
            monkeypatch.setattr(
                block_sm90, "token_tile", lambda _, size, *__: list(cuts[size])[int(way)]
            )
            wide = list(union_sm90.TOKEN_COSTS)[int(way)]
            monkeypatch.setattr(union_sm90, "token_wide", lambda *_: wide)
            monkeypatch.setattr(pair_sm90, "ENOUGH", float("inf"))
        else:
            monkeypatch.setattr(pair_sm90, "ENOUGH", 0)
            monkeypatch.setattr(pair_sm90, "LEAST", 0)
            monkeypatch.setattr(pair_sm90, "SHARE", 2)
    yield request.param
    clear_caches()


@pytest.fixture
def taken(monkeypatch):
    """Which kernels were launched, by their names."""
    names = []
    for module in (block_few, block_sm90, block_weights_sm90, pair_sm90, union_sm90):
        monkeypatch.setattr(module, "kernel", _noting(module.kernel, names))
    return names


def _noting(found, names):
    def kernel(wanted, device):
        names.append(wanted.name)
        return found(wanted, device)

    return kernel


def integers(*shape: int, seed: int = 0) -> Tensor:
    """Small integers as float32 on the CPU."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def whole(rows: int, columns: int, size: int, d: float = 0.5) -> BlockLayout:
    """Blocks without dead elements, some lines empty, on the CPU."""
    kept = (
        torch.rand(rows // size, columns // size, generator=torch.Generator().manual_seed(size)) < d
    )
    kept[1::5], kept[:, 2::7] = False, False
    layout = P.blocks(kept, size).to_layout("block", rows, columns, size=size)
    assert layout.live() is None
    return layout


def partial(rows: int, columns: int, size: int) -> BlockLayout:
    """Blocks with dead elements, and some that hang over the edge."""
    pattern = P.dilated(60, 3) | P.random(0.002, 0)
    return pattern.to_layout("block", rows, columns, size=size)


def products(layout, values, x, bias=None, activation=None, grad=None):
    """Result, gradient of x and of the values."""
    x, values = (
        x.detach().requires_grad_(grad is not None),
        values.detach().requires_grad_(grad is not None),
    )
    out = linear(x, SparseTensor(layout, values), bias, activation)
    if grad is None:
        return (out,)
    return out.detach(), *torch.autograd.grad(out, (x, values), grad)


def exact(layout, count, dtype, biased=False, lead=()):
    """As the reference on the CPU, of integers, to the bit, whatever dead slots hold."""
    rows, columns = layout.shape
    values, live = integers(layout.slots, seed=1), layout.live()
    bias = integers(rows, seed=4) if biased else None
    x, grad = integers(*lead, count, columns, seed=2), integers(*lead, count, rows, seed=3)
    theirs = products(layout, values, x, bias, grad=grad)
    hurt = values if live is None else values.masked_fill(~live, torch.nan)
    there = [None if t is None else t.to(DEVICE, dtype) for t in (hurt, x, bias)]
    ours = products(layout.to(DEVICE), *there, grad=grad.to(DEVICE, dtype))
    for what, mine, other in zip(("result", "of x", "of values"), ours, theirs, strict=True):
        assert torch.equal(mine.cpu(), other.to(dtype)), what
    assert ours[0].is_contiguous()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", TOKENS)
def test_integers_are_exact(count, size, dtype, kernel, poisoned, taken):
    exact(whole(5 * 128, 6 * 128, size), count, dtype)
    if kernel.startswith("few"):
        assert taken.count("spmm_block_few") == 2
    elif kernel == "pairs" and size == 64 and count > 128:
        assert taken.count("spmm_pair_sm90") == 2
    elif kernel != "best" and size >= 32:
        name = "spmm_union_sm90" if size == 32 else "spmm_block_sm90"
        assert taken.count(name) == 2
    exact(whole(5 * 128, 6 * 128, size), count, dtype, biased=True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 40, 257])
@pytest.mark.parametrize("shape", [(584, 760), (136, 1400), (1400, 136)])
def test_dead_elements_and_edges_are_exact(shape, count, size, kernel, poisoned):
    exact(partial(*shape, size), count, torch.float16)
    exact(partial(*shape, size), count, torch.bfloat16, biased=True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [(128, 128), (128, 4096), (4096, 128), (256, 256)])
def test_shapes_are_exact(shape, size, kernel):
    """Lines longer than all warps take at once; fewer blocks than warps; leading dimensions."""
    exact(whole(*shape, size, 0.9), 24, torch.float16, biased=True, lead=(2, 3))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [16, 300])
def test_what_nothing_keeps_does_not_matter(size, count, kernel):
    """NaN in x where no block has a live element: 0 · NaN is NaN."""
    for layout in (whole(640, 768, size), partial(584, 760, size)):
        dense = SparseTensor(layout, torch.ones(layout.slots)).to_dense()
        values, x = integers(layout.slots, seed=1), integers(count, layout.shape[1], seed=2)
        unused = dense.eq(0).all(0)
        right = products(layout, values, x)[0]
        x[:, unused] = torch.nan
        y = products(layout.to(DEVICE), *(t.to(DEVICE).half() for t in (values, x)))[0]
        assert torch.equal(y.cpu(), right.half())


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [5, 300])
def test_activations(count, size, name, kernel):
    """Of sums that are not rounded before."""
    layout = whole(640, 768, size)
    g = torch.Generator().manual_seed(0)
    values, x, bias = (
        torch.randn(*n, generator=g).half() for n in ((layout.slots,), (count, 768), (640,))
    )
    values = values / 8
    sums = products(layout, values.double(), x.double(), bias.double())[0]
    with torch.no_grad():
        y = products(layout.to(DEVICE), *(t.to(DEVICE) for t in (values, x, bias)), name)[0]
    right = ACTIVATIONS[name](sums)
    torch.testing.assert_close(y.cpu().double(), right, rtol=1.2 * 2.0**-11, atol=4e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [3, 24, 200])
def test_the_long_way_has_the_same_bits(size, count, kernel):
    """Operators, which torch.compile traces, write rows of features; layers rows of tokens."""
    layout = whole(640, 768, size).to(DEVICE)
    g = torch.Generator(DEVICE).manual_seed(0)
    values, x, bias, grad = (
        torch.randn(*n, device=DEVICE, generator=g).half()
        for n in ((layout.slots,), (count, 768), (640,), (count, 640))
    )
    short = products(layout, values, x, bias, grad=grad)
    with torch.device(DEVICE):  # something watches: the operators
        long = products(layout, values, x, bias, grad=grad)
    for a, b in zip(short, long, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", SIZES)
def test_odd_tensors(size, kernel):
    """Not aligned, not contiguous, broadcast, one dimension: copied or turned, never misread."""
    layout = whole(256, 384, size)
    values, w = integers(layout.slots, seed=1), integers(4, 40, 385, seed=2)
    there = layout.to(DEVICE)
    for make in (
        lambda t: t[0, :, 1:],
        lambda t: t[0, :, :-1],
        lambda t: t[0].T[:384].T,
        lambda t: t[:, ::3, :384],
        lambda t: t[0, :1, :384].expand(20, 384),
        lambda t: t[0, 0, :384],
        lambda t: t[0, :0, :384],
    ):
        right = products(layout, values, make(w))[0]
        y = products(there, values.to(DEVICE).half(), make(w.to(DEVICE).half()))[0]
        assert torch.equal(y.cpu(), right.half())


@pytest.mark.parametrize("size", SIZES)
def test_columns_of_a_product(size, kernel):
    """Spmm of a matrix whose columns are rows of tokens in memory, and of several at once."""
    layout = whole(256, 384, size)
    values, x = integers(layout.slots, seed=1), integers(3, 24, 384, seed=2)
    right = spmm(SparseTensor(layout, values), x.mT)
    w = SparseTensor(layout.to(DEVICE), values.to(DEVICE).half())
    assert torch.equal(spmm(w, x.to(DEVICE).half().mT).cpu(), right.half())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [16, 256])
def test_repeats_are_alike(size, count, kernel):
    """A race would move a bit in one of 250."""
    layout = whole(640, 768, size, 0.8).to(DEVICE)
    g = torch.Generator(DEVICE).manual_seed(0)
    values, x = (
        torch.randn(*n, device=DEVICE, generator=g).half() for n in ((layout.slots,), (count, 768))
    )
    w = SparseTensor(layout, values)
    first = linear(x, w)
    assert all(torch.equal(linear(x, w), first) for _ in range(250))


@pytest.mark.parametrize("count", [4, 200])
def test_a_layer_in_a_graph(count, kernel):
    layer = SparseLinear(384, 256, whole(256, 384, 64), device=DEVICE, dtype=torch.half)
    x = torch.randn(count, 384, device=DEVICE).half()
    with torch.no_grad():
        right = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.mul_(2)
        graph.replay()
        assert torch.equal(y, layer(x)) and not torch.equal(y, right)


@pytest.mark.parametrize("kind", ["block", "row", "mixed"])
def test_compiled_layers(kind):
    """Traced, a layer is one operator, with the bits of the eager one, forward and backward."""
    pattern = P.blocks(torch.eye(8, 12, dtype=torch.bool), 64) | P.random(0.004, 0)
    layout = pattern.to_layout(kind, 512, 768).to(DEVICE)
    layer = SparseLinear(768, 512, layout, device=DEVICE, dtype=torch.half)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(40, 768, device=DEVICE).half()
    for run in (lambda f: (f(x),), lambda f: _gradients(f, layer, x)):
        for mine, right in zip(run(compiled), run(layer), strict=True):
            assert torch.equal(mine, right)


def _gradients(f, layer, x):
    x = x.detach().requires_grad_()
    y = f(x)
    return y, *torch.autograd.grad(y.sum(), (x, *layer.parameters()))
