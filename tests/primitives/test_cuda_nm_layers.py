"""The gradient of the input of a layer of 2:4 or 1:2 halves on Hopper: spmm_nm_expand_sm90."""

import pytest
import torch
from test_cuda_block import poisoned as poisoned  # a fixture
from test_cuda_weights import HALVES, integers, layout_of
from torch import Tensor

from mixgrain.cuda.device import facts
from mixgrain.formats.cache import clear_caches
from mixgrain.formats.layout import Layout
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives.cuda import nm_expand_sm90
from mixgrain.primitives.linear import linear

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
KINDS = ("2:4", "1:2")


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """Tokens of a CTA of each kernel that was asked for, whatever it gains."""
    if not facts(0).hopper:
        pytest.skip("no Hopper")
    found, plain = [], nm_expand_sm90.spmm_request

    def spmm_request(wide, *rest):
        found.append(wide)
        return plain(wide, *rest)

    monkeypatch.setattr(nm_expand_sm90, "spmm_request", spmm_request)
    monkeypatch.setattr(nm_expand_sm90, "TOKENS", 1 << 30)
    clear_caches()
    yield found
    clear_caches()


@pytest.fixture(params=nm_expand_sm90.STAGES)
def wide(request, monkeypatch):
    monkeypatch.setattr(nm_expand_sm90, "wide_of", lambda *_: request.param)
    return request.param


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def gradient(x: Tensor, layout: Layout, values: Tensor, grad: Tensor) -> Tensor:
    """Of the input of a layer."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(linear(x, SparseTensor(layout, values)), x, grad)[0]


def exact(layout: Layout, count: int, dtype: torch.dtype, lead=()) -> None:
    """As the reference on the CPU, to the bit, whatever dead slots hold."""
    rows, columns = layout.shape
    values, live = integers(layout.slots, seed=1), layout.live()
    x, grad = (integers(*lead, count, n, seed=2) for n in (columns, rows))
    right = gradient(x, layout, values, grad)
    hurt = values if live is None else values.masked_fill(~live, torch.nan)
    there = (t.to(DEVICE, dtype) for t in (hurt, grad))
    ours = gradient(x.to(DEVICE, dtype), layout.to(DEVICE), *there)
    assert ours.is_contiguous() and torch.equal(ours.cpu(), right.to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("count", [1, 65, 700])
@pytest.mark.parametrize("shape", [(640, 768), (8, 40), (200, 376), (4096, 72), (72, 4096)])
def test_gradients_are_exact(shape, count, dtype, kind, wide, poisoned, taken):
    exact(layout_of(kind, *shape), count, dtype)
    assert taken == [wide]


def test_leading_dimensions(kind, wide, taken):
    exact(layout_of(kind, 200, 376), 9, torch.float16, lead=(2, 3))
    assert taken == [wide]


def test_large_layers_are_exact(kind, taken):
    """More CTAs than multiprocessors, as they are cut by themselves."""
    layout = layout_of(kind, 4096, 4096).to(DEVICE)
    g = torch.Generator(DEVICE).manual_seed(0)
    for count in (130, 700, 2000):
        values, grad = (
            torch.randint(-2, 3, n, device=DEVICE, generator=g).half()
            for n in ((layout.slots,), (count, 4096))
        )
        x = torch.zeros(count, 4096, device=DEVICE).half()
        dense = SparseTensor(layout, values.double()).to_dense()
        ours = gradient(x, layout, values, grad)
        assert torch.equal(ours, (grad.double() @ dense).half())
    assert len(taken) == 3


def test_the_long_way_has_the_same_bits(kind, wide, taken):
    """Operators, which torch.compile traces."""
    layout, g = layout_of(kind, 208, 336).to(DEVICE), torch.Generator(DEVICE).manual_seed(0)
    x, grad = (torch.randn(70, n, device=DEVICE, generator=g).half() for n in (336, 208))
    values = torch.randn(layout.slots, device=DEVICE, generator=g).half()
    short = gradient(x, layout, values, grad)
    with torch.device(DEVICE):  # something watches: the operators
        long = gradient(x, layout, values, grad)
    assert torch.equal(short, long) and taken == [wide] * 2


@pytest.mark.parametrize("count", [3, 300])
def test_no_read_is_too_early(count, kind, wide, taken):
    """Operands change from call to call and caches are cold: what was there before shows."""
    g = torch.Generator(DEVICE).manual_seed(0)
    junk = torch.empty(1 << 27, dtype=torch.uint8, device=DEVICE)
    layers = []
    for n in range(3):
        layout = layout_of(kind, 1024, 1536 + 64 * n).to(DEVICE)
        values, grad = (
            torch.randint(-2, 3, n, device=DEVICE, generator=g).half()
            for n in ((layout.slots,), (count, 1024))
        )
        dense = SparseTensor(layout, values.double()).to_dense()
        x = torch.zeros(count, layout.shape[1], device=DEVICE).half()
        layers.append((x, layout, values, grad, (grad.double() @ dense).half()))
    for n in range(60):
        *given, right = layers[n % 3]
        if n % 20 == 0:
            clear_caches()
        junk.fill_(n)
        assert torch.equal(gradient(*given), right)
    assert taken


def test_repeats_are_alike(kind, wide, taken):
    """A race would move a bit in one of 250."""
    layout, g = layout_of(kind, 640, 2048).to(DEVICE), torch.Generator(DEVICE).manual_seed(0)
    x, grad = (torch.randn(200, n, device=DEVICE, generator=g).half() for n in (2048, 640))
    values = torch.randn(layout.slots, device=DEVICE, generator=g).half()
    first = gradient(x, layout, values, grad)
    assert all(torch.equal(gradient(x, layout, values, grad), first) for _ in range(250))
    assert taken
