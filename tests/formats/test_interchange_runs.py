"""cuDNN's interval masks and FlashMask, in and out, against their definitions written as loops."""

from __future__ import annotations

import pytest
import torch

from mixgrain.formats import interchange as X
from mixgrain.formats import patterns as P
from mixgrain.formats.errors import DtypeError, LayoutError, ShapeError

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

MIXED = P.causal() & P.longformer(5, [3, 27])
PATTERNS = {
    "flat": MIXED,
    "nothing": P.full() - P.full(),
    "everything": P.full(),
    "scattered": P.random(0.3, 5),
    "heads": P.per_head([MIXED, P.window(3), MIXED]),
    "batch": P.per_batch([P.full(), P.random(0.1, 1)]),
    "both": P.per_batch([P.per_head([P.full(), MIXED]), P.per_head([MIXED] * 2)]),
}
SHAPES = [(30, 41), (41, 30), (1, 1), (0, 3), (3, 0)]


def full_dense(pattern: P.Pattern, nq: int, nk: int) -> torch.Tensor:
    """(b, h, nq, nk), whatever the pattern's leading dimensions."""
    return pattern.dense(nq, nk).reshape(*pattern.lead, nq, nk)


# Interval masks


def literal_intervals(ends: torch.Tensor, batch: int, nk: int) -> torch.Tensor:
    """[0, F0) ∪ [F1, F2) ∪ …, key by key: bool (batch, heads, nq, nk)."""
    heads, _, total = ends.shape
    nq = total // batch
    out = torch.zeros(batch, heads, nq, nk, dtype=torch.bool)
    for h in range(heads):
        for line in range(total):
            f = ends[h, :, line].tolist()
            for start, stop in zip([0, *f[1::2]], f[0::2], strict=True):
                out[line // nq, h, line % nq, start:stop] = True
    return out


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("nq, nk", SHAPES)
def test_intervals(name, nq, nk) -> None:
    pattern = PATTERNS[name]
    dense, (b, h) = full_dense(pattern, nq, nk), pattern.lead
    ends = X.to_intervals(pattern, nq, nk)
    assert ends.dtype == torch.int32 and ends.is_contiguous()
    assert ends.shape[0] == h and ends.shape[1] % 2 == 1 and ends.shape[2] == b * nq
    assert bool((ends.diff(dim=1) >= 0).all())
    assert torch.equal(literal_intervals(ends, b, nk), dense)
    back = X.from_intervals(ends, (nq, nk), batch=b)
    assert torch.equal(full_dense(back, nq, nk), dense)


def test_intervals_hold_as_few_ends_as_the_pattern_needs() -> None:
    for pattern, ends in [(P.causal(), 1), (P.window(3), 3), (P.window(3) | P.sinks(2), 3)]:
        assert X.to_intervals(pattern, 20, 20).shape == (1, ends, 20)
    twice = X.to_intervals(P.causal(), 5, 7, batch=2)
    assert torch.equal(twice, torch.tensor([3, 4, 5, 6, 7] * 2).int().reshape(1, 1, 10))


def test_intervals_may_be_empty_and_touch() -> None:
    ends = torch.tensor([[[0, 2], [1, 2], [1, 4], [3, 4], [5, 4]]])
    pattern = X.from_intervals(ends, (2, 5))
    assert pattern.dense(2, 5).int().tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 0]]
    assert X.to_intervals(pattern, 2, 5).tolist() == [[[0, 4], [3, 4], [5, 4]]]


def test_interval_errors() -> None:
    good = torch.tensor([[[1, 2], [2, 2], [3, 5]]])
    cases = [
        (lambda: X.to_intervals(P.random(0.5, 0), 9, 64, max_intervals=3), LayoutError,
         "more than max_intervals = 3"),
        (lambda: X.to_intervals(PATTERNS["batch"], 9, 9, batch=3), ShapeError, "2 batch entries"),
        (lambda: X.to_intervals(P.nm(2, 4), 8, 8), LayoutError, "static"),
        (lambda: X.from_intervals(good, (2, 4)), LayoutError, r"end 5 at \(0, 2, 1\)"),
        (lambda: X.from_intervals(good - 2, (2, 5)), LayoutError, "end -1"),
        (lambda: X.from_intervals(good.flip(1), (2, 5)), LayoutError, "end 1 of query 0"),
        (lambda: X.from_intervals(good[:, :2], (2, 5)), ShapeError, "odd number"),
        (lambda: X.from_intervals(good, (3, 5)), ShapeError, "1 · 3"),
        (lambda: X.from_intervals(good, (1, 5)), ShapeError, "1 · 1"),
        (lambda: X.from_intervals(good[0], (2, 5)), ShapeError, "3-D"),
        (lambda: X.from_intervals(good.float(), (2, 5)), DtypeError, "integers"),
        (lambda: X.from_intervals(good, (2, -5)), ShapeError, "nq, nk"),
    ]  # fmt: skip
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()


# FlashMask


def literal_flashmask(rows: torch.Tensor, causal: bool, nq: int, nk: int) -> torch.Tensor:
    """What the paper's four forms keep: bool (B, H, nq, nk), by loops."""
    batch, heads, _, columns = rows.shape
    out = torch.ones(batch, heads, nq, nk, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for j in range(nk):
                r = rows[b, h, j].tolist()
                has_end = (columns, causal) in ((2, True), (4, False))
                out[b, h, r[0] : r[1] if has_end else nq, j] = False
                for i in range(nq):
                    if causal and i + nk - nq < j:
                        out[b, h, i, j] = False
                    if not causal and (r[2] <= i < r[3] if has_end else i < r[1]):
                        out[b, h, i, j] = False
    return out


FORMS = [(1, True), (2, True), (2, False), (4, False)]


@pytest.mark.parametrize("columns, causal", FORMS)
@pytest.mark.parametrize("nq, nk", [(17, 23), (23, 17), (20, 20), (1, 1), (0, 3), (3, 0)])
@pytest.mark.parametrize("lead", [(1, 1), (1, 2), (2, 3)])
def test_any_flashmask(columns, causal, nq, nk, lead) -> None:
    generator = torch.Generator().manual_seed(nq * nk + columns)
    rows = torch.randint(0, nq + 1, (*lead, nk, columns), generator=generator)
    expected = literal_flashmask(rows, causal, nq, nk)
    pattern = X.from_flashmask(rows, (nq, nk), causal)
    assert torch.equal(full_dense(pattern, nq, nk), expected)
    # A query alone, which is asked for other runs than all of them.
    if nq and lead == (1, 1):
        assert (
            pattern.row(nq // 2, nq, nk).tolist()
            == expected[0, 0, nq // 2].nonzero()[:, 0].tolist()
        )
    for wanted in (causal, None):
        made = X.to_flashmask(pattern, nq, nk, wanted)
        assert made.startend_row_indices.dtype == torch.int32
        again = literal_flashmask(made.startend_row_indices, made.causal, nq, nk)
        assert torch.equal(again.expand_as(expected), expected)


# The examples of the FlashMask documentation: mask, causal, indices.
DOCUMENTED = {
    "sliding window": (P.causal() & P.window(2), True, [[3, 4, 5, 6, 7, 8, 9, 10, 10, 10]]),
    "causal documents": (
        P.causal() & P.documents([0] * 4 + [1] * 3 + [2] * 3), True,
        [[4, 4, 4, 4, 7, 7, 7, 10, 10, 10]],
    ),
    "documents": (
        P.documents([0] * 4 + [1] * 3 + [2] * 3), False,
        [[4, 4, 4, 4, 7, 7, 7, 10, 10, 10], [0, 0, 0, 0, 4, 4, 4, 7, 7, 7]],
    ),
    "prefix": (
        P.causal() | P.blocks(torch.tensor([[True, False], [False, False]]), 5), False,
        [[10] * 10, [0] * 5 + [5, 6, 7, 8, 9]],
    ),
    "global and window": (
        P.longformer(1, [0, 1]), False,
        [[10, 10, 4, 5, 6, 7, 8, 9, 10, 10], [10] * 10, [0, 0, 0, 0] + [2] * 6,
         [0, 0, 0, 0, 3, 4, 5, 6, 7, 8]],
    ),
    "causal": (P.causal(), True, [[10] * 10]),
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_flashmasks(name) -> None:
    pattern, causal, columns = DOCUMENTED[name]
    rows = torch.tensor(columns).T[None, None]
    assert torch.equal(
        X.from_flashmask(rows, (10, 10), causal).dense(10, 10), pattern.dense(10, 10)
    )
    made = X.to_flashmask(pattern, 10, 10)
    assert made.causal == causal
    if name != "global and window":  # written down there with an interval more than is needed
        assert torch.equal(made.startend_row_indices, rows.int())


def test_flashmask_forms_can_be_asked_for() -> None:
    pattern = P.causal() & P.window(3)
    for columns, causal in FORMS:
        made = X.to_flashmask(pattern, 12, 12, causal, columns)
        assert made.startend_row_indices.shape == (1, 1, 12, columns) and made.causal == causal
        expected = literal_flashmask(made.startend_row_indices, causal, 12, 12)[0, 0]
        assert torch.equal(expected, pattern.dense(12, 12))


def test_flashmask_of_shared_key_heads() -> None:
    rows = torch.randint(0, 9, (2, 2, 8, 1))
    pattern = X.from_flashmask(rows, (8, 8), True, heads=6)
    expected = literal_flashmask(rows, True, 8, 8).repeat_interleave(3, 1)
    assert pattern.lead == (2, 6) and torch.equal(pattern.dense(8, 8), expected)
    one = X.from_flashmask(rows[:1, :1], (8, 8), True, heads=6)
    assert one.lead == (1, 1)


def test_flashmask_errors() -> None:
    rows = torch.full((1, 1, 5, 2), 3)
    combs = P.dilated(5, 2)
    cases = [
        (lambda: X.to_flashmask(combs, 12, 12), LayoutError, "more than three runs"),
        (lambda: X.to_flashmask(P.causal() & P.dilated(2, 3), 12, 12, True), LayoutError,
         "intervals of rows do not see key 0 behind"),
        (lambda: X.to_flashmask(P.window(3), 9, 9, causal=True), LayoutError, "key 1 is kept"),
        (lambda: X.to_flashmask(P.longformer(1, [0, 1]), 12, 12, None, 2), LayoutError, "needs 4"),
        (lambda: X.to_flashmask(P.causal(), 9, 9, True, 4), LayoutError, "needs 1 or 2"),
        (lambda: X.from_flashmask(rows, (5, 5), True, heads=0), LayoutError, ">= 1"),
        (lambda: X.from_flashmask(rows.expand(1, 2, 5, 2), (5, 5), True, heads=3), ShapeError,
         "multiple"),
        (lambda: X.from_flashmask(rows[..., :1], (5, 5), False), LayoutError, "1 columns"),
        (lambda: X.from_flashmask(rows.repeat(1, 1, 1, 2), (5, 5), True), LayoutError, "4 columns"),
        (lambda: X.from_flashmask(rows, (2, 5), True), LayoutError, "row 3 at"),
        (lambda: X.from_flashmask(-rows, (5, 5), True), LayoutError, "row -3"),
        (lambda: X.from_flashmask(rows, (5, 6), True), ShapeError, r"\(B, H, 6"),
        (lambda: X.from_flashmask(rows.double(), (5, 5), True), DtypeError, "integers"),
    ]  # fmt: skip
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()


# Properties


@hypothesis.given(
    seed=st.integers(0, 2**31), nq=st.integers(0, 20), nk=st.integers(0, 20),
    density=st.sampled_from([0.05, 0.5, 0.95]),
)  # fmt: skip
def test_any_mask_round_trips_through_intervals(seed, nq, nk, density) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(2, 2, nq, nk, generator=generator) < density
    ends = X.to_intervals(P.from_dense(dense), nq, nk)
    assert torch.equal(literal_intervals(ends, 2, nk), dense)
    assert torch.equal(X.from_intervals(ends, (nq, nk), batch=2).dense(nq, nk), dense)


@hypothesis.given(
    seed=st.integers(0, 2**31), nq=st.integers(1, 20), nk=st.integers(1, 20),
    density=st.sampled_from([0.1, 0.5, 0.9]),
)  # fmt: skip
def test_flashmask_holds_a_mask_or_says_that_it_cannot(seed, nq, nk, density) -> None:
    """It can where, for each key, at most two stretches of rows are masked."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(nq, nk, generator=generator) < density
    if seed % 2:  # columns with few stretches
        dense = dense.cummax(0)[0] if seed % 4 == 1 else ~(~dense).cummax(0)[0]
        dense[: seed % 5] = False
    padded = torch.nn.functional.pad((~dense).int(), (0, 0, 1, 0))
    stretches = (padded.diff(dim=0) == 1).sum(0)
    if int(stretches.max()) <= 2:
        made = X.to_flashmask(P.from_dense(dense), nq, nk)
        kept = literal_flashmask(made.startend_row_indices, made.causal, nq, nk)
        assert torch.equal(kept[0, 0], dense)
    else:
        with pytest.raises(LayoutError, match="to_block_mask"):
            X.to_flashmask(P.from_dense(dense), nq, nk, causal=False)
