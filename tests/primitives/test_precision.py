"""Float32 against float64, half precision against torch's own dense computation of the same."""

from __future__ import annotations

import pytest
import torch
from cases import cells

from mixgrain.formats import patterns as P
from mixgrain.formats.layout import Layout
from mixgrain.formats.sparse import SparseTensor
from mixgrain.formats.sparsify import sparsify
from mixgrain.primitives import reference
from mixgrain.primitives.dispatch import TABLE
from mixgrain.primitives.linear import linear
from mixgrain.primitives.sddmm import sddmm
from mixgrain.primitives.softmax import softmax
from mixgrain.primitives.spmm import spmm

N, D, HEADS = 200, 64, 2
PATTERN = P.window(30) | P.global_tokens([5, 150]) | P.random(0.05, 0)
KINDS = {cls.kind: cls for cls in TABLE["softmax"] if cls.kind not in ("nm", "panel")}
HALVES = [torch.float16, torch.bfloat16]


def layout_of(kind: str) -> Layout:
    return PATTERN.to_layout(kind, N, N)


def inputs(dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(HEADS, N, D, generator=g).to(dtype) for _ in range(4)]


def errors(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    """Rms within 1.05 × and maximum within 2 × of torch's error at the same precision."""
    mine, other = (t.double() - exact for t in (ours, theirs))
    assert mine.square().mean() <= 1.05**2 * other.square().mean()
    assert mine.abs().max() <= 2 * other.abs().max()


def dense_attention(q, k, v, mask, out=None):
    """Scores, probabilities and output as torch computes them in the inputs' dtype."""
    s = torch.bmm(q, k.mT) * D**-0.5
    p = torch.softmax(s.masked_fill(~mask, -torch.inf), -1)
    return s, p, torch.bmm(p, v)


def attention(q, k, v, layout):
    s = sddmm(q, k, layout, scale=D**-0.5)
    p = softmax(s)
    return s, p, spmm(p, v)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("seed", range(3))
def test_half_precision_is_as_good_as_dense(kind: str, dtype: torch.dtype, seed: int) -> None:
    layout = layout_of(kind)
    mask = layout.mask()[0, 0]
    *halves, grad = inputs(dtype, seed)
    runs = []
    for f, tensors, extra in (
        (attention, halves, layout),
        (dense_attention, halves, mask),
        (dense_attention, [t.double() for t in halves], mask),
    ):
        leaves = [t.detach().requires_grad_() for t in tensors]
        s, p, o = f(*leaves, extra)
        assert o.dtype == tensors[0].dtype
        grads = torch.autograd.grad(o, leaves, grad.to(o.dtype))
        if f is attention:
            s, p = s.to_dense(), p.to_dense()
        runs.append([torch.where(mask, s, 0), p, o, *grads])
    for ours, theirs, exact in zip(*runs, strict=True):
        errors(ours, theirs, exact)


@pytest.mark.parametrize("kind", ["tile", "nm", "block", "row", "mixed"])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_of_linear(kind: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    dense = torch.randn(128, 192, generator=g) * (torch.rand(128, 192, generator=g) < 0.3)
    w = sparsify(dense.to(dtype), kind, **({"prune": True} if kind == "nm" else {}))
    x = torch.randn(50, 192, generator=g).to(dtype)
    bias = torch.randn(128, generator=g).to(dtype)
    runs = []
    for f, weight, scale in (
        (linear, w, dtype),
        (torch.nn.functional.linear, w.to_dense(), dtype),
        (torch.nn.functional.linear, w.to_dense(), torch.float64),
    ):
        leaf = x.to(scale).requires_grad_()
        y = f(leaf, weight.to(scale), bias.to(scale))
        runs.append([y, torch.autograd.grad(y, leaf, torch.ones_like(y))[0]])
    for ours, theirs, exact in zip(*runs, strict=True):
        errors(ours, theirs, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_within_a_millionth(kind: str) -> None:
    layout = layout_of(kind)
    q, k, v, _ = inputs(torch.float32, 0)
    s, p, o = attention(q, k, v, layout)
    exact = attention(q.double(), k.double(), v.double(), layout)
    for ours, theirs in ((s.values, exact[0].values), (p.values, exact[1].values), (o, exact[2])):
        error = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert error < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_out_dtype_keeps_scores_in_float32(kind: str) -> None:
    layout = layout_of(kind)
    q, k, v, _ = inputs(torch.bfloat16, 0)
    s = sddmm(q, k, layout, out_dtype=torch.float32)
    assert s.dtype == torch.float32
    exact = reference.sddmm(q, k, layout)
    assert (s.values.double() - exact.values).abs().max() < 1e-4
    p, lse = softmax(s, return_lse=True, out_dtype=torch.bfloat16)
    assert p.dtype == torch.bfloat16 and lse.dtype == torch.float32
    q.requires_grad_()
    o = spmm(softmax(sddmm(q, k, layout, out_dtype=torch.float32)), v)
    assert o.dtype == torch.bfloat16
    assert torch.autograd.grad(o.sum(), q)[0].dtype == torch.bfloat16


def test_scale_is_applied_before_rounding() -> None:
    """Sums beyond 65,504 that the scale brings back do not overflow in float16, nor gradients."""
    q = torch.full((1, 64), 60.0, dtype=torch.float16, requires_grad=True)
    k = torch.full((16, 64), 60.0, dtype=torch.float16)
    s = sddmm(q, k, P.full(), scale=0.01)
    assert bool((s.values[s.values != 0] == torch.tensor(2304.0)).all())
    grad = torch.full_like(s.values, 200.0)
    (dq,) = torch.autograd.grad(s.values, q, grad)
    assert bool(torch.isfinite(dq).all()) and dq[0, 0] == 16 * 200 * 60 * 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_repeatable_and_batch_invariant(kind: str, dtype: torch.dtype) -> None:
    """Bit for bit: again, alone, among others, and whatever stands beside a head."""
    layout = layout_of(kind)
    g = torch.Generator().manual_seed(1)
    q, k, v, grad = (torch.randn(3, HEADS, N, D, generator=g).to(dtype) for _ in range(4))

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors[:3]]
        s, p, o = attention(*leaves, layout)
        return [s.values, p.values, o, *torch.autograd.grad(o, leaves, tensors[3])]

    whole, again = run(q, k, v, grad), run(q, k, v, grad)
    alone = run(q[1, 1], k[1, 1], v[1, 1], grad[1, 1])
    for a, b, c in zip(whole, again, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[1, 1], c)


@pytest.mark.parametrize("kind, name", cells("spmm", TABLE, ["window"]))
def test_mixed_dtypes_of_spmm(kind: str, name: str) -> None:
    """Probabilities may be wider than x: the result has x's dtype, the gradients their own."""
    from cases import build, operands

    layout = build(kind, name)
    values = torch.rand(layout.slots, requires_grad=True)
    _, k = operands(name, torch.bfloat16)
    k.requires_grad_()
    o = spmm(SparseTensor(layout, values), k)
    dv, dk = torch.autograd.grad(o.float().sum(), (values, k))
    assert (o.dtype, dv.dtype, dk.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
