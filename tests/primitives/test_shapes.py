"""Leading dimensions: folding, broadcasting, grouped-query attention, views, key masks."""

from __future__ import annotations

import pytest
import torch

from mixgrain.formats import patterns as P
from mixgrain.formats.errors import ShapeError
from mixgrain.formats.layout import Layout
from mixgrain.primitives import fold, reference
from mixgrain.primitives.sddmm import sddmm
from mixgrain.primitives.softmax import softmax
from mixgrain.primitives.spmm import spmm

N, D = 40, 6
FLAT = P.window(3) | P.global_tokens([7])
HEADS = P.per_head([P.window(2), P.causal(), P.window(2), FLAT])
BATCH = P.per_batch([P.window(2), FLAT])
BOTH = P.per_batch([HEADS, P.per_head([P.causal()] * 4)])


@pytest.mark.parametrize(
    "lead, shape, folded",
    [
        ((1, 1), (), (1, 1)),
        ((1, 1), (2, 3), (6, 1)),
        ((1, 3), (3,), (1, 3)),
        ((1, 3), (5, 2, 3), (10, 3)),
        ((2, 1), (2, 3), (3, 2)),
        ((2, 1), (4, 2, 3), (12, 2)),
        ((2, 3), (2, 3), (1, 6)),
        ((2, 3), (7, 2, 3), (7, 6)),
    ],
)
def test_fold_and_back(lead, shape, folded) -> None:
    t = torch.randn(*shape, 4, 5)
    there = fold.fold(t, lead)
    assert there.shape == (*folded, 4, 5)
    assert torch.equal(fold.unfold(there, lead, shape), t)
    free = fold.free_shape(lead, shape)
    assert fold.fold_values(torch.zeros(*free, 9), lead, shape).shape == (folded[0], 9)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# (pattern, q's leading shape, k's, the result's); why
SHAPES = [
    (FLAT, (), (), ()),  # nothing but the matrix
    (FLAT, (2, 3), (2, 3), (2, 3)),  # the usual
    (FLAT, (2, 1), (1, 3), (2, 3)),  # both broadcast
    (FLAT, (3,), (), (3,)),  # k is shared
    (FLAT, (), (2, 3), (2, 3)),  # q is shared
    (FLAT, (2, 4), (2, 2), (2, 4)),  # grouped queries
    (FLAT, (4,), (2, 1), (2, 4)),  # broadcast, not grouped
    (FLAT, (5, 2, 4), (2, 2), (5, 2, 4)),  # a third leading dimension, grouped
    (FLAT, (0, 2), (0, 2), (0, 2)),  # an empty batch
    (HEADS, (4,), (4,), (4,)),  # positions vary over heads
    (HEADS, (), (), (4,)),  # and the operands do not
    (HEADS, (3, 4), (3, 2), (3, 4)),  # grouped
    (HEADS, (3, 1), (2,), (3, 4)),  # one query head for four patterns, two key heads
    (BATCH, (2, 3), (2, 3), (2, 3)),  # positions vary over the batch
    (BATCH, (2, 4), (2, 2), (2, 4)),
    (BATCH, (3,), (), (2, 3)),
    (BATCH, (5, 2, 3), (2, 1), (5, 2, 3)),
    (BOTH, (2, 4), (2, 2), (2, 4)),  # over both
    (BOTH, (1, 4), (1,), (2, 4)),
    (BOTH, (3, 2, 4), (2, 4), (3, 2, 4)),
]


@pytest.mark.parametrize("kind", ["block", "row", "mixed"])
@pytest.mark.parametrize("pattern, left, right, expected", SHAPES)
def test_leading_dimensions(kind, pattern, left, right, expected) -> None:
    layout = pattern.to_layout(kind, N, N, size=16)
    q, k, v = rand(*left, N, D), rand(*right, N, D), rand(*right, N, 3)
    s = sddmm(q, k, layout)
    assert s.lead_shape == expected
    p, lse = softmax(s, return_lse=True)
    assert lse.shape == (*expected, N)
    o = spmm(p, v)
    assert o.shape == (*expected, N, 3)
    dense, mask = dense_scores(q, k, layout, expected)
    torch.testing.assert_close(s.to_dense(), torch.where(mask, dense, 0))
    weights, their_lse = reference.masked_softmax(dense, mask)
    torch.testing.assert_close(lse, their_lse)
    torch.testing.assert_close(o, weights @ grouped(v, expected))


def grouped(t: torch.Tensor, expected: tuple[int, ...]) -> torch.Tensor:
    if t.dim() > 2 and t.shape[-3] not in (1, expected[-1]):
        t = t.repeat_interleave(expected[-1] // t.shape[-3], -3)
    return t


def dense_scores(q, k, layout: Layout, expected) -> tuple[torch.Tensor, torch.Tensor]:
    mask = layout.mask()
    while mask.dim() - 2 > len(expected):
        mask = mask[0]
    mask = mask.expand(*expected, N, N)
    return (q @ grouped(k, expected).mT).expand(mask.shape), mask


@pytest.mark.parametrize("pattern", [FLAT, HEADS, BATCH])
@pytest.mark.parametrize("batch", [(), (1,), (2,)])
def test_key_masks(pattern, batch) -> None:
    layout = pattern.to_layout("mixed", N, N)
    q, k = rand(2, 4, N, D), rand(2, 2, N, D)
    keep = torch.rand(*batch, N) < 0.5
    s = sddmm(q, k, layout, key_mask=keep)
    assert s.key_mask is keep
    dense, mask = dense_scores(q, k, layout, (2, 4))
    kept = keep if keep.dim() == 1 else keep[:, None, None, :]
    mask = mask & kept
    torch.testing.assert_close(s.to_dense(), torch.where(mask, dense, 0))
    p, lse = softmax(s, return_lse=True)
    weights, their_lse = reference.masked_softmax(dense, mask)
    torch.testing.assert_close(lse, their_lse)
    torch.testing.assert_close(spmm(p, k), weights @ grouped(k, (2, 4)))


def test_a_key_mask_brings_its_batch() -> None:
    s = sddmm(rand(4, N, D), rand(N, D), FLAT, key_mask=torch.ones(3, N, dtype=torch.bool))
    assert s.shape == (3, 4, N, N)


def test_strided_operands() -> None:
    """Transposed, sliced, expanded and misaligned views give what their copies give."""
    layout = FLAT.to_layout("mixed", N, N)
    base = torch.randn(2 * 3 * N * D + 1)
    views = [
        base[1:].view(2, 3, N, D),
        base[:-1].view(2, N, 3, D).transpose(1, 2),
        base[:-1].view(2, 3, D, N).mT,
        base[: N * D].view(N, D).expand(2, 3, N, D),
        base[: N * 3].view(1, 3, N, 1).expand(2, 3, N, D),
    ]
    for q in views:
        copy = q.clone(memory_format=torch.contiguous_format)
        s = sddmm(q, q, layout)
        assert torch.equal(s.values, sddmm(copy, copy, layout).values)
        strided = s.with_values(s.values.mT.contiguous().mT)
        assert torch.equal(softmax(strided).values, softmax(s).values)
        assert torch.equal(spmm(strided, q), spmm(s, copy))


def test_gradients_sum_over_what_was_shared() -> None:
    layout = HEADS.to_layout("mixed", N, N)
    q, k, v = rand(2, 4, N, D), rand(2, N, D), rand(1, 2, N, D)
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def f(q, k, v):
        return spmm(softmax(sddmm(q, k, layout)), v)

    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize(
    "left, right, message",
    [
        ((2, 3), (2, 2), "broadcast"),
        ((4, 3), (4, 3), "broadcast|leading"),
        ((3,), (4,), "broadcast|leading"),
    ],
)
def test_shapes_that_do_not_fit(left, right, message) -> None:
    with pytest.raises(ShapeError, match=message):
        sddmm(rand(*left, N, D), rand(*right, N, D), BOTH if left[0] != 2 else FLAT)
