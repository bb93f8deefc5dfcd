"""merge: the attention over a union of keys from those over its parts."""

import math

import hypothesis.strategies as st
import pytest
import torch
from attention_cases import error
from hypothesis import given

import mixgrain as mg

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def partial(seed: int, dtype: torch.dtype, far: float, dead: float) -> tuple:
    """o (2, 3, 5, 4) and lse (2, 3, 5) spread over ±far, a share of the rows without keys."""
    generator = torch.Generator().manual_seed(seed)
    o = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64)
    lse = far * torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    none = torch.rand(2, 3, 5, generator=generator) < dead
    return o.masked_fill(none[..., None], 0).to(dtype), lse.masked_fill(none, -math.inf).to(dtype)


@given(
    seed=st.integers(0, 2**20),
    far=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    dead=st.sampled_from([0.0, 0.3, 0.9]),
)
def test_merging_is_associative_and_commutative(seed, far, dead) -> None:
    a, b, c = (partial(seed + i, torch.float64, far, dead) for i in range(3))
    left = mg.merge(*mg.merge(*a, *b), *c)
    right = mg.merge(*a, *mg.merge(*b, *c))
    turned = mg.merge(*mg.merge(*c, *b), *a)
    for x, y in ((left, right), (left, turned)):
        assert error(x[0], y[0]) < 1e-12 and error(x[1], y[1]) < 1e-12


@pytest.mark.parametrize("first", DTYPES)
@pytest.mark.parametrize("second", DTYPES)
def test_any_floating_dtype_gives_float32_or_float64(first, second) -> None:
    a, b = partial(0, first, 1.0, 0.2), partial(1, second, 1.0, 0.2)
    o, lse = mg.merge(*a, *b)
    expected = torch.float64 if torch.float64 in (first, second) else torch.float32
    assert o.dtype == lse.dtype == expected
    exact = mg.merge(*(x.double() for x in (*a, *b)))
    assert error(o, exact[0]) < 1e-6 and error(lse, exact[1]) < 1e-6


def test_nothing_merged_with_nothing_is_nothing() -> None:
    o = torch.full((1, 1, 3, 2), math.nan, requires_grad=True)  # never written, never read
    lse = torch.full((1, 1, 3), -math.inf, requires_grad=True)
    o2 = torch.zeros(1, 1, 3, 2, requires_grad=True)
    got, logs = mg.merge(o, lse, o2, lse)
    assert (got == 0).all() and (logs == -math.inf).all()
    grads = torch.autograd.grad(
        [got, logs], [o, lse, o2], [torch.ones_like(o), torch.ones(1, 1, 3)]
    )
    assert all((g == 0).all() for g in grads)


def test_nothing_changes_nothing() -> None:
    o, lse = partial(3, torch.float32, 5.0, 0.0)
    none = torch.zeros_like(o), torch.full_like(lse, -math.inf)
    got = mg.merge(o, lse, *none)
    assert torch.equal(got[0], o) and torch.equal(got[1], lse)


def test_derivatives_of_both_orders() -> None:
    a, b = partial(5, torch.float64, 1.0, 0.0), partial(6, torch.float64, 1.0, 0.0)
    inputs = [x[:1, :1].clone().requires_grad_() for x in (*a, *b)]
    assert torch.autograd.gradcheck(mg.merge, inputs)
    assert torch.autograd.gradgradcheck(mg.merge, inputs)


def test_errors() -> None:
    o, lse = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)
    with pytest.raises(ValueError, match="leading shape"):
        mg.merge(o, lse, o[:, :1], lse)
    with pytest.raises(TypeError, match="o2"):
        mg.merge(o, lse, o.int(), lse)
