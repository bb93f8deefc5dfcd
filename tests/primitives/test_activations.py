"""The activation of linear and SparseLinear on the CPU, against torch's own in float64."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import mixgrain as mg
from mixgrain.cuda.compile import INCLUDE
from mixgrain.formats.errors import UnsupportedError
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives import reference
from mixgrain.primitives.activations import ACTIVATIONS, CODES
from mixgrain.primitives.dispatch import plan_for
from mixgrain.primitives.linear import linear
from mixgrain.primitives.sparse_linear import SparseLinear

DOUBLE = torch.float64
OPTIONS = {
    "tile": {"density": 0.4},
    "nm": {"n": 2, "m": 4},
    "block": {"density": 0.5, "size": 16},
    "row": {"density": 0.3},
    "panel": {"density": 0.5, "axis": "rows"},
    "mixed": {"density": 0.2, "size": 16},
}
# As users of torch write them, not as mixgrain does.
TORCHS = {
    "gelu": torch.nn.GELU(),
    "gelu_tanh": torch.nn.GELU(approximate="tanh"),
    "silu": torch.nn.SiLU(),
    "relu": torch.nn.ReLU(),
}


def weight(kind: str, dtype: torch.dtype = DOUBLE) -> SparseTensor:
    g = torch.Generator().manual_seed(1)
    dense = torch.randn(24, 40, generator=g, dtype=dtype)
    return mg.sparsify(dense, kind, prune=True, **OPTIONS[kind])


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("name", TORCHS)
@pytest.mark.parametrize("kind", OPTIONS)
def test_forward(kind: str, name: str) -> None:
    w, bias = weight(kind), tensor(24, seed=2)
    for lead in ((), (1,), (3, 5), (2, 0)):
        x = tensor(*lead, 40)
        for b in (None, bias):
            expected = TORCHS[name](F.linear(x, w.to_dense(), b))
            for made in (linear(x, w, b, name), reference.linear(x, w, b, name)):
                assert made.shape == (*lead, 24) and made.is_contiguous()
                torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", TORCHS)
def test_results_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    w, x, b = weight("row", dtype), tensor(50, 40, dtype=dtype), tensor(24, seed=2, dtype=dtype)
    exact = reference.linear(x, w, b, name)
    made = linear(x, w, b, activation=name)
    assert made.dtype == dtype
    # Half of the last place, and what float32 sums of 40 terms differ by.
    step = torch.finfo(dtype).eps / 2
    assert ((made.double() - exact).abs() <= 1.001 * step * exact.abs() + 1e-5).all()


def test_a_masked_weight_and_no_positions() -> None:
    keep = torch.arange(40) % 3 > 0
    x, b = tensor(7, 40), tensor(24, seed=2)
    for kind in OPTIONS:
        w = weight(kind)
        masked = SparseTensor(w.layout, w.values, keep)
        expected = F.gelu(F.linear(x, w.to_dense() * keep, b))
        torch.testing.assert_close(linear(x, masked, b, "gelu"), expected)
    empty = mg.sparsify(torch.zeros(24, 40, dtype=DOUBLE), "row")
    torch.testing.assert_close(linear(x, empty, b, "silu"), F.silu(b).expand(7, 24))
    assert not linear(x, empty, None, "gelu").any()


def test_views_of_x() -> None:
    w, x = weight("tile"), tensor(40, 6)
    torch.testing.assert_close(linear(x.T, w, None, "silu"), F.silu(x.T @ w.to_dense().T))
    one = x[:, :1].T.expand(6, 40)
    torch.testing.assert_close(linear(one, w, None, "silu"), F.silu(one @ w.to_dense().T))


def test_special_values() -> None:
    """What torch makes of infinities and NaN, and of what is large enough to overflow a cube."""
    given = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e30, -1e30])
    w = mg.sparsify(torch.eye(1), "row")
    for name, theirs in TORCHS.items():
        made = linear(given[:, None], w, None, name)[:, 0]
        torch.testing.assert_close(made, theirs(given), equal_nan=True)


@pytest.mark.parametrize("value", ["swish", "GELU", "", 3, True, torch.nn.GELU(), F.gelu, ["gelu"]])
def test_bad_names(value: object) -> None:
    w, x = weight("row"), tensor(2, 40)
    calls = {
        "linear": lambda: linear(x, w, None, value),
        "SparseLinear": lambda: SparseLinear(40, 24, activation=value),
    }
    for who, call in calls.items():
        with pytest.raises(UnsupportedError, match=f"^{who}: activation=.*expected None or one of"):
            call()
    with pytest.raises(UnsupportedError, match="give 'gelu_tanh'"):
        linear(x, w, None, "gelu_pytorch_tanh")


# Derivatives


@pytest.mark.parametrize("kind", OPTIONS)
def test_with_gradients_it_is_the_same(kind: str) -> None:
    w, x, b = weight(kind), tensor(2, 5, 40), tensor(24, seed=2)
    without = linear(x, w, b, "gelu")
    for at in range(3):
        given = [t.clone() for t in (x, w.values, b)]
        given[at].requires_grad_()
        made = linear(given[0], w.with_values(given[1]), given[2], "gelu")
        torch.testing.assert_close(made.detach(), without, rtol=1e-12, atol=1e-12)
        dense = [given[0].detach(), w.with_values(given[1]).to_dense().detach(), given[2].detach()]
        dense[at].requires_grad_()
        expected = F.gelu(F.linear(*dense))
        (mine,) = torch.autograd.grad(made.square().sum(), given[at])
        (theirs,) = torch.autograd.grad(expected.square().sum(), dense[at])
        if at == 1:
            mine = w.with_values(mine).to_dense()
            theirs = theirs * (SparseTensor(w.layout, torch.ones_like(w.values)).to_dense() != 0)
        torch.testing.assert_close(mine, theirs)
        with torch.no_grad():
            made = linear(given[0], w.with_values(given[1]), given[2], "gelu")
        assert torch.equal(made, without)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("kind", ["row", "nm"])
def test_first_and_second_derivatives(kind: str, name: str) -> None:
    w = weight(kind)
    given = [t.requires_grad_() for t in (tensor(3, 40), w.values.clone(), tensor(24, seed=2))]

    def f(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return linear(x, w.with_values(values), bias, name)

    # torch has no forward derivative of gelu's backward.
    assert torch.autograd.gradcheck(f, given, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, given, fast_mode=True)


@pytest.mark.parametrize("kind", ["row", "nm", "tile"])
def test_transforms(kind: str) -> None:
    w, x, b = weight(kind), tensor(4, 3, 40), tensor(24, seed=2)
    f = lambda x: linear(x, w, b, "gelu")  # noqa: E731
    plain = f(x)
    torch.testing.assert_close(torch.func.vmap(f)(x), plain)
    torch.testing.assert_close(torch.func.vmap(torch.func.vmap(f), in_dims=1, out_dims=1)(x), plain)
    values = torch.stack([w.values, 2 * w.values])
    made = torch.func.vmap(lambda v: linear(x, w.with_values(v), b, "gelu"))(values)
    torch.testing.assert_close(made[1], linear(x, w * 2.0, b, "gelu"))
    made = torch.func.vmap(lambda b: linear(x, w, b, "gelu"))(torch.stack([b, b + 1]))
    torch.testing.assert_close(made[1], linear(x, w, b + 1, "gelu"))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: f(x).sum())(x), expected)
    per_sample = torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(x)
    torch.testing.assert_close(per_sample, expected)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", OPTIONS)
def test_opcheck(kind: str, biased: bool) -> None:
    w = weight(kind)
    values = torch.stack([w.values, w.values + 1])
    bias = tensor(24, seed=2) if biased else None
    for recorded in (False, True):
        given = [t if t is None else t.requires_grad_(recorded) for t in (values, bias)]
        x = tensor(2, 5, 40).requires_grad_(recorded)
        arguments = (given[0], x, given[1], None, False, *plan_for("linear", w.layout), "gelu")
        torch.library.opcheck(torch.ops.mixgrain.activated.default, arguments)


@pytest.mark.parametrize("kind", ["tile", "nm", "row"])
def test_compiled(kind: str) -> None:
    """One graph; without gradients the fused operator is in it."""
    w, x, b = weight(kind), tensor(5, 40), tensor(24, seed=2)
    counter = CompileCounterWithBackend("aot_eager")
    f = lambda x, values, bias: linear(x, w.with_values(values), bias, "silu")  # noqa: E731
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    assert torch.equal(compiled(x, w.values, b), f(x, w.values, b))
    given = [t.clone().requires_grad_() for t in (x, w.values, b)]
    mine, theirs = compiled(*given), f(*given)
    assert torch.equal(mine, theirs)
    grads = [torch.autograd.grad(made.square().sum(), given) for made in (mine, theirs)]
    torch.testing.assert_close(*grads)
    assert any("activated" in str(node.target) for node in counter.graphs[0].graph.nodes)


def test_exported() -> None:
    """The operator is in the program, and decides when that runs whether gradients are recorded."""
    layer, x = SparseLinear.from_sparse(weight("nm"), activation="gelu"), tensor(5, 40)
    program = torch.export.export(layer, (x,))
    assert any("activated" in str(node.target) for node in program.graph.nodes)
    made = program.module()(x)
    torch.testing.assert_close(made, layer(x))
    made.sum().backward()
    assert layer.values.grad is not None
    with torch.no_grad():
        assert torch.equal(program.module()(x), layer(x))


def test_autocast() -> None:
    w, x, b = weight("nm", torch.float32), tensor(5, 40).float(), tensor(24, seed=2).float()
    for recorded in (False, True):
        given = x.clone().requires_grad_(recorded)
        with torch.autocast("cpu", torch.bfloat16):
            made = linear(given, w, b, "gelu")
        by_hand = linear(x.bfloat16(), w.to(torch.bfloat16), b.bfloat16(), "gelu")
        assert made.dtype == torch.bfloat16
        torch.testing.assert_close(made.detach(), by_hand, rtol=2e-2, atol=1e-3)


# The layer


def test_layer() -> None:
    torch.manual_seed(0)
    dense = torch.nn.Linear(40, 24)
    x = torch.randn(6, 40)
    plain = SparseLinear.from_linear(dense, "nm", prune=True)
    layer = SparseLinear.from_linear(dense, "nm", activation="gelu", prune=True)
    assert "activation" not in repr(plain)
    assert "bias=True, activation='gelu'" in repr(layer)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(layer(x), F.gelu(plain(x)))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.gelu(plain(x)))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    other = SparseLinear.from_sparse(plain.weight, plain.bias, "gelu")
    assert torch.equal(other(x), layer(x))
    empty = SparseLinear(40, 24, activation="gelu")
    empty.load_state_dict(plain.state_dict())
    assert torch.equal(empty(x), layer(x))
    with pytest.raises(UnsupportedError, match="to_linear: the layer applies 'gelu'"):
        layer.to_linear()
    layer.activation = None
    torch.testing.assert_close(layer.to_linear()(x), plain(x))


# What the kernels compute of halves, step by step in float32


HEADER = "".join(
    Path(INCLUDE / name).read_text(encoding="utf-8") for name in ("activation.cuh", "exponent.cuh")
)
TAIL = ("-0.09096618f", "0.19796763f", "0.08528816f", "0.15800722f", "0.14968893f")


def constant(text: str) -> np.float32:
    assert text in HEADER
    return np.float32(text.removesuffix("f"))


def in_float32(name: str, x: np.ndarray) -> np.ndarray:
    one = np.float32(1)
    if name == "gelu":
        t = one / (constant("0.37650783f") * abs(x) + one)
        p = np.zeros_like(x)
        for c in TAIL:
            p = p * t + constant(c)
        tail = np.exp2(x * constant("-0.72134752f") * x) * (p * t)
        return x * np.where(x > 0, one - tail, tail)
    if name == "gelu_tanh":
        slope = x * x * constant("-0.07135482f") + constant("-1.59576912f")
    else:
        slope = np.float32(-1)
    return x / (one + np.exp2(x * slope * constant("1.4426950408889634f")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_short_forms_are_exact_to_an_eighth_of_the_last_place(name, dtype) -> None:
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = torch.cat([words.view(kind).float() for kind in (torch.float16, torch.bfloat16)])
    x = torch.cat([x[x.isfinite()], torch.linspace(-30, 30, 200_001)])
    wide = x.double()
    exact = {
        # Not torch's 1 + erf, which has no digits left on the left.
        "gelu": wide * torch.special.erfc(-wide / 2**0.5) / 2,
        "gelu_tanh": wide * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)),
        "silu": F.silu(wide),
    }[name]
    with np.errstate(over="ignore", under="ignore"):
        made = torch.from_numpy(in_float32(name, x.numpy()).astype(np.float64))
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact)[1].double() - 1
    last = torch.exp2(exponent) * info.eps
    last = last.clamp(min=info.tiny * info.eps)
    off = (made - exact).abs() - 1e-36
    inside = exact.abs() < info.max
    assert (off[inside] <= last[inside] / 8).all()


def test_codes() -> None:
    assert list(ACTIVATIONS) == list(TORCHS)
    for name, code in CODES.items():
        assert f"{code} {name}" in HEADER
