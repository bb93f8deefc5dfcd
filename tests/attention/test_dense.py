"""What ``impl="auto"`` hands to torch's own attention: calls that drop nothing, and no others."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.attention import attend as module
from mixgrain.attention import dense
from mixgrain.cuda.device import pretending
from mixgrain.tools.bench.dense import SHAPES

CUDA = torch.device("cuda", 0)
ROWS = json.loads((Path(__file__).parents[2] / "benchmarks" / "h200.json").read_text())["rows"]
FLAT = st.deferred(
    lambda: st.one_of(
        st.sampled_from([P.full(), P.causal(), P.dilated(3, 2), P.documents([0, 1, 1, 2])]),
        st.builds(P.window, st.integers(0, 9), st.integers(0, 9)),
        st.builds(P.sinks, st.integers(0, 9)),
        st.builds(P.random, st.floats(0, 1), st.integers(0, 3)),
        st.builds(lambda a, b: a | b, FLAT, FLAT),
        st.builds(lambda a, b: a & b, FLAT, FLAT),
        st.builds(lambda a: ~a, FLAT),
    )
)


def inputs(nq=12, nk=12, hq=4, hk=4, d=16, dtype=torch.float32, grad=False):
    g = torch.Generator().manual_seed(0)
    shapes = ((2, hq, nq, d), (2, hk, nk, d), (2, hk, nk, d))
    return [torch.randn(s, generator=g).to(dtype).requires_grad_(grad) for s in shapes]


@pytest.fixture
def handed(monkeypatch):
    """How often torch's attention was called."""
    calls = []

    def watched(*arguments):
        calls.append(arguments[4].backends)
        return dense.dense(*arguments)

    monkeypatch.setattr(module, "dense", watched)
    return calls


@given(FLAT, st.integers(1, 8), st.integers(1, 8))
def test_the_same_keys_are_what_the_mask_says(pattern, nq, nk) -> None:
    try:
        mask = pattern.dense(nq, nk)
    except mg.LayoutError:  # documents of another length
        return
    found = dense.same_keys(pattern, nq, nk)
    if found is not None:
        expected = torch.zeros_like(mask)
        expected[:, slice(*found)] = True
        assert torch.equal(mask, expected) and 0 <= found[0] < found[1] <= nk


@pytest.mark.parametrize(
    ("pattern", "nq", "nk", "keys"),
    [
        (P.full(), 5, 7, (0, 7)),
        (P.causal(), 1, 7, (0, 7)),
        (P.causal(), 2, 7, None),
        (P.window(6), 1, 7, (0, 7)),
        (P.window(2, 0), 1, 7, (4, 7)),
        (P.window(7), 7, 7, (0, 7)),
        (P.window(5), 7, 7, None),
        (P.causal() & P.window(3), 1, 7, (3, 7)),
        (P.causal() & P.window(3), 1, 1, (0, 1)),
        (P.sinks(7), 4, 7, (0, 7)),
        (P.sinks(3), 4, 7, (0, 3)),
        (P.sinks(0), 4, 7, None),
        (P.causal() & (P.window(2) | P.sinks(2)), 1, 9, None),  # two stretches
        (P.causal() & (P.window(9) | P.sinks(2)), 1, 9, (0, 9)),
        (P.random(0.5, 0) | P.full(), 9, 9, None),  # not known at once
        (P.causal(), 9, 7, None),  # queries that keep nothing
    ],
)
def test_common_patterns_are_known(pattern, nq, nk, keys) -> None:
    assert dense.same_keys(pattern, nq, nk) == keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("hk", [4, 2])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_results_and_gradients_are_those_of_the_reference(dtype, hk, scale, handed) -> None:
    given = inputs(nq=9, hk=hk, dtype=dtype, grad=True)
    o = mg.attend(*given, P.full(), scale=scale, enable_gqa=True)
    assert handed == [()]
    expected = mg.attend(*given, P.full(), scale=scale, enable_gqa=True, impl="reference")
    up = torch.randn_like(o)
    grads, right = (torch.autograd.grad(x, given, up) for x in (o, expected))
    rtol, atol = (2e-2, 2e-2) if dtype == torch.bfloat16 else (1e-4, 1e-5)
    for a, b in zip((o, *grads), (expected, *right), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("pattern", [P.causal() & P.window(5), P.sinks(4), P.window(4, 2)])
@pytest.mark.parametrize("nq", [1, 3])
def test_a_part_of_the_keys_is_all_that_is_read(pattern, nq, handed) -> None:
    q, k, v = inputs(nq, 20)
    o = mg.attend(q, k, v, pattern)
    assert len(handed) == (nq == 1 or "sinks" in repr(pattern))
    torch.testing.assert_close(o, mg.attend(q, k, v, pattern, impl="reference"))
    dropped = ~pattern.dense(nq, 20).any(0)
    k[:, :, dropped] = v[:, :, dropped] = torch.nan
    torch.testing.assert_close(mg.attend(q, k, v, pattern), o)


def test_the_output_has_the_order_of_strides_of_q(handed) -> None:
    q, k, v = inputs()
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    o = mg.attend(turned, k, v, P.full())
    assert o.stride() == turned.stride() and handed
    torch.testing.assert_close(o, mg.attend(q, k, v, P.full()))


@pytest.mark.parametrize(
    "case",
    ["lse", "mask", "sink", "fused", "composed", "reference", "layout", "value width", "negative",
     "strided", "float16", "causal", "no keys", "heads"],
)  # fmt: skip
def test_other_calls_are_not_handed_over(case, handed) -> None:
    q, k, v = inputs(dtype=torch.float16 if case == "float16" else torch.float32)
    pattern, options = P.full(), {}
    if case == "lse":
        options["return_lse"] = True
    elif case == "mask":
        options["key_mask"] = torch.ones(2, 12, dtype=torch.bool)
    elif case == "sink":
        options["sink_logits"] = torch.zeros(4)
    elif case in ("fused", "composed", "reference"):
        options["impl"] = case
    elif case == "layout":
        pattern = P.full().to_layout("block", 12, 12)
    elif case == "value width":
        v = v[..., :8].contiguous()
    elif case == "negative":
        options["scale"] = -1.0
    elif case == "strided":
        k = k.transpose(2, 3).contiguous().transpose(2, 3)
    elif case == "causal":
        pattern = P.causal()
    elif case == "no keys":
        k, v = k[:, :, :0], v[:, :, :0]
    elif case == "heads":
        pattern = P.per_head([P.full()] * 4)
    mg.attend(q, k, v, pattern, **options)
    assert not handed


def test_a_nan_that_causality_drops_stays_dropped(handed) -> None:
    """torch's is_causal lets it out among the values: such calls are ours."""
    q, k, v = inputs()
    expected = mg.attend(q, k, v, P.causal())
    v[:, :, 8:] = k[:, :, 8:] = torch.nan
    torch.testing.assert_close(mg.attend(q, k, v, P.causal())[:, :, :8], expected[:, :, :8])
    assert not handed


def test_one_graph_at_any_length() -> None:
    compiled = torch.compile(
        lambda q, k, v: mg.attend(q, k, v, P.full()), fullgraph=True, backend="aot_eager",
        dynamic=True,
    )  # fmt: skip
    for n in (12, 20):
        given = inputs(nq=n, nk=n)
        torch.testing.assert_close(compiled(*given), mg.attend(*given, P.full()))


def rule(name):
    """What "auto" takes for a shape of the benchmark, as an engine of its rows."""
    dtype, lead, nq, nk, d = SHAPES[name]
    with pretending("90a"):
        found = dense.choose(P.full(), CUDA, dtype, lead, nq, nk, d)
    if found is None:
        return "mixgrain"
    engines = {(): "SDPA, efficient", dense.CUDNN: "SDPA, cuDNN", dense.FLASH: "SDPA, flash"}
    return engines[found.backends]


@pytest.mark.parametrize("name", SHAPES)
def test_the_rule_takes_what_was_measured_to_be_the_fastest(name) -> None:
    """Up to 10 % or 10 µs, which a call of torch's kernels costs on the host.

    Of one query cuDNN is left out: it compiles for every length of a cache that grows.
    """
    times = {row["engine"]: row["ms"] for row in ROWS if row["work"] == name and "ms" in row}
    if SHAPES[name].nq <= 16:
        times.pop("SDPA, cuDNN", None)
    assert "mixgrain" in times and len(times) > 1
    best = min(times.values())
    assert times[rule(name)] <= max(1.1 * best, best + 0.01), times


def test_gradients_go_to_torch_on_cuda_and_float64_does_not() -> None:
    half = (torch.bfloat16, (1, 4, 4), 64, 64, 64)
    with pretending("90a"):
        assert dense.choose(P.full(), CUDA, *half) is None
        assert dense.choose(P.full(), CUDA, *half, asked=True) == (0, 64, ())
        assert dense.choose(P.causal(), CUDA, *half, asked=True) is None
        for other in (
            (torch.float64, (1, 4, 4), 64, 64, 64),
            (torch.float32, (1, 4, 2), 64, 64, 64),  # torch would store every score
            (torch.bfloat16, (1, 4, 4), 64, 64, 65),
            (torch.bfloat16, (1, 4, 4), 64, 64, 264),
        ):
            assert dense.choose(P.full(), CUDA, *other, asked=True) is None
    with pretending("80"):
        assert dense.choose(P.full(), CUDA, *half) == (0, 64, ())


def test_explain_says_what_runs() -> None:
    said = mg.explain(P.full(), 2048, 2048)
    assert said.impl == "sdpa" and "scaled_dot_product_attention" in str(said)
    assert said.steps is said.computed is said.plan_bytes is None
    assert mg.explain(P.causal(), 2048, 2048).impl == "fused"
    assert mg.explain(P.causal(), 1, 2048).impl == "sdpa"
    assert mg.explain(P.full(), 0, 0).impl == "fused"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "hk", "nq", "nk", "d"),
    [
        (torch.bfloat16, 4, 1100, 1030, 256),
        (torch.float16, 4, 1024, 1024, 200),
        (torch.bfloat16, 2, 1, 9000, 128),
        (torch.float16, 4, 1, 300, 64),
        (torch.float32, 4, 70, 300, 128),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_on_cuda_results_repeat_and_are_right(dtype, hk, nq, nk, d, turned, handed) -> None:
    mg.clear_caches()
    q, k, v = (t.cuda() for t in inputs(nq, nk, 4, hk, d, dtype))
    if turned:
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    o = mg.attend(q, k, v, P.full(), enable_gqa=True)
    assert len(handed) == 1
    for _ in range(3):
        again = mg.attend(q, k, v, P.full(), enable_gqa=True)
        assert torch.equal(again, o) and again.stride() == o.stride()
    assert len(handed) == 1  # the others went the short way
    assert (o.transpose(1, 2) if turned else o).is_contiguous()
    expected = mg.attend(q, k, v, P.full(), enable_gqa=True, impl="reference")
    error = (o.double() - expected.double()).norm() / expected.double().norm()
    assert error < (1e-5 if dtype == torch.float32 else 5e-3)
    other, lse = mg.attend(q, k, v, P.full(), enable_gqa=True, return_lse=True)
    assert len(handed) == 1 and lse.shape == (2, 4, nq)
    torch.testing.assert_close(other, o, rtol=2e-2, atol=2e-3)


@pytest.mark.gpu
def test_on_cuda_a_cache_that_grows_is_never_planned(handed, monkeypatch) -> None:
    monkeypatch.setattr(module, "plan_for", None)
    q, k, v = (t.cuda() for t in inputs(1, 90, 8, 2, 64, torch.bfloat16))
    for n in range(60, 90):
        kept = P.causal() & P.window(70)
        o = mg.attend(q, k[:, :, :n], v[:, :, :n], kept, enable_gqa=True)
        first = max(n - 71, 0)
        right = mg.attend(
            q, k[:, :, first:n], v[:, :, first:n], P.full(), enable_gqa=True, impl="reference"
        )
        torch.testing.assert_close(o, right, rtol=2e-2, atol=2e-2)
    assert handed == [dense.FLASH] * 30


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_cuda_gradients_are_those_of_the_composed(dtype, handed) -> None:
    given = [t.cuda().requires_grad_() for t in inputs(130, 200, 4, 4, 64, dtype)]
    o = mg.attend(*given, P.full())
    assert handed == [()]
    up = torch.randn_like(o)
    right = mg.attend(*given, P.full(), impl="composed")
    for a, b in zip(*(torch.autograd.grad(x, given, up) for x in (o, right)), strict=True):
        assert (a - b).double().norm() / b.double().norm() < (
            1e-5 if dtype == torch.float32 else 2e-2
        )
