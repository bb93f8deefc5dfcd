"""Every cell of the table, on every case, against the dense oracle."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, build, cells, operands

from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives import reference
from mixgrain.primitives.dispatch import TABLE
from mixgrain.primitives.linear import linear
from mixgrain.primitives.sddmm import sddmm
from mixgrain.primitives.softmax import softmax, softmax_backward
from mixgrain.primitives.spmm import spmm


def sparse(kind: str, name: str, seed: int = 3, dtype: torch.dtype = torch.float64) -> SparseTensor:
    """Random values at every slot of a case's layout, dead ones included."""
    layout, case = build(kind, name), CASES[name]
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(*case.free, layout.slots, generator=g, dtype=torch.float64)
    return SparseTensor(layout, values.to(dtype))


def key_mask(name: str, seed: int = 5) -> torch.Tensor:
    """A mask with the case's batch dimension, if it has one."""
    case = CASES[name]
    g = torch.Generator().manual_seed(seed)
    batch = case.lead_shape[-2:-1] if len(case.lead_shape) > 1 else ()
    return torch.rand(*batch, case.shape[1], generator=g) < 0.7


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-10, atol=1e-10, equal_nan=True)


def dead_of(s: SparseTensor) -> torch.Tensor:
    live = s.live()
    return (
        torch.zeros_like(s.values, dtype=torch.bool)
        if live is None
        else (~live).expand_as(s.values)
    )


@pytest.mark.parametrize("kind, name", cells("sddmm", TABLE))
def test_sddmm(kind: str, name: str) -> None:
    q, k = operands(name)
    layout = build(kind, name)
    for mask in (None, key_mask(name)):
        ours = sddmm(q, k, layout, scale=0.5, key_mask=mask)
        close(ours.values, reference.sddmm(q, k, layout, 0.5, mask).values)
        assert bits_zero(ours.values[dead_of(ours)])


def bits_zero(t: torch.Tensor) -> bool:
    """All +0."""
    return not t.numel() or bool((t.view(torch.int64) == 0).all())


@pytest.mark.parametrize("kind, name", cells("softmax", TABLE))
def test_softmax(kind: str, name: str) -> None:
    s = sparse(kind, name)
    for mask in (None, key_mask(name)):
        t = SparseTensor(s.layout, s.values, mask)
        t = t.with_values(t.values.masked_fill(dead_of(t), torch.nan))
        p, lse = softmax(t, return_lse=True)
        theirs, their_lse = reference.softmax(t)
        close(p.values, theirs.values)
        close(lse, their_lse)
        assert bits_zero(p.values[dead_of(t)])
        assert p.keep is mask


@pytest.mark.parametrize("kind, name", cells("softmax_backward", TABLE))
def test_softmax_backward(kind: str, name: str) -> None:
    s = sparse(kind, name)
    grad = s.with_values(torch.randn_like(s.values))
    values = s.values.clone().requires_grad_()
    p, lse = reference.softmax(s.with_values(values))
    grad_lse = torch.rand(lse.shape, dtype=torch.float64)
    finite = torch.where(torch.isfinite(lse), lse, 0)
    (expected,) = torch.autograd.grad(
        (p.values * grad.values).sum() + (finite * grad_lse).sum(), values
    )
    poisoned = grad.with_values(grad.values.masked_fill(dead_of(s), torch.nan))
    ours = softmax_backward(softmax(s), poisoned, grad_lse)
    close(ours.values, expected)
    assert bits_zero(ours.values[dead_of(s)])


@pytest.mark.parametrize("kind, name", cells("spmm", TABLE))
def test_spmm_and_of_the_transpose(kind: str, name: str) -> None:
    s = sparse(kind, name)
    q, k = operands(name)
    for mask in (None, key_mask(name)):
        if mask is not None and kind == "tile":
            mask = mask[..., : s.layout.shape[1]]
        t = SparseTensor(s.layout, s.values, mask)
        t = t.with_values(t.values.masked_fill(dead_of(t), torch.nan))
        close(spmm(t, k), reference.spmm(t, k))
        close(spmm(t.T, q), reference.spmm(t, torch.eye(k.shape[-2]).double()).mT @ q)


@pytest.mark.parametrize(
    "kind, name", [c for c in cells("linear", TABLE) if CASES[c[1]].lead == (1, 1)]
)
def test_linear(kind: str, name: str) -> None:
    w = sparse(kind, name)
    w = w.with_values(w.values[(0,) * (w.values.dim() - 1)])
    n_out, n_in = w.layout.shape
    bias = torch.randn(n_out, dtype=torch.float64)
    for lead in ((), (3,), (2, 0), (2, 4)):
        x = torch.randn(*lead, n_in, dtype=torch.float64)
        close(linear(x, w), reference.linear(x, w))
        close(linear(x, w, bias), reference.linear(x, w, bias))


# Gradients: first and second, in every cell

SMALL = ["odd sizes", "holes", "heads shared", "batch differs", "no keys"]


def check_gradients(f, *inputs: torch.Tensor) -> None:
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("kind, name", cells("sddmm", TABLE, SMALL))
def test_gradients_of_sddmm(kind: str, name: str) -> None:
    layout = build(kind, name)
    for mask in (None, key_mask(name)):
        check_gradients(
            lambda q, k, mask=mask: sddmm(q, k, layout, 0.7, mask).values, *operands(name)
        )


@pytest.mark.parametrize("kind, name", cells("softmax", TABLE, SMALL))
def test_gradients_of_softmax(kind: str, name: str) -> None:
    s = sparse(kind, name)
    for mask in (None, key_mask(name)):

        def f(values: torch.Tensor, mask=mask) -> tuple[torch.Tensor, torch.Tensor]:
            p, lse = softmax(SparseTensor(s.layout, values, mask), return_lse=True)
            return p.values, lse[lse > -torch.inf]

        check_gradients(f, s.values)


@pytest.mark.parametrize("kind, name", cells("softmax_backward", TABLE, SMALL))
def test_gradients_of_softmax_backward(kind: str, name: str) -> None:
    s = sparse(kind, name)
    grad = s.with_values(torch.randn_like(s.values))
    lse = torch.randn(*s.lead_shape, s.layout.shape[0], dtype=torch.float64)

    def f(p: torch.Tensor, g: torch.Tensor, g_lse: torch.Tensor) -> torch.Tensor:
        return softmax_backward(s.with_values(p), grad.with_values(g), g_lse).values

    check_gradients(f, s.values, grad.values, lse)


@pytest.mark.parametrize("kind, name", cells("spmm", TABLE, SMALL))
def test_gradients_of_spmm(kind: str, name: str) -> None:
    s = sparse(kind, name)
    q, k = operands(name)
    for mask in (None, key_mask(name)):

        def f(values: torch.Tensor, x: torch.Tensor, mask=mask) -> torch.Tensor:
            return spmm(SparseTensor(s.layout, values, mask), x)

        def f_t(values: torch.Tensor, x: torch.Tensor, mask=mask) -> torch.Tensor:
            return spmm(SparseTensor(s.layout, values, mask).T, x)

        check_gradients(f, s.values, k)
        check_gradients(f_t, s.values, q)


@pytest.mark.parametrize(
    "kind, name", [c for c in cells("linear", TABLE, SMALL) if CASES[c[1]].lead == (1, 1)]
)
def test_gradients_of_linear(kind: str, name: str) -> None:
    w = sparse(kind, name)
    n_out, n_in = w.layout.shape

    def f(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear(x, w.with_values(values), bias)

    x = torch.randn(2, 3, n_in, dtype=torch.float64)
    check_gradients(f, x, w.values, torch.randn(n_out, dtype=torch.float64))
