"""The short way of linear and of N:M chosen by score, on a GPU: the same bits, and its limits."""

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.formats.errors import DtypeError, ShapeError, UnsupportedError
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives import linear as linear_module
from mixgrain.primitives import ops, ops_linear
from mixgrain.tools.bench.measure import host_us

pytestmark = pytest.mark.gpu

OUT, IN = 320, 448
KINDS = {
    "tile": {"kind": "tile", "density": 0.4},
    "2:4": {"kind": "nm", "n": 2, "m": 4},
    "1:2": {"kind": "nm", "n": 1, "m": 2},
    "4:8": {"kind": "nm", "n": 4, "m": 8},
    "block": {"kind": "block", "density": 0.5, "size": 16},
    "row": {"kind": "row", "density": 0.1},
    "panel": {"kind": "panel", "density": 0.5, "axis": "rows"},
    "mixed": {"kind": "mixed", "density": 0.2, "size": 16},
}
DTYPES = [torch.float16, torch.float32]
INPUTS = {
    "rows": lambda t: t(16, IN),
    "one": lambda t: t(IN),
    "batch": lambda t: t(2, 3, IN),
    "many": lambda t: t(300, IN),
    "columns": lambda t: t(IN, 24).T,
    "last tokens": lambda t: t(4, 5, IN)[:, -1:],
    "some tokens": lambda t: t(4, 5, IN)[:, 1:],  # no rows without a copy
    "wide": lambda t: t(8, 2 * IN)[:, :IN],
    "shifted": lambda t: t(8 * IN + 1)[1:].view(8, IN),
    "none": lambda t: t(0, IN),
}


@pytest.fixture(autouse=True)
def forgotten():
    mg.clear_caches()
    yield
    mg.clear_caches()


@pytest.fixture
def operators(monkeypatch) -> list[str]:
    """Names of the operators that Python calls."""
    seen: list[str] = []
    places = [(ops, f"_op_{n}") for n in ("sddmm", "spmm", "spmm_t", "softmax", "prune")]
    places += [(ops, "_op_softmax_backward"), (ops_linear, "_op_linear"), (linear_module, "affine")]
    for module, name in places:
        plain = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, plain=plain, name=name: (seen.append(name), plain(*a))[1]
        )
    return seen


def random(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", dtype=dtype, generator=g)


def weight(kind: str, dtype: torch.dtype = torch.float16, shape=(OUT, IN)) -> SparseTensor:
    return mg.sparsify(random(*shape, dtype=dtype, seed=1), prune=True, **KINDS[kind])


def watched():
    """Something watches: the operators are called."""
    return torch.device("cuda")


def everything(x: Tensor, w: SparseTensor, bias: Tensor | None) -> list[Tensor]:
    inputs = [x.detach().requires_grad_(), w.values.detach().requires_grad_()]
    inputs += [] if bias is None else [bias.detach().requires_grad_()]
    y = mg.linear(inputs[0], w.with_values(inputs[1]), inputs[2] if len(inputs) > 2 else None)
    with torch.no_grad():
        assert torch.equal(mg.linear(x, w, bias), y)
    above = torch.linspace(-1, 1, max(y.numel(), 1), device="cuda")[: y.numel()]
    return [y, *torch.autograd.grad(y, inputs, above.to(y.dtype).view(y.shape))]


def relative(a: Tensor, b: Tensor) -> float:
    if not b.numel():
        return 0.0
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-9))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_linear_gives_the_bits_of_the_operators(kind, dtype, biased, operators) -> None:
    w, bias = weight(kind, dtype), random(OUT, dtype=dtype, seed=3) if biased else None
    for name, make in INPUTS.items():
        x = make(lambda *shape: random(*shape, dtype=dtype, seed=2))
        with watched():
            right = everything(x, w, bias)
        assert operators
        operators.clear()
        for _ in range(2):
            found = everything(x, w, bias)
            assert not operators
            assert all(map(torch.equal, found, right)), name
            assert found[0].is_contiguous()
            assert [t.shape for t in found] == [t.shape for t in right]
    dense = w.to_dense().double()
    x = random(16, IN, dtype=dtype, seed=2)
    wanted = x.double() @ dense.T + (0 if bias is None else bias.double())
    assert relative(mg.linear(x, w, bias), wanted) <= (2e-3 if dtype == torch.float16 else 1e-5)


def test_a_run_time_mask_counts(operators) -> None:
    for kind in ("2:4", "row", "tile"):
        w, x = weight(kind), random(16, IN, seed=2)
        keep = torch.arange(IN, device="cuda") % 3 > 0
        for mask in (keep, ~keep):
            masked = SparseTensor(w.layout, w.values, mask)
            with watched():
                right = everything(x, masked, None)
            operators.clear()
            for _ in range(2):
                assert all(map(torch.equal, everything(x, masked, None), right))
            assert not operators


def test_linear_reads_values_and_metadata_when_it_is_called() -> None:
    for kind in KINDS:
        w, x = weight(kind), random(16, IN, seed=2)
        bias = random(OUT, seed=3)
        mg.linear(x, w, bias)
        w.values.mul_(-2)
        bias.zero_()
        wanted = x.double() @ w.to_dense().double().T
        assert relative(mg.linear(x, w, bias), wanted) <= 2e-3
        assert relative(mg.linear(x.neg(), w, bias), -wanted) <= 2e-3
    one, other = (mg.sparsify(random(OUT, IN, seed=n), "nm", n=2, m=4, prune=True) for n in (1, 2))
    for w in (one, other, one):
        assert relative(mg.linear(x, w), x.double() @ w.to_dense().double().T) <= 2e-3
        assert relative(mg.linear(random(3, OUT), w.T), random(3, OUT) @ w.to_dense()) <= 2e-3


def test_linear_leaves_the_short_way(operators) -> None:
    w, x, bias = weight("tile"), random(16, IN, seed=2), random(OUT, seed=3)
    right = mg.linear(x, w, bias)
    mg.linear(x, w, bias)
    assert not operators

    class Own(Tensor):
        pass

    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    for context in (Watch(), torch.autocast("cuda", torch.float16), watched()):
        with context:
            assert torch.equal(mg.linear(x, w, bias), right)
        assert operators == ["affine"]
        operators.clear()
    assert torch.equal(mg.linear(x.as_subclass(Own), w, bias), right)
    assert operators
    operators.clear()
    with torch.autocast("cuda", torch.bfloat16):
        assert mg.linear(x, w, bias).dtype == torch.bfloat16
    for error, call in (
        (ShapeError, lambda: mg.linear(x.cpu(), w, bias)),
        (ShapeError, lambda: mg.linear(x[:, :-1], w, bias)),
        (ShapeError, lambda: mg.linear(x, w, bias[:-1])),
        (DtypeError, lambda: mg.linear(x.float(), w, bias)),
        (DtypeError, lambda: mg.linear(x, w, bias.float())),
        (UnsupportedError, lambda: mg.linear(x.double(), w.to(torch.float64))),
    ):
        for _ in range(2):
            with pytest.raises(error):
                call()


def test_the_switch_of_tf32_is_read_by_every_call() -> None:
    w, x = weight("1:2", torch.float32), random(64, IN, dtype=torch.float32, seed=2)
    before = torch.backends.cuda.matmul.allow_tf32
    found = []
    try:
        for allowed in (False, True, False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            found.append(mg.linear(x, w))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("kind", ["tile", "2:4", "block", "row", "mixed"])
def test_a_captured_step_of_training(kind) -> None:
    dense = nn.Linear(IN, OUT, device="cuda", dtype=torch.float16)
    layer = mg.SparseLinear.from_linear(dense, prune=True, **KINDS[kind])
    x, above = random(16, IN, seed=2).requires_grad_(), random(16, OUT, seed=3)

    def step() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, [x, *layer.parameters()], above)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    with torch.no_grad():
        x.copy_(random(16, IN, seed=5))
        for p in layer.parameters():
            p.mul_(-1.5)
    for t in made:
        t.detach().fill_(torch.nan)
    graph.replay()
    assert all(map(torch.equal, made, step()))


def test_linear_on_another_stream_and_the_allocators_next_addresses() -> None:
    w = weight("2:4")
    right = {}
    for n in range(40):
        x = random(1 + n % 3, IN, seed=n % 5)
        with torch.cuda.stream(torch.cuda.Stream() if n % 2 else torch.cuda.current_stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            y = mg.linear(x, w)
        torch.cuda.synchronize()
        key = (n % 3, n % 5)
        assert torch.equal(right.setdefault(key, y.clone()), y)
        del x, y


# N:M chosen by score

N, D = 256, 64
CHOICES = {
    "2:4": P.nm(2, 4),
    "1:2": P.nm(1, 2),
    "within": P.nm(2, 4) & P.window(70),
}


def attention(q: Tensor, k: Tensor, v: Tensor, pattern, mask=None) -> tuple[Tensor, Tensor]:
    p, lse = mg.softmax(mg.sddmm(q, k, pattern, 0.125, mask), return_lse=True)
    return mg.spmm(p, v), lse


def chain(given: list[Tensor], pattern, mask=None) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in given]
    o, lse = attention(*leaves, pattern, mask)
    with torch.no_grad():
        plain = attention(*given, pattern, mask)
    assert torch.equal(plain[0], o)
    assert torch.equal(plain[1], lse)
    total = (o.float() ** 2).sum() + lse.nan_to_num(0, 0, 0).sum()
    return [o, lse, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (1, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", CHOICES)
def test_the_chain_gives_the_bits_of_the_operators(name, dtype, lead, masked, operators) -> None:
    mask = torch.arange(N, device="cuda") % 7 > 0 if masked else None
    if masked and len(lead) == 2:
        mask = torch.stack([mask] * lead[0])
    for seed in range(3):  # other scores, other positions
        given = [random(*lead, N, D, dtype=dtype, seed=3 * seed + n) for n in range(3)]
        with watched():
            right = chain(given, CHOICES[name], mask)
        assert operators
        operators.clear()
        for _ in range(2):
            assert all(map(torch.equal, chain(given, CHOICES[name], mask), right))
        assert not operators


def test_a_chain_of_grouped_heads_and_other_strides(operators) -> None:
    q = random(2, N, 4, D).transpose(1, 2)
    k, v = (random(2, 2, N, D, seed=n) for n in (1, 2))
    with watched():
        right = attention(q, k, v, P.nm(2, 4))
    operators.clear()
    for _ in range(2):
        assert all(map(torch.equal, attention(q, k, v, P.nm(2, 4)), right))
    assert not operators


def test_every_layout_of_a_chain_is_its_own() -> None:
    q, k, v = (random(2, N, D, seed=n) for n in range(3))
    made = [mg.sddmm(q, k, P.nm(2, 4)) for _ in range(3)]
    assert len({s.layout.key for s in made}) == 3
    assert len({s.layout.metadata.data_ptr() for s in made}) == 3
    for s in made:
        s.layout.validate()
        assert s.layout.home == q.device
    other = mg.sddmm(k, q, P.nm(2, 4))
    close = torch.testing.assert_close
    for s in (*made, other):
        close(mg.spmm(s, v), (s.to_dense().double() @ v.double()).half(), rtol=1e-2, atol=1e-1)
        close(mg.spmm(s.T, v), (s.to_dense().mT.double() @ v.double()).half(), rtol=1e-2, atol=1e-1)


def test_a_captured_chain() -> None:
    given = [random(2, 3, N, D, seed=n) for n in range(3)]
    for _ in range(2):
        chain(given, P.nm(2, 4))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attention(*given, P.nm(2, 4))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = attention(*given, P.nm(2, 4))
    for n, t in enumerate(given):
        t.copy_(random(2, 3, N, D, seed=20 + n))
    graph.replay()
    right = attention(*given, P.nm(2, 4))
    assert torch.equal(o, right[0])
    assert torch.equal(lse, right[1])


@pytest.mark.parametrize("what", ["chain", "blocks", "linear"])
def test_checkpoints_that_meet_a_call_first(what) -> None:
    q, k, v = (random(2, N, D, seed=n).requires_grad_() for n in range(3))
    layout = P.window(40).to_layout("block", N, N, device="cuda")
    w = weight("tile", shape=(D, D))
    run = {
        "chain": lambda q, k, v: attention(q, k, v, P.nm(2, 4))[0],
        "blocks": lambda q, k, v: attention(q, k, v, layout)[0],
        "linear": lambda q, k, v: mg.linear(q + k + v, w),
    }[what]
    o = checkpoint(run, q, k, v, use_reentrant=False)
    found = torch.autograd.grad(o.float().square().sum(), (q, k, v))
    right = torch.autograd.grad(run(q, k, v).float().square().sum(), (q, k, v))
    assert all(map(torch.equal, found, right))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["tile", "1:2", "block", "row", "mixed"])
def test_results_may_be_changed_in_place(kind, dtype) -> None:
    # Some results are parts of what kernels wrote.
    for out, tokens in ((60, 12), (61, 5)):
        w = mg.sparsify(torch.randn(out, 64, dtype=dtype), prune=True, **KINDS[kind]).to("cuda")
        x = torch.randn(tokens, 64, dtype=dtype, device="cuda", requires_grad=True)
        for _ in range(2):
            y = mg.linear(x, w)
            right = torch.relu(y.detach())
            (grad,) = torch.autograd.grad(y.relu_().sum(), x)
            assert torch.equal(y, right)
            (expected,) = torch.autograd.grad(torch.relu(mg.linear(x, w)).sum(), x)
            assert torch.equal(grad, expected)


@pytest.mark.parametrize("lead", [(), (3,)])
def test_products_may_be_changed_in_place(lead) -> None:
    dense = torch.randn(70, 70).half()
    s = mg.sparsify(dense, "block", prune=True, size=16, density=0.5).to("cuda")
    x = torch.randn(*lead, 70, 13, device="cuda").half().requires_grad_()
    (expected,) = torch.autograd.grad(torch.relu(mg.spmm(s, x)).sum(), x)
    for _ in range(2):
        (grad,) = torch.autograd.grad(mg.spmm(s, x).relu_().sum(), x)
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 300])
def test_products_with_tiles(width, dtype, operators) -> None:
    w = weight("tile", dtype)
    for s in (w, w.T):
        x = random(s.shape[1], width, dtype=dtype)
        with torch.device("cuda"):
            right = mg.spmm(s, x)
        mg.spmm(s, x)
        operators.clear()
        assert torch.equal(mg.spmm(s, x), right)
        assert operators == []
        values, given = s.values.detach().requires_grad_(), x.clone().requires_grad_()
        found = []
        for n in range(3):
            with torch.device("cuda") if n == 0 else contextlib.nullcontext():
                y = mg.spmm(s.with_values(values), given)
                found.append(torch.autograd.grad(y.float().square().sum(), (values, given)))
        for made in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(made, found[0], strict=True))


def test_one_inner_position() -> None:
    w = mg.sparsify(torch.randn(48, 1).half(), "tile", prune=True, density=1.0).to("cuda")
    bias = torch.randn(48, device="cuda").half()
    for tokens in (1, 40, 300):
        x = torch.randn(tokens, 1, device="cuda").half()
        for activation in (None, "relu"):
            right = torch.nn.functional.linear(x.float(), w.to_dense().float(), bias.float())
            right = right if activation is None else right.relu()
            for _ in range(2):
                made = mg.linear(x, w, bias, activation)
                torch.testing.assert_close(made, right.half(), rtol=2e-3, atol=1e-3)


def test_devices_are_compared() -> None:
    q, k = (torch.randn(2, 64, 32, device="cuda").half() for _ in range(2))
    mask = torch.ones(64, dtype=torch.bool)
    for _ in range(2):
        mg.sddmm(q, k, P.nm(2, 4), key_mask=mask.cuda())
        for given in ({"key_mask": mask}, {"k": k.cpu()}):
            with pytest.raises(ShapeError, match="cpu"):
                mg.sddmm(q, given.get("k", k), P.nm(2, 4), key_mask=given.get("key_mask"))


def test_saved_tensors_that_a_hook_leaves_on_the_cpu() -> None:
    layout = P.window(20).to_layout("block", 128, 128, device="cuda")
    q, k = (torch.randn(2, 128, 32, device="cuda").half().requires_grad_() for _ in range(2))
    right = torch.autograd.grad(mg.sddmm(q, k, layout).values.float().sum(), (q, k))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.cpu(), lambda t: t):
        s = mg.sddmm(q, k, layout).values.float().sum()
    for _ in range(2):
        with pytest.raises((RuntimeError, ShapeError), match="cpu"):
            torch.autograd.grad(s, (q, k), retain_graph=True)
    again = torch.autograd.grad(mg.sddmm(q, k, layout).values.float().sum(), (q, k))
    assert all(torch.equal(a, b) for a, b in zip(again, right, strict=True))


def test_wrappers_that_outlive_their_transform() -> None:
    w = mg.sparsify(torch.randn(64, 64).half(), "block", prune=True, size=16, density=0.5).to(
        "cuda"
    )
    x, held = torch.randn(8, 64, device="cuda").half(), []
    right = mg.linear(x, w)
    torch.func.grad(lambda t: (held.append(t), t.float().sum())[1])(x)
    assert torch.equal(mg.linear(held[0], w), right)


def test_host_time(record_property) -> None:
    """Generous limits: another machine's host may be several times slower."""
    calls = {}
    for kind in ("tile", "2:4", "block", "row"):
        w, x = weight(kind), random(16, IN, seed=2)
        asking = x.clone().requires_grad_()
        calls[f"linear {kind}"] = (lambda x=x, w=w: mg.linear(x, w), 60)
        calls[f"linear {kind}, recording"] = (lambda x=asking, w=w: mg.linear(x, w), 80)
    given = [random(2, 3, N, D, seed=n) for n in range(3)]
    calls["chain"] = (lambda: attention(*given, P.nm(2, 4)), 240)
    for name, (call, limit) in calls.items():
        spent = host_us(call, 300)
        record_property(name, spent)
        assert spent < limit, f"{name}: {spent:.1f} µs"
