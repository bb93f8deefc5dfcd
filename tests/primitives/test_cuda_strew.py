"""Linear layers of single entries on Hopper, strewn over dense tiles: spmm_strew_sm90."""

import pytest
import torch
from test_cuda_block import poisoned as poisoned  # a fixture
from test_cuda_row_layers import HALVES, integers, there, weight
from torch import Tensor

from mixgrain.cuda.device import facts
from mixgrain.formats.cache import clear_caches
from mixgrain.formats.sparse import SparseTensor
from mixgrain.formats.sparsify import sparsify
from mixgrain.primitives.activations import ACTIVATIONS
from mixgrain.primitives.cuda import strew_sm90
from mixgrain.primitives.linear import linear
from mixgrain.primitives.sparse_linear import SparseLinear
from mixgrain.primitives.spmm import spmm

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
CUTS = list(strew_sm90.COSTS)


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """Cuts of the kernels that were asked for; whatever they gain, and whoever else could."""
    if not facts(0).hopper:
        pytest.skip("no Hopper")
    found, plain = [], strew_sm90.spmm_request

    def spmm_request(how, *rest):
        found.append(how)
        return plain(how, *rest)

    monkeypatch.setattr(strew_sm90, "spmm_request", spmm_request)
    monkeypatch.setattr(strew_sm90, "faster", lambda *_: True)
    clear_caches()
    yield found
    clear_caches()


@pytest.fixture(params=CUTS, ids=lambda how: "-".join(map(str, how)))
def how(request, monkeypatch):
    monkeypatch.setattr(strew_sm90, "COSTS", {request.param: 1})
    return request.param


def everything(x: Tensor, w: SparseTensor, bias: Tensor | None, grad: Tensor) -> list[Tensor]:
    """A layer and its gradients of x and of the values."""
    x, values = x.detach().requires_grad_(), w.values.detach().requires_grad_()
    y = linear(x, SparseTensor(w.layout, values), bias)
    return [y.detach(), *torch.autograd.grad(y, (x, values), grad)]


def exact(w: SparseTensor, count: int, dtype: torch.dtype, biased: bool = False, lead=()) -> None:
    """As the reference on the CPU, to the bit."""
    rows, columns = w.shape
    x, grad = (integers(*lead, count, n, seed=2) for n in (columns, rows))
    bias = integers(rows, seed=4) if biased else None
    wide = [None if t is None else t.double() for t in (x, bias, grad)]
    right = everything(wide[0], there(w, torch.float64, "cpu"), *wide[1:])
    move = [None if t is None else t.to(DEVICE, dtype) for t in (x, bias, grad)]
    ours = everything(move[0], there(w, dtype), *move[1:])
    for a, b in zip(ours, right, strict=True):
        assert a.is_contiguous() and torch.equal(a.cpu(), b.to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("count", [1, 65, 300])
@pytest.mark.parametrize(
    ("shape", "d"), [((208, 336), 0.2), ((8, 40), 0.5), ((696, 8), 0.3), ((304, 2056), 0.02)]
)
def test_products_are_exact(shape, d, count, dtype, how, taken):
    w = weight(*shape, d)
    exact(w, count, dtype)
    exact(w, count, dtype, biased=True)
    assert set(taken) == {how} and len(taken) >= 4


def test_dense_steps_take_several_pieces(how, taken):
    exact(weight(200, 1032, 0.7), 130, torch.float16)
    exact(weight(200, 1032, 1.0), 130, torch.float16)
    assert taken


def test_leading_dimensions(how, taken):
    exact(weight(208, 336, 0.2), 9, torch.float16, lead=(2, 3))
    assert taken


def test_lines_that_keep_nothing(how, taken):
    dense = torch.zeros(512, 1024)
    dense[130, 700], dense[131, 3], dense[400, ::2] = 1, 2, 3
    exact(sparsify(dense, "row"), 70, torch.float16, biased=True)
    assert taken


def test_large_layers_are_exact(taken):
    """As they are cut by themselves: more CTAs than multiprocessors, clusters."""
    for shape, d, count in (((4096, 4096), 0.05, 64), ((4096, 4096), 0.05, 600)):
        g = torch.Generator(DEVICE).manual_seed(0)
        kept = torch.rand(*shape, device=DEVICE, generator=g) < d
        dense = torch.randint(-2, 3, shape, device=DEVICE, generator=g) * kept
        x = torch.randint(-2, 3, (count, shape[1]), device=DEVICE, generator=g)
        y = linear(x.half(), sparsify(dense.half(), "row"))
        assert torch.equal(y, (x.double() @ dense.double().T).half())
    assert len(set(taken)) == 2


@pytest.mark.parametrize("count", [5, 200])
def test_what_a_row_does_not_keep_does_not_matter(count, how, taken):
    """NaN or infinity in x: 0 · NaN is NaN."""
    w = weight(208, 336, 0.2)
    x, dense = integers(count, 336, seed=2), w.to_dense()
    right = linear(x, w)
    for column, wrong in ((0, torch.nan), (171, torch.inf), (335, torch.nan)):
        broken = x.clone()
        broken[count // 2 :, column] = wrong
        y = linear(broken.to(DEVICE).half(), there(w, torch.float16)).cpu()
        keeps = dense[:, column] != 0
        assert torch.equal(y[: count // 2], right[: count // 2].half())
        assert torch.equal(y[:, ~keeps], right[:, ~keeps].half())
        assert not y[count // 2 :, keeps].isfinite().any()
    hurt = w.values.clone()
    hurt[7] = torch.nan
    y = linear(x.to(DEVICE).half(), there(SparseTensor(w.layout, hurt), torch.float16)).cpu()
    assert y.isnan().any(0).sum() == 1 and y.isnan().sum() == count
    assert taken


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, how, taken):
    w = weight(208, 336, 0.2)
    g = torch.Generator().manual_seed(0)
    x, bias = (torch.randn(*n, generator=g).half() for n in ((70, 336), (208,)))
    w = SparseTensor(w.layout, (w.values / 16).half())
    wide = SparseTensor(w.layout, w.values.double())
    right = ACTIVATIONS[name](linear(x.double(), wide, bias.double()))
    with torch.no_grad():
        y = linear(x.to(DEVICE), there(w, torch.float16), bias.to(DEVICE), name)
    torch.testing.assert_close(y.cpu().double(), right, rtol=1.2 * 2.0**-11, atol=4e-4)
    assert taken


@pytest.mark.parametrize("biased", [False, True])
def test_the_long_way_has_the_same_bits(biased, how, taken):
    """Operators, which torch.compile traces; and spmm of the same rows, transposed."""
    w, g = there(weight(208, 336, 0.2), torch.float16), torch.Generator(DEVICE).manual_seed(0)
    x, bias, grad = (
        torch.randn(*n, device=DEVICE, generator=g).half() for n in ((70, 336), (208,), (70, 208))
    )
    bias = bias if biased else None
    short = everything(x, w, bias, grad)
    with torch.device(DEVICE):  # something watches: the operators
        long = everything(x, w, bias, grad)
    for a, b in zip(short, long, strict=True):
        assert torch.equal(a, b)
    if not biased:
        assert torch.equal(spmm(w, x.mT).mT, short[0])
    assert set(taken) == {how}


def test_matrices_of_values(how, taken):
    w = weight(208, 336, 0.2)
    values, x = integers(3, w.layout.slots, seed=3), integers(3, 70, 336, seed=2)
    right = spmm(SparseTensor(w.layout, values), x.mT).half()
    s = SparseTensor(w.layout.to(DEVICE), values.to(DEVICE).half())
    assert torch.equal(spmm(s, x.to(DEVICE).half().mT).cpu(), right)
    assert taken


@pytest.mark.parametrize("d", [0.1, 0.6])
@pytest.mark.parametrize("count", [3, 300])
def test_no_read_is_too_early(count, d, how, taken):
    """Operands change from call to call and caches are cold: what was there before shows."""
    g = torch.Generator(DEVICE).manual_seed(0)
    junk = torch.empty(1 << 27, dtype=torch.uint8, device=DEVICE)
    layers = []
    for sign in (-1, 1, -1):
        kept = torch.rand(1024, 1536, device=DEVICE, generator=g) < d
        dense = sign * torch.randint(1, 3, (1024, 1536), device=DEVICE, generator=g) * kept
        x, grad = (
            torch.randint(-1, 2, (count, n), device=DEVICE, generator=g) for n in (1536, 1024)
        )
        right = x.double() @ dense.double().T, grad.double() @ dense.double()
        w = sparsify(dense.half(), "row")
        layers.append((w, x.half().requires_grad_(), grad.half(), *(t.half() for t in right)))
    for n in range(90):
        w, x, grad, right, dx = layers[n % 3]
        if n % 30 == 0:
            clear_caches()
        junk.fill_(n)
        y = linear(x, w)
        junk.fill_(n + 1)
        assert torch.equal(y.detach(), right)
        assert torch.equal(torch.autograd.grad(y, x, grad)[0], dx)
    assert taken


def test_repeats_are_alike(how, taken):
    """A race would move a bit in one of 250."""
    w, g = there(weight(600, 2048, 0.3), torch.float16), torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(100, 2048, device=DEVICE, generator=g).half()
    first = linear(x, w)
    assert all(torch.equal(linear(x, w), first) for _ in range(250))
    assert taken


def test_a_layer_in_a_graph(how, taken):
    layout = weight(208, 336, 0.2).layout.to(DEVICE)
    layer = SparseLinear(336, 208, layout, device=DEVICE, dtype=torch.half)
    x = torch.randn(70, 336, device=DEVICE).half()
    with torch.no_grad():
        right = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.mul_(2)
        graph.replay()
        assert torch.equal(y, layer(x)) and not torch.equal(y, right)
    assert taken
