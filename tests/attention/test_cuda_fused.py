"""The fused attention on CUDA, end to end: exact counts, against dense float64, graphs, repeats."""

import pytest
import torch
from attention_cases import PATTERNS, bernoulli
from torch import Tensor

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.attention.cuda import choice
from mixgrain.formats.cache import clear_caches
from mixgrain.formats.errors import UnsupportedError

pytestmark = pytest.mark.gpu
HALVES = (torch.float16, torch.bfloat16)
# (nq, nk) around the units, longer, shorter.
SIZES = [(1, 1), (63, 65), (64, 64), (129, 200), (300, 129), (1, 200)]
SCATTERED = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:70]
# Each line: what it is there for.
CASES = {
    "causal": P.causal(),  # items of very different lengths
    "window": P.window(100),
    "longformer": P.longformer(64, range(64)),  # long lines that lie where they are
    "scattered": P.longformer(64, SCATTERED),  # gathered keys and queries
    "entries": P.window(40) | P.random(0.01, 1),  # single entries beside units
    "all": P.longformer(20, [5, 777]) | P.random(0.005, 2),  # every kind at once
    "random": P.random(0.03, 4),  # single entries alone
    "heads": P.per_head([P.window(70), P.causal(), P.longformer(9, SCATTERED), P.random(0.02, 1)]),
    "gaps": P.window(30) & P.blocks(torch.arange(16).bool().repeat(16, 1), 64),  # empty rows
}


@pytest.fixture(params=["best", "mma"], autouse=True)
def which(request, monkeypatch):
    """The kernel of units that this device would take, then the one that every device can."""
    if request.param == "mma":
        clear_caches()  # of calls prepared for the other kernel
        monkeypatch.setattr(choice, "unit_kernel", lambda *_: "mma")
    yield request.param
    if request.param == "mma":
        clear_caches()


def inputs(
    dtype: torch.dtype, n: int = 1000, d: int = 64, kv: int = 4, batch: int = 2
) -> list[Tensor]:
    g = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(batch, h, n, d, device="cuda", dtype=dtype, generator=g) for h in (4, kv, kv)
    ]


def count(kept, mask: Tensor, size: tuple[int, int], d: int, heads: tuple[int, int]) -> None:
    """q = 0: exp(lse) is the number of kept keys, o the mean of integers."""
    (nq, nk), (hq, hk) = size, heads
    mask = mask.cuda().expand(1, hq, nq, nk)
    values = torch.randint(-128, 128, (1, hk, nk, d), device="cuda")
    q = torch.zeros(1, hq, nq, d, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, hk, nk, d, device="cuda").bfloat16()
    o, lse = mg.attend(
        q, k, values.bfloat16(), kept, enable_gqa=True, return_lse=True, impl="fused"
    )
    counts = mask.sum(-1)
    assert torch.equal(torch.exp(lse.double()).round().long(), counts)
    total = mask.double() @ values.double().repeat_interleave(hq // hk, 1)
    mean = total / counts[..., None].clamp(min=1)
    assert ((o.double() - mean).abs() <= 2**-8 * mean.abs() + 2**-7).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_every_kept_key_counts_once(name, size) -> None:
    pattern = PATTERNS[name](*size)
    for d, heads in ((64, (1, 1)), (128, (4, 2))):
        count(pattern, pattern.dense(*size), size, d, heads)


@pytest.mark.parametrize("kind", ["block", "row", "mixed"])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("name", ["from_dense", "longformer", "full", "random blocks", "window"])
def test_every_split_counts_the_same(name, kind, size) -> None:
    pattern = PATTERNS[name](170, 300)
    layout = pattern.to_layout(kind, 170, 300, size, device="cuda")
    count(layout, pattern.dense(170, 300), (170, 300), 64, (2, 1))


def test_long_rows_are_cut_and_merged() -> None:
    for kind in ("block", "row", "mixed"):
        pattern = P.full() if kind != "row" else P.full() - P.global_keys([5])
        layout = pattern.to_layout(kind, 70, 9000, device="cuda")
        count(layout, pattern.dense(70, 9000), (70, 9000), 64, (1, 1))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("d", [64, 128])
def test_as_good_as_torch(name, dtype, d) -> None:
    n = 1024 if name == "gaps" else 1000
    q, k, v = inputs(dtype, n, d)
    mask = CASES[name].dense(n, n).cuda()
    o, lse = mg.attend(q, k, v, CASES[name], impl="fused", return_lse=True)
    s = (q.double() @ k.double().mT * d**-0.5).masked_fill(~mask, -torch.inf)
    exact = torch.where(mask.any(-1, keepdim=True), s.softmax(-1), 0) @ v.double()
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    theirs = torch.where(mask.any(-1, keepdim=True), theirs, 0)
    mine, other = ((x.double() - exact).abs() for x in (o, theirs))
    assert mine.square().mean().sqrt() <= 1.05 * other.square().mean().sqrt()
    # Rounding the largest output alone may cost half a unit in the last place.
    step = torch.finfo(dtype).eps * 2 ** exact.abs().max().log2().floor()
    assert mine.max() <= 2 * torch.maximum(other.max(), step / 2)
    torch.testing.assert_close(lse.double(), s.logsumexp(-1), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("d", [8, 32, 40, 96, 192, 256])
@pytest.mark.parametrize("name", ["scattered", "all", "random"])
def test_head_dimensions(name, d) -> None:
    q, k, v = inputs(torch.bfloat16, 1000, d, batch=1)
    o = mg.attend(q, k, v, CASES[name], impl="fused")
    right = mg.attend(q, k, v, CASES[name], impl="reference")
    torch.testing.assert_close(o, right, rtol=2e-2, atol=2e-2)


def test_values_of_another_width_and_odd_ones() -> None:
    q, k, v = inputs(torch.float16, 500)
    for pattern in (P.window(60), P.random(0.05, 1)):
        for d, dv in ((64, 32), (20, 64), (17, 9)):
            a, b, c = q[..., :d], k[..., :d], v[..., :dv]
            o = mg.attend(a, b, c, pattern, impl="fused")
            right = mg.attend(a, b, c, pattern, impl="reference")
            torch.testing.assert_close(o, right, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["window", "scattered", "all", "random"])
def test_sinks_groups_and_strides(name) -> None:
    q, k, v = inputs(torch.bfloat16, kv=2)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k, v = k[:, :1].expand(-1, 2, -1, -1), torch.cat([v, v], 3)[..., 64:]
    sink = torch.randn(4, device="cuda")
    options = {"enable_gqa": True, "sink_logits": sink, "return_lse": True, "scale": 0.3}
    o, lse = mg.attend(q, k, v, CASES[name], impl="fused", **options)
    right, logs = mg.attend(q, k, v, CASES[name], impl="reference", **options)
    assert o.stride() == q.stride()
    torch.testing.assert_close(o, right, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, logs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(200, 700), (700, 200)], ids=str)
def test_cross_attention(size) -> None:
    nq, nk = size
    q, k, v = inputs(torch.bfloat16, 700)
    q, k, v = q[:, :, :nq], k[:, :, :nk], v[:, :, :nk]
    for pattern in (P.causal(), P.window(50), P.longformer(30, [3, 150])):
        o = mg.attend(q, k, v, pattern, impl="fused")
        right = mg.attend(q, k, v, pattern, impl="reference")
        torch.testing.assert_close(o, right, rtol=2e-2, atol=2e-2)


def test_patterns_of_their_own_for_batch_entries_and_heads() -> None:
    q, k, v = inputs(torch.bfloat16, 1000, kv=2)
    heads = [P.window(20), P.longformer(9, SCATTERED), P.causal(), P.window(20)]
    pattern = P.per_batch([P.per_head(heads), P.per_head(heads[::-1])])
    o = mg.attend(q, k, v, pattern, enable_gqa=True, impl="fused")
    right = mg.attend(q, k, v, pattern, enable_gqa=True, impl="reference")
    torch.testing.assert_close(o, right, rtol=2e-2, atol=2e-2)


def test_dropped_keys_leak_nothing() -> None:
    q, k, v = inputs(torch.float16, 512)
    dead = torch.arange(70, 110, device="cuda")
    for pattern in (P.window(50) - P.global_keys(dead.tolist()), P.sinks(3)):
        dropped = ~pattern.dense(512, 512).any(0).cuda()
        clean = mg.attend(q, k, v, pattern, impl="fused")
        bad = [t.clone() for t in (k, v)]
        bad[0][:, :, dropped], bad[1][:, :, dropped] = torch.inf, torch.nan
        assert torch.equal(mg.attend(q, *bad, pattern, impl="fused"), clean)


@pytest.mark.parametrize("d", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("growth", [3.0, 40.0, 400.0])
def test_scores_that_grow_along_the_keys(growth, d) -> None:
    """Every unit's scores leave those before far behind, at last beyond what a float can tell."""
    q, k, v = inputs(torch.bfloat16, 1000, d, batch=1)
    q[..., 0] = d**0.5  # the first column alone says how much a key counts
    k[..., 0] = (torch.arange(1000, device="cuda") // 64 * growth).to(k.dtype)
    for pattern in (P.full(), P.causal(), P.window(300), P.longformer(100, SCATTERED)):
        o, lse = mg.attend(q, k, v, pattern, impl="fused", return_lse=True)
        right, logs = mg.attend(q, k, v, pattern, impl="reference", return_lse=True)
        torch.testing.assert_close(o, right, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse, logs, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("d", [64, 128, 192, 256])
@pytest.mark.parametrize("name", ["full", "nothing", "two units", "window"])
def test_many_short_items(name, d) -> None:
    """Items of no step to a few, several of them for a CTA, some warpgroups without a unit."""
    (nq, nk), kept = {
        "full": ((64, 64), P.full()),
        "nothing": ((64, 64), P.full() - P.full()),
        "two units": ((64, 128), P.full()),
        "window": ((320, 320), P.window(20)),
    }[name]
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(64, 8, n, d, device="cuda", dtype=torch.bfloat16, generator=g)
        for n in (nq, nk, nk)
    )
    right, logs = mg.attend(q, k, v, kept, impl="reference", return_lse=True)
    cold = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(5):
        cold.fill_(1)
        o, lse = mg.attend(q, k, v, kept, impl="fused", return_lse=True)
        torch.testing.assert_close(o, right, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse, logs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["causal", "scattered", "all"])
def test_repeats_are_bitwise_equal(name) -> None:
    q, k, v = inputs(torch.bfloat16)
    first, logs = mg.attend(q, k, v, CASES[name], impl="fused", return_lse=True)
    wrong = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(250):
        o, lse = mg.attend(q, k, v, CASES[name], impl="fused", return_lse=True)
        wrong += (o != first).sum() + (lse != logs).sum()
    assert int(wrong) == 0


@pytest.mark.parametrize("name", ["causal", "scattered", "all"])
def test_a_row_does_not_depend_on_its_neighbours(name) -> None:
    q, k, v = inputs(torch.bfloat16)
    whole = mg.attend(q, k, v, CASES[name], impl="fused")
    for b, h in ((0, 0), (1, 3)):
        one = [t[b : b + 1, h : h + 1] for t in (q, k, v)]
        assert torch.equal(mg.attend(*one, CASES[name], impl="fused"), whole[b : b + 1, h : h + 1])


@pytest.mark.parametrize("name", ["scattered", "all"])
def test_graphs_and_streams(name) -> None:
    q, k, v = inputs(torch.bfloat16)
    right = mg.attend(q, k, v, CASES[name], impl="fused")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = mg.attend(q, k, v, CASES[name], impl="fused")
    o.zero_()
    graph.replay()
    assert torch.equal(o, right)
    q.mul_(-1)
    graph.replay()
    assert torch.equal(o, mg.attend(q, k, v, CASES[name], impl="fused"))
    made = []
    torch.cuda.synchronize()
    for _ in range(2):
        with torch.cuda.stream(torch.cuda.Stream()):
            made += [mg.attend(q, k, v, CASES[name], impl="fused") for _ in range(20)]
    torch.cuda.synchronize()
    assert all(torch.equal(one, o) for one in made)


def test_a_plan_made_while_capturing_is_refused() -> None:
    q, k, v = inputs(torch.bfloat16, 320)
    mg.attend(q, k, v, P.window(11), impl="fused")
    with pytest.raises(Exception, match="plan first"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        mg.attend(q[:1], k[:1], v[:1], P.window(11), impl="fused")


def test_what_the_fused_kernels_lack_is_said_and_auto_goes_on() -> None:
    q, k, v = inputs(torch.bfloat16, 128)
    wants = q.clone().requires_grad_()
    with pytest.raises(UnsupportedError, match='impl="composed"'):
        mg.attend(wants, k, v, P.window(5), impl="fused")
    mg.attend(wants, k, v, P.window(5)).sum().backward()
    with torch.no_grad():
        mg.attend(wants, k, v, P.window(5), impl="fused")
    with pytest.raises(UnsupportedError, match="float32, not float64"):
        mg.attend(q.double(), k.double(), v.double(), P.window(5), impl="fused")
    with pytest.raises(UnsupportedError, match="N:M"):
        mg.attend(q, k, v, P.nm(2, 4), impl="fused")


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("name", ["window", "scattered", "all", "random", "heads"])
def test_key_masks(name, dtype) -> None:
    q, k, v = inputs(dtype, 1000, kv=2 if name != "heads" else 4)
    keep = bernoulli(2, 1000, 0.7, 1).cuda()
    keep[1, :300] = False
    options = {"key_mask": keep, "enable_gqa": True, "return_lse": True}
    o, lse = mg.attend(q, k, v, CASES[name], impl="fused", **options)
    right, logs = mg.attend(q, k, v, CASES[name], impl="reference", **options)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(o, right, **close)
    torch.testing.assert_close(lse, logs, rtol=1e-4, atol=1e-4)
    # What the mask drops leaks nothing.
    dropped = ~keep[:, None, :, None].expand_as(k)
    bad = k.masked_fill(dropped, torch.nan), v.masked_fill(dropped, torch.inf)
    assert torch.equal(mg.attend(q, *bad, CASES[name], impl="fused", **options)[0], o)


@pytest.mark.parametrize("rounded", [False, True], ids=["full", "tf32"])
@pytest.mark.parametrize("d", [40, 64, 128, 256])
@pytest.mark.parametrize("name", CASES)
def test_float32(name, d, rounded, monkeypatch) -> None:
    precision = "tf32" if rounded else "ieee"
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
    n = 1024 if name == "gaps" else 1000
    q, k, v = inputs(torch.float32, n, d, batch=1)
    mask = CASES[name].dense(n, n).cuda()
    o, lse = mg.attend(q, k, v, CASES[name], impl="fused", return_lse=True)
    s = (q.double() @ k.double().mT * d**-0.5).masked_fill(~mask, -torch.inf)
    some = mask.any(-1, keepdim=True)
    exact = torch.where(some, s.softmax(-1), 0) @ v.double()
    error = (o.double() - exact).square().mean().sqrt()
    if rounded:
        theirs = (q @ k.mT * d**-0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        theirs = torch.where(some, theirs, 0) @ v
        assert error <= 1.05 * (theirs.double() - exact).square().mean().sqrt()
    else:
        assert error <= 1e-6 * exact.square().mean().sqrt()
    near = 2e-3 if rounded else 2e-6
    torch.testing.assert_close(lse.double(), s.logsumexp(-1), rtol=near, atol=near)


def test_explain_on_the_device() -> None:
    found = mg.explain(CASES["scattered"], 1000, 1000, device="cuda")
    assert found.impl == "fused" and found.plan_bytes > 0 and found.computed >= found.kept
