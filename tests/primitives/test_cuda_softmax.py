"""The operators along rows on a GPU against the same in float64 on the CPU."""

import math

import pytest
import torch
from cases import CASES, Case, band, block_layout, density, row_layout
from test_cuda_block import (
    DEVICE,
    DTYPES,
    build,
    dead_of,
    key_mask,
    poisoned,  # noqa: F401  # a fixture for all tests here: outputs hold NaN before they are written
    zero_bits,
)
from torch import Tensor

from mixgrain.formats.layout import Layout
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives import ops
from mixgrain.primitives.dispatch import plan_for
from mixgrain.primitives.softmax import softmax, softmax_backward

pytestmark = pytest.mark.gpu

KINDS = ("block", "row", "panel", "mixed")
# One rounding of a result, and the error of sums and exponents in float32 beside it.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


def near(ours: Tensor, theirs: Tensor, dtype: torch.dtype, times: float = 1.0) -> None:
    """Compare a rounded result with float64; ``times`` for what is summed before."""
    assert ours.shape == theirs.shape
    assert ours.dtype == dtype
    relative = 1.02 * ROUNDING[dtype] + times * 1e-6
    # float16 has no normal numbers below 6e-5.
    torch.testing.assert_close(
        ours.cpu().double(), theirs.double(), rtol=relative, atol=times * 5e-7, equal_nan=True
    )


def scores(layout: Layout, free: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random values, NaN in dead slots, on the CPU."""
    g = torch.Generator().manual_seed(seed)
    values = (3 * torch.randn(*free, layout.slots, generator=g)).to(dtype)
    values[dead_of(SparseTensor(layout, values))] = torch.nan
    return values


def check(layout: Layout, there: Layout, values: Tensor, mask: Tensor | None, out: torch.dtype):
    """Softmax, lse, and the backward with and without a gradient of lse."""
    moved = None if mask is None else mask.to(DEVICE)
    s = SparseTensor(layout, values.double(), mask)
    t = SparseTensor(there, values.to(DEVICE), moved)
    expected, lse = softmax(s, return_lse=True)
    p, ours = softmax(t, return_lse=True, out_dtype=out)
    near(p.values, expected.values, out)
    near(ours, lse, torch.float32, times=4)
    assert torch.equal(softmax(t, out_dtype=out).values, p.values)
    dead = dead_of(expected)
    assert zero_bits(p.values.cpu()[dead])

    g = torch.Generator().manual_seed(9)
    grad = torch.randn(values.shape, generator=g).to(out)
    grad[dead] = torch.nan
    rows = torch.randn(lse.shape, generator=g)
    same = SparseTensor(layout, p.values.cpu().double(), mask)
    for extra in (None, rows):
        back = softmax_backward(p, grad.to(DEVICE), None if extra is None else extra.to(DEVICE))
        wanted = softmax_backward(same, grad.double(), None if extra is None else extra.double())
        near(back.values, wanted.values, out, times=16)
        assert zero_bits(back.values.cpu()[dead])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_cases(name, kind, dtype):
    case = CASES[name]
    layout, there = build(kind, case)
    for mask in (None, key_mask(case)):
        for out in {dtype, torch.float32}:
            check(layout, there, scores(layout, case.free, dtype), mask, out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["odd sizes", "heads shared", "batch differs", "holes"])
def test_row_masks(name, kind):
    """After a transpose the run-time mask is over rows."""
    case = CASES[name]
    layout, there = build(kind, case)
    mask = key_mask(case)
    s = SparseTensor(layout, scores(layout, case.free, torch.float32), mask)
    t = SparseTensor(there, s.values.to(DEVICE), mask.to(DEVICE))
    turned = SparseTensor(s.layout, s.values.double(), s.keep, s.keep_rows).T
    p, lse = softmax(t.T, return_lse=True)
    expected, theirs = softmax(turned, return_lse=True)
    near(p.values, expected.values, torch.float32)
    near(lse, theirs, torch.float32, times=4)


# Rows of every length class: held by a warp, by a team, and longer than a team holds.
LENGTHS = {
    "block": [(16, 3), (16, 16), (16, 17), (16, 200), (32, 40), (64, 33), (128, 20)],
    "row": [(1, 1), (1, 512), (1, 513), (1, 5000)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind, size, count", [(kind, *pair) for kind in LENGTHS for pair in LENGTHS[kind]]
)
def test_row_lengths(kind, size, count, dtype):
    nq, nk = (2 * size + 3, size * count) if kind == "block" else (7, count)
    g = torch.Generator().manual_seed(count)
    masks = torch.rand(1, nq, nk, generator=g) < torch.rand(nq, 1, generator=g).clamp(min=0.1)
    masks[:, -1] = False
    masks[:, 0] = True
    if kind == "block":
        masks[:, :size, : nk // 2] = True  # full blocks among others
    layout = (
        block_layout(masks, (0,), (1, 1), size)
        if kind == "block"
        else row_layout(masks, (0,), (1, 1))
    )
    for mask in (None, torch.rand(nk, generator=g) < 0.8):
        check(layout, layout.to(DEVICE), scores(layout, (2,), dtype), mask, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_special_values(kind):
    """−inf is absent, all −inf is an empty row, NaN and +inf spoil their row alone."""
    case = Case((40, 64), density(0.6))
    layout, there = build(kind, case)
    values = scores(layout, (), torch.float32)
    row, column = layout.indices()
    values[column == 9] = -torch.inf
    values[row == 2] = -torch.inf
    values[(row == 5) & (column > 30)] = torch.nan
    values[(row == 6) & (column == int(column[row == 6].max()))] = torch.inf
    values[row == 7] = torch.nan
    s = SparseTensor(layout, values.double())
    expected, theirs = softmax(s, return_lse=True)
    p, lse = softmax(SparseTensor(there, values.to(DEVICE)), return_lse=True)
    near(p.values, expected.values, torch.float32)
    near(lse, theirs, torch.float32, times=4)


@pytest.mark.parametrize("kind", KINDS)
def test_large_scores_do_not_overflow(kind):
    layout, there = build(kind, CASES["window"])
    for dtype, most in ((torch.float16, 6e4), (torch.bfloat16, 1e30), (torch.float32, 1e30)):
        values = (scores(layout, (), torch.float32) * most / 12).to(dtype)
        s = SparseTensor(layout, values.double())
        p, lse = softmax(SparseTensor(there, values.to(DEVICE)), return_lse=True)
        expected, theirs = softmax(s, return_lse=True)
        near(p.values, expected.values, dtype)
        near(lse, theirs, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_what_is_computed_beside_it(kind, dtype):
    case = Case((80, 700), density(0.5), lead=(1, 3), free=(2,), size=16)
    _, there = build(kind, case)
    values = scores(build(kind, case)[0], (2,), dtype).to(DEVICE)
    p, lse = softmax(SparseTensor(there, values), return_lse=True)
    again = softmax(SparseTensor(there, values))
    assert torch.equal(p.values, again.values)
    one = SparseTensor(there, values[1:])
    q, m = softmax(one, return_lse=True)
    assert torch.equal(q.values, p.values[1:])
    assert torch.equal(m, lse[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["odd sizes", "both differ", "lines", "no queries", "no keys"])
def test_sums_and_copies(name, kind, dtype):
    case = CASES[name]
    layout, there = build(kind, case)
    free = math.prod(case.free)
    values = scores(layout, (free,), dtype)
    g = torch.Generator().manual_seed(4)
    rows = torch.randn(free, layout.entries, layout.shape[0], generator=g)
    plans = (
        plan_for("softmax", layout, values),
        plan_for("softmax", there, values.to(DEVICE)),
    )
    for side in (None, False, True):
        keep = None
        if side is not None:
            keep = (
                torch.rand(free, layout.entries, layout.shape[0 if side else 1], generator=g) < 0.7
            )
        moved = None if keep is None else keep.to(DEVICE)
        total = ops.row_sum(values.to(DEVICE), moved, bool(side), plans[1])
        wanted = ops.row_sum(values.double(), keep, bool(side), plans[0])
        near(total, wanted, torch.float32, times=64)
        spread = ops.row_expand(rows.to(DEVICE), moved, bool(side), plans[1], dtype)
        wanted = ops.row_expand(rows, keep, bool(side), plans[0], torch.float32)
        assert torch.equal(spread.cpu(), wanted.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind):
    layout, there = build(kind, Case((30, 40), band(9)))
    made = []
    for where, here, dtype in ((DEVICE, there, torch.float32), ("cpu", layout, torch.float64)):
        g = torch.Generator().manual_seed(0)
        values = torch.randn(layout.slots, generator=g, dtype=torch.float64).to(where, dtype)
        weight = torch.randn(layout.slots, generator=g, dtype=torch.float64).to(where, dtype)
        values.requires_grad_()
        p, lse = softmax(SparseTensor(here, values), return_lse=True)
        (first,) = torch.autograd.grad(
            (p.values * weight).sum() + (lse**2).sum(), values, create_graph=True
        )
        (second,) = torch.autograd.grad((first * weight).square().sum(), values)
        made.append((first, second))
    for ours, theirs in zip(*made, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=2e-5, atol=2e-5)
