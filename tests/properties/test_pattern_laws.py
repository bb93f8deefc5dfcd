"""Patterns: the algebra, the suffix law, counts, queries, tables, and layouts made of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

pytest.importorskip("hypothesis")
from expressions import Expression, expressions, ids_of, mask_of, pattern_of, sides
from hypothesis import strategies as st
from laws import law
from layout_cases import RATES
from pattern_checks import check_blocks, check_factor, runs_mask
from predicates import count_nm

from mixgrain.formats import patterns as P
from mixgrain.formats.pattern import Frame
from mixgrain.formats.runs import from_interval

CPU = torch.device("cpu")
KINDS = st.sampled_from(("row", "block", "mixed"))
tables = st.lists(expressions(fixed=False, most=2), min_size=1, max_size=3)


@law(6, e=expressions(), nq=sides, nk=sides)
def test_an_expression_keeps_what_boolean_algebra_says(e: Expression, nq: int, nk: int) -> None:
    p, mask = pattern_of(e, nq, nk), mask_of(e, nq, nk)
    assert torch.equal(p.dense(nq, nk), mask)


@law(6, e=expressions(), nq=sides, nk=sides)
def test_counts_agree_with_the_mask(e: Expression, nq: int, nk: int) -> None:
    p, mask = pattern_of(e, nq, nk), mask_of(e, nq, nk)
    assert p.nnz(nq, nk) == int(mask.sum())
    assert p.density(nq, nk) == (int(mask.sum()) / mask.numel() if mask.numel() else 0)


@law(3, e=expressions(), nq=sides, nk=sides, at=st.integers(0, 2**16))
def test_rows_and_blocks_agree_with_the_mask(e: Expression, nq: int, nk: int, at: int) -> None:
    p, mask = pattern_of(e, nq, nk), mask_of(e, nq, nk)
    if nq and nk:
        i = at % nq
        assert torch.equal(p.row(i, nq, nk), mask[i].nonzero().flatten())
        check_blocks(p, mask, (7, 16, 10, 64)[at % 4])


@law(4, e=expressions(), nq=sides, nk=sides, step=st.integers(1, 4))
def test_every_form_of_a_pattern_agrees(e: Expression, nq: int, nk: int, step: int) -> None:
    """Runs and intervals of some rows, and the factors, all say what the mask says."""
    p, mask = pattern_of(e, nq, nk), mask_of(e, nq, nk)
    frame = Frame(nq, nk, CPU)
    rows = frame.rows()[::step]
    assert torch.equal(runs_mask(p.runs(frame, rows), nk), mask[rows])
    found = p.interval(frame, rows)
    if found is not None:
        assert torch.equal(runs_mask(from_interval(*found), nk), mask[rows])
    check_factor(p, mask, frame)


@law(6, e=expressions(fixed=False), nk=sides, cut=st.integers(0, 24))
def test_fewer_queries_are_the_last_rows(e: Expression, nk: int, cut: int) -> None:
    """The suffix law."""
    p, nq = pattern_of(e, nk, nk), min(cut, nk)
    assert torch.equal(p.dense(nq, nk), p.dense(nk, nk)[nk - nq :])


@law(1, a=expressions(most=2), b=expressions(most=2), nq=sides, nk=sides)
def test_the_laws_of_boolean_algebra(a: Expression, b: Expression, nq: int, nk: int) -> None:
    """De Morgan, difference, double complement and inclusion-exclusion, by counts alone."""
    p, q = pattern_of(a, nq, nk), pattern_of(b, nq, nk)
    total = nq * nk

    def count(pattern: P.Pattern) -> int:
        return pattern.nnz(nq, nk)

    assert count(p | q) + count(p & q) == count(p) + count(q)
    assert count(~(p | q)) == count(~p & ~q) == total - count(p | q)
    assert count(p - q) == count(p) - count(p & q)
    assert count(~~p) == count(p) == total - count(~p)


@law(1, e=expressions(), nq=sides, nk=sides, how=st.sampled_from(("pickle", "deepcopy", "again")))
def test_copies_of_a_pattern_are_the_pattern(e: Expression, nq: int, nk: int, how: str) -> None:
    """The same mask, and, since an expression is remembered by what it says, the same layout."""
    p = pattern_of(e, nq, nk)
    copied = {
        "pickle": lambda: pickle.loads(pickle.dumps(p)),
        "deepcopy": lambda: copy.deepcopy(p),
        "again": lambda: pattern_of(e, nq, nk),
    }[how]()
    assert torch.equal(copied.dense(nq, nk), mask_of(e, nq, nk))
    assert copied.expression_key() == p.expression_key() and repr(copied) == repr(p)
    assert copied.to_layout("row", nq, nk) is p.to_layout("row", nq, nk)


@law(1, a=tables, b=expressions(fixed=False, most=2), nq=sides, nk=sides, batch=st.booleans())
def test_tables_work_entry_by_entry(
    a: list[Expression], b: Expression, nq: int, nk: int, batch: bool
) -> None:
    table = (P.per_batch if batch else P.per_head)([pattern_of(e, nq, nk) for e in a])
    masks = torch.stack([mask_of(e, nq, nk) for e in a])
    other, mask = pattern_of(b, nq, nk), mask_of(b, nq, nk)
    for pattern, expected in ((table, masks), (table | other, masks | mask),
                              (other - table, mask & ~masks), (~table, ~masks)):  # fmt: skip
        dense = pattern.dense(nq, nk)
        assert torch.equal(dense, expected[:, None] if batch else expected)
        assert pattern.nnz(nq, nk) == int(expected.sum())


@law(0.5, a=tables, b=tables, nq=sides, nk=sides)
def test_heads_within_batch_entries(
    a: list[Expression], b: list[Expression], nq: int, nk: int
) -> None:
    heads = P.per_head([pattern_of(e, nq, nk) for e in a])
    batch = P.per_batch([pattern_of(e, nq, nk) for e in b])
    ours = torch.stack([mask_of(e, nq, nk) for e in a])
    theirs = torch.stack([mask_of(e, nq, nk) for e in b])
    assert torch.equal((heads & batch).dense(nq, nk), ours[None] & theirs[:, None])
    nested = P.per_batch([heads & pattern_of(e, nq, nk) for e in b])
    assert torch.equal(nested.dense(nq, nk), ours[None] & theirs[:, None])


@law(
    3, how=st.lists(st.tuples(st.sampled_from(("runs", "squares")), st.integers(1, 4)),
                    min_size=1, max_size=3), nq=sides, nk=sides,
)  # fmt: skip
def test_documents_of_a_batch(how: list[tuple[str, int]], nq: int, nk: int) -> None:
    ids = torch.tensor([ids_of(*one, nk) for one in how], dtype=torch.int64).reshape(len(how), nk)
    masks = torch.stack([mask_of(("documents", *one), nq, nk) for one in how])
    assert torch.equal(P.documents(ids).dense(nq, nk), masks[:, None])


@law(4, e=expressions(), nq=sides, nk=sides, m=st.integers(1, 9), n=st.integers(1, 9))
def test_nm_counts_the_smaller_of_n_and_the_live(
    e: Expression, nq: int, nk: int, m: int, n: int
) -> None:
    n = min(n, m)
    pattern = pattern_of(e, nq, nk) & P.nm(n, m)
    expected = count_nm(mask_of(e, nq, nk), n, m)
    assert pattern.nnz(nq, nk) == expected
    assert P.nm(n, m).nnz(nq, nk) == nq * sum(min(n, nk - j) for j in range(0, nk, m))


@law(1, e=expressions(), nq=sides, nk=sides, kind=KINDS, size=st.sampled_from((16, 32)),
     rates=st.sampled_from(list(RATES)))  # fmt: skip
def test_a_layout_keeps_what_its_pattern_keeps(
    e: Expression, nq: int, nk: int, kind: str, size: int, rates: str
) -> None:
    """Mixed parts are disjoint and their union is the pattern, at whatever rates it was split."""
    mask = mask_of(e, nq, nk)
    layout = pattern_of(e, nq, nk).to_layout(kind, nq, nk, size=size, costs=RATES[rates])
    layout.validate()
    held = torch.zeros(nq, nk, dtype=torch.int64)
    for part in layout.parts:
        held += part.mask()[0, 0].long()
    assert torch.equal(held, mask.long())
    assert layout.nnz == int(mask.sum()) == sum(part.nnz for part in layout.parts)
    assert layout.density == (layout.nnz / mask.numel() if mask.numel() else 0)


@law(0.5, a=tables, nq=sides, nk=sides, kind=KINDS, batch=st.booleans())
def test_a_layout_of_a_table_keeps_each_entry(
    a: list[Expression], nq: int, nk: int, kind: str, batch: bool
) -> None:
    table = (P.per_batch if batch else P.per_head)([pattern_of(e, nq, nk) for e in a])
    layout = table.to_layout(kind, nq, nk, size=16)
    layout.validate()
    masks = torch.stack([mask_of(e, nq, nk) for e in a])
    expected = masks[:, None] if batch else masks[None]
    assert layout.lead == table.lead
    assert torch.equal(sum(part.mask().long() for part in layout.parts) + 0 * expected.long(),
                       expected.long())  # fmt: skip
    assert layout.nnz == int(expected.sum())
    # Equal expressions written twice are one layout.
    again = (P.per_batch if batch else P.per_head)([pattern_of(e, nq, nk) for e in a])
    assert again.to_layout(kind, nq, nk, size=16) is layout


@law(4, density=st.floats(0, 1), per_row=st.integers(0, 9), size=st.integers(1, 9),
     seed=st.integers(-(2**65), 2**65), nq=sides, nk=sides)  # fmt: skip
def test_random_patterns_keep_their_counts(
    density: float, per_row: int, size: int, seed: int, nq: int, nk: int
) -> None:
    counts = P.random(density, seed).dense(nq, nk).sum(1)
    assert bool(((counts - density * nk).abs() < 1).all())
    mask = P.random_blocks(per_row, size, seed).dense(nq, nk)
    blocks = -(-nk // size)
    wide = torch.nn.functional.pad(mask, (0, blocks * size - nk)).view(nq, blocks, size)
    full = torch.nn.functional.pad(torch.ones(nk), (0, blocks * size - nk)).view(blocks, size)
    assert bool((wide.sum(2) % full.sum(1).clamp(min=1) == 0).all()), "blocks are whole"
    assert bool((wide.any(2).sum(1) == min(per_row, blocks)).all())
