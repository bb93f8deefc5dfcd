"""torch.func: vmap, grad, jvp and their compositions, against loops and dense formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.formats.errors import UnsupportedError

N, D = 20, 4
PATTERNS = {
    "expression": P.causal() & (P.window(3) | P.global_tokens([0, 7])),
    "per head": P.per_head([P.window(3), P.causal()]),
    "per batch": P.documents(torch.arange(2 * N).reshape(2, N) // 7),
    "nm": P.nm(2, 4),
    "nm within": P.nm(1, 4) & P.window(5),
}
SINK = torch.tensor([0.3, -0.2], dtype=torch.float64)


@pytest.fixture(autouse=True)
def cold():
    """Layouts and plans are made inside the transform."""
    mg.clear_caches()


def tensors(*lead: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*lead, N, D, generator=g, dtype=torch.float64) for _ in range(3)]


def attention(name: str, impl: str, key_mask: Tensor | None = None):
    def f(q: Tensor, k: Tensor, v: Tensor, sink: Tensor = SINK) -> Tensor:
        o, lse = mg.attend(q, k, v, PATTERNS[name], key_mask=key_mask, sink_logits=sink,
                           return_lse=True, impl=impl)  # fmt: skip
        return torch.cat([o, lse[..., None]], -1)

    return f


def loop(f, in_dims, *given: Tensor):
    """What vmap stands for."""
    size = next(t.shape[d] for t, d in zip(given, in_dims, strict=True) if d is not None)
    made = [
        f(*(t if d is None else t.select(d, i) for t, d in zip(given, in_dims, strict=True)))
        for i in range(size)
    ]
    return torch.utils._pytree.tree_map(lambda *parts: torch.stack(parts), *made)


def check(f, in_dims, *given: Tensor) -> None:
    torch.testing.assert_close(
        vmap(f, in_dims=in_dims)(*given), loop(f, in_dims, *given), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("impl", ["fused", "composed"])
@pytest.mark.parametrize("name", PATTERNS)
def test_vmap_of_attend(name: str, impl: str) -> None:
    q, k, v = tensors(3, 2, 2)
    mask = torch.rand(2, N, generator=torch.Generator().manual_seed(3)) < 0.8
    f = attention(name, impl, mask)
    check(f, (0, 0, 0), q, k, v)
    check(f, (1, None, 3), q.movedim(0, 1), k[0], v.movedim(0, 3))
    check(f, (None, 0, None), q[0], k, v[0])
    sinks = torch.randn(3, 2, dtype=torch.float64)
    check(f, (0, None, None, 0), q, k[0], v[0], sinks)


@pytest.mark.parametrize("impl", ["fused", "composed"])
@pytest.mark.parametrize("name", PATTERNS)
def test_vmap_of_grad(name: str, impl: str) -> None:
    q, k, v = tensors(3, 2, 2)
    f = attention(name, impl)
    gradient = grad(lambda *given: (f(*given) ** 3).sum(), argnums=(0, 1, 2, 3))
    sinks = torch.randn(3, 2, dtype=torch.float64)
    check(gradient, (0, 0, 0, 0), q, k, v, sinks)
    check(lambda q, k: gradient(q, k, v[0], SINK), (0, None), q, k[0])


def test_vmap_of_a_mapped_key_mask() -> None:
    q, k, v = tensors(2, 2)
    masks = torch.rand(3, 2, N, generator=torch.Generator().manual_seed(3)) < 0.6
    for impl in ("fused", "composed"):
        check(lambda mask: attention("expression", impl, mask)(q, k, v), (0,), masks)  # noqa: B023


@pytest.mark.parametrize("kind", ["row", "block", "mixed"])
def test_vmap_of_the_primitives(kind: str) -> None:
    layout = PATTERNS["per head"].to_layout(kind, N, N, 16)
    q, k, v = tensors(3, 2)
    check(lambda q, k: mg.sddmm(q, k, layout).values, (0, None), q, k[0])
    check(lambda q, k: mg.sddmm(q, k, layout).values, (None, 1), q[0], k.movedim(0, 1))
    s = mg.sddmm(q, k, layout)

    def probabilities(values: Tensor) -> tuple[Tensor, Tensor]:
        p, lse = mg.softmax(s.with_values(values), return_lse=True)
        return p.values, lse

    check(probabilities, (1,), s.values.t())
    check(lambda values, x: mg.spmm(s.with_values(values), x), (0, 0), s.values, v)
    check(lambda values, x: mg.spmm(s.with_values(values).T, x), (0, None), s.values, v[0])
    nested = vmap(vmap(lambda q, k: mg.sddmm(q, k, layout).values, (0, None)), (None, 0))
    one = torch.stack([torch.stack([mg.sddmm(a, b, layout).values for a in q]) for b in k])
    torch.testing.assert_close(nested(q, k), one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["row", "tile", "nm"])
def test_ensembles_of_weights(kind: str) -> None:
    """A batch of weights on one layout, and per-sample gradients."""
    w = torch.randn(24, 20, dtype=torch.float64)
    options = {} if kind == "nm" else {"density": 0.5}
    layer = mg.SparseLinear.from_sparse(mg.sparsify(w, kind, prune=True, **options))
    many = torch.randn(3, layer.values.numel(), dtype=torch.float64)
    x = torch.randn(5, 20, dtype=torch.float64)
    check(lambda values: functional_call(layer, {"values": values}, x), (0,), many)
    loss = lambda values, row: functional_call(layer, {"values": values}, row).square().sum()  # noqa: E731
    check(lambda row: grad(loss)(many[0], row), (0,), x)


@pytest.mark.parametrize("impl", ["fused", "composed"])
def test_grad_equals_autograd(impl: str) -> None:
    q, k, v = tensors(2, 2)
    f = lambda q, k, v: (attention("expression", impl)(q, k, v) ** 2).sum()  # noqa: E731
    mine = grad(f, argnums=(0, 1, 2))(q, k, v)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    torch.testing.assert_close(mine, torch.autograd.grad(f(*leaves), leaves), rtol=0, atol=0)
    # What was planned inside the transform serves outside of it.
    torch.testing.assert_close(f(q, k, v), f(*leaves).detach(), rtol=0, atol=0)
    (out, pull) = vjp(lambda q: attention("expression", impl)(q, k, v), q)
    torch.testing.assert_close(pull(2 * out)[0], mine[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PATTERNS)
def test_forward_mode_of_composed(name: str) -> None:
    q, k, v = tensors(2, 2)
    dq, dk, dv = tensors(2, 2, seed=1)
    f = attention(name, "composed")
    value, tangent = jvp(f, (q, k, v, SINK), (dq, dk, dv, SINK))
    torch.testing.assert_close(value, f(q, k, v))
    step = 1e-6
    ahead, back = (f(q + e * dq, k + e * dk, v + e * dv, SINK + e * SINK) for e in (step, -step))
    torch.testing.assert_close(tangent, (ahead - back) / (2 * step), rtol=1e-6, atol=1e-7)
    with forward_ad.dual_level():
        dual = f(forward_ad.make_dual(q, dq), k, v)
        mine = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(mine, jvp(lambda q: f(q, k, v), (q,), (dq,))[1])


def test_transforms_of_transforms() -> None:
    """Second and third derivatives, every way round, equal those of the dense formula."""
    q, v = (t[..., :6, :] for t in tensors(1, 2)[:2])
    pattern = P.causal() & P.window(2)
    mask = pattern.dense(6, 6)

    def dense(q: Tensor) -> Tensor:
        s = torch.where(mask, q @ q.mT * 0.5, -torch.inf)
        return (torch.softmax(s, -1) @ q).pow(3).sum()

    def sparse(q: Tensor) -> Tensor:
        return mg.attend(q, q, q, pattern, scale=0.5, impl="composed").pow(3).sum()

    def along(f, times: int):
        return f if not times else along(lambda q: jvp(f, (q,), (v,))[1], times - 1)

    ways = {
        "forward over forward": lambda f: along(f, 2)(q),
        "three times forward": lambda f: along(f, 3)(q),
        "forward over reverse": lambda f: jvp(grad(f), (q,), (v,))[1],
        "reverse over forward": lambda f: grad(along(f, 1))(q),
        "reverse over reverse": lambda f: grad(lambda q: (grad(f)(q) * v).sum())(q),
        "reverse over forward twice": lambda f: grad(along(f, 2))(q),
        "mapped": lambda f: vmap(lambda w: jvp(grad(f), (q,), (w,))[1])(torch.stack([v, q])),
        "Hessian": lambda f: jacfwd(jacrev(f))(q),
    }
    for name, way in ways.items():
        wanted = way(dense)
        assert wanted.abs().sum() > 1, name
        torch.testing.assert_close(way(sparse), wanted, rtol=1e-10, atol=1e-10, msg=name)


def test_forward_mode_of_fused_says_what_to_do() -> None:
    q, k, v = tensors(1, 2)
    f = attention("expression", "fused")
    with pytest.raises(UnsupportedError, match='impl="composed"'):
        jvp(lambda q: f(q, k, v), (q,), (q,))
    with forward_ad.dual_level(), pytest.raises(UnsupportedError, match="forward-mode"):
        f(q, k, forward_ad.make_dual(v, v))
    with pytest.raises(UnsupportedError, match='impl="composed"'):
        jacfwd(grad(lambda q: f(q, k, v).sum()))(q)


@pytest.mark.parametrize("impl", ["fused", "composed"])
def test_make_fx(impl: str) -> None:
    """The library's operators and aten's in the graph, which computes the same."""
    q, k, v = tensors(2, 2)
    f = grad(lambda q: (attention("expression", impl)(q, k, v) ** 2).sum())
    graph = make_fx(f)(q)
    assert "mixgrain" in {str(node.target).split(".")[0] for node in graph.graph.nodes}
    other = q.flip(0)
    torch.testing.assert_close(graph(other), f(other), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [[1, 3], [3, 1, 3], [2], []])
def test_patterns_made_inside_a_transform(tokens) -> None:
    q, k, v = tensors(1, 2)

    def f(q: Tensor, make=lambda: P.window(2) | P.global_tokens(tokens)) -> Tensor:
        return mg.attend(q, k, v, make()).square().sum()

    outside = P.window(2) | P.global_tokens(tokens)
    right = f(q, lambda: outside)
    torch.testing.assert_close(torch.func.functionalize(f)(q), right, rtol=1e-12, atol=1e-12)
    value, back = vjp(f, q)
    torch.testing.assert_close(value, right, rtol=1e-12, atol=1e-12)
    expected = grad(lambda q: f(q, lambda: outside))(q)
    for made in (grad(f)(q), back(torch.ones_like(value))[0]):
        torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)
    both = torch.stack([q, q + 1])
    torch.testing.assert_close(
        vmap(f)(both), torch.stack([f(one) for one in both]), rtol=1e-12, atol=1e-12
    )


IDS = torch.arange(N) // 7
MASK = torch.ones(5, 5, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    "make",
    [
        lambda: P.global_tokens([3, 1]),
        lambda: P.documents(IDS),
        lambda: P.blocks(MASK, 4),
        lambda: P.from_dense(IDS[:, None] == IDS),
    ],
)
def test_what_a_transform_read_first_is_read_after_it(make) -> None:
    right, kept = make().dense(N, N), []

    def f(q: Tensor) -> Tensor:
        kept.append(make())
        kept[0].row(5, N, N)
        return q

    torch.func.functionalize(f)(torch.ones(2))
    assert torch.equal(kept[0].dense(N, N), right)
