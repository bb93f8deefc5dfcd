"""What ``impl="auto"`` hands to torch's own attention: calls whose queries keep the same keys."""

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
HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
ENGINES = {"flash": "SDPA, flash", "cudnn": "SDPA, cuDNN", "efficient": "SDPA, efficient"}
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


def inputs(nq=12, nk=12, hq=4, hk=4, d=16, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(0)
    shapes = ((2, hq, nq, d), (2, hk, nk, d), (2, hk, nk, d))
    return [torch.randn(s, generator=g).to(device, dtype) for s in shapes]


@pytest.fixture
def handed(monkeypatch):
    """The engines of calls that went to torch the long way."""
    calls = []
    run = dense.run

    def watched(*arguments):
        calls.append(arguments[4].engine)
        return run(*arguments)

    monkeypatch.setattr(module.dense, "run", watched)
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


@pytest.mark.parametrize("pattern", [P.full(), P.causal() & P.window(5), P.sinks(4)])
@pytest.mark.parametrize("nq", [1, 3])
@pytest.mark.parametrize("dtype", [FLOAT, BRAIN, torch.float64])
def test_on_cpus_every_call_is_ours(pattern, nq, dtype, handed) -> None:
    """And keeps its promises: the same bits alone and among others, NaN where a query is NaN."""
    q, k, v = inputs(nq, 20, dtype=dtype)
    q[1, 2, 0] = torch.nan
    o = mg.attend(q, k, v, pattern)
    assert not handed and mg.explain(pattern, nq, 20).impl == "fused"
    assert torch.equal(o[:1], mg.attend(q[:1], k[:1], v[:1], pattern))
    assert bool(o[1, 2, 0].isnan().all()) and not bool(o[0].isnan().any())


def rule(name):
    """What "auto" takes for a shape of the benchmark, as an engine of its rows."""
    dtype, lead, nq, nk, d = SHAPES[name]
    with pretending("90a"):
        found = dense.rule(P.full(), CUDA, dtype, lead, nq, nk, d)
    return "mixgrain" if found is None else ENGINES[found.engine]


@pytest.mark.parametrize("name", SHAPES)
def test_the_rule_takes_what_was_measured_to_be_the_fastest(name) -> None:
    """Up to 10 % or 10 µs, which a call of torch's kernels costs on the host.

    Of few queries cuDNN is left out: it compiles for every length of a cache that grows.
    """
    times = {row["engine"]: row["ms"] for row in ROWS if row["work"] == name and "ms" in row}
    if SHAPES[name].nq <= 16:
        times.pop("SDPA, cuDNN", None)
    assert "mixgrain" in times and len(times) > 1
    best = min(times.values())
    assert times[rule(name)] <= max(1.1 * best, best + 0.01), times


@pytest.mark.parametrize(
    ("arch", "dtype", "heads", "nq", "nk", "d", "engine"),
    [
        ("90a", BRAIN, (4, 4), 1, 64, 64, "flash"),
        ("90a", HALF, (32, 8), 1, 100_000, 128, "flash"),
        ("90a", BRAIN, (256, 256), 1, 64, 64, "flash"),
        ("90a", BRAIN, (256, 256), 1, 100_000, 64, None),  # ours is faster
        ("90a", BRAIN, (4, 4), 2, 64, 64, None),
        ("90a", BRAIN, (4, 4), 2048, 2048, 256, "cudnn"),
        ("90a", BRAIN, (4, 4), 2048, 512, 256, None),
        ("90a", FLOAT, (4, 4), 64, 64, 128, "efficient"),
        ("90a", FLOAT, (4, 4), 64, 64, 64, None),
        ("90a", FLOAT, (4, 2), 64, 64, 128, None),  # torch would store every score
        ("90a", torch.float64, (4, 4), 1, 64, 64, None),
        ("90a", BRAIN, (4, 4), 1, 64, 65, None),
        ("90a", BRAIN, (4, 4), 1, 64, 264, None),
        ("80", BRAIN, (4, 4), 1, 64, 64, None),  # not measured
    ],
)
def test_the_rule_by_shape(arch, dtype, heads, nq, nk, d, engine) -> None:
    with pretending(arch):
        found = dense.rule(P.full(), CUDA, dtype, (1, *heads), nq, nk, d)
        assert found == (None if engine is None else (0, nk, engine))
        none = dense.rule(P.full().to_layout("block", 64, 64), CUDA, BRAIN, (1, 1, 1), 1, 64, 64)
        assert none is None


GPU = pytest.mark.gpu


@GPU
@pytest.mark.parametrize(
    ("dtype", "hk", "nq", "nk", "d", "engine"),
    [
        (BRAIN, 4, 1100, 1030, 256, "cudnn"),
        (HALF, 4, 1024, 1024, 200, "cudnn"),
        (BRAIN, 2, 1, 9000, 128, "flash"),
        (HALF, 4, 1, 300, 64, "flash"),
        (HALF, 1, 1, 1, 8, "flash"),
        (FLOAT, 4, 70, 300, 128, "efficient"),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_on_cuda_results_repeat_and_are_right(dtype, hk, nq, nk, d, engine, turned, handed) -> None:
    mg.clear_caches()
    q, k, v = inputs(nq, nk, 4, hk, d, dtype, "cuda")
    if turned:
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    for scale in (None, 0.3):
        o = mg.attend(q, k, v, P.full(), scale, enable_gqa=True)
        for _ in range(3):  # the short way
            again = mg.attend(q, k, v, P.full(), scale, enable_gqa=True)
            assert torch.equal(again, o) and again.stride() == o.stride()
        assert (o.transpose(1, 2) if turned else o).is_contiguous()
        expected = mg.attend(q, k, v, P.full(), scale, enable_gqa=True, impl="reference")
        error = (o.double() - expected.double()).norm() / expected.double().norm()
        assert error < (1e-5 if dtype == FLOAT else 5e-3)
    assert handed == [engine] * 8
    other, lse = mg.attend(q, k, v, P.full(), enable_gqa=True, return_lse=True)
    assert handed == [engine] * 8 and lse.shape == (2, 4, nq)
    torch.testing.assert_close(
        other, mg.attend(q, k, v, P.full(), enable_gqa=True), rtol=2e-2, atol=2e-3
    )


@GPU
@pytest.mark.parametrize(
    ("dtype", "nq", "nk", "d"),
    [(BRAIN, 1, 300, 64), (BRAIN, 1, 5, 64), (BRAIN, 1024, 1024, 256), (FLOAT, 5, 9, 128)],
)
def test_on_cuda_nan_stays(dtype, nq, nk, d, handed) -> None:
    q, k, v = inputs(nq, nk, 4, 4, d, dtype, "cuda")
    q[1, 2, -1] = torch.nan
    v[0, 1, nk // 2, 3] = torch.nan
    o = mg.attend(q, k, v, P.full())
    assert len(handed) == 1
    expected = torch.zeros_like(o, dtype=torch.bool)
    expected[1, 2, -1] = expected[0, 1, :, 3] = True
    assert torch.equal(o.isnan(), expected)


@GPU
@pytest.mark.parametrize("case", ["offset", "strided", "gradient", "lse", "mask", "sink", "fused"])
def test_on_cuda_other_calls_are_ours(case, handed) -> None:
    q, k, v = inputs(1, 300, 4, 4, 64, BRAIN, "cuda")
    options = {}
    if case in ("offset", "strided"):
        wide = inputs(1, 300, 4, 4, 72 if case == "offset" else 65, BRAIN, "cuda")
        q, k, v = (t[..., 1:65] if case == "offset" else t[..., :64] for t in wide)
    elif case == "gradient":
        v.requires_grad_()
    elif case == "mask":
        options["key_mask"] = torch.ones(2, 300, dtype=torch.bool, device="cuda")
    elif case == "sink":
        options["sink_logits"] = torch.zeros(4, device="cuda")
    elif case == "lse":
        options["return_lse"] = True
    elif case == "fused":
        options["impl"] = "fused"
    o = mg.attend(q, k, v, P.full(), **options)
    o = o[0] if case == "lse" else o
    right = mg.attend(q, k, v, P.full(), impl="reference", sink_logits=options.get("sink_logits"))
    assert not handed
    torch.testing.assert_close(o, right, rtol=2e-2, atol=2e-2)


@GPU
def test_on_cuda_a_cache_that_grows_is_never_planned(handed, monkeypatch) -> None:
    monkeypatch.setattr(module, "plan_for", None)
    q, k, v = inputs(1, 90, 8, 2, 64, BRAIN, "cuda")
    k[:, :, :15] = v[:, :, :15] = torch.nan  # behind every window
    for n in range(87, 90):
        o = mg.attend(q, k[:, :, :n], v[:, :, :n], P.causal() & P.window(70), enable_gqa=True)
        keys = slice(n - 71, n)
        right = mg.attend(
            q, k[:, :, keys], v[:, :, keys], P.full(), enable_gqa=True, impl="reference"
        )
        torch.testing.assert_close(o, right, rtol=2e-2, atol=2e-2)
    assert handed == ["flash"] * 3


@GPU
def test_on_cuda_traced_calls_are_ours(handed) -> None:
    q, k, v = inputs(1, 90, 8, 2, 64, BRAIN, "cuda")
    call = lambda q, k, v: mg.attend(q, k, v, P.causal(), enable_gqa=True)  # noqa: E731
    right = call(q, k, v)
    assert handed == ["flash"]
    o = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    assert handed == ["flash"]
    torch.testing.assert_close(o, right, rtol=2e-2, atol=2e-2)


@GPU
def test_on_cuda_explain_says_what_runs() -> None:
    window = mg.explain(P.causal() & P.window(128), 1, 1_000_000, 128, device="cuda")
    assert window.impl == "sdpa" and "torch's attention" in str(window)
    assert window.steps is window.computed is window.plan_bytes is None
    assert window.seconds < window.dense_seconds  # both hold a launch, 3 µs
    assert mg.explain(P.causal(), 2048, 2048, 128, device="cuda").impl == "fused"
    assert mg.explain(P.full(), 0, 0, 128, device="cuda").impl == "fused"
