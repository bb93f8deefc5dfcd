"""attend of dynamic N:M, composed of CUDA kernels, against dense attention over what it keeps."""

import pytest
import torch
from torch import Tensor

import mixgrain as mg
from mixgrain import patterns as P

pytestmark = pytest.mark.gpu
HALVES = (torch.float16, torch.bfloat16)
# Each line: what it is there for.
PATTERNS = {
    "alone": P.nm(2, 4),  # sparse tensor cores throughout
    "1:2": P.nm(1, 2),
    "causal": P.causal() & P.nm(2, 4),  # block rows of very different lengths
    "window": P.window(100) & P.nm(2, 4),
    "heads": P.per_head([P.window(70), P.causal(), P.window(70), P.full()]) & P.nm(1, 2),
    "gaps": P.window(30) & P.blocks(torch.arange(16).bool().repeat(16, 1), 64) & P.nm(2, 4),
}


def inputs(dtype: torch.dtype, n: int = 1000, d: int = 64, kv: int = 4) -> list[Tensor]:
    g = torch.Generator("cuda").manual_seed(0)
    make = lambda h: torch.randn(2, h, n, d, device="cuda", dtype=dtype, generator=g)  # noqa: E731
    return [make(4).requires_grad_(), make(kv).requires_grad_(), make(kv).requires_grad_()]


def kept_by(q: Tensor, k: Tensor, pattern: P.Pattern, mask: Tensor | None) -> Tensor:
    """What the kernel itself chose."""
    with torch.no_grad():
        s = mg.sddmm(q, k, pattern, q.shape[-1] ** -0.5, mask)
    kept = s.with_values(torch.ones_like(s.values)).to_dense() > 0
    return kept if mask is None else kept & mask[:, None, None, :]


def dense(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """The three dense primitives in the precision of the inputs."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = (q @ k.mT) * q.shape[-1] ** -0.5
    p = torch.softmax(s.masked_fill(~kept, -torch.inf), -1)
    return torch.where(kept.any(-1, keepdim=True), p, 0) @ v


def gate(ours: Tensor, baseline: Tensor, exact: Tensor) -> None:
    mine, theirs = ((t.double() - exact).abs() for t in (ours, baseline))
    assert mine.square().mean().sqrt() <= 1.05 * theirs.square().mean().sqrt()
    assert mine.max() <= 2 * theirs.max()


def compare(pattern: P.Pattern, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None):
    kept = kept_by(q, k, pattern, mask)
    o, lse = mg.attend(
        q, k, v, pattern, impl="composed", key_mask=mask, enable_gqa=True, return_lse=True
    )
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact, baseline = dense(*wide, kept), dense(q, k, v, kept)
    g = torch.randn_like(o)
    ours = (o, *torch.autograd.grad(o, (q, k, v), g))
    theirs = (baseline, *torch.autograd.grad(baseline, (q, k, v), g))
    right = (exact, *torch.autograd.grad(exact, wide, g.double()))
    keys = wide[1].repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (wide[0] @ keys.mT) * q.shape[-1] ** -0.5
    expected = scores.masked_fill(~kept, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-2, atol=2e-2)
    return ours, theirs, right


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_as_good_as_dense(name, dtype):
    q, k, v = inputs(dtype, 1024 if name == "gaps" else 1000)
    for ours, baseline, exact in zip(*compare(PATTERNS[name], q, k, v), strict=True):
        gate(ours, baseline, exact)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["alone", "causal"])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_key_masks_and_shared_heads(kv, name, dtype):
    q, k, v = inputs(dtype, 333, 128, kv)
    mask = torch.rand(2, 333, device="cuda") < 0.7
    mask[:, 0] = True
    for ours, baseline, exact in zip(*compare(PATTERNS[name], q, k, v, mask), strict=True):
        gate(ours, baseline, exact)


@pytest.mark.parametrize("nm", [(2, 4), (1, 2)], ids=str)
@pytest.mark.parametrize("name", ["alone", "causal"])
def test_float32_is_exact(name, nm):
    pattern = P.nm(*nm) if name == "alone" else P.causal() & P.nm(*nm)
    q, k, v = inputs(torch.float32, 300)
    for ours, _, exact in zip(*compare(pattern, q, k, v), strict=True):
        error = (ours.double() - exact).norm() / exact.norm()
        assert error < 2e-6


@pytest.mark.parametrize("name", ["alone", "causal"])
def test_dropped_keys_leak_nowhere(name):
    q, k, v = (t.detach() for t in inputs(torch.bfloat16, 200))
    mask = torch.ones(2, 200, dtype=torch.bool, device="cuda")
    mask[:, [5, 64, 199]] = False
    expected = mg.attend(q, k, v, PATTERNS[name], key_mask=mask, impl="composed")
    k[:, :, ~mask[0]], v[:, :, ~mask[0]] = torch.nan, torch.nan
    made = mg.attend(q, k, v, PATTERNS[name], key_mask=mask, impl="composed")
    assert torch.equal(made, expected)


def test_repeats_and_second_derivatives():
    q, k, v = inputs(torch.float32, 70, 16)
    made = []
    for _ in range(2):
        o = mg.attend(q, k, v, P.nm(2, 4), impl="composed")
        (first,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
        made.append((o, first, *torch.autograd.grad(first.square().sum(), (q, k, v))))
    for a, b in zip(*made, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


def test_under_compile():
    q, k, v = (t.detach() for t in inputs(torch.bfloat16, 256))
    run = torch.compile(lambda q, k, v: mg.attend(q, k, v, P.nm(2, 4), impl="composed"))
    expected = mg.attend(q, k, v, P.nm(2, 4), impl="composed")
    assert torch.equal(run(q, k, v), expected)
