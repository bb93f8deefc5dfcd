"""Random expressions obey the boolean algebra of their masks; P.nm; identity; caches."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import types

import pytest
import torch
from pattern_checks import check_factor, check_forms, check_suffix
from predicates import count_nm

from mixgrain.formats import cache
from mixgrain.formats import patterns as P
from mixgrain.formats.costs import Costs
from mixgrain.formats.pattern import Frame, Pattern
from mixgrain.formats.pattern_algebra import And, Not, Or

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

small = st.integers(0, 12)
LEAVES = st.one_of(
    st.just(P.full()),
    st.just(P.causal()),
    st.builds(P.window, small, small),
    st.builds(P.dilated, st.integers(0, 5), st.integers(1, 6)),
    st.builds(P.sinks, small),
    st.builds(P.global_keys, st.lists(st.integers(0, 40), max_size=5)),
    st.builds(P.global_queries, st.lists(st.integers(0, 40), max_size=5)),
    st.builds(P.global_tokens, st.lists(st.integers(0, 40), max_size=5)),
    st.builds(P.random, st.floats(0, 1), st.integers(0, 9)),
    st.builds(P.random_blocks, st.integers(0, 3), st.integers(1, 9), st.integers(0, 9)),
    st.builds(P.bigbird, st.integers(1, 6), *[st.integers(0, 2)] * 3, st.integers(0, 9)),
)
SHAPES = st.tuples(st.integers(0, 30), st.integers(0, 30))


def mask_of(pattern: Pattern, nq: int, nk: int) -> torch.Tensor:
    """The mask of an expression from the masks of its leaves."""
    if isinstance(pattern, Or | And):
        masks = torch.stack([mask_of(term, nq, nk) for term in pattern.terms])
        return masks.any(0) if isinstance(pattern, Or) else masks.all(0)
    return ~mask_of(pattern.term, nq, nk) if isinstance(pattern, Not) else pattern.dense(nq, nk)


def grow(inner):
    return st.one_of(
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a - b, inner, inner),
        st.builds(lambda a: ~a, inner),
    )


EXPRESSIONS = st.recursive(LEAVES, grow, max_leaves=6)


@given(EXPRESSIONS, SHAPES)
def test_expressions_are_boolean_algebra(pattern, shape) -> None:
    check_forms(pattern, mask_of(pattern, *shape))


@given(EXPRESSIONS, EXPRESSIONS, SHAPES)
def test_operators(a, b, shape) -> None:
    x, y = a.dense(*shape), b.dense(*shape)
    assert torch.equal((a | b).dense(*shape), x | y)
    assert torch.equal((a & b).dense(*shape), x & y)
    assert torch.equal((a - b).dense(*shape), x & ~y)
    assert torch.equal((~a).dense(*shape), ~x)


@given(EXPRESSIONS, st.integers(0, 30))
def test_suffix_law(pattern, nk) -> None:
    check_suffix(pattern, nk)


@given(EXPRESSIONS, st.integers(0, 3))
def test_the_text_names_the_same_pattern(pattern, _) -> None:
    """What is printed can be typed in again, but for lists that are cut short."""
    text = repr(pattern)
    if "window=" in text or "block_window" in text:  # parts of bigbird have no public name
        return
    again = eval(text, {**vars(P), "inf": float("inf"), "__builtins__": {}})
    assert torch.equal(again.dense(20, 20), pattern.dense(20, 20))


def test_union_factors_globals_out() -> None:
    pattern = P.longformer(3, [0, 9]) | P.global_keys([4]) | P.sinks(2) | P.global_queries([30])
    frame = Frame(20, 24, torch.device("cpu"))
    factored = pattern.factor(frame)
    assert factored.core is not None
    assert factored.core.interval(frame, frame.rows()) is not None
    assert factored.keys.tolist() == [0, 1, 4, 9]
    assert factored.queries.tolist() == [5]  # position 9; position 0 has no query, 30 no key
    check_factor(pattern, pattern.dense(20, 24), frame)
    assert P.global_tokens([1]).factor(frame).core is None


INTERVALS = {
    "windows that overlap": P.window(2, 0) | P.window(0, 5),
    "windows cut": P.causal() & P.window(4),
    "after the diagonal": ~P.causal(),
    "window before the diagonal": P.window(4) - ~P.causal(),
    "one document": P.documents([0] * 30) & P.causal(),
    "sinks and causal": P.sinks(3) | P.causal(),
}


@pytest.mark.parametrize("name", INTERVALS)
def test_fast_path_is_taken(name) -> None:
    frame = Frame(30, 30, torch.device("cpu"))
    assert INTERVALS[name].interval(frame, frame.rows()) is not None


# N:M


@given(EXPRESSIONS, SHAPES, st.sampled_from([(1, 2), (2, 4), (1, 1), (3, 5), (4, 4), (7, 16)]))
def test_nm_counts_live_keys_by_group(pattern, shape, nm) -> None:
    expected = count_nm(pattern.dense(*shape), *nm)
    for limited in (P.nm(*nm) & pattern, pattern & P.nm(*nm)):
        assert limited.nnz(*shape) == expected
        assert limited.density(*shape) == (expected / (shape[0] * shape[1]) if expected else 0)
    assert P.nm(*nm).nnz(*shape) == count_nm(torch.ones(shape, dtype=torch.bool), *nm)


def test_nm_of_a_table() -> None:
    heads = P.per_head([P.window(3), P.causal(), P.window(3)])
    pattern = P.nm(2, 4) & heads & P.sinks(20)
    assert (pattern.lead, pattern.entry, pattern.leading_dims) == ((1, 3), (0, 1, 0), 1)
    assert pattern.nnz(9, 9) == sum(count_nm(m, 2, 4) for m in heads.dense(9, 9))
    assert [repr(p) for p in pattern.distinct][1] == "nm(2, 4) & causal() & sinks(20)"


# Identity


def test_equal_expressions_have_equal_keys() -> None:
    def build() -> Pattern:
        return P.longformer(3, [0, 9]) & ~P.documents(torch.tensor([0, 1, 1])) - P.random(0.5, 1)

    assert build().expression_key() == build().expression_key()
    assert hash(build().expression_key()) == hash(build().expression_key())
    assert P.window(3).expression_key() != P.window(3, 4).expression_key()
    assert P.causal().expression_key() != P.full().expression_key()
    assert P.global_keys([1]).expression_key() != P.global_queries([1]).expression_key()
    assert (P.causal() | P.full()).expression_key() != (P.causal() & P.full()).expression_key()


def test_small_cpu_tensors_are_named_by_their_bytes() -> None:
    ids = torch.tensor([0, 0, 1])
    pattern = P.documents(ids)
    key = pattern.expression_key()
    assert P.documents(ids.clone()).expression_key() == key
    ids[1] = 1
    assert pattern.expression_key() != key
    assert pattern.dense(3, 3).int().tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]


def test_large_tensors_are_named_by_reference_and_version() -> None:
    ids = torch.zeros(20000, dtype=torch.int64)
    key = P.documents(ids).expression_key()
    assert P.documents(ids).expression_key() == key
    assert P.documents(ids.clone()).expression_key() != key
    pattern = P.documents(ids)
    assert pattern.nnz(20000, 20000) == 20000**2
    ids[10000:] = 1
    assert pattern.expression_key() != key
    assert pattern.nnz(20000, 20000) == 2 * 10000**2


def test_a_key_does_not_keep_a_tensor_alive_nor_match_its_successor() -> None:
    ids = torch.zeros(20000, dtype=torch.int64)
    key = P.documents(ids).expression_key()
    assert key == P.documents(ids).expression_key()
    del ids
    gc.collect()
    for _ in range(20):
        assert P.documents(torch.zeros(20000, dtype=torch.int64)).expression_key() != key


def test_inference_tensors_are_named_by_their_bytes() -> None:
    with torch.inference_mode():
        ids = torch.zeros(20000, dtype=torch.int64)
        key = P.documents(ids).expression_key()
        ids[5] = 1
        assert P.documents(ids).expression_key() != key
        assert P.documents(ids).nnz(20000, 20000) == 19999**2 + 1


def test_entries_of_one_tensor_differ() -> None:
    ids = torch.zeros(2, 20000, dtype=torch.int64)
    first, second = P.documents(ids), P.documents(ids)
    assert first.expression_key() == second.expression_key()
    assert first.entry == (0, 1)  # too large to compare


@pytest.mark.parametrize("again", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_patterns_can_be_copied_and_pickled(again) -> None:
    """Modules that hold a pattern are."""
    for pattern in (
        P.longformer(3, [0, 9]) & P.documents([0, 0, 1, 1]),
        P.per_head([P.from_dense(torch.eye(4).bool()), P.random(0.5, 1)]),
    ):
        before = pattern.dense(4, 4)
        copied = again(pattern)
        assert copied is not pattern
        assert torch.equal(copied.dense(4, 4), before)
        assert copied.expression_key() == pattern.expression_key()


# Memo


@pytest.fixture
def split(monkeypatch):
    """A stand-in for the split that counts its calls."""
    calls: list[tuple] = []
    module = types.ModuleType("mixgrain.formats.split")
    module.to_layout = lambda *args: calls.append(args) or object()
    monkeypatch.setitem(sys.modules, "mixgrain.formats.split", module)
    cache.clear_caches()
    yield calls
    cache.clear_caches()


def test_layouts_are_remembered_by_expression(split) -> None:
    a = P.longformer(3, [0, 9]).to_layout("mixed", 16, 16)
    assert P.longformer(3, [0, 9]).to_layout("mixed", 16, 16, device="cpu") is a
    assert len(split) == 1
    pattern, *rest = split[0]
    assert repr(pattern) == "window(3) | global_tokens([0, 9])"
    assert rest == ["mixed", 16, 16, 64, torch.device("cpu"), None]
    others = [
        P.longformer(3, [0, 8]).to_layout("mixed", 16, 16),
        P.longformer(3, [0, 9]).to_layout("block", 16, 16),
        P.longformer(3, [0, 9]).to_layout("mixed", 15, 16),
        P.longformer(3, [0, 9]).to_layout("mixed", 16, 16, size=32),
        P.longformer(3, [0, 9]).to_layout("mixed", 16, 16, costs=Costs.h200()),
    ]
    assert len({id(x) for x in [a, *others]}) == len(split) == 6
    cache.clear_caches()
    assert P.longformer(3, [0, 9]).to_layout("mixed", 16, 16) is not a


def test_a_change_in_place_makes_a_new_layout(split) -> None:
    ids = torch.zeros(20000, dtype=torch.int64)
    pattern = P.documents(ids)
    a = pattern.to_layout("mixed", 20000, 20000)
    assert pattern.to_layout("mixed", 20000, 20000) is a
    ids[0] = 5
    assert pattern.to_layout("mixed", 20000, 20000) is not a


def test_the_memo_holds_sixty_four(split) -> None:
    first = P.window(0).to_layout("row", 4, 4)
    for k in range(1, 64):
        P.window(k).to_layout("row", 4, 4)
    assert P.window(0).to_layout("row", 4, 4) is first  # and is now the youngest
    P.window(64).to_layout("row", 4, 4)
    assert len(cache.layouts) == 64
    assert P.window(0).to_layout("row", 4, 4) is first
    count = len(split)
    P.window(1).to_layout("row", 4, 4)
    assert len(split) == count + 1


def test_a_failed_build_is_not_remembered() -> None:
    memo: cache.LRU[int] = cache.LRU(2)
    with pytest.raises(ZeroDivisionError):
        memo.get("a", lambda: 1 // 0)
    assert memo.get("a", lambda: 1) == 1
    assert memo.get("a", lambda: 2) == 1
