"""sddmm and spmm of RowLayout on a GPU: exact on integers, exact per element, repeatable."""

import dataclasses

import pytest
import torch
from cases import CASES, Case, density, operands, row_layout
from test_cuda_block import (
    DEVICE,
    DTYPES,
    adjoint,
    build,
    close,
    integers,
    key_mask,
    poisoned,  # noqa: F401  # a fixture for all tests here: outputs hold NaN before they are written
)
from torch import Tensor

from mixgrain.formats.layout import Layout
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives import reference
from mixgrain.primitives.sddmm import sddmm
from mixgrain.primitives.spmm import spmm

pytestmark = pytest.mark.gpu

# One lane to 32 a row, pieces that fill them and that do not, several tiles of columns and passes.
WIDTHS = (1, 8, 16, 24, 32, 40, 64, 80, 96, 128, 192, 256, 520, 1100)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_cases(name, dtype):
    case = CASES[name]
    layout, there = build("row", case)
    q, k = operands(name, dtype)
    for mask in (None, key_mask(case)):
        moved = None if mask is None else mask.to(DEVICE)
        ours = sddmm(q.to(DEVICE), k.to(DEVICE), there, 0.5, moved)
        expected = reference.sddmm(q.double(), k.double(), layout, 0.5, mask)
        close(ours.values, expected.values, case.dim, dtype)
        values = torch.randn(ours.values.shape, generator=torch.Generator().manual_seed(2)).to(
            dtype
        )
        s, t = SparseTensor(layout, values, mask), SparseTensor(there, values.to(DEVICE), moved)
        close(spmm(t, k.to(DEVICE)), reference.spmm(s, k), case.shape[1], dtype)
        expected_t = reference.dense_of(s).mT @ q.double()
        close(spmm(t.T, q.to(DEVICE)), expected_t, case.shape[0], dtype)
        close(adjoint(t, q.to(DEVICE)), expected_t, case.shape[0], dtype)


def check_exact(case: Case, dtype: torch.dtype, out: torch.dtype, seed: int) -> None:
    """Small integers: sums are exact in float32, so results are right to the bit."""
    layout, there = build("row", case, seed)
    (nq, nk), width = case.shape, case.dim
    q = integers(*case.lead_shape, nq, width, seed=1)
    k = integers(*case.lead_shape, nk, width, seed=2)
    mask = key_mask(case)
    for keep in (None, mask):
        moved = None if keep is None else keep.to(DEVICE)
        ours = sddmm(q.to(DEVICE, dtype), k.to(DEVICE, dtype), there, 1.0, moved, out_dtype=out)
        theirs = sddmm(q, k, layout, 1.0, keep)
        assert torch.equal(ours.values.cpu(), theirs.values.to(out))
        values = integers(*theirs.values.shape, seed=3)
        s = SparseTensor(layout, values, keep)
        t = SparseTensor(there, values.to(DEVICE, out), moved)
        assert torch.equal(spmm(t, k.to(DEVICE, dtype)).cpu(), spmm(s, k).to(dtype))
        assert torch.equal(adjoint(t, q.to(DEVICE, dtype)).cpu(), adjoint(s, q).to(dtype))
        assert torch.equal(spmm(t.T, q.to(DEVICE, dtype)).cpu(), spmm(s.T, q).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_integers_are_exact(width, dtype):
    case = Case((45, 83), density(0.3), free=(2,), lead=(1, 2), dim=width)
    for out in {dtype, torch.float32}:
        check_exact(case, dtype, out, seed=width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5000), (5000, 3), (2, 513), (700, 600)])
def test_long_rows_are_cut_and_merged(shape, dtype):
    """Rows of more than 512 positions, of the matrix and of its transpose."""
    for width in (8, 64, 136):
        check_exact(Case(shape, density(2.0), free=(2,), dim=width), dtype, dtype, seed=1)


def test_any_strides():
    case = Case((40, 50), density(0.4), lead=(1, 3), free=(2,), dim=16)
    layout, there = build("row", case)
    g = torch.Generator().manual_seed(0)
    q = torch.randint(-2, 3, (2, 40, 3, 16), generator=g).float()
    k = torch.randint(-2, 3, (2, 50, 3, 20), generator=g).float()
    expected = sddmm(q.transpose(1, 2), k.transpose(1, 2)[..., 3:19], layout)
    left, right = q.to(DEVICE).transpose(1, 2), k.to(DEVICE).transpose(1, 2)[..., 3:19]
    for a, b in (
        (left, right),  # rows far apart, and not aligned
        (left.mT.contiguous().mT, right.contiguous()),  # columns far apart
    ):
        ours = sddmm(a, b, there)
        assert torch.equal(ours.values.cpu(), expected.values)
        assert torch.equal(
            spmm(ours, b).cpu(), spmm(expected, k.transpose(1, 2)[..., 3:19].contiguous())
        )
    one = left[:1, :1].expand(2, 3, 40, 16)  # shared by all
    same = sddmm(
        q.transpose(1, 2)[:1, :1].expand(2, 3, 40, 16),
        k[:, :, :, :16].mT.mT.transpose(1, 2),
        layout,
    )
    assert torch.equal(
        sddmm(one, k.to(DEVICE)[..., :16].transpose(1, 2), there).values.cpu(), same.values
    )


def non_finite(layout: Layout, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """x with NaN in row 3 and infinity in row 5, and the dense product with ones."""
    x = x.clone()
    x[..., 3, :], x[..., 5, 0] = torch.nan, torch.inf
    kept = layout.mask()[0, 0]
    if mask is not None:
        kept = kept & mask
    rows = [x[kept[i]].sum(0) for i in range(kept.shape[0])]
    return x, torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_rows_that_keep_a_key_see_it(dtype):
    case = Case((37, 40), density(0.3), dim=72)
    layout, there = build("row", case)
    mask = torch.ones(40, dtype=torch.bool)
    mask[3] = False
    for keep in (None, mask):
        x, expected = non_finite(layout, integers(40, 72, seed=4), keep)
        ones = torch.ones(layout.slots)
        moved = None if keep is None else keep.to(DEVICE)
        ours = spmm(SparseTensor(there, ones.to(DEVICE, dtype), moved), x.to(DEVICE, dtype)).cpu()
        torch.testing.assert_close(ours.float(), expected, rtol=0, atol=0, equal_nan=True)
        scores = sddmm(torch.ones(37, 72, device=DEVICE, dtype=dtype), x.to(DEVICE, dtype), there,
                       key_mask=moved).values.cpu()  # fmt: skip
        column = layout.indices()[1]
        spoilt = column == 3 if keep is None else torch.zeros_like(column, dtype=torch.bool)
        assert torch.equal(scores.isnan(), spoilt)
        assert torch.equal(scores.isinf(), column == 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_what_is_computed_beside_it(dtype):
    shape, width = (300, 700), 64
    g = torch.Generator().manual_seed(0)
    masks = torch.rand(3, *shape, generator=g) < torch.tensor([0.9, 0.02, 0.3])[:, None, None]
    many = row_layout(masks, (0, 1, 2), (1, 3)).to(DEVICE)
    q = torch.randn(4, 3, shape[0], width, generator=g).to(DEVICE, dtype)
    k = torch.randn(4, 3, shape[1], width, generator=g).to(DEVICE, dtype)
    s = sddmm(q, k, many)
    o, again = spmm(s, k), spmm(sddmm(q, k, many), k)
    assert torch.equal(o, again)
    t = adjoint(s, q)
    for e in range(3):
        alone = row_layout(masks[e : e + 1], (0,), (1, 1)).to(DEVICE)
        one = sddmm(q[2, e], k[2, e], alone)
        assert torch.equal(spmm(one, k[2, e]), o[2, e])
        assert torch.equal(adjoint(one, q[2, e]), t[2, e])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype):
    case = Case((60, 50), density(0.3), free=(2,), lead=(1, 2), dim=24)
    layout, there = build("row", case)
    made = []
    for where, here, kind in ((DEVICE, there, dtype), ("cpu", layout, torch.float64)):
        q = integers(2, 2, 60, 24, seed=1).to(where, kind).requires_grad_()
        k = integers(2, 2, 50, 24, seed=2).to(where, kind).requires_grad_()
        s = sddmm(q, k, here, 0.125)
        made.append(torch.autograd.grad(spmm(s, k).sum() + (s.values * 0.5).sum(), (q, k)))
    for ours, theirs in zip(*made, strict=True):
        scale = float(theirs.abs().max())
        error = (ours.cpu().double() - theirs).abs().max() / scale
        assert error < {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-6}[dtype]


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """Offsets into k and x are 64-bit."""
    free, nk, width = 40, 1_000_000, 64
    mask = torch.zeros(1, 2, nk, dtype=torch.bool)
    mask[0, 0, [5, nk - 1]], mask[0, 1, nk - 7] = True, True
    layout = row_layout(mask, (0,), (1, 1)).to(DEVICE)
    k = torch.zeros(free, nk, width, dtype=torch.float16, device=DEVICE)
    k[-1, -1], k[-1, nk - 7], k[-1, 5] = 3.0, 2.0, 1.0
    q = torch.ones(free, 2, width, dtype=torch.float16, device=DEVICE)
    s = sddmm(q, k, layout)
    assert s.values[-1].tolist() == [64.0, 192.0, 128.0]
    assert not s.values[:-1].any()
    o = spmm(s, k)
    assert o[-1, :, 0].tolist() == [640.0, 256.0]
    t = spmm(s.T, q)
    assert t[-1, [5, nk - 1, nk - 7], 0].tolist() == [64.0, 192.0, 128.0]


def test_dtypes_of_values_and_operands_may_differ():
    case = dataclasses.replace(CASES["odd sizes"], dim=16)
    layout, there = build("row", case)
    x = integers(37, 16, seed=1)
    values = integers(layout.slots, seed=2)
    expected = spmm(SparseTensor(layout, values), x)
    for mine in DTYPES:
        for theirs in DTYPES:
            s = SparseTensor(there, values.to(DEVICE, mine))
            assert torch.equal(spmm(s, x.to(DEVICE, theirs)).cpu(), expected.to(theirs))
