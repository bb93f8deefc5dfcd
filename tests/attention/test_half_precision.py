"""Half precision against torch's own attention on the same mask in the same precision."""

import pytest
import torch
from attention_cases import operands
from torch.nn.functional import scaled_dot_product_attention

import mixgrain as mg
from mixgrain import patterns as P

CASES = {
    "window": lambda: P.window(40),
    "longformer": lambda: P.longformer(24, [0, 100, 333]),
    "random": lambda: P.random(0.1, seed=1) | P.window(0),
    "causal": lambda: P.causal(),
}


def errors(got: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Root mean square and largest difference."""
    difference = (got.double() - exact).detach()
    return float(difference.square().mean().sqrt()), float(difference.abs().max())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fused_errs_no_more_than_torch(name, dtype) -> None:
    q, k, v = operands((400, 400, 64, 64), dtype, heads=(4, 4))
    pattern = CASES[name]()
    do = torch.randn(q.shape, generator=torch.Generator().manual_seed(7)).to(dtype)

    def all_of(attention, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        o = attention(*inputs)
        return (o, *torch.autograd.grad(o, inputs, do.to(o.dtype)))

    mask = pattern.dense(400, 400)
    exact = all_of(
        lambda *x: scaled_dot_product_attention(*x, attn_mask=mask),
        *(x.detach().double().requires_grad_() for x in (q, k, v)),
    )
    torchs = all_of(lambda *x: scaled_dot_product_attention(*x, attn_mask=mask), q, k, v)
    ours = all_of(lambda *x: mg.attend(*x, pattern, impl="fused"), q, k, v)
    for what, a, b, true in zip(("o", "dq", "dk", "dv"), ours, torchs, exact, strict=True):
        (rms, most), (torch_rms, torch_most) = errors(a, true), errors(b, true)
        assert rms <= 1.05 * torch_rms, what
        assert most <= 2 * torch_most, what


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_output_is_rounded_once(dtype) -> None:
    q, k, v = operands((100, 100, 16, 16), dtype, grad=False)
    o = mg.attend(q, k, v, P.window(9), enable_gqa=True)
    single = mg.attend(q.float(), k.float(), v.float(), P.window(9), enable_gqa=True)
    assert torch.equal(o, single.to(dtype))
