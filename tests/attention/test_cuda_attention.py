"""attend composed of CUDA kernels, against dense float64: values, gradients, threads, graphs."""

import threading

import pytest
import torch
from torch import Tensor

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.formats.errors import UnsupportedError

pytestmark = pytest.mark.gpu
HALVES = (torch.float16, torch.bfloat16)
# Each line: what it is there for.
PATTERNS = {
    "window": P.window(100),  # blocks, full and cut
    "causal": P.causal(),  # block rows of very different lengths
    "longformer": P.longformer(64, [3, 500, 777]),  # blocks and two panels
    "scattered": P.window(40) | P.random(0.01, 1),  # blocks and single entries
    "heads": P.per_head([P.window(70), P.causal(), P.window(70), P.bigbird(64, 1, 1, 1, 0)]),
    "gaps": P.window(30) & P.blocks(torch.arange(16).bool().repeat(16, 1), 64),  # rows without keys
}


def inputs(dtype: torch.dtype, n: int = 1000, d: int = 64, kv: int = 4) -> list[Tensor]:
    g = torch.Generator("cuda").manual_seed(0)
    make = lambda h: torch.randn(2, h, n, d, device="cuda", dtype=dtype, generator=g)  # noqa: E731
    return [make(4).requires_grad_(), make(kv).requires_grad_(), make(kv).requires_grad_()]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The three dense primitives in the precision of the inputs."""
    s = (q @ k.mT) * q.shape[-1] ** -0.5
    p = torch.softmax(s.masked_fill(~mask, -torch.inf), -1)
    return torch.where(mask.any(-1, keepdim=True), p, 0) @ v


def gate(ours: Tensor, baseline: Tensor, exact: Tensor) -> None:
    mine, theirs = ((t.double() - exact).abs() for t in (ours, baseline))
    assert mine.square().mean().sqrt() <= 1.05 * theirs.square().mean().sqrt()
    assert mine.max() <= 2 * theirs.max()


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_as_good_as_dense(name, dtype):
    n = 1000 if name != "gaps" else 1024
    q, k, v = inputs(dtype, n)
    mask = PATTERNS[name].dense(n, n).cuda()
    o, lse = mg.attend(q, k, v, PATTERNS[name], impl="composed", return_lse=True)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact = dense(*wide, mask)
    baseline = dense(q, k, v, mask)
    gate(o, baseline, exact)
    g = torch.randn_like(o)
    ours = torch.autograd.grad(o, (q, k, v), g)
    theirs = torch.autograd.grad(baseline, (q, k, v), g)
    right = torch.autograd.grad(exact, wide, g.double())
    for a, b, c in zip(ours, theirs, right, strict=True):
        gate(a, b, c)
    s = (wide[0] @ wide[1].mT / 8).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(lse.double(), s.logsumexp(-1), rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("name", PATTERNS)
def test_float32_is_exact_to_rounding(name):
    n = 1000 if name != "gaps" else 1024
    q, k, v = inputs(torch.float32, n)
    o, lse = mg.attend(q, k, v, PATTERNS[name], return_lse=True)
    right, its = mg.attend(q, k, v, PATTERNS[name], impl="reference", return_lse=True)
    torch.testing.assert_close(o, right, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(lse, its, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(o)
    grads = [torch.autograd.grad(made, (q, k, v), g) for made in (o, right)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("d", [8, 40, 96, 128, 200, 256])
def test_head_dimensions(d):
    q, k, v = inputs(torch.bfloat16, 500, d)
    o = mg.attend(q, k, v, P.window(64))
    mask = P.window(64).dense(500, 500).cuda()
    gate(o, dense(q, k, v, mask), dense(*(t.double() for t in (q, k, v)), mask))


def test_grouped_queries_masks_and_sinks():
    q, k, v = inputs(torch.float32, 300, kv=2)
    keep = torch.rand(2, 300, device="cuda") < 0.7
    sink = torch.randn(4, device="cuda", requires_grad=True)
    options = {"key_mask": keep, "enable_gqa": True, "sink_logits": sink}
    results = []
    for impl in ("composed", "reference"):
        o = mg.attend(q, k, v, P.longformer(20, [5]), impl=impl, **options)
        results.append([o, *torch.autograd.grad(o.square().sum(), (q, k, v, sink))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=5e-5)


def test_dropped_keys_leak_nothing():
    q, k, v = (t.detach() for t in inputs(torch.float16, 256))
    keep = torch.rand(2, 256, device="cuda") < 0.5
    clean = mg.attend(q, k, v, P.window(50), key_mask=keep)
    for t in (k, v):
        t.masked_fill_(~keep[:, None, :, None], torch.nan)
    assert torch.equal(mg.attend(q, k, v, P.window(50), key_mask=keep), clean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_thread_without_a_context(dtype):
    q, k, v = (t.detach() for t in inputs(dtype, 256))
    layout = PATTERNS["scattered"].to_layout("mixed", 256, 256, device="cuda")
    here = mg.attend(q, k, v, layout)
    found: list[Tensor] = []
    fresh = [t.clone() for t in (q, k, v)]  # other addresses: nothing is remembered of them
    worker = threading.Thread(target=lambda: found.append(mg.attend(*fresh, layout)))
    worker.start()
    worker.join()
    assert torch.equal(found[0], here)


def test_graph_replay_equals_eager():
    q, k, v = (t.detach() for t in inputs(torch.bfloat16, 512))
    layout = PATTERNS["scattered"].to_layout("mixed", 512, 512, device="cuda")
    mg.attend(q, k, v, layout)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = mg.attend(q, k, v, layout)
    for t in (q, k, v):
        t.copy_(torch.randn_like(t))
    o.fill_(torch.nan)
    graph.replay()
    assert torch.equal(o, mg.attend(q, k, v, layout))


def test_repeats_are_bitwise_equal_on_two_streams():
    q, k, v = inputs(torch.float16, 600)
    layout = PATTERNS["longformer"].to_layout("mixed", 600, 600, device="cuda")
    first = None
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for n in range(60):
        with torch.cuda.stream(streams[n % 2]):
            o = mg.attend(q, k, v, layout)
            made = [o, *torch.autograd.grad(o.sum(), (q, k, v))]
        torch.cuda.synchronize()
        first = first or made
        assert all(torch.equal(a, b) for a, b in zip(first, made, strict=True))


def test_strided_inputs():
    q, k, v = (
        t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in inputs(torch.float16)
    )
    o = mg.attend(q, k, v, PATTERNS["window"])
    assert o.stride() == q.stride()
    assert torch.equal(o, mg.attend(*(t.contiguous() for t in (q, k, v)), PATTERNS["window"]))


def test_fused_says_what_exists():
    q, k, v = inputs(torch.float16, 64)
    with pytest.raises(UnsupportedError, match="composed"):
        mg.attend(q, k, v, P.causal(), impl="fused")
