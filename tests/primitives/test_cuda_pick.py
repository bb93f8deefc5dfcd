"""The gradient of a layer's single entries on Hopper, from rows of tokens: sddmm_pick_sm90."""

import pytest
import torch
from test_cuda_block import poisoned as poisoned  # a fixture
from test_cuda_row_layers import HALVES, integers, there, weight
from torch import Tensor

from mixgrain.cuda.device import facts
from mixgrain.formats import patterns as P
from mixgrain.formats.cache import clear_caches
from mixgrain.formats.sparse import SparseTensor
from mixgrain.formats.sparsify import sparsify
from mixgrain.primitives.cuda import dense_tile_sm90, row_weights_sm90
from mixgrain.primitives.linear import linear
from mixgrain.primitives.sddmm import sddmm

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """Columns of a tile of each kernel that was asked for, whatever it gains."""
    if not facts(0).hopper:
        pytest.skip("no Hopper")
    found, plain = [], row_weights_sm90.sddmm_request

    def sddmm_request(wide, *rest):
        found.append(wide)
        return plain(wide, *rest)

    monkeypatch.setattr(row_weights_sm90, "sddmm_request", sddmm_request)
    monkeypatch.setattr(row_weights_sm90, "GATHER", 1e-9)
    clear_caches()
    yield found
    clear_caches()


@pytest.fixture(params=dense_tile_sm90.STAGES)
def wide(request, monkeypatch):
    monkeypatch.setattr(row_weights_sm90, "wide_of", lambda *_: request.param)
    return request.param


def gradient(x: Tensor, w: SparseTensor, grad: Tensor) -> Tensor:
    """Of the values of a layer."""
    values = w.values.detach().requires_grad_()
    y = linear(x, SparseTensor(w.layout, values))
    return torch.autograd.grad(y, values, grad)[0]


def exact(w: SparseTensor, count: int, dtype: torch.dtype, lead=()) -> None:
    """As the reference on the CPU, to the bit."""
    rows, columns = w.shape
    x, grad = (integers(*lead, count, n, seed=2) for n in (columns, rows))
    right = gradient(x.double(), there(w, torch.float64, "cpu"), grad.double())
    ours = gradient(x.to(DEVICE, dtype), there(w, dtype), grad.to(DEVICE, dtype))
    assert ours.is_contiguous() and torch.equal(ours.cpu(), right.to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("count", [1, 65, 700])
@pytest.mark.parametrize(
    ("shape", "d"), [((208, 336), 0.2), ((8, 40), 0.5), ((696, 8), 0.3), ((304, 2056), 0.02)]
)
def test_gradients_are_exact(shape, d, count, dtype, wide, taken):
    exact(weight(*shape, d), count, dtype)
    assert taken == [wide]


def test_leading_dimensions(wide, taken):
    exact(weight(208, 336, 0.2), 9, torch.float16, lead=(2, 3))
    assert taken


def test_tiles_that_keep_everything_and_nothing(wide, taken):
    dense = torch.zeros(512, 1024)
    dense[130, 700], dense[131, 3], dense[256:384, 256:512] = 1, 2, 3
    exact(sparsify(dense, "row"), 70, torch.float16)
    exact(weight(200, 1032, 1.0), 70, torch.float16)
    assert taken


def test_slots_that_nothing_keeps_are_zero(wide, taken):
    """A mixed layout of single entries has some behind them."""
    layout = P.random(0.02, 0).to_layout("mixed", 1024, 1024)
    assert layout.slots > layout.nnz
    exact(SparseTensor(layout, integers(layout.slots, seed=3)), 70, torch.float16)
    assert taken == [wide]


def test_large_layers_are_exact(taken):
    """As they are cut by themselves: more CTAs than multiprocessors."""
    g = torch.Generator(DEVICE).manual_seed(0)
    for shape, count in (((4096, 4096), 600), ((1024, 1024), 600)):
        kept = torch.rand(*shape, device=DEVICE, generator=g) < 0.05
        w = sparsify(torch.where(kept, 1.0, 0.0).half(), "row")
        x, grad = (
            torch.randint(-2, 3, (count, n), device=DEVICE, generator=g).half()
            for n in (shape[1], shape[0])
        )
        right = (grad.double().T @ x.double())[kept]
        assert torch.equal(gradient(x, w, grad), right.half())
    assert len(set(taken)) == 2


def test_what_is_not_kept_does_not_matter(wide, taken):
    """An entry meets its row of gradients and its column of x, nothing else."""
    w = there(weight(208, 336, 0.2), torch.float16)
    x, grad = (integers(200, n, seed=2).to(DEVICE).half() for n in (336, 208))
    right = gradient(x, w, grad)
    x[150, 171], grad[3, 104] = torch.nan, torch.inf
    ours = SparseTensor(w.layout, gradient(x, w, grad)).to_dense()
    touched = torch.zeros(208, 336, dtype=torch.bool, device=DEVICE)
    touched[104], touched[:, 171] = True, True
    assert torch.equal(ours[~touched], SparseTensor(w.layout, right).to_dense()[~touched])
    kept = SparseTensor(w.layout, torch.ones_like(right)).to_dense() != 0
    assert not ours[touched & kept].isfinite().any() and taken


def test_the_long_way_has_the_same_bits(wide, taken):
    """Operators, which torch.compile traces; and sddmm of rows of tokens, scaled."""
    w, g = there(weight(208, 336, 0.2), torch.float16), torch.Generator(DEVICE).manual_seed(0)
    x, grad = (torch.randn(70, n, device=DEVICE, generator=g).half() for n in (336, 208))
    short = gradient(x, w, grad)
    with torch.device(DEVICE):  # something watches: the operators
        long = gradient(x, w, grad)
    assert torch.equal(short, long)
    assert torch.equal(sddmm(grad.mT, x.mT, w.layout, scale=0.5).values, short * 0.5)
    assert taken == [wide] * 3


def test_matrices_of_values(wide, taken):
    w = weight(208, 336, 0.2)
    q, k = integers(3, 70, 208, seed=3), integers(3, 70, 336, seed=2)
    right = sddmm(q.mT, k.mT, w.layout, scale=1.0).values.half()
    layout = w.layout.to(DEVICE)
    ours = sddmm(*(t.to(DEVICE).half().mT for t in (q, k)), layout, scale=1.0).values
    assert torch.equal(ours.cpu(), right) and taken


@pytest.mark.parametrize("d", [0.1, 0.6])
@pytest.mark.parametrize("count", [3, 300])
def test_no_read_is_too_early(count, d, wide, taken):
    """Operands change from call to call and caches are cold: what was there before shows."""
    g = torch.Generator(DEVICE).manual_seed(0)
    junk = torch.empty(1 << 27, dtype=torch.uint8, device=DEVICE)
    layers = []
    for _ in range(3):
        kept = torch.rand(1024, 1536, device=DEVICE, generator=g) < d
        x, grad = (
            torch.randint(-2, 3, (count, n), device=DEVICE, generator=g) for n in (1536, 1024)
        )
        right = (grad.double().T @ x.double())[kept].half()
        w = sparsify(torch.where(kept, 1.0, 0.0).half(), "row")
        layers.append((w, x.half(), grad.half(), right))
    for n in range(60):
        w, x, grad, right = layers[n % 3]
        if n % 20 == 0:
            clear_caches()
        junk.fill_(n)
        assert torch.equal(gradient(x, w, grad), right)
    assert taken


@pytest.mark.parametrize("shape, d", [((600, 2048), 0.3), ((2056, 4104), 0.05)])
def test_repeats_are_alike(shape, d, wide, taken):
    """A race would move a bit in one of 250; CTAs take a tile, and several with edges."""
    w, g = there(weight(*shape, d), torch.float16), torch.Generator(DEVICE).manual_seed(0)
    x, grad = (torch.randn(100, n, device=DEVICE, generator=g).half() for n in shape[::-1])
    first = gradient(x, w, grad)
    assert all(torch.equal(gradient(x, w, grad), first) for _ in range(250))
    assert taken
