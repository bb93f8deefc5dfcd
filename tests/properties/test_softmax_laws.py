"""softmax over kept entries: rows sum to one or nothing, shifts, lse, monotonicity."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis")
from drawn import EXACT, KINDS, LEADS, Example, close, examples, real, same_bits, spread, whole
from hypothesis import example
from hypothesis import strategies as st
from laws import law
from torch import Tensor

from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives.sddmm import sddmm
from mixgrain.primitives.softmax import softmax, softmax_backward

OFTEN = ("row", "block", "row", "block", "nm", "panel", "mixed", "nm within")


def scores(x: Example, spread_by: float = 1.0) -> tuple[SparseTensor, Tensor]:
    """Random scores on a layout, and what it keeps as it stands in dense tensors."""
    layout = x.layout()
    values = real(x.generator(2), *x.free, layout.slots) * spread_by
    return SparseTensor(layout, values), spread(layout.mask(), x)


@law(1.5, x=examples(OFTEN), size=st.sampled_from((1.0, 30.0, 700.0, 0.0)))
def test_rows_sum_to_one_or_to_nothing(x: Example, size: float) -> None:
    s, mask = scores(x, size)
    p, lse = softmax(s, return_lse=True)
    dense = p.to_dense()
    close(dense.sum(-1), mask.any(-1).double())
    assert bool((dense >= 0).all()) and bool((dense[~mask] == 0).all())
    assert torch.equal(lse > -torch.inf, mask.any(-1))
    live = s.layout.live()
    assert live is None or bool((p.values[..., ~live] == 0).all())


@law(1.5, x=examples(OFTEN))
def test_softmax_and_lse_are_those_of_dense_rows(x: Example) -> None:
    s, mask = scores(x)
    p, lse = softmax(s, return_lse=True)
    dense = torch.where(mask, s.to_dense(), -torch.inf)
    expected = torch.where(mask, torch.softmax(dense, -1), 0.0)
    close(p.to_dense(), expected)
    if x.shape[1]:
        close(lse, torch.logsumexp(dense, -1))
    assert torch.equal(softmax(s).values, p.values)


@law(1, x=examples(OFTEN), by=st.sampled_from((3.0, -50.0, 1e6)))
def test_a_shift_moves_lse_alone(x: Example, by: float) -> None:
    """Whole scores, so that adding to them does not round."""
    layout = x.layout()
    s = x.sparse(layout, x.generator(2))
    p, lse = softmax(s, return_lse=True)
    shifted, more = softmax(s.with_values(s.values + by), return_lse=True)
    assert torch.equal(shifted.values, p.values)
    close(more, lse + by)


@law(1, x=examples(EXACT, dims=(3, 1, 5)))
def test_more_keys_never_lower_lse(x: Example) -> None:
    g, masks = x.generator(1), x.masks()
    more = masks | x.masks(stream=3)
    q, k = (t / 8 for t in x.operands(g))
    few, many = (sddmm(q, k, x.layout(m)) for m in (masks, more))
    (p, low), (r, high) = softmax(few, return_lse=True), softmax(many, return_lse=True)
    assert bool((high >= low - 1e-12).all())
    # And what was there gets no more than before.
    kept = spread(x.full_mask(masks), x)
    assert bool((r.to_dense()[kept] <= p.to_dense()[kept] + 1e-12).all())


@law(1, x=examples(EXACT, leads=LEADS, dims=(3, 1)), batch=st.booleans())
def test_a_key_mask_is_a_mask_without_those_keys(x: Example, batch: bool) -> None:
    g, masks = x.generator(1), x.masks()
    q, k = x.operands(g)
    keep = torch.rand(x.shape[1], generator=g) < 0.6
    given = keep.expand(x.lead_shape[-2], -1) if batch and len(x.lead_shape) > 1 else keep
    s = sddmm(q, k, x.layout(masks), scale=0.3, key_mask=given)
    p, lse = softmax(s, return_lse=True)
    cut, cut_lse = softmax(sddmm(q, k, x.layout(masks & keep), scale=0.3), return_lse=True)
    close(p.to_dense(), cut.to_dense())
    close(lse, cut_lse)


@law(1, x=examples(EXACT))
def test_columns_in_another_order(x: Example) -> None:
    g, masks = x.generator(1), x.masks()
    q, k = x.operands(g)
    order, rows = (torch.randperm(n, generator=g) for n in x.shape[::-1])
    p, lse = softmax(sddmm(q, k, x.layout(masks), scale=0.1), return_lse=True)
    moved = sddmm(
        q[..., rows, :], k[..., order, :], x.layout(masks[:, rows][..., order]), scale=0.1
    )
    r, other = softmax(moved, return_lse=True)
    close(r.to_dense(), p.to_dense()[..., rows, :][..., order])
    close(other, lse[..., rows])


@law(1, x=examples(OFTEN), dtype=st.sampled_from((torch.bfloat16, torch.float16)))
def test_half_precision_is_float32_rounded_once(x: Example, dtype: torch.dtype) -> None:
    layout = x.layout()
    s = SparseTensor(layout, whole(x.generator(2), *x.free, layout.slots, dtype=dtype) / 4)
    p, lse = softmax(s, return_lse=True)
    wide, wide_lse = softmax(s.to(torch.float32), return_lse=True)
    assert same_bits(p.values, wide.values.to(dtype))
    assert lse.dtype == torch.float32 and same_bits(lse, wide_lse)
    assert same_bits(softmax(s, out_dtype=torch.float32).values, wide.values)


@law(0.7, x=examples(OFTEN), infinite=st.sampled_from((0.3, 1.0, 0.05)))
def test_scores_of_minus_infinity_get_nothing(x: Example, infinite: float) -> None:
    """A kept score of −inf weighs nothing; the other entries of its row share the whole."""
    s, _ = scores(x)
    gone = torch.rand(s.values.shape, generator=x.generator(3)) < infinite
    s = s.with_values(torch.where(gone, -torch.inf, s.values))
    finite = s.with_values((~gone).double()).to_dense() > 0
    p, lse = softmax(s, return_lse=True)
    dense = torch.where(finite, s.to_dense(), -torch.inf)
    some = finite.any(-1)
    expected = torch.where(finite, torch.softmax(dense, -1), 0.0)
    close(p.to_dense()[some], expected[some])
    if x.shape[1]:
        close(lse[some], torch.logsumexp(dense, -1)[some])


@law(1, x=examples(OFTEN), with_lse=st.booleans())
@example(x=Example("row", (5, 5), lead=(2, 1), entry=(0, 1)), with_lse=False)
def test_softmax_backward_is_the_textbook_formula(x: Example, with_lse: bool) -> None:
    s, mask = scores(x)
    p = softmax(s)
    grad = s.with_values(real(x.generator(3), *s.values.shape))
    grad_lse = real(x.generator(4), *x.lead_shape, x.shape[0]) if with_lse else None
    got = softmax_backward(p, grad, grad_lse)
    dp, dg = p.to_dense(), grad.to_dense()
    inner = (dp * dg).sum(-1, keepdim=True)
    expected = dp * (dg - inner + (0 if grad_lse is None else grad_lse[..., None]))
    close(got.to_dense(), torch.where(mask, expected, 0.0))


@law(0.5, x=examples(KINDS))
def test_softmax_of_a_transpose_runs_over_columns(x: Example) -> None:
    s, _ = scores(x)
    if x.kind.startswith("nm"):
        with pytest.raises(ValueError, match="transpose"):
            softmax(s.T)
        return
    mask = spread(s.layout.mask(), x).mT
    dense = torch.where(mask, s.to_dense().mT, -torch.inf)
    close(softmax(s.T).to_dense(), torch.where(mask, torch.softmax(dense, -1), 0.0))
