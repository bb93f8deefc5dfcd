"""Linear layers of single entries on a GPU, for few rows of tokens: spmm_row_few."""

import pytest
import torch
from test_cuda_block import poisoned as poisoned  # a fixture
from torch import Tensor

from mixgrain.cuda.device import facts
from mixgrain.formats import patterns as P
from mixgrain.formats.cache import clear_caches
from mixgrain.formats.sparse import SparseTensor
from mixgrain.formats.sparsify import sparsify
from mixgrain.primitives.activations import ACTIVATIONS
from mixgrain.primitives.cuda import row_few, strew_sm90
from mixgrain.primitives.linear import linear
from mixgrain.primitives.sparse_linear import SparseLinear
from mixgrain.primitives.spmm import spmm

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

HALVES = (torch.float16, torch.bfloat16)
TOKENS = (1, 2, 3, 4, 7, 8, 9, 16)


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """Tokens of a CTA of each kernel that was asked for, whoever else is faster."""
    found = []
    monkeypatch.setattr(strew_sm90, "faster", lambda *_: False)
    clear_caches()
    plain = row_few.few_request

    def few_request(tokens, *rest):
        found.append(tokens)
        return plain(tokens, *rest)

    monkeypatch.setattr(row_few, "few_request", few_request)
    yield found
    clear_caches()


def integers(*shape: int, seed: int = 0) -> Tensor:
    """Small integers as float32 on the CPU."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def weight(rows: int, columns: int, d: float) -> SparseTensor:
    """Entries kept at random, some rows empty and one full, on the CPU."""
    g = torch.Generator().manual_seed(rows)
    kept = torch.rand(rows, columns, generator=g) < d
    kept[1::7], kept[:, 3::11], kept[rows // 2] = False, False, True
    dense = torch.where(kept, integers(rows, columns, seed=1) + 0.5, 0)
    return sparsify(dense, "row")


def there(w: SparseTensor, dtype: torch.dtype, where: str = DEVICE) -> SparseTensor:
    return SparseTensor(w.layout.to(where), w.values.to(where, dtype))


def exact(w, count, dtype, taken, biased=False, lead=()):
    """As the reference on the CPU, to the bit."""
    rows, columns = w.shape
    x, bias = integers(*lead, count, columns, seed=2), integers(rows, seed=4) if biased else None
    right = linear(x, w, bias).to(dtype)
    move = [None if t is None else t.to(DEVICE, dtype) for t in (x, bias)]
    y = linear(move[0], there(w, dtype), move[1])
    assert y.is_contiguous() and torch.equal(y.cpu(), right)
    assert len(taken) == 1
    taken.clear()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("count", TOKENS)
@pytest.mark.parametrize("shape", [(203, 336), (5, 40), (700, 8), (1, 2048), (3000, 512)])
def test_products_are_exact(shape, count, dtype, taken):
    w = weight(*shape, 0.2)
    exact(w, count, dtype, taken)
    exact(w, count, dtype, taken, biased=True)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_leading_dimensions(count, taken):
    exact(weight(203, 336, 0.2), count, torch.float16, taken, lead=(1, 2))


@pytest.mark.parametrize(
    ("columns", "count"), [(30_000, 1), (30_000, 5), (65_528, 2), (14_000, 16)]
)
def test_long_rows_are_exact(columns, count, taken):
    """Rows of many steps; where not all tokens fit they are taken in two turns, or not at all."""
    w, room = weight(40, columns, 0.02), facts(0).shared_bytes - 2048
    x = integers(count, columns, seed=2)
    y = linear(x.to(DEVICE).half(), there(w, torch.float16))
    assert torch.equal(y.cpu(), linear(x, w).half())
    fits = [n for n in row_few.TOKENS if row_few.shared(columns, n) <= room]
    assert bool(taken) == any(2 * n >= count for n in fits)


def test_other_columns_are_not_for_it(taken):
    """Too many tokens; inner positions that are no whole loads, or that 16 bits cannot name."""
    for columns, count in ((336, 17), (335, 4), (65_536, 1)):
        w, x = weight(50, columns, 0.1), integers(count, columns, seed=2)
        y = linear(x.to(DEVICE).half(), there(w, torch.float16))
        assert torch.equal(y.cpu(), linear(x, w).half())
    assert not taken


@pytest.mark.parametrize("count", [1, 8])
def test_what_a_row_does_not_keep_does_not_matter(count, taken):
    """NaN in x or in a neighbour's value, which lies in the same eight: 0 · NaN is NaN."""
    w = weight(203, 336, 0.2)
    x, dense = integers(count, 336, seed=2), w.to_dense()
    right = linear(x, w)
    for column in (0, 5, 171, 335):
        broken = x.clone()
        broken[:, column] = torch.nan
        y = linear(broken.to(DEVICE).half(), there(w, torch.float16)).cpu()
        keeps = dense[:, column] != 0
        assert y[:, keeps].isnan().all() and torch.equal(y[:, ~keeps], right[:, ~keeps].half())
    values, first = w.values.clone(), int(dense[:100].ne(0).sum())
    values[first] = torch.nan  # of row 100 or, if it is empty, the next
    hurt = SparseTensor(w.layout, values)
    y = linear(x.to(DEVICE).half(), there(hurt, torch.float16)).cpu()
    row = next(n for n in range(100, 203) if dense[n].any())
    assert y[:, row].isnan().all() and y.isnan().sum() == count


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, taken):
    w = weight(203, 336, 0.2)
    g = torch.Generator().manual_seed(0)
    x, bias = (torch.randn(*n, generator=g).half() for n in ((5, 336), (203,)))
    w = SparseTensor(w.layout, (w.values / 16).half())
    wide = SparseTensor(w.layout, w.values.double())
    right = ACTIVATIONS[name](linear(x.double(), wide, bias.double()))
    with torch.no_grad():
        y = linear(x.to(DEVICE), there(w, torch.float16), bias.to(DEVICE), name)
    torch.testing.assert_close(y.cpu().double(), right, rtol=1.2 * 2.0**-11, atol=4e-4)
    assert taken


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("count", [1, 6, 16])
def test_the_long_way_has_the_same_bits(count, biased, taken):
    """Operators, which torch.compile traces, write rows of features; layers rows of tokens."""
    w, g = there(weight(203, 336, 0.2), torch.float16), torch.Generator(DEVICE).manual_seed(0)
    x, bias, grad = (
        torch.randn(*n, device=DEVICE, generator=g).half()
        for n in ((count, 336), (203,), (count, 203))
    )
    bias = bias if biased else None

    def everything():
        given, values = x.detach().requires_grad_(), w.values.detach().requires_grad_()
        y = linear(given, SparseTensor(w.layout, values), bias)
        return y, *torch.autograd.grad(y, (given, values), grad)

    short = everything()
    with torch.device(DEVICE):  # something watches: the operators
        long = everything()
    assert len(taken) == 2
    for a, b in zip(short, long, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("columns", [336, 344])
def test_matrices_of_values(columns, taken):
    """Values of several matrices, of which all but the first may lie between 16-byte loads."""
    w = weight(203, columns, 0.2)
    assert columns == 344 or w.layout.slots % 8
    values, x = integers(3, w.layout.slots, seed=3), integers(3, 7, columns, seed=2)
    right = spmm(SparseTensor(w.layout, values), x.mT).half()
    s = SparseTensor(w.layout.to(DEVICE), values.to(DEVICE).half())
    assert torch.equal(spmm(s, x.to(DEVICE).half().mT).cpu(), right)
    assert taken


def test_more_matrices_than_a_grid_counts(taken):
    """The second launch begins wherever the values of 65,535 matrices end."""
    layout, free = P.window(3).to_layout("row", 3, 8), (1 << 16) + 2
    assert layout.slots % 8
    values, x = integers(free, layout.slots, seed=3), integers(free, 1, 8, seed=2)
    s = SparseTensor(layout.to(DEVICE), values.to(DEVICE).half())
    y = spmm(s, x.to(DEVICE).half().mT)
    assert torch.equal(y.cpu().float(), SparseTensor(layout, values).to_dense() @ x.mT)
    assert taken


def test_repeats_are_alike(taken):
    """A race would move a bit in one of 250."""
    w, g = there(weight(600, 2048, 0.3), torch.float16), torch.Generator(DEVICE).manual_seed(0)
    for count in (1, 8, 16):
        x = torch.randn(count, 2048, device=DEVICE, generator=g).half()
        first = linear(x, w)
        assert all(torch.equal(linear(x, w), first) for _ in range(250))
    assert taken


def test_a_layer_in_a_graph(taken):
    layout = weight(203, 336, 0.2).layout.to(DEVICE)
    layer = SparseLinear(336, 203, layout, device=DEVICE, dtype=torch.half)
    x = torch.randn(4, 336, device=DEVICE).half()
    with torch.no_grad():
        right = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.mul_(2)
        graph.replay()
        assert torch.equal(y, layer(x)) and not torch.equal(y, right)
    assert taken
