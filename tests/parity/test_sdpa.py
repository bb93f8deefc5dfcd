"""attend against torch's scaled_dot_product_attention with the dense mask, gradients included."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from attention_cases import PATTERNS, SHAPES, operands
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import mixgrain as mg
from mixgrain import patterns as P

EXACT = {torch.float64: 1e-13, torch.float32: 2e-6}


def results(attention, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Output, and the gradients of a fixed projection of it."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    o = attention(*inputs)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(5)).to(o.dtype)
    return [o.detach(), *torch.autograd.grad(o, inputs, weight)]


def compare(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for what, a, b in zip(("o", "dq", "dk", "dv"), got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, what
        assert not torch.isnan(a).any(), what
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())), what


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("impl", ["fused", "composed", "reference"])
@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern(name, impl, dtype) -> None:
    for shape in SHAPES[:3] if impl == "reference" else SHAPES:
        q, k, v = operands(shape, dtype)
        pattern = PATTERNS[name](*shape[:2])
        mask = pattern.dense(*shape[:2])
        theirs = partial(sdpa, attn_mask=mask, enable_gqa=True)
        ours = partial(mg.attend, pattern_or_layout=pattern, enable_gqa=True, impl=impl)
        compare(results(ours, q, k, v), results(theirs, q, k, v), EXACT[dtype])


@pytest.mark.parametrize("impl", ["fused", "composed", "reference"])
@pytest.mark.parametrize("kind, size", [("row", 64), ("block", 16), ("block", 64), ("mixed", 32)])
def test_every_layout(kind, size, impl) -> None:
    q, k, v = operands((70, 90, 16, 16))
    pattern = P.longformer(9, [0, 31, 80]) | P.random(0.05, seed=1)
    layout = pattern.to_layout(kind, 70, 90, size)
    mask = pattern.dense(70, 90)
    expected = results(lambda *x: sdpa(*x, attn_mask=mask, enable_gqa=True), q, k, v)
    ours = results(lambda *x: mg.attend(*x, layout, enable_gqa=True, impl=impl), q, k, v)
    compare(ours, expected, 1e-13)


@pytest.mark.parametrize("impl", ["fused", "composed"])
@pytest.mark.parametrize("shape", ["heads", "batch", "both"])
def test_masks_that_differ(shape, impl) -> None:
    q, k, v = operands((40, 50, 8, 8), batch=3)
    mask = torch.rand(3, 4, 40, 50, generator=torch.Generator().manual_seed(2)) < 0.3
    mask = {"heads": mask[:1], "batch": mask[:, :1], "both": mask}[shape]
    pattern = P.from_dense(mask[0] if shape == "heads" else mask)
    expected = results(lambda *x: sdpa(*x, attn_mask=mask, enable_gqa=True), q, k, v)
    ours = results(lambda *x: mg.attend(*x, pattern, enable_gqa=True, impl=impl), q, k, v)
    compare(ours, expected, 1e-13)


@pytest.mark.parametrize("impl", ["fused", "composed"])
def test_is_causal_scale_and_padding(impl) -> None:
    q, k, v = operands((60, 60, 8, 8), heads=(4, 4))
    expected = results(lambda *x: sdpa(*x, is_causal=True, scale=0.3), q, k, v)
    compare(
        results(lambda *x: mg.attend(*x, P.causal(), scale=0.3, impl=impl), q, k, v),
        expected,
        1e-13,
    )
    keys = torch.rand(2, 60, generator=torch.Generator().manual_seed(3)) < 0.2
    mask = keys[:, None, None] & P.window(3).dense(60, 60)
    assert not mask.any(-1).all()  # some queries see nothing, and torch gives 0 as well
    expected = results(lambda *x: sdpa(*x, attn_mask=mask), q, k, v)
    ours = results(lambda *x: mg.attend(*x, P.window(3), key_mask=keys, impl=impl), q, k, v)
    compare(ours, expected, 1e-13)


@pytest.mark.parametrize("impl", ["fused", "composed", "reference"])
def test_a_sink_is_a_key_without_a_value(impl) -> None:
    """For torch: one more key of zeros, whose score is the sink, by an additive mask."""
    q, k, v = operands((33, 40, 8, 8), heads=(4, 4))
    pattern, sink = P.window(4), torch.tensor([-1.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    bias = torch.where(pattern.dense(33, 40), 0.0, -torch.inf).double().expand(4, -1, -1)
    bias = torch.cat([bias, sink[:, None, None].expand(-1, 33, 1)], -1)

    def with_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        none = k.new_zeros(2, 4, 1, 8)
        return sdpa(q, torch.cat([k, none], 2), torch.cat([v, none], 2), attn_mask=bias)

    ours = results(lambda *x: mg.attend(*x, pattern, sink_logits=sink, impl=impl), q, k, v)
    compare(ours, results(with_key, q, k, v), 1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["window", "longformer", "causal", "random"])
def test_composed_in_half_precision(name, dtype) -> None:
    """Against three dense products rounded where ours are: bmm, softmax, bmm."""
    shape = (200, 200, 32, 32)
    q, k, v = operands(shape, dtype, heads=(2, 2))
    pattern = PATTERNS[name](*shape[:2])
    mask = pattern.dense(*shape[:2])

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q @ k.transpose(-1, -2)) * 32**-0.5
        return torch.nan_to_num(s.masked_fill(~mask, -torch.inf).softmax(-1)) @ v

    exact = results(lambda *x: sdpa(*x, attn_mask=mask), *(x.double() for x in (q, k, v)))
    theirs = results(dense, q, k, v)
    ours = results(lambda *x: mg.attend(*x, pattern, impl="composed"), q, k, v)
    for what, a, b, true in zip(("o", "dq", "dk", "dv"), ours, theirs, exact, strict=True):
        assert a.dtype == dtype
        errors = [(x.double() - true).square().mean().sqrt() for x in (a, b)]
        assert errors[0] <= 1.05 * errors[1], what
