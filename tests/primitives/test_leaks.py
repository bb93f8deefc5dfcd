"""What stands at dropped positions never reaches a result, what stands at kept ones does."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, build, cells, operands

from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives import reference
from mixgrain.primitives.dispatch import TABLE
from mixgrain.primitives.linear import linear
from mixgrain.primitives.sddmm import sddmm
from mixgrain.primitives.softmax import softmax
from mixgrain.primitives.spmm import spmm

# Cases with partly kept rows and columns; small, since the exact oracle is cubic.
NAMES = ["odd sizes", "holes", "heads shared", "batch differs"]
BAD = [torch.nan, torch.inf, -torch.inf]


def poison(t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """NaN and both infinities, alternately, in the rows of (…, N, D) that are True."""
    bad = torch.tensor(BAD, dtype=t.dtype)
    fill = bad[torch.arange(t.shape[-2] * t.shape[-1]).view(t.shape[-2:]) % 3]
    return torch.where(rows[..., None], fill, t)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("kind, name", cells("spmm", TABLE, NAMES))
def test_non_finite_rows_reach_only_who_keeps_them(kind: str, name: str) -> None:
    layout, case = build(kind, name), CASES[name]
    q, k = operands(name)
    g = torch.Generator().manual_seed(2)
    values = torch.randn(*case.free, layout.slots, generator=g, dtype=torch.float64)
    s = SparseTensor(layout, values)
    for x, t in ((k, s), (q, s.T)):
        rows = torch.rand(x.shape[-2], generator=g) < 0.2
        spoilt = poison(x, rows)
        same(spmm(t, spoilt), exact_product(t, spoilt))


def exact_product(s: SparseTensor, x: torch.Tensor) -> torch.Tensor:
    """Sums over kept entries one by one, from the definition."""
    mask = reference.mask_of(s.layout, s.keep, s.keep_rows)
    dense = reference.dense_of(s)
    mask = reference.fit(mask, s.lead_shape)
    return torch.where(mask[..., None], dense[..., None] * x[..., None, :, :], 0).sum(-2)


@pytest.mark.parametrize("kind, name", cells("softmax", TABLE, NAMES))
def test_dropped_keys_leak_nowhere(kind: str, name: str) -> None:
    """NaN in K and V of keys that key_mask drops: outputs and all gradients are as with zeros."""
    layout = build(kind, name)
    q, k = operands(name)
    keep = torch.rand(k.shape[-2], generator=torch.Generator().manual_seed(3)) < 0.6
    results = []
    for fill in (0.0, torch.nan):
        spoilt = torch.where(keep[:, None], k, fill)
        inputs = [t.clone().requires_grad_() for t in (q, spoilt, spoilt)]
        s = sddmm(inputs[0], inputs[1], layout, scale=0.4, key_mask=keep)
        p, lse = softmax(s, return_lse=True)
        o = spmm(p, inputs[2])
        loss = (o * q[..., :1]).sum() + lse[lse > -torch.inf].sum()
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum((t**2).sum() for t in grads), inputs)
        results.append([o, lse, *grads, *second])
        for t in (*grads[1:], *second[1:]):
            assert bool((t.movedim(-2, 0)[~keep] == 0).all())
    for clean, ours in zip(*results, strict=True):
        assert bool(torch.isfinite(torch.where(clean == -torch.inf, 0, clean)).all())
        same(ours, clean)


@pytest.mark.parametrize("kind, name", cells("softmax", TABLE, NAMES))
def test_unkept_keys_leak_nowhere(kind: str, name: str) -> None:
    """The same for keys that no query keeps, without a mask."""
    layout = build(kind, name)
    q, k = operands(name)
    unkept = ~layout.mask().any(-2).any(0).any(0)
    spoilt = poison(k, unkept)
    inputs = [t.clone().requires_grad_() for t in (q, spoilt, spoilt)]
    o = spmm(softmax(sddmm(inputs[0], inputs[1], layout)), inputs[2])
    assert bool(torch.isfinite(o).all())
    for t in torch.autograd.grad(o.sum(), inputs):
        assert bool(torch.isfinite(t).all())


@pytest.mark.parametrize("kind, name", cells("softmax", TABLE, NAMES))
def test_one_nan_query_spoils_one_row(kind: str, name: str) -> None:
    layout = build(kind, name)
    q, k = operands(name)
    spoilt = q.clone()
    spoilt[..., 3, 0] = torch.nan
    clean, ours = (spmm(softmax(sddmm(t, k, layout)), k) for t in (q, spoilt))
    others = torch.arange(q.shape[-2]) != 3
    assert torch.equal(ours[..., others, :], clean[..., others, :])
    s = softmax(sddmm(spoilt, k, layout))
    live = s.live()
    if live is not None:
        assert bool((s.values.movedim(-1, 0)[~live] == 0).all())


@pytest.mark.parametrize("kind, name", cells("softmax", TABLE, ["odd sizes"]))
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, 1e300, -1e300])
def test_extreme_scores(kind: str, name: str, value: float) -> None:
    """Rows of nothing but −inf are empty, huge scores do not overflow, +inf is NaN as in torch."""
    layout = build(kind, name)
    values = torch.full((layout.slots,), value, dtype=torch.float64)
    s = SparseTensor(layout, values)
    p, lse = softmax(s, return_lse=True)
    rows = layout.mask()[0, 0].any(-1)
    if value == torch.inf:
        assert bool(torch.isnan(spmm(p, torch.ones(layout.shape[1], 1).double())[rows]).all())
        assert bool((lse[rows] == torch.inf).all())
    elif value == -torch.inf:
        assert bool((p.values == 0).all()) and bool((lse == -torch.inf).all())
    else:
        same(p.values, reference.softmax(s)[0].values)


@pytest.mark.parametrize("kind", ["block", "mixed", "row", "panel", "nm within"])
def test_row_masks_after_transposition(kind: str) -> None:
    """s.T carries the mask over rows; dropped rows are empty, whatever their slots hold."""
    name = "batch differs"
    layout = build(kind, name)
    q, k = operands(name)
    keep = torch.rand(2, k.shape[-2], generator=torch.Generator().manual_seed(4)) < 0.6
    s = sddmm(q, k, layout, key_mask=keep)
    spoilt = s.with_values(torch.where(s.live(), s.values, torch.nan))
    turned = spoilt.T
    assert turned.keep_rows and turned.keep is keep
    same(spmm(turned, q), s.to_dense().mT @ q)
    same(spmm(turned.T, k), s.to_dense() @ k)
    if kind != "nm within":
        p, lse = softmax(turned, return_lse=True)
        theirs, their_lse = reference.softmax(turned)
        same(p.values, theirs.values)
        same(lse, their_lse)


def test_linear_is_exact_too() -> None:
    w = SparseTensor(build("block", "odd sizes"), torch.randn(build("block", "odd sizes").slots))
    x = torch.randn(3, 37)
    x[1, 5] = torch.inf
    dense = reference.dense_of(w)
    mask = w.layout.mask()[0, 0]
    expected = torch.where(mask, dense * x[:, None, :].double(), 0).sum(-1)
    torch.testing.assert_close(
        linear(x, w).double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True
    )
