"""Infinities and NaN reach nothing that does not keep them: outputs, lse and every gradient."""

import math

import pytest
import torch
from attention_cases import PATTERNS, bernoulli, error, operands, run, wide

import mixgrain as mg
from mixgrain import patterns as P

NAMES = ["window", "longformer", "random", "from_dense", "causal", "dilated", "bigbird"]


@pytest.mark.parametrize("impl", ["fused", "composed", "reference"])
@pytest.mark.parametrize("name", [*NAMES, "nm", "nm in blocks"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_dropped_keys_leak_nowhere(impl, name, bad) -> None:
    q, k, v = (x.detach() for x in operands((50, 70, 8, 8)))
    kept = {"nm": P.nm(2, 4), "nm in blocks": P.nm(2, 4) & P.window(9)}.get(name)
    kept = PATTERNS[name](50, 70) if kept is None else kept
    keep = bernoulli(2, 70, 0.6, 4)
    dropped = ~keep[:, None, :, None]
    clean = run(impl, q, k.masked_fill(dropped, 0), v.masked_fill(dropped, 0), kept, key_mask=keep)
    dirty = run(
        impl, q, k.masked_fill(dropped, bad), v.masked_fill(dropped, bad), kept, key_mask=keep
    )
    for a, b in zip((*clean[:2], *clean[2]), (*dirty[:2], *dirty[2]), strict=True):
        assert torch.equal(a, b)
    assert (dirty[2][1][dropped.expand_as(k)] == 0).all()
    assert (dirty[2][2][dropped.expand_as(v)] == 0).all()


@pytest.mark.parametrize("impl", ["fused", "composed"])
@pytest.mark.parametrize("name", [*NAMES[:-1], "documents"])
@pytest.mark.parametrize("where", ["k", "v", "both"])
def test_rows_that_keep_no_bad_key_are_exact(impl, name, where) -> None:
    nq, nk = 60, 80
    q, k, v = (x.detach() for x in operands((nq, nk, 8, 8)))
    pattern = PATTERNS[name](nq, nk)
    bad = torch.zeros(nk, dtype=torch.bool)
    bad[[33, 79]] = True
    clean = run("reference", q, k, v, pattern)
    if where != "v":
        k = k.masked_fill(bad[:, None], math.nan)
    if where != "k":
        v = v.masked_fill(bad[:, None], math.inf)
    o, lse, (dq, _, _) = run(impl, q, k, v, pattern)
    rows = ~(pattern.dense(nq, nk) & bad).any(1)
    assert rows.any()
    assert error(o[:, :, rows], clean[0][:, :, rows]) < 1e-12
    assert error(lse[:, :, rows], clean[1][:, :, rows]) < 1e-12
    assert error(dq[:, :, rows], clean[2][0][:, :, rows]) < 1e-12
    touched = pattern.dense(nq, nk) & bad
    if bool(touched.any()):
        assert not torch.isfinite(o[:, :, touched.any(1)]).all()


@pytest.mark.parametrize("impl", ["fused", "composed"])
@pytest.mark.parametrize("name", NAMES)
def test_bad_queries_and_gradients_stay_in_their_rows(impl, name) -> None:
    nq, nk = 60, 80
    q, k, v = (x.detach() for x in operands((nq, nk, 8, 8)))
    pattern = PATTERNS[name](nq, nk)
    clean = run("reference", q, k, v, pattern)
    q[:, :, 11] = math.nan
    o, _, (dq, dk, dv) = run(impl, q, k, v, pattern)
    rows = torch.arange(nq) != 11
    assert error(o[:, :, rows], clean[0][:, :, rows]) < 1e-12
    assert error(dq[:, :, rows], clean[2][0][:, :, rows]) < 1e-12
    seen = pattern.dense(nq, nk)[11]
    assert error(dk[:, :, ~seen], clean[2][1][:, :, ~seen]) < 1e-12
    assert error(dv[:, :, ~seen], clean[2][2][:, :, ~seen]) < 1e-12


@pytest.mark.parametrize("impl", ["fused", "composed"])
def test_products_that_overflow_stay_in_their_positions(impl) -> None:
    # Finite operands whose scores are infinite: dropped positions must not turn into NaN.
    q, k, v = (x.detach() for x in operands((40, 40, 4, 4), torch.float32))
    q[:, :, 5], k[:, :, 30] = 1e30, 1e30
    pattern = P.window(3)
    got = run(impl, q, k, v, pattern)
    expected = run("reference", *wide(q, k, v), pattern)
    rows = (torch.arange(40) - 5).abs() > 8
    rows &= (torch.arange(40) - 30).abs() > 8
    assert error(got[0][:, :, rows], expected[0][:, :, rows]) < 1e-5
    assert error(got[2][0][:, :, rows], expected[2][0][:, :, rows]) < 1e-5


@pytest.mark.parametrize("impl", ["fused", "composed", "reference"])
def test_gradients_of_rows_without_keys_are_ignored(impl) -> None:
    q, k, v = operands((20, 20, 4, 4))
    o = mg.attend(q, k, v, P.global_queries([2]), enable_gqa=True, impl=impl)
    do = torch.ones_like(o)
    do[:, :, 5] = math.nan
    grads = torch.autograd.grad(o, (q, k, v), do)
    assert all(torch.isfinite(g).all() for g in grads)
