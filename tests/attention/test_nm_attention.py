"""Dynamic N:M: of every m neighbouring keys the n with the largest scores, within a pattern."""

import math

import pytest
import torch
from attention_cases import PATTERNS, bernoulli, error, operands, run, wide

import mixgrain as mg
from mixgrain import patterns as P

GROUPS = [(2, 4), (1, 2), (3, 5), (8, 16), (4, 4)]


@pytest.mark.parametrize("nm", GROUPS, ids=str)
@pytest.mark.parametrize("name", [None, "window", "longformer", "from_dense", "nothing"])
@pytest.mark.parametrize("shape", [(70, 130, 8, 5), (129, 66, 8, 8)], ids=str)
def test_matches_the_definition(nm, name, shape) -> None:
    q, k, v = operands(shape)
    kept = P.nm(*nm)
    if name:
        kept = kept & PATTERNS[name](*shape[:2])
    options = {"key_mask": bernoulli(2, shape[1], 0.8, 3), "sink": torch.randn(4).double()}
    got, expected = (run(impl, q, k, v, kept, **options) for impl in ("fused", "reference"))
    for a, b in zip((*got[:2], *got[2]), (*expected[:2], *expected[2]), strict=True):
        assert error(a, b) < 1e-12


@pytest.mark.parametrize("nm", [(2, 4), (1, 2)], ids=str)
@pytest.mark.parametrize("name", [None, "window"])
def test_composed_chooses_the_same(nm, name) -> None:
    q, k, v = operands((70, 130, 8, 5))
    kept = P.nm(*nm) if name is None else P.nm(*nm) & PATTERNS[name](70, 130)
    got, expected = (run(impl, q, k, v, kept) for impl in ("composed", "reference"))
    for a, b in zip((*got[:2], *got[2]), (*expected[:2], *expected[2]), strict=True):
        assert error(a, b) < 1e-12


def test_keeping_all_of_each_group_is_the_static_pattern() -> None:
    q, k, v = operands((60, 90, 8, 8))
    static, dynamic = P.window(12), P.nm(4, 4) & P.window(12)
    a, b = (run("fused", q, k, v, kept) for kept in (static, dynamic))
    for x, y in zip((*a[:2], *a[2]), (*b[:2], *b[2]), strict=True):
        assert error(x, y) < 1e-13


@pytest.mark.parametrize("m", [3, 4, 8])
def test_ties_go_to_the_lower_index(m) -> None:
    q = torch.zeros(1, 1, 5, 4)
    k = torch.randn(1, 1, 3 * m + 1, 4)
    v = torch.eye(3 * m + 1)[None, None]
    o = mg.attend(q, k, v, P.nm(2, m))[0, 0]
    expected = torch.arange(3 * m + 1) % m < 2
    assert torch.equal(o > 0, expected.expand(5, -1))


def test_groups_follow_original_keys_whatever_is_dropped() -> None:
    # Keys 0 and 1 are dropped: group 0 keeps 2 and 3, however small their scores.
    k = torch.tensor([9.0, 9.0, -9.0, -9.0, 3.0, 1.0, 2.0, 0.0])[None, None, :, None]
    v = torch.eye(8)[None, None]
    keep = torch.tensor([[False, False, True, True, True, True, True, True]])
    o = mg.attend(torch.ones(1, 1, 1, 1), k, v, P.nm(2, 4), key_mask=keep)[0, 0, 0]
    assert (o > 0).tolist() == [False, False, True, True, True, False, True, False]
    # A group with at most n live keys keeps them all.
    static = P.from_dense(torch.tensor([[True, False, False, False, True, True, True, True]]))
    o = mg.attend(torch.ones(1, 1, 1, 1), k, v, P.nm(2, 4) & static)[0, 0, 0]
    assert (o > 0).tolist() == [True, False, False, False, True, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_chooses_by_float32_scores(dtype) -> None:
    q, k, v = operands((90, 120, 16, 8), dtype)
    got, expected = (
        run(impl, *x, P.nm(2, 4) & P.window(30))
        for impl, x in (("fused", (q, k, v)), ("reference", wide(q, k, v)))
    )
    eps = torch.finfo(dtype).eps
    assert error(got[0], expected[0]) < 2 * eps
    for a, b in zip(got[2], expected[2], strict=True):
        assert error(a, b) < 8 * eps


def test_infinite_values_of_members_not_chosen_stay_out() -> None:
    q = torch.ones(1, 1, 2, 1)
    k = torch.tensor([4.0, 3.0, 2.0, 1.0] * 3)[None, None, :, None].requires_grad_()
    v = torch.randn(1, 1, 12, 3)
    v[0, 0, 2::4], v[0, 0, 3::4] = math.inf, math.nan
    v.requires_grad_()
    o = mg.attend(q, k, v, P.nm(2, 4))
    assert torch.isfinite(o).all()
    dk, dv = torch.autograd.grad(o.sum(), (k, v))
    assert torch.isfinite(dk).all() and torch.isfinite(dv).all()
    assert (dv[0, 0, 2::4] == 0).all() and (dk[0, 0, 3::4] == 0).all()
