"""Sketches read literally: what is in a band, a unit, a line, a column or a list is kept."""

import pytest
import torch
from attention_cases import DIRECT, PATTERNS, UNIT_SIZES
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixgrain import patterns as P
from mixgrain.attention.cuda.choice import split_costs
from mixgrain.attention.cuda.planner import BANDS
from mixgrain.formats.costs import Costs
from mixgrain.formats.pattern import Frame, Pattern
from mixgrain.formats.pattern_static import BlockWindow
from mixgrain.formats.sketch import UNIT, Sketch, sketch

# Beside those, an interval of every line.
SKETCHED = {**DIRECT, "block window": lambda n: BlockWindow(128, 2)}


def read(found: Sketch, nq: int, nk: int) -> Tensor:
    """bool (nq, nk)."""
    rows, keys = torch.arange(nq), torch.arange(nk)
    kept = torch.zeros(nq, nk, dtype=torch.bool)
    for band in found.bands:
        low, high = map(torch.from_numpy, band.at(rows.numpy()))
        assert (low >= 0).all() and (high <= nk).all()
        kept |= (low[:, None] <= keys) & (keys < high[:, None])
    if found.units is not None:
        kept |= torch.from_numpy(found.units.copy())[rows // UNIT][:, keys // UNIT]
    for first, last in found.lines.tolist():
        kept[first * UNIT : last * UNIT] = True
    for first, last in found.columns.tolist():
        kept[:, first * UNIT : last * UNIT] = True
    for members in (found.queries, found.keys):
        assert (members[1:] > members[:-1]).all()
    kept[:, found.keys] = True
    kept[found.queries] = True
    return kept


def check(pattern: Pattern, nq: int, nk: int, costs: Costs) -> Sketch | None:
    found = sketch(pattern, Frame(nq, nk, torch.device("cpu")), costs)
    if found is not None:
        assert len(found.bands) <= BANDS
        assert torch.equal(read(found, nq, nk), pattern.dense(nq, nk))
    return found


@pytest.mark.parametrize("size", UNIT_SIZES, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_small_patterns(name, size) -> None:
    pattern = PATTERNS[name](*size)
    for flat in pattern.distinct:
        check(flat, *size, Costs.h200())


@pytest.mark.parametrize("n", [1024, 2000, 4096])
@pytest.mark.parametrize("name", SKETCHED)
def test_large_patterns(name, n) -> None:
    if n % 64 and name == "blocks":
        pytest.skip("a mask of whole blocks")
    found = check(SKETCHED[name](n), n, n, split_costs(64))
    # Between units, what is listed may be a matter of single entries; so it is where lists are long
    # for so few keys.
    assert found is not None or n % 64 or (n == 1024 and name in ("scattered", "keys"))
    if n == 4096:
        assert (len(found.keys) > 0) == (name in ("scattered", "keys"))
        assert (len(found.queries) > 0) == (name in ("scattered", "queries"))


@given(
    st.integers(1, 300), st.integers(1, 300), st.integers(0, 90), st.integers(0, 200),
    st.lists(st.integers(0, 299), max_size=12), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_window_and_globals(nq, nk, left, right, tokens, rows, columns) -> None:
    pattern = P.window(left, right)
    inside = [t for t in tokens if t < min(nq, nk)]
    if rows:
        pattern = pattern | P.global_queries(inside)
    if columns:
        pattern = pattern | P.global_keys(inside)
    check(pattern, nq, nk, Costs.h200())


def some_documents(n: int, lengths: list[int]) -> Pattern:
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return P.documents(torch.nn.functional.pad(ids, (0, n), value=len(lengths))[:n])


N = 210
TERMS = st.one_of(
    st.builds(P.window, st.integers(0, 150), st.integers(0, 90)),
    st.just(P.causal()),
    st.builds(P.sinks, st.integers(1, 150)),
    st.builds(some_documents, st.just(N), st.lists(st.integers(1, 90), min_size=1, max_size=3)),
)
MIXED = st.recursive(
    TERMS,
    lambda terms: st.builds(
        lambda first, second, meet: first & second if meet else first | second,
        terms, terms, st.booleans(),
    ),
    max_leaves=5,
)  # fmt: skip


@given(MIXED)
def test_any_mixture_of_intervals(pattern) -> None:
    for flat in pattern.distinct:
        check(flat, N, N, split_costs(64))


def test_several_windows_within_two_kinds_of_documents() -> None:
    first, second = some_documents(N, [70, 80]), some_documents(N, [100, 33])
    for rest in (P.window(20, 0) | P.window(0, 70), P.window(20, 0) | P.sinks(70)):
        assert check(first & second & rest, N, N, split_costs(64)) is not None


def test_what_layouts_have_to_decide() -> None:
    frame = Frame(1024, 1024, torch.device("cpu"))
    for pattern in (P.random(0.01, 1), P.window(9) | P.random(0.01, 1), P.dilated(9, 3)):
        assert sketch(pattern, frame, split_costs(64)) is None
    assert sketch(P.causal(), Frame(0, 5, frame.device), split_costs(64)) is None


def test_large_rectangles_have_no_lists_of_units() -> None:
    frame, costs = Frame(4096, 4096, torch.device("cpu")), split_costs(64)
    for name, make in SKETCHED.items():
        pattern = make(4096)
        small, large = (sketch(pattern, frame, costs, size) for size in (False, True))
        if small is not None and small.units is not None:
            assert large is None, name
        else:
            assert (small is None) == (large is None), name
        if large is not None:
            assert torch.equal(read(large, 4096, 4096), pattern.dense(4096, 4096)), name


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=12),
    nq=st.integers(1, 300),
    again=st.booleans(),
)
def test_documents_are_stretches_of_rows(lengths, nq, again) -> None:
    nk = sum(lengths)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    if again:
        ids[-1] = 0  # a document that comes back, unless there is one alone
    pattern, frame = P.documents(ids), Frame(nq, nk, torch.device("cpu"))
    mask = pattern.dense(nq, nk)
    found = pattern.stretches(frame)
    back = again and len(lengths) > 1 and not (len(lengths) == 2 and lengths[1] == 1)
    assert (found is None) == back
    if found is None:
        return
    rows, lo, hi = found
    assert rows[0] == 0 and (rows[1:] > rows[:-1]).all() and rows[-1] < nq
    at = torch.searchsorted(rows, frame.rows(), right=True) - 1
    keys = torch.arange(nk)
    assert torch.equal((lo[at, None] <= keys) & (keys < hi[at, None]), mask)
    ((low, high),) = pattern.bands(frame)
    assert torch.equal((low[:, None] <= keys) & (keys < high[:, None]), mask)
    for one in (pattern, pattern & P.causal(), pattern & (P.window(20, 0) | P.sinks(70))):
        made = check(one, nq, nk, split_costs(64))
        assert made is not None and all(band.rows is not None for band in made.bands)
