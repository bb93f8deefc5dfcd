"""torch.compile: one graph, from the first call on, equal to eager in values and gradients."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import mixgrain as mg
from mixgrain import patterns as P

N = 48
PATTERN = P.causal() & (P.window(9) | P.global_tokens([0, 7]))
PATTERNS = {
    "expression": PATTERN,
    "per head": P.per_head([P.window(3), P.causal(), P.window(3), P.sinks(2) | P.window(2)]),
    "per batch": P.documents(torch.arange(2 * N).reshape(2, N) // 20),
    "mask": P.from_dense(torch.rand(N, N, generator=torch.Generator().manual_seed(0)) < 0.3),
    "nm": P.nm(2, 4),
    "nm within": P.nm(2, 4) & P.window(7),
}


@pytest.fixture(autouse=True)
def cold():
    """Nothing compiled, planned or laid out yet."""
    torch._dynamo.reset()
    mg.clear_caches()


def tensors(*shape: int, count: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=g, dtype=dtype).requires_grad_() for _ in range(count)]


def check(f: Callable[..., Tensor], *given: object, backend: str = "aot_eager") -> None:
    """One graph without an eager call before; results and gradients equal, bit for bit."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    inputs = [t for t in given if isinstance(t, Tensor) and t.requires_grad]
    mine = compiled(*given)
    grads = torch.autograd.grad(mine.square().sum(), inputs)
    torch.testing.assert_close(compiled(*given), mine, rtol=0, atol=0)
    assert counter.frame_count == 1
    wanted = f(*given)
    expected = torch.autograd.grad(wanted.square().sum(), inputs)
    exact = {"rtol": 0, "atol": 0} if backend == "aot_eager" else {}
    torch.testing.assert_close(mine, wanted, **exact)
    torch.testing.assert_close(grads, expected, **exact)


@pytest.mark.parametrize("impl", ["fused", "composed"])
@pytest.mark.parametrize("name", PATTERNS)
def test_attend(name: str, impl: str) -> None:
    pattern = PATTERNS[name]
    check(lambda q, k, v: mg.attend(q, k, v, pattern, impl=impl), *tensors(2, 4, N, 8))


@pytest.mark.parametrize("impl", ["fused", "composed"])
def test_attend_with_everything(impl: str) -> None:
    q, k, v = tensors(2, 4, N, 8)
    mask = torch.rand(2, N) < 0.7

    def f(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        # The pattern is made here, in the compiled function.
        pattern = P.per_head([P.window(5) | P.global_keys([3, 1]), P.causal()] * 2)
        o, lse = mg.attend(q, k[:, :2], v[:, :2], pattern, key_mask=mask, sink_logits=sink,
                           enable_gqa=True, return_lse=True, impl=impl)  # fmt: skip
        return o + lse[..., None]

    check(f, q, k, v, torch.randn(4).requires_grad_())


@pytest.mark.parametrize("kind", ["block", "row", "mixed"])
def test_primitives_on_a_layout(kind: str) -> None:
    layout = PATTERN.to_layout(kind, N, N, size=16)
    f = lambda q, k, v, layout: mg.spmm(mg.softmax(mg.sddmm(q, k, layout, scale=0.3)), v)  # noqa: E731
    check(f, *tensors(2, 4, N, 8), layout)


def test_a_variant_of_ones_own() -> None:
    slopes = 2.0 ** -torch.arange(1, 5)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = mg.sddmm(q, k, PATTERN, scale=0.3).map(lambda x, i, j: 30 * torch.tanh(x / 30))
        s = s.map(lambda x, i, j, h: x - slopes[h] * (i - j))
        p = mg.softmax(s + s * 0.5)
        return mg.spmm(p, v) + mg.spmm(p.T, v) + p.to_dense().sum(-1, keepdim=True)

    check(f, *tensors(2, 4, N, 8))


def test_dynamic_nm_transposed_and_dense() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = mg.softmax(mg.sddmm(q, k, P.nm(2, 4) & PATTERN))
        return mg.spmm(p.T, v)

    check(f, *tensors(2, 4, N, 8))


KINDS = {
    "row": {"density": 0.3},
    "block": {"density": 0.5, "size": 16},
    "mixed": {"density": 0.3},
    "tile": {"density": 0.5},
    "nm": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_linear(kind: str) -> None:
    w = mg.sparsify(torch.randn(24, 40), kind, prune=True, **KINDS[kind])
    x, bias, values = torch.randn(5, 40), torch.randn(24), w.values.clone()
    given = [t.requires_grad_() for t in (x, values, bias)]
    check(lambda x, values, bias: mg.linear(x, w.with_values(values), bias), *given)


@pytest.mark.slow  # compiles C++
def test_inductor() -> None:
    q, k, v = tensors(1, 2, N, 8)
    x = torch.randn(1, 2, N, 8)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        fused = mg.attend(q, k, v, PATTERN)
        s = mg.sddmm(q, k, PATTERN, scale=0.3).map(lambda s, i, j: torch.tanh(s))
        return torch.sin(fused) * x + mg.spmm(mg.softmax(s), v)

    check(f, q, k, v, backend="inductor")


def test_dynamic_sizes_compile_once() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def f(q: Tensor, w: Tensor) -> Tensor:
        s = mg.softmax(mg.sddmm(q, q, PATTERN, scale=0.3))
        return mg.spmm(s, q) + mg.attend(q, q, q, PATTERN, scale=0.3) + mg.linear(w, weight).sum()

    weight = mg.sparsify(torch.randn(24, 40), "row", prune=True, density=0.3)
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for b, h, d in [(2, 4, 8), (3, 6, 16), (5, 2, 24), (4, 3, 10)]:
        q, w = torch.randn(b, h, N, d, requires_grad=True), torch.randn(b, d, 40)
        for dim in (0, 1, 3):
            torch._dynamo.mark_dynamic(q, dim)
        torch._dynamo.mark_dynamic(w, 0)
        torch._dynamo.mark_dynamic(w, 1)
        mine, wanted = compiled(q, w), f(q, w)
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0)
        grads = [torch.autograd.grad(o.square().sum(), q)[0] for o in (mine, wanted)]
        torch.testing.assert_close(*grads, rtol=0, atol=0)
    assert counter.frame_count == 1


@pytest.mark.parametrize("impl", ["fused", "composed"])
@pytest.mark.parametrize("name", ["expression", "nm within"])
def test_another_length_compiles_once_more(name: str, impl: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    f = lambda q: mg.attend(q, q, q, PATTERNS[name], impl=impl)  # noqa: E731
    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=True)
    for n in (30, 41, 30, 41):
        q = torch.randn(2, 4, n, 8)
        torch.testing.assert_close(compiled(q), f(q), rtol=0, atol=0)
    assert counter.frame_count == 2


def test_an_equal_pattern_and_a_second_compilation_plan_nothing(monkeypatch) -> None:
    from mixgrain.attention import plan
    from mixgrain.formats import split

    made = []
    whole, build = split.to_layout, plan.Builder.finish
    monkeypatch.setattr(split, "to_layout", lambda *a, **k: made.append("layout") or whole(*a, **k))
    monkeypatch.setattr(plan.Builder, "finish", lambda self: made.append("plan") or build(self))
    counter = CompileCounterWithBackend("aot_eager")
    f = lambda q, pattern: mg.attend(q, q, q, pattern)  # noqa: E731
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    (q,) = tensors(1, 2, N, 8, count=1)
    first = compiled(q, P.window(4) | P.sinks(1))
    assert made == ["layout", "plan"]
    compiled(q, P.window(4) | P.sinks(1))  # equal, another object
    assert counter.frame_count == 1
    torch._dynamo.reset()
    again = torch.compile(f, fullgraph=True, backend=counter)(q, P.window(4) | P.sinks(1))
    assert made == ["layout", "plan"] and torch.equal(first, again)
    compiled(q, P.window(5) | P.sinks(1))
    assert made == ["layout", "plan"] * 2


def variant(q: Tensor, k: Tensor, v: Tensor, layout: mg.formats.layout.Layout) -> Tensor:
    s = mg.sddmm(q, k, layout, scale=0.3)
    return mg.spmm(mg.softmax(s.map(lambda x, i, j: x - 0.1 * (i - j).abs())), v)


def test_a_layout_plans_once_and_is_known_by_identity(monkeypatch) -> None:
    from mixgrain.primitives.plans import plan

    made = []
    validate = plan.validate_once
    monkeypatch.setattr(plan, "validate_once", lambda x: (made.append(x.key), validate(x)))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(variant, fullgraph=True, backend=counter)
    one, other = (p.to_layout("mixed", N, N, size=16) for p in (PATTERN, P.window(3)))
    for n, layout in enumerate((one, one, one, other, one, other)):
        q, k, v = (torch.randn(2, 4, N, 8, generator=torch.Generator().manual_seed(n + i))
                   for i in range(3))  # fmt: skip
        mine = compiled(q, k, v, layout)
        planned = len(made)
        assert torch.equal(mine, variant(q, k, v, layout))
        assert counter.frame_count == planned == len(made) == (1 if n < 3 else 2)
    assert made == [one.key, other.key]


def test_what_was_compiled_keeps_no_layout_alive() -> None:
    q, k, v = (t.detach() for t in tensors(1, 2, N, 8))
    layout = mg.formats.row.RowLayout.from_csr(
        (N, N), torch.arange(N + 1), torch.arange(N, dtype=torch.int32)
    )
    torch.compile(variant, fullgraph=True, backend="aot_eager")(q, k, v, layout)
    gone = weakref.ref(layout)
    del layout
    gc.collect()
    assert gone() is None


def test_costs_are_compared_by_value() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    f = lambda q, costs: mg.sddmm(  # noqa: E731
        q, q, PATTERN.to_layout("mixed", N, N, size=16, costs=costs)
    ).to_dense()
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    (q,) = tensors(1, 2, N, 8, count=1)
    wide = dataclasses.replace(mg.Costs.cpu(), head_dim=128)
    for costs, frames in ((mg.Costs.cpu(), 1), (mg.Costs.cpu(), 1), (wide, 2), (None, 3)):
        assert torch.equal(compiled(q, costs), f(q, costs))
        assert counter.frame_count == frames


def test_a_layout_that_leaves_the_graph_keeps_its_identity() -> None:
    (q,) = tensors(1, 2, N, 8, count=1)
    static = torch.compile(lambda q: mg.sddmm(q, q, PATTERN), fullgraph=True, backend="eager")(q)
    assert static.layout is mg.sddmm(q, q, PATTERN).layout
    chosen = torch.compile(lambda q: mg.sddmm(q, q, P.nm(2, 4)), fullgraph=True, backend="eager")
    one, other = chosen(q), chosen(-q.flip(-2))
    assert one.layout == one.layout and one.layout != other.layout
    with pytest.raises(mg.LayoutError, match="layouts differ"):
        one + other
    torch.testing.assert_close(mg.spmm(one, q), mg.spmm(mg.sddmm(q, q, P.nm(2, 4)), q))


def test_a_pattern_of_traced_numbers_says_what_to_do() -> None:
    f = lambda q, ids: mg.attend(q, q, q, P.documents(ids))  # noqa: E731
    (q,) = tensors(1, 2, N, 8, count=1)
    with pytest.raises(Exception, match="make the pattern outside the compiled function"):
        torch.compile(f, fullgraph=True, backend="eager")(q, torch.zeros(N, dtype=torch.int64))


def test_autocast_is_compiled_too() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            o = mg.attend(q, k, v, PATTERN)
        assert o.dtype == torch.bfloat16
        return o.float()

    check(f, *tensors(1, 2, N, 8))
