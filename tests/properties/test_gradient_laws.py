"""Gradients: exact where the operation is bilinear, against finite differences, and their laws."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis")
from drawn import (
    EXACT,
    LEADS,
    TINY,
    Example,
    close,
    examples,
    real,
    same_bits,
    spread,
    whole,
)
from hypothesis import example
from hypothesis import strategies as st
from laws import law
from torch import Tensor

import mixgrain as mg
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives.linear import linear
from mixgrain.primitives.sddmm import sddmm
from mixgrain.primitives.softmax import softmax, softmax_backward
from mixgrain.primitives.spmm import spmm

OFTEN = ("row", "block", "row", "block", "nm", "panel", "mixed", "nm within")
FEW = LEADS[:4]


def leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


@law(1, x=examples(OFTEN), masked=st.booleans())
def test_the_gradient_of_sddmm_is_spmm(x: Example, masked: bool) -> None:
    """Exactly: dq = g k and dk = gᵀ q, whatever the gradient holds at dead slots."""
    g, layout = x.generator(1), x.layout()
    q, k = map(leaf, x.operands(g))
    keep = torch.rand(x.shape[1], generator=g) < 0.6 if masked else None
    s = sddmm(q, k, layout, scale=2.0, key_mask=keep)
    w = s.with_values(whole(g, *s.values.shape))
    dq, dk = torch.autograd.grad(s.values, (q, k), w.values)
    dense = w.to_dense()
    assert torch.equal(dq, 2 * dense @ k) and torch.equal(dk, 2 * dense.mT @ q)
    assert bool((dq[~(dense != 0).any(-1)] == 0).all())


@law(1, x=examples((*OFTEN, "tile")), turned=st.booleans())
def test_the_gradient_of_spmm_is_sddmm_and_spmm(x: Example, turned: bool) -> None:
    g, layout = x.generator(1), x.layout()
    values, t = leaf(x.sparse(layout, g).values), x.operands(g)[0 if turned else 1]
    s, t = SparseTensor(layout, values), leaf(t)
    o = spmm(s.T if turned else s, t)
    w = whole(g, *o.shape)
    dv, dt = torch.autograd.grad(o, (values, t), w)
    dense = s.to_dense().detach()
    dense, outer = (dense.mT, (t @ w.mT)) if turned else (dense, w @ t.mT)
    mask = spread(layout.mask(), x)
    assert torch.equal(dt, dense.mT @ w)
    assert torch.equal(s.with_values(dv).to_dense(), torch.where(mask, outer, 0.0))
    live = layout.live()
    assert live is None or bool((dv[..., ~live] == 0).all())


@law(1, x=examples((*OFTEN, "tile"), leads=LEADS[:1], free=((),)), biased=st.booleans())
@example(x=Example("row", (5, 0)), biased=False)
def test_the_gradient_of_linear(x: Example, biased: bool) -> None:
    g, layout = x.generator(1), x.layout()
    w, t = leaf(x.sparse(layout, g).values), leaf(whole(g, 3, x.shape[1]))
    bias = leaf(whole(g, x.shape[0])) if biased else None
    sparse = SparseTensor(layout, w)
    y = linear(t, sparse, bias)
    up = whole(g, *y.shape)
    inputs = (w, t) if bias is None else (w, t, bias)
    dw, dt, *db = torch.autograd.grad(y, inputs, up)
    assert torch.equal(dt, up @ sparse.to_dense().detach())
    expected = torch.where(layout.mask()[0, 0], up.mT @ t, 0.0)
    assert torch.equal(sparse.with_values(dw).to_dense(), expected)
    assert not db or torch.equal(db[0], up.sum(0))


@law(1, x=examples(OFTEN), masked=st.booleans())
@example(x=Example("row", (5, 5), lead=(2, 1), entry=(0, 1)), masked=False)
def test_the_gradient_of_softmax_is_softmax_backward(x: Example, masked: bool) -> None:
    g, layout = x.generator(1), x.layout()
    values = leaf(real(g, *x.free, layout.slots))
    keep = torch.rand(x.shape[1], generator=g) < 0.6 if masked else None
    p, lse = softmax(SparseTensor(layout, values, keep), return_lse=True)
    up, up_lse = real(g, *p.values.shape), real(g, *lse.shape)
    (got,) = torch.autograd.grad((p.values, lse), values, (up, up_lse))
    by_hand = softmax_backward(p, up, up_lse)
    assert torch.equal(got, by_hand.values)
    # Rows of the Jacobian sum to nothing: shifting all scores of a row changes no probability.
    (alone,) = torch.autograd.grad(softmax(SparseTensor(layout, values, keep)).values, values, up)
    close(p.with_values(alone).to_dense().sum(-1), torch.zeros(*x.lead_shape, x.shape[0]).double())


@law(1, x=examples(OFTEN), a=st.integers(-3, 3))
def test_backward_is_linear_in_the_gradient(x: Example, a: int) -> None:
    g, layout = x.generator(1), x.layout()
    p = softmax(SparseTensor(layout, real(g, *x.free, layout.slots)))
    u, v = (p.with_values(real(g, *p.values.shape)) for _ in range(2))
    both = softmax_backward(p, u * a + v)
    close(both.values, (softmax_backward(p, u) * a + softmax_backward(p, v)).values)


@law(1, x=examples(OFTEN))
def test_softmax_backward_is_symmetric(x: Example) -> None:
    """The Jacobian of softmax is: <u, J v> = <v, J u>."""
    g, layout = x.generator(1), x.layout()
    p = softmax(SparseTensor(layout, real(g, *x.free, layout.slots)))
    u, v = (p.with_values(real(g, *p.values.shape)) for _ in range(2))

    def dot(a: SparseTensor, b: SparseTensor) -> Tensor:
        return (a.to_dense() * b.to_dense()).sum()

    close(dot(u, softmax_backward(p, v)), dot(v, softmax_backward(p, u)))


_tiny = {"sides": TINY, "leads": FEW, "free": ((), (2,)), "dims": (2, 1)}


@law(0.05, x=examples(OFTEN, **_tiny), masked=st.booleans())
def test_first_derivatives_match_finite_differences(x: Example, masked: bool) -> None:
    g, layout = x.generator(1), x.layout()
    q, k = (leaf(real(g, *x.lead_shape, n, x.dim)) for n in x.shape)
    keep = torch.rand(x.shape[1], generator=g) < 0.6 if masked else None

    def composed(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        p, lse = softmax(sddmm(q, k, layout, scale=0.7, key_mask=keep), return_lse=True)
        return spmm(p, k), torch.where(lse > -torch.inf, lse, 0.0)

    assert torch.autograd.gradcheck(composed, (q, k))


@law(0.02, x=examples(OFTEN, **_tiny))
def test_second_derivatives_match_finite_differences(x: Example) -> None:
    g, layout = x.generator(1), x.layout()
    q, k = (leaf(real(g, *x.lead_shape, n, x.dim)) for n in x.shape)

    def composed(q: Tensor, k: Tensor) -> Tensor:
        return spmm(softmax(sddmm(q, k, layout, scale=0.7)), k)

    assert torch.autograd.gradgradcheck(composed, (q, k))


@law(0.05, x=examples(("row", "block", "mixed"), sides=TINY, leads=LEADS[:4], dims=(2, 1)),
     masked=st.booleans(), sunk=st.booleans(),
     impl=st.sampled_from(("fused", "composed")))  # fmt: skip
def test_attention_derivatives_match_finite_differences(
    x: Example, masked: bool, sunk: bool, impl: str
) -> None:
    g, (b, h), layout = x.generator(1), x.lead, x.layout()
    q = leaf(real(g, b, h, x.shape[0], x.dim))
    k, v = (leaf(real(g, b, h, x.shape[1], n)) for n in (x.dim, 2))
    keep = torch.rand(b, x.shape[1], generator=g) < 0.6 if masked else None
    sink = (leaf(real(g, h)),) if sunk else ()

    def run(q: Tensor, k: Tensor, v: Tensor, *sink: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = mg.attend(
            q, k, v, layout, key_mask=keep, sink_logits=sink[0] if sink else None,
            return_lse=True, impl=impl,
        )  # fmt: skip
        return o, torch.where(lse > -torch.inf, lse, 0.0)

    assert torch.autograd.gradcheck(run, (q, k, v, *sink))


@law(0.5, x=examples(EXACT), dtype=st.sampled_from((torch.float32, torch.float64)))
def test_gradients_repeat_bit_for_bit(x: Example, dtype: torch.dtype) -> None:
    g, layout = x.generator(1), x.layout()
    q, k = (leaf(real(g, *x.lead_shape, n, x.dim, dtype=dtype)) for n in x.shape)
    up = real(g, *x.lead_shape, x.shape[0], x.dim, dtype=dtype)

    def run() -> tuple[Tensor, ...]:
        o = spmm(softmax(sddmm(q, k, layout, scale=0.3)), k)
        return torch.autograd.grad(o, (q, k), up)

    first = run()
    mg.clear_caches()
    assert all(map(same_bits, first, run()))


@law(0.5, x=examples(OFTEN, leads=LEADS[:1], free=((2, 4),)), heads=st.sampled_from((1, 2, 4)))
def test_gradients_of_shared_keys_are_sums(x: Example, heads: int) -> None:
    """Grouped heads: the gradient of a key head is the sum over the query heads it serves."""
    g, layout = x.generator(1), x.layout()
    q = leaf(whole(g, 2, 4, x.shape[0], x.dim))
    k = leaf(whole(g, 2, heads, x.shape[1], x.dim))
    s = sddmm(q, k, layout)
    up = whole(g, *s.values.shape)
    dq, dk = torch.autograd.grad(s.values, (q, k), up)
    wide = leaf(k.detach().repeat_interleave(4 // heads, 1))
    dq2, dw = torch.autograd.grad(sddmm(q, wide, layout).values, (q, wide), up)
    assert torch.equal(dq, dq2)
    assert torch.equal(dk, dw.unflatten(1, (heads, -1)).sum(2))


@law(0.5, x=examples(("row", "block", "mixed", "nm"), leads=LEADS[:4]))
def test_gradients_pass_through_values(x: Example) -> None:
    """to_dense, T, part, map, +, * and sparsify(layout=) are linear maps with their transposes."""
    g, layout = x.generator(1), x.layout()
    values = leaf(whole(g, *x.free, layout.slots))
    s = SparseTensor(layout, values)
    up, live = whole(g, *s.shape), layout.live()
    (got,) = torch.autograd.grad(s.to_dense(), values, up)
    expected = SparseTensor(layout, torch.zeros_like(values))
    kept = spread(layout.mask(), x)
    assert torch.equal(expected.with_values(got).to_dense(), torch.where(kept, up, 0.0))
    assert live is None or bool((got[..., ~live] == 0).all())
    (turned,) = torch.autograd.grad(s.T.to_dense(), values, up.mT)
    assert torch.equal(turned, got)
    (mapped,) = torch.autograd.grad((s * 2 + s).map(lambda v, i, j: v * j).to_dense(), values, up)
    columns = layout.indices()[1]
    assert torch.equal(mapped, got * 3 * columns)
    parts = [s.part(i).to_dense() for i in range(len(layout.parts))]
    if parts:
        (summed,) = torch.autograd.grad(sum(parts), values, up)
        assert torch.equal(summed, got)
