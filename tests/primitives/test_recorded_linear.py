"""The short way of linear on the CPU: launch code runs as it is for prepared calls."""

import pytest
import torch
from cases import BUILDERS, Case, density, masks_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mixgrain.cuda.device import pretending
from mixgrain.cuda.recording import Recording, recorded
from mixgrain.cuda.steps import Launch
from mixgrain.formats.errors import DtypeError, ShapeError, UnsupportedError
from mixgrain.formats.sparse import SparseTensor
from mixgrain.formats.sparsify import sparsify
from mixgrain.formats.tile import TileLayout
from mixgrain.primitives import eager, lately
from mixgrain.primitives.activations import ACTIVATIONS
from mixgrain.primitives.cuda import launch_code, tokens
from mixgrain.primitives.cuda.calls import describe
from mixgrain.primitives.dispatch import TABLE
from mixgrain.primitives.linear import linear
from mixgrain.primitives.sparse_linear import SparseLinear

OUT, IN = 20, 28
SHAPES = {
    "rows": lambda t: t(7, IN),
    "one": lambda t: t(IN),
    "batch": lambda t: t(2, 3, IN),
    "columns": lambda t: t(IN, 7).T,
    "last tokens": lambda t: t(4, 5, IN)[:, -1:],
    "some tokens": lambda t: t(4, 5, IN)[:, 1:],  # no rows without a copy
    "heads": lambda t: t(2, 4, 3, IN // 4).transpose(1, 2).flatten(2),
    "wide": lambda t: t(3, 2 * IN)[:, :IN],
    "repeated": lambda t: t(1, IN).expand(5, IN),
    "a single": lambda t: t(1, 1, IN),
    "none": lambda t: t(0, IN),
}


def weight(kind: str, masked: bool = False, dtype=torch.float64) -> SparseTensor:
    case = Case((OUT, IN), density(0.4))
    layout = BUILDERS[kind](case, *masks_of(case))
    g = torch.Generator().manual_seed(1)
    values = torch.randn(layout.slots, generator=g, dtype=torch.float64).to(dtype)
    keep = torch.rand(IN, generator=g) < 0.7 if masked else None
    return SparseTensor(layout, values, keep)


def drawn(*shape: int) -> Tensor:
    g = torch.Generator().manual_seed(2)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def everything(x: Tensor, w: SparseTensor, bias: Tensor | None) -> list[Tensor]:
    """The result, and the gradients of all there is."""
    inputs = [x.detach().requires_grad_(), w.values.detach().requires_grad_()]
    inputs += [] if bias is None else [bias.detach().requires_grad_()]
    y = linear(inputs[0], w.with_values(inputs[1]), inputs[2] if len(inputs) > 2 else None)
    with torch.no_grad():
        assert torch.equal(linear(x, w, bias), y)
    return [y, *torch.autograd.grad((y * drawn(*y.shape)).sum(), inputs)]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["tile", "nm", "block", "row", "panel", "mixed"])
def test_the_short_way_equals_the_long_way(kind, masked, biased, runs):
    w, bias = weight(kind, masked), drawn(OUT) if biased else None
    for name, make in SHAPES.items():
        x = make(drawn)
        with torch.device("cpu"):  # something watches: the operators
            right = everything(x, w, bias)
        assert runs == []
        for _ in range(2):
            found = everything(x, w, bias)
            assert runs == ["tokens", "tokens", "token_gradients"], name
            runs.clear()
            for a, b in zip(found, right, strict=True):
                assert torch.equal(a, b), name
                assert a.shape == b.shape, name
            assert found[0].is_contiguous()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", ["block", "row", "panel", "mixed"])
def test_rows_of_tokens_are_turned(kind, biased, runs, monkeypatch):
    """As for kernels that want rows of features, of a multiple of 8 tokens."""
    monkeypatch.setattr(tokens, "TURNED", {"block", "row", "panel"})
    monkeypatch.setattr(tokens, "CODES", {torch.float64: 2})
    monkeypatch.setattr(tokens.torch, "float32", torch.float64)
    w, bias = weight(kind), drawn(OUT) if biased else None
    for name, make in SHAPES.items():
        x = make(drawn)
        with torch.device("cpu"):
            right = everything(x, w, bias)
        for a, b in zip(everything(x, w, bias), right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)
    assert runs


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["tile", "nm", "block", "mixed"])
def test_activations(kind, name, runs):
    w, bias, x = weight(kind), drawn(OUT), drawn(3, 5, IN)
    with torch.device("cpu"):
        right = linear(x, w, bias, name)
    assert runs == []
    for _ in range(2):
        assert torch.equal(linear(x, w, bias, name), right)
        assert not torch.equal(linear(x, w, bias), right)  # a call of its own
    assert runs == ["tokens"] * 4 and runs.prepared == 2
    runs.clear()
    fresh = weight(kind)
    for _ in range(3):
        linear(x.detach().requires_grad_(), fresh, bias, name)
    assert runs == ["tokens"] * 3
    runs.clear()
    # Gradients need what is activated: the layer, then torch's function.
    given = x.detach().requires_grad_()
    y = linear(given, w, bias, name)
    (found,) = torch.autograd.grad(y.sum(), given)
    assert runs == ["tokens", "token_gradients"]
    z = linear(given, w, bias)
    (expected,) = torch.autograd.grad(ACTIVATIONS[name](z).sum(), given)
    assert torch.equal(found, expected) and torch.equal(y, ACTIVATIONS[name](z))
    with pytest.raises(UnsupportedError, match="activation"):
        linear(x, w, bias, "tanh")


@pytest.mark.parametrize("kind", ["tile", "nm", "block", "row", "panel", "mixed"])
def test_masks_with_a_batch_dimension_are_refused(kind, runs):
    w = weight(kind)
    for batch in (1, 3):
        keep = torch.ones(batch, IN, dtype=torch.bool)
        with pytest.raises(ShapeError, match="batch dimension"):
            linear(drawn(7, IN), SparseTensor(w.layout, w.values, keep))
    assert not runs


def test_only_the_gradients_that_are_wanted_are_computed(runs):
    w, bias, x = weight("block"), drawn(OUT), drawn(7, IN)
    right = everything(x, w, bias)[1:]
    for n in range(3):
        inputs = [t.detach().requires_grad_(n == at) for at, t in enumerate((x, w.values, bias))]
        y = linear(inputs[0], w.with_values(inputs[1]), inputs[2])
        (found,) = torch.autograd.grad((y * drawn(*y.shape)).sum(), inputs[n])
        assert torch.equal(found, right[n])


def test_every_part_of_a_signature_counts(runs):
    w, x, bias = weight("block"), drawn(6, IN), drawn(OUT)
    linear(x, w)
    linear(x, w)
    assert runs == ["tokens", "tokens"]
    assert runs.prepared == 1
    base = torch.zeros(x.numel() + 2, dtype=torch.float64)
    at = 1 if base.data_ptr() & 15 == x.data_ptr() & 15 else 0
    others = {
        "bias": lambda: linear(x, w, bias),
        "shape": lambda: linear(x[:3], w),
        "more dimensions": lambda: linear(x.view(2, 3, IN), w),
        "strides": lambda: linear(x.T.contiguous().T, w),
        "alignment": lambda: linear(base[at : at + x.numel()].view(x.shape), w),
        "another layout": lambda: linear(x, weight("block")),
        "another kind": lambda: linear(x, weight("tile")),
        "mask": lambda: linear(x, weight("block", True)),
        "dtype": lambda: linear(x.float(), w.with_values(w.values.float())),
    }
    for count, (name, call) in enumerate(others.items()):
        call()
        assert runs.prepared == count + 2, name
    runs.clear()
    with pytest.raises(DtypeError):
        linear(x.float(), w)
    with pytest.raises(DtypeError):
        linear(x, w, bias.float())
    with pytest.raises(ShapeError):
        linear(x, w, drawn(OUT + 1))
    with pytest.raises(ShapeError):
        linear(drawn(6, IN + 1), w)
    with pytest.raises(ShapeError):
        linear(x, SparseTensor(w.layout, w.values[None]))
    with pytest.raises(TypeError):
        linear(x, w, 1.0)
    with pytest.raises(TypeError):
        linear([1.0], w)
    assert runs == []


def test_values_are_read_when_a_call_is_made(runs):
    w, x = weight("row"), drawn(3, IN)
    first = linear(x, w)
    w.values.mul_(2)
    assert torch.allclose(linear(x, w), first * 2)
    assert torch.allclose(linear(x, w * 2), first * 4)
    assert runs.prepared == 1


def test_metadata_is_read_when_a_call_is_made(runs):
    """It is given to the call: layouts with other choices share it."""
    x = drawn(3, IN)
    for seed in range(3):
        case = Case((OUT, IN), density(0.4))
        layout = BUILDERS["nm"](case, *masks_of(case, seed))
        w = SparseTensor(layout, drawn(layout.slots))
        y = linear(x, w)
        assert torch.allclose(y, x @ w.to_dense().T)
        assert torch.allclose(linear(y, w.T), y @ w.to_dense())
    assert runs.prepared == 2


def test_what_watches_sees_the_operators(runs):
    from torch.utils._python_dispatch import TorchDispatchMode

    w, x = weight("tile"), drawn(3, IN)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    linear(x, w)
    runs.clear()
    for context in (Watch(), torch.device("cpu"), torch.autocast("cpu", torch.bfloat16)):
        with context:
            linear(x, w)
    torch.func.vmap(lambda a: linear(a, w))(x)
    torch.func.grad(lambda a: linear(a, w).sum())(x)
    torch.func.jvp(lambda a: linear(a, w), (x,), (x,))
    linear(x.as_subclass(type("Own", (Tensor,), {})), w)
    assert runs == []
    linear(torch.nn.Parameter(x), w)
    assert runs == ["tokens"]


def test_double_backward(runs):
    bias = drawn(OUT)
    for kind in ("tile", "nm", "row"):
        w = weight(kind)

        def f(x: Tensor, values: Tensor, b: Tensor, w: SparseTensor = w) -> Tensor:
            return linear(x, w.with_values(values), b)

        given = [t.detach().requires_grad_() for t in (drawn(2, 3, IN), w.values, bias)]
        runs.clear()
        torch.autograd.gradgradcheck(f, given)
        assert "tokens" in runs
        assert "token_gradients" not in runs  # to be differentiated: the operators


@pytest.mark.parametrize("warm", [False, True])
def test_checkpoints(warm, runs):
    layer = SparseLinear.from_sparse(weight("block"), drawn(OUT))
    x = drawn(3, IN).requires_grad_()
    inputs = [x, *layer.parameters()]
    if warm:
        layer(x)
    o = checkpoint(layer, x, use_reentrant=False)
    found = torch.autograd.grad(o.square().sum(), inputs)
    right = torch.autograd.grad(layer(x).square().sum(), inputs)
    assert all(map(torch.equal, found, right))


def test_a_layer_trains_and_moves(runs):
    layer = SparseLinear.from_sparse(weight("tile"), drawn(OUT))
    x = drawn(3, IN)
    before = layer(x)
    assert before.requires_grad
    before.sum().backward()
    with torch.no_grad():
        for p in layer.parameters():
            p -= 0.1 * p.grad
    right = x @ layer.to_dense().T + layer.bias
    assert torch.allclose(layer(x), right)
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    assert runs == ["tokens", "token_gradients", "tokens", "tokens"]
    assert runs.prepared == 2
    assert torch.allclose(layer.float()(x.float()), right.float(), atol=1e-5)
    assert isinstance(layer.positions.layout, TileLayout)


def test_caches_are_bounded(runs):
    w = weight("row")
    for n in range(1, lately.SIGNATURES + 5):
        linear(drawn(n, IN), w)
    assert max(map(len, eager._layouts._values.values())) <= lately.SIGNATURES


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("count", [1, 13, 16])
@pytest.mark.parametrize("kind", ["tile", "nm", "block", "row"])
def test_a_layer_is_kernels_alone(kind, count, activation, biased, arch):
    """Nothing is left for torch to copy, add or cast: that is what host time is spent on."""
    dense = torch.randn(208, 336, generator=torch.Generator().manual_seed(0)).half()
    options = {"tile": {"density": 0.4}, "nm": {}, "block": {"density": 0.4, "size": 16}}
    w = sparsify(dense, kind, prune=True, **options.get(kind, {"density": 0.1}))
    with pretending(arch):
        plan = TABLE["linear"][type(w.layout)]["cuda"](w.layout)
        recording = Recording(0)
        values, x, bias, above = (
            torch.empty(*n, dtype=torch.half, device="meta")
            for n in ((w.layout.slots,), (count, 336), (208,), (count, 208))
        )
        arguments = (values, x, bias if biased else None, *plan, None, False, activation)
        with recorded(recording):
            y = launch_code("tokens")(*describe(recording, arguments))
        assert {type(step) for step in recording.steps} == {Launch}
        assert y.shape == (count, 208)
        assert y.whole()
        recording = Recording(0)
        wanted = (True, True, False)
        arguments = (values, x, above, *plan, None, False, wanted, torch.half)
        with recorded(recording):
            dv, dx = launch_code("token_gradients")(*describe(recording, arguments))
        if kind != "nm" or count > 1:  # one row of tokens is copied to be aligned
            assert {type(step) for step in recording.steps} == {Launch}
        assert (dv.shape, dx.shape) == (values.shape, x.shape)
