"""Operators on packed N:M values that are there already, on a GPU against float64 on the CPU."""

import math

import pytest
import torch
from cases import CASES, nm_layout, operands
from cases import masks_of as case_masks
from test_cuda_block import (
    DEVICE,
    DTYPES,
    adjoint,
    close,
    dead_of,
    key_mask,
    poisoned,  # noqa: F401  # a fixture for all tests here: outputs hold NaN before they are written
    zero_bits,
)
from test_cuda_nm_dynamic import portable  # noqa: F401  # a fixture
from test_cuda_softmax import check, near, scores
from torch import Tensor

from mixgrain import patterns as P
from mixgrain.formats.nm import NMLayout, choose
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives import ops, reference
from mixgrain.primitives.dispatch import plan_for
from mixgrain.primitives.sddmm import sddmm
from mixgrain.primitives.softmax import softmax
from mixgrain.primitives.spmm import spmm

pytestmark = pytest.mark.gpu

NAMES = [name for name, case in CASES.items() if case.nm in ((2, 4), (1, 2))]
KINDS = (False, True)  # within a static pattern


def build(name: str, within: bool) -> tuple[NMLayout, NMLayout]:
    case = CASES[name]
    layout = nm_layout(case, *case_masks(case), within)
    return layout, layout.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("within", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_sampled_scores(name, within, dtype, portable):  # noqa: F811
    case = CASES[name]
    layout, there = build(name, within)
    q, k = operands(name, dtype)
    for mask in (None, key_mask(case)):
        moved = None if mask is None else mask.to(DEVICE)
        ours = sddmm(q.to(DEVICE), k.to(DEVICE), there, 0.5, moved)
        expected = reference.sddmm(q.double(), k.double(), layout, 0.5, mask)
        close(ours.values, expected.values, case.dim, dtype)
        assert zero_bits(ours.values.cpu()[dead_of(expected)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_products_within_a_pattern(name, dtype):
    case = CASES[name]
    layout, there = build(name, True)
    q, k = operands(name, dtype)
    for mask in (None, key_mask(case)):
        g = torch.Generator().manual_seed(2)
        values = torch.randn(*case.free, layout.slots, generator=g).to(dtype)
        s = SparseTensor(layout, values, mask)
        values[dead_of(s)] = torch.nan
        moved = None if mask is None else mask.to(DEVICE)
        t = SparseTensor(there, values.to(DEVICE), moved)
        close(spmm(t, k.to(DEVICE)), reference.spmm(s, k), case.shape[1], dtype)
        expected = reference.dense_of(s).mT @ q.double()
        close(spmm(t.T, q.to(DEVICE)), expected, case.shape[0], dtype)
        close(adjoint(t, q.to(DEVICE)), expected, case.shape[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("within", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_softmax(name, within, dtype):
    case = CASES[name]
    layout, there = build(name, within)
    for mask in (None, key_mask(case)):
        for out in {dtype, torch.float32}:
            check(layout, there, scores(layout, case.free, dtype), mask, out)


# Rows of every length class: shared by a warp, a warp's, a team's, and longer than a team holds.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [64, 200, 1000, 4096, 8200, 33_000, 150_000])
def test_row_lengths(columns, dtype):
    g = torch.Generator().manual_seed(columns)
    choice = choose(torch.rand(1, 5, columns, generator=g), None, 2, 4)
    layout = NMLayout.from_choice(choice, (5, columns), 2, 4)
    for mask in (None, torch.rand(columns, generator=g) < 0.8):
        check(layout, layout.to(DEVICE), scores(layout, (2,), dtype), mask, dtype)


@pytest.mark.parametrize("size, count", [(16, 3), (16, 40), (32, 17), (64, 5), (64, 30)])
def test_block_row_lengths(size, count):
    nq, nk = size + 3, size * count
    g = torch.Generator().manual_seed(count)
    kept = torch.rand(nq, nk, generator=g) < torch.rand(nq, 1, generator=g).clamp(min=0.1)
    within = P.from_dense(kept).to_layout("block", nq, nk, size=size)
    live = within.live()
    live = torch.ones(within.slots, dtype=torch.bool) if live is None else live
    live = live.view(-1, size, size)
    choice = choose(torch.rand(live.shape, generator=g), live, 2, 4)
    layout = NMLayout.from_choice(choice, (nq, nk), 2, 4, within=within)
    for dtype in DTYPES:
        check(layout, layout.to(DEVICE), scores(layout, (2,), dtype), None, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("within", KINDS)
@pytest.mark.parametrize("name", ["odd sizes", "both differ", "no queries", "no keys"])
def test_sums_and_copies(name, within, dtype):
    case = CASES[name]
    layout, there = build(name, within)
    free = math.prod(case.free)
    values = scores(layout, (free,), dtype)
    g = torch.Generator().manual_seed(4)
    rows = torch.randn(free, layout.entries, layout.shape[0], generator=g)
    plans = (plan_for("softmax", layout, values), plan_for("softmax", there, values.to(DEVICE)))
    for side in (None, False, True):
        keep: Tensor | None = None
        if side is not None:
            lines = layout.shape[0 if side else 1]
            keep = torch.rand(free, layout.entries, lines, generator=g) < 0.7
        moved = None if keep is None else keep.to(DEVICE)
        total = ops.row_sum(values.to(DEVICE), moved, bool(side), plans[1])
        near(total, ops.row_sum(values.double(), keep, bool(side), plans[0]), torch.float32, 64)
        spread = ops.row_expand(rows.to(DEVICE), moved, bool(side), plans[1], dtype)
        wanted = ops.row_expand(rows, keep, bool(side), plans[0], torch.float32)
        assert torch.equal(spread.cpu(), wanted.to(dtype))


@pytest.mark.parametrize("within", KINDS)
def test_second_derivatives_of_softmax(within):
    layout, there = build("odd sizes", within)
    made = []
    for where, here, dtype in ((DEVICE, there, torch.float32), ("cpu", layout, torch.float64)):
        g = torch.Generator().manual_seed(0)
        values = torch.randn(layout.slots, generator=g, dtype=torch.float64).to(where, dtype)
        weight = torch.randn(layout.slots, generator=g, dtype=torch.float64).to(where, dtype)
        values.requires_grad_()
        p, lse = softmax(SparseTensor(here, values), return_lse=True)
        finite = torch.where(lse.isfinite(), lse, 0)
        (first,) = torch.autograd.grad(
            (p.values * weight).sum() + (finite**2).sum(), values, create_graph=True
        )
        (second,) = torch.autograd.grad((first * weight).square().sum(), values)
        made.append((first, second))
    for ours, theirs in zip(*made, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=2e-5, atol=2e-5)
