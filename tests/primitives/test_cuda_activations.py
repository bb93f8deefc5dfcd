"""Linear layers with an activation on a GPU, against dense float64.

Functions go round over dtypes and numbers of tokens, so that few kernels are compiled: every
format meets every function, every dtype and every way to multiply.
"""

from __future__ import annotations

import functools

import pytest
import torch
from test_cuda_block import DEVICE, DTYPES, EPSILON
from test_cuda_block import poisoned as poisoned  # a fixture
from torch import Tensor

import mixgrain as mg
from mixgrain.formats.cache import clear_caches
from mixgrain.formats.errors import UnsupportedError
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives import reference
from mixgrain.primitives.activations import ACTIVATIONS
from mixgrain.primitives.cuda import nm, tile
from mixgrain.primitives.linear import linear

pytestmark = pytest.mark.gpu
OPTIONS = {
    "tile": {"density": 0.3},
    "2:4": {"n": 2, "m": 4},
    "1:3": {"n": 1, "m": 3},
    "block": {"density": 0.5, "size": 64},
    "row": {"density": 0.1},
    "panel": {"density": 0.5, "axis": "rows"},
    "mixed": {"density": 0.1},
}
NAMES = list(ACTIVATIONS)
TOKENS = (1, 16, 37, 600)
HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
#: Each dtype's tokens; the function goes with their sum.
CASES = [(HALF, tokens) for tokens in TOKENS]
CASES += [(BRAIN, 16), (BRAIN, 600), (FLOAT, 1), (FLOAT, 37)]
#: Columns of the weights: rows of 8 elements are at multiples of 16 bytes, and there is a rest.
SHAPE = (200, 328)


@functools.cache
def weight(kind: str, dtype: torch.dtype, shape: tuple[int, int] = SHAPE) -> SparseTensor:
    """On the CPU."""
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(1)) / shape[1] ** 0.25
    how = "nm" if ":" in kind else kind
    return mg.sparsify(dense.to(dtype), how, prune=True, **OPTIONS[kind])


def tensor(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def there(w: SparseTensor) -> SparseTensor:
    """On the device, dead slots spoilt."""
    live = w.layout.live()
    values = w.values if live is None else w.values.masked_fill(~live, torch.nan)
    return SparseTensor(w.layout.to(DEVICE), values.to(DEVICE))


def close(made: Tensor, exact: Tensor, inner: int) -> None:
    """One rounding and float32 sums of `inner` terms, as in the tests of linear."""
    assert made.shape == exact.shape and made.is_contiguous()
    # No function here is steeper than 1.13.
    allowed = 1.13 * (1.01 * EPSILON[made.dtype] * exact.abs() + inner * 4 * EPSILON[FLOAT])
    off = (made.cpu().double() - exact).abs()
    assert (off <= allowed).all(), float((off - allowed).max())


def check(kind: str, dtype: torch.dtype, tokens: int, name: str, biased: bool) -> None:
    w = weight(kind, dtype)
    n_out, n_in = w.shape
    x = tensor(tokens, n_in, dtype=dtype)
    bias = tensor(n_out, dtype=dtype, seed=2) if biased else None
    exact = reference.linear(x, w, bias, name)
    on, given = there(w), [t if t is None else t.to(DEVICE) for t in (x, bias)]
    made = linear(given[0], on, given[1], name)
    close(made, exact, n_in)
    # The same bits again, from a call that was prepared, and from tokens that are not alone.
    for x in (given[0], given[0].clone()):
        assert torch.equal(linear(x, on, given[1], name), made)


@pytest.mark.parametrize("dtype, tokens", CASES)
@pytest.mark.parametrize("kind", OPTIONS)
def test_against_float64(kind, dtype, tokens):
    at = DTYPES.index(dtype) + TOKENS.index(tokens)
    check(kind, dtype, tokens, NAMES[at % 4], biased=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", OPTIONS)
def test_every_function_without_a_bias(kind, name):
    tokens = TOKENS[NAMES.index(name)]
    check(kind, HALF, tokens, name, biased=False)
    x, w = tensor(tokens, SHAPE[1], dtype=HALF), weight(kind, HALF)
    zero = torch.zeros(SHAPE[0], dtype=HALF, device=DEVICE)
    on, x = there(w), x.to(DEVICE)
    assert torch.equal(linear(x, on, zero, name), linear(x, on, None, name))


@pytest.mark.parametrize("kind, tokens", [("tile", 16), ("tile", 600), ("2:4", 16), ("2:4", 600)])
def test_kernels_of_other_devices(kind, tokens, monkeypatch):
    clear_caches()  # of calls prepared for this one
    monkeypatch.setattr(tile, "_hopper", lambda _: False)
    monkeypatch.setattr(nm, "_hopper", lambda _: False)
    check(kind, BRAIN, tokens, "gelu", biased=True)
    clear_caches()


@pytest.mark.parametrize(
    "rows, inner, tokens", [(2048, 512, 512), (1003, 512, 512), (4096, 64, 8192)]
)
def test_large_tiles_of_sparse_wgmma(rows, inner, tokens):
    """Results go out by TMA; of rows of odd length; in clusters, where there are many tiles."""
    w = weight("2:4", HALF, (rows, inner))
    x, bias = tensor(tokens, inner, dtype=HALF), tensor(rows, dtype=HALF, seed=2)
    given = x.to(DEVICE), there(w), bias.to(DEVICE), "gelu"
    made = linear(*given)
    assert made.shape == (tokens, rows) and torch.equal(linear(*given), made)
    for some in (slice(0, 50), slice(-50, None)):
        close(made[some], reference.linear(x[some], w, bias, "gelu"), inner)


def test_float32_by_sparse_tensor_cores():
    """1:2 as TF32, where torch allows it."""
    dense = tensor(256, 320, dtype=FLOAT)
    w = mg.sparsify(dense, "nm", n=1, m=2, prune=True)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        for tokens in (8, 300):
            x, bias = tensor(tokens, 320, dtype=FLOAT), tensor(256, dtype=FLOAT)
            made = linear(x.to(DEVICE), there(w), bias.to(DEVICE), "gelu").cpu().double()
            # Operands lose all but 10 bits; gelu is nowhere steeper than 1.13.
            sizes = x.abs().double() @ w.to_dense().abs().double().T
            error = (made - reference.linear(x, w, bias, "gelu")).abs()
            assert (error <= 1.13 * 2**-9 * sizes).all()
            exact = reference.linear(x, w, bias)
            unrounded = linear(x.to(DEVICE), there(w), bias.to(DEVICE)).cpu().double()
            assert (made - ACTIVATIONS["gelu"](unrounded)).abs().max() < 1e-5
            assert (unrounded - exact).abs().max() > 1e-5  # or it was not TF32
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_half_there_is(name, dtype):
    """Of each the function, to the last place: half of it is the rounding's, less than 1/8 ours."""
    kind = HALF if dtype == FLOAT else dtype
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = words.view(kind).to(dtype)
    x = x[x.isfinite()]
    x = x[: x.numel() // 16 * 16].view(-1, 16)
    one = SparseTensor((eye := mg.sparsify(torch.eye(16, dtype=dtype), "row")).layout, eye.values)
    made = linear(x.to(DEVICE), there(one), None, name).cpu().double()
    wide = x.double()
    exact = wide * torch.special.erfc(-wide / 2**0.5) / 2 if name == "gelu" else None
    exact = ACTIVATIONS[name](wide) if exact is None else exact
    if name == "gelu_tanh":  # torch's 1 + tanh has no digits left on the left
        exact = wide * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3))
    info = torch.finfo(dtype)
    last = torch.exp2(torch.frexp(exact)[1].double() - 1) * info.eps
    last = last.clamp(min=info.tiny * info.eps)
    # Of float32 the library's expf and erfcf are exact to some last places of an argument's size.
    allowed = last * (0.625 if dtype != FLOAT else 500) + 1e-36
    inside = exact.abs() < info.max
    assert ((made - exact).abs() <= allowed)[inside].all()


def test_special_values():
    given = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3e4, -3e4, 1.0])
    w = mg.sparsify(torch.eye(16), "row")
    for dtype in (HALF, FLOAT):
        x = given[:, None].expand(8, 16).to(DEVICE, dtype)
        on = SparseTensor(w.layout.to(DEVICE), w.values.to(DEVICE, dtype))
        for name, function in ACTIVATIONS.items():
            made = linear(x, on, None, name)
            torch.testing.assert_close(made, function(x), equal_nan=True)


@pytest.mark.parametrize("dtype", [HALF, FLOAT])
@pytest.mark.parametrize("kind", OPTIONS)
def test_with_gradients_it_is_the_same(kind, dtype):
    w = weight(kind, dtype)
    x, bias = tensor(37, SHAPE[1], dtype=dtype), tensor(SHAPE[0], dtype=dtype, seed=2)
    on, x, bias = there(w), x.to(DEVICE), bias.to(DEVICE)
    fused = linear(x, on, bias, "gelu")
    given = [t.clone().requires_grad_() for t in (x, on.values, bias)]
    made = linear(given[0], on.with_values(given[1]), given[2], "gelu")
    # Two roundings to the one.
    allowed = 3.5 * EPSILON[dtype] * fused.abs().double() + 2e-5 * (dtype == FLOAT)
    step = EPSILON[dtype] * linear(x, on, bias).abs().double() * 1.2
    assert ((made - fused).abs().double() <= allowed + step + 3e-6).all()
    plain = linear(given[0], on.with_values(given[1]), given[2])
    grad = tensor(37, SHAPE[0], dtype=dtype, seed=3).to(DEVICE)
    theirs = torch.autograd.grad(torch.nn.functional.gelu(plain), given, grad)
    for mine, other in zip(torch.autograd.grad(made, given, grad), theirs, strict=True):
        assert torch.equal(mine.nan_to_num(), other.nan_to_num())


def test_masks_views_and_nothing():
    keep = torch.arange(SHAPE[1]) % 3 > 0
    bias = tensor(SHAPE[0], dtype=HALF, seed=2)
    x = tensor(37, SHAPE[1], dtype=HALF)
    for kind in ("tile", "2:4", "row", "mixed"):
        w = weight(kind, HALF)
        masked = SparseTensor(w.layout, w.values, keep)
        on = there(w)
        on = SparseTensor(on.layout, on.values, keep.to(DEVICE))
        made = linear(x.to(DEVICE), on, bias.to(DEVICE), "silu")
        close(made, reference.linear(x, masked, bias, "silu"), SHAPE[1])
        # Tokens side by side, and an odd address.
        on, exact = there(w), reference.linear(x, w, bias, "silu")
        for view in (
            x.T.contiguous().to(DEVICE).T,
            torch.cat([x.flatten()[:1], x.flatten()]).to(DEVICE)[1:].view(37, -1),
            x.to(DEVICE)[None].expand(2, -1, -1)[1],
        ):
            close(linear(view, on, bias.to(DEVICE), "silu"), exact, SHAPE[1])
        none = linear(x[:0].to(DEVICE), on, bias.to(DEVICE), "silu")
        assert none.shape == (0, SHAPE[0]) and none.dtype == HALF
    empty = mg.sparsify(torch.zeros(SHAPE).half(), "row")
    made = linear(x.to(DEVICE), there(empty), bias.to(DEVICE), "silu")
    close(made, reference.linear(x, empty, bias, "silu"), 1)


def test_vmap_and_two_streams_of_a_mixed_layout():
    """Several weights at the same positions; of many the fine parts run beside the coarse ones."""
    w, x = weight("mixed", HALF), tensor(64, SHAPE[1], dtype=HALF).to(DEVICE)
    on = there(w)
    values = torch.stack([on.values, -on.values, 2 * on.values])
    f = lambda v: linear(x, on.with_values(v), None, "gelu")  # noqa: E731
    made = torch.func.vmap(f)(values)
    for i in range(3):
        assert torch.equal(made[i], f(values[i]))


def test_captured_in_a_graph():
    for kind in ("tile", "2:4", "mixed"):
        layer = mg.SparseLinear.from_sparse(
            weight(kind, HALF), tensor(SHAPE[0], dtype=HALF), "gelu"
        ).to(DEVICE)
        x = tensor(37, SHAPE[1], dtype=HALF).to(DEVICE)
        with torch.no_grad():
            expected = layer(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                made = layer(x)
        made.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(made, expected)


def test_float64_says_what_to_do():
    w = there(weight("row", FLOAT)).to(torch.float64)
    with pytest.raises(UnsupportedError, match="no CUDA kernels for float64"):
        linear(torch.zeros(3, SHAPE[1], dtype=torch.float64, device=DEVICE), w, None, "gelu")
