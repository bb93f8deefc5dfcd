"""Gradients: derivatives of all orders that exist, repeatability, independence of the batch."""

import pytest
import torch
from attention_cases import PATTERNS, bernoulli, error, operands, run, wide

import mixgrain as mg
from mixgrain import patterns as P


@pytest.mark.parametrize("name", PATTERNS)
def test_fused_gradients_in_float32(name) -> None:
    q, k, v = operands((140, 180, 16, 8), torch.float32)
    pattern = PATTERNS[name](140, 180)
    sink = torch.randn(4)
    got = run("fused", q, k, v, pattern, sink=sink)
    expected = run("reference", *wide(q, k, v), pattern, sink=sink.double())
    for a, b in zip(got[2], expected[2], strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("impl", ["fused", "composed"])
@pytest.mark.parametrize("kind", ["mixed", "row", "block"])
def test_gradcheck(impl, kind) -> None:
    q, k, v = operands((7, 9, 4, 3), batch=1, heads=(2, 1))
    sink = torch.randn(2, dtype=torch.float64, requires_grad=True)
    keep = torch.ones(1, 9, dtype=torch.bool)
    keep[0, 4] = False
    pattern = P.window(2) | P.global_keys([0])
    layout = pattern.to_layout(kind, 7, 9, 16)

    def f(q, k, v, sink):
        return mg.attend(
            q, k, v, layout, sink_logits=sink, key_mask=keep, enable_gqa=True, return_lse=True,
            impl=impl,
        )  # fmt: skip

    assert torch.autograd.gradcheck(f, (q, k, v, sink), fast_mode=impl == "composed")


@pytest.mark.parametrize("name", ["window", "longformer", "random", "from_dense"])
@pytest.mark.parametrize("impl", ["composed", "reference"])
def test_second_derivatives(impl, name) -> None:
    q, k, v = operands((6, 7, 3, 2), batch=1, heads=(2, 1))
    sink = torch.randn(2, dtype=torch.float64, requires_grad=True)
    pattern = PATTERNS[name](6, 7)

    def f(q, k, v, sink):
        o, lse = mg.attend(
            q, k, v, pattern, sink_logits=sink, enable_gqa=True, return_lse=True, impl=impl
        )
        return o, lse

    assert torch.autograd.gradgradcheck(f, (q, k, v, sink), fast_mode=True)


def test_the_fused_second_derivative_raises_and_names_composed() -> None:
    q, k, v = operands((8, 8, 4, 4))
    o = mg.attend(q, k, v, P.causal(), enable_gqa=True, impl="fused")
    (dq,) = torch.autograd.grad(o.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match='impl="composed"'):
        dq.sum().backward()


def test_lse_alone_and_output_alone_can_be_differentiated() -> None:
    q, k, v = operands((20, 20, 4, 4))
    kept = P.window(3)
    for pick in (0, 1):
        grads = []
        for impl in ("fused", "reference"):
            out = mg.attend(q, k, v, kept, enable_gqa=True, return_lse=True, impl=impl)[pick]
            grads.append(torch.autograd.grad(out.sin().sum(), (q, k, v), allow_unused=True))
        for a, b in zip(*grads, strict=True):
            if b is None:
                assert a is None or (a == 0).all()
            else:
                assert error(a, b) < 1e-12


CASES = ["longformer", "random", "from_dense", "bigbird", "full"]


@pytest.mark.parametrize("name", [*CASES, "nm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_results_repeat_bitwise(name, dtype) -> None:
    q, k, v = operands((300, 300, 16, 16), dtype)
    kept = P.nm(2, 4) & P.causal() if name == "nm" else PATTERNS[name](300, 300)
    first = run("fused", q, k, v, kept)
    for _ in range(3):
        again = run("fused", q, k, v, kept)
        for a, b in zip((*first[:2], *first[2]), (*again[:2], *again[2]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", [*CASES, "nm"])
def test_a_row_does_not_depend_on_batch_or_heads(name) -> None:
    q, k, v = operands((200, 200, 16, 16), torch.float32, batch=3, heads=(4, 4))
    kept = P.nm(2, 4) & P.window(40) if name == "nm" else PATTERNS[name](200, 200)
    keep = bernoulli(3, 200, 0.8, 2)
    do = torch.randn(q.shape)

    def at(b, h):
        x = [t[b, h].detach().contiguous().requires_grad_() for t in (q, k, v)]
        o, lse = mg.attend(*x, kept, key_mask=keep[b], return_lse=True, impl="fused")
        return o, lse, torch.autograd.grad(o, x, do[b, h])

    everywhere, every_head = slice(None), slice(None)
    o, lse, grads = at(everywhere, every_head)
    for b, h in ((0, 0), (2, 3), (1, 2)):
        b, h = slice(b, b + 1), slice(h, h + 1)
        one, logs, mine = at(b, h)
        assert torch.equal(one, o[b, h]) and torch.equal(logs, lse[b, h])
        for a, whole in zip(mine, grads, strict=True):
            assert torch.equal(a, whole[b, h])


def test_equal_heads_get_equal_results() -> None:
    q, k, v = operands((90, 90, 8, 8), torch.float32, heads=(1, 1))
    q, k, v = (x.detach().expand(-1, 4, -1, -1) for x in (q, k, v))
    same, other = P.window(5) | P.global_keys([3]), P.causal()
    o = mg.attend(q, k, v, P.per_head([same, other, same, other]))
    assert torch.equal(o[:, 0], o[:, 2]) and torch.equal(o[:, 1], o[:, 3])
    assert torch.equal(o[:, :1], mg.attend(q[:, :1], k[:, :1], v[:, :1], same))


def test_the_operator_passes_opcheck() -> None:
    from mixgrain.attention.attend import plan_for
    from mixgrain.attention.ops import attention

    q, k, v = operands((20, 30, 4, 3), torch.float32, batch=1)
    made = plan_for(P.longformer(3, [1]), 20, 30)
    keep = bernoulli(1, 30, 0.9, 1)
    sink = torch.randn(4, requires_grad=True)
    torch.library.opcheck(attention, (q, k, v, keep, sink, 0.5, made.tensors, list(made.ints)))


def test_plans_are_made_once_and_forgotten_on_demand() -> None:
    from mixgrain.attention.attend import plan_for

    kept = P.window(4)
    made = plan_for(kept, 50, 50)
    assert plan_for(P.window(4), 50, 50) is made
    assert plan_for(kept, 50, 51) is not made
    mg.clear_caches()
    assert plan_for(kept, 50, 50) is not made


@pytest.mark.parametrize("impl", ["fused", "composed"])
def test_a_layout_compiles_into_one_graph(impl) -> None:
    q, k, v = operands((64, 64, 8, 8), torch.float32, batch=1)
    layout = P.longformer(3, [1]).to_layout("mixed", 64, 64)

    def f(q, k, v):
        return 2 * mg.attend(q, k, v, layout, enable_gqa=True, impl=impl)

    eager = f(q, k, v)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)(q, k, v)
    assert torch.equal(compiled, eager)
    grads = (torch.autograd.grad(o.sum(), (q, k, v)) for o in (compiled, eager))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
