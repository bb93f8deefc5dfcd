"""The patterns given by a formula, against literal predicates; errors; texts; sizes."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import predicates as L
import pytest
import torch
from pattern_checks import check_forms, check_suffix

from mixgrain.formats import pattern_queries
from mixgrain.formats import patterns as P
from mixgrain.formats.errors import DtypeError, LayoutError, ShapeError


def ids_of(nk: int) -> list[int]:
    return [i // 9 for i in range(nk)]  # contiguous: one interval a row


def scattered_ids_of(nk: int) -> list[int]:
    return [(i * i) % 5 - 1 for i in range(nk)]


TOKENS = [7, 0, 33, 34, 35, 500, 7]

# name: (pattern of nk, predicate)
FORMULAS = {
    "full": (lambda nk: P.full(), L.full()),
    "causal": (lambda nk: P.causal(), L.causal()),
    "window": (lambda nk: P.window(5), L.window(5)),
    "window of one": (lambda nk: P.window(0), L.window(0)),
    "window, two radii": (lambda nk: P.window(3, 9), L.window(3, 9)),
    "window, causal": (lambda nk: P.window(4, 0), L.window(4, 0)),
    "window, no bound before": (lambda nk: P.window(math.inf, 2), L.window(math.inf, 2)),
    "window, no bound after": (lambda nk: P.window(2, math.inf), L.window(2, math.inf)),
    "window, no bounds": (lambda nk: P.window(math.inf), L.window(math.inf)),
    "window beyond int64": (lambda nk: P.window(1 << 70), L.window(1 << 70)),
    "dilated": (lambda nk: P.dilated(4, 3), L.dilated(4, 3)),
    "dilated by 1": (lambda nk: P.dilated(4, 1), L.dilated(4, 1)),
    "dilated, only itself": (lambda nk: P.dilated(0, 3), L.dilated(0, 3)),
    "dilated, wide": (lambda nk: P.dilated(1000, 7), L.dilated(1000, 7)),
    "dilated, no bound": (lambda nk: P.dilated(math.inf, 5), L.dilated(math.inf, 5)),
    "dilated, step beyond": (lambda nk: P.dilated(2, 99), L.dilated(2, 99)),
    "global tokens": (lambda nk: P.global_tokens(TOKENS), L.global_tokens(TOKENS)),
    "global tokens, one": (lambda nk: P.global_tokens([6]), L.global_tokens([6])),
    "global tokens, none": (lambda nk: P.global_tokens([]), L.global_tokens([])),
    "global tokens, all": (lambda nk: P.global_tokens(range(70)), L.global_tokens([*range(70)])),
    "global keys": (lambda nk: P.global_keys(TOKENS), L.global_keys(TOKENS)),
    "global keys, a range": (lambda nk: P.global_keys(range(3, 9)), L.global_keys([*range(3, 9)])),
    "global keys, no range": (lambda nk: P.global_keys(range(9, 3)), L.global_keys([])),
    "global queries, no range": (lambda nk: P.global_queries(range(64, 60)), L.global_queries([])),
    "global keys, a tensor": (
        lambda nk: P.global_keys(torch.tensor(TOKENS, dtype=torch.int32)),
        L.global_keys(TOKENS),
    ),
    "global queries": (lambda nk: P.global_queries(TOKENS), L.global_queries(TOKENS)),
    "sinks": (lambda nk: P.sinks(4), L.sinks(4)),
    "sinks, none": (lambda nk: P.sinks(0), L.sinks(0)),
    "documents": (lambda nk: P.documents(ids_of(nk)), L.documents(ids_of)),
    "documents, scattered": (
        lambda nk: P.documents(scattered_ids_of(nk)),
        L.documents(scattered_ids_of),
    ),
    "longformer": (lambda nk: P.longformer(3, TOKENS), L.longformer(3, TOKENS)),
    "bigbird without random blocks": (
        lambda nk: P.bigbird(8, 1, 0, 2, seed=0),
        L.bigbird_fixed(8, 1, 2),
    ),
    "bigbird without globals": (
        lambda nk: P.bigbird(5, 2, 0, 0, seed=0),
        L.bigbird_fixed(5, 2, 0),
    ),
}
formulas = pytest.mark.parametrize("name", FORMULAS)


@formulas
@pytest.mark.parametrize("nk", L.SIDES)
def test_dense_is_the_predicate(name, nk) -> None:
    make, keep = FORMULAS[name]
    pattern = make(nk)
    for nq in L.SIDES:
        mask = pattern.dense(nq, nk)
        assert (mask.dtype, mask.shape) == (torch.bool, (nq, nk))
        assert torch.equal(mask, L.mask_of(keep, nq, nk)), (nq, nk)


@formulas
@pytest.mark.parametrize("nq, nk", [(0, 7), (7, 0), (1, 1), (64, 64), (33, 70), (70, 33)])
def test_forms_agree(name, nq, nk) -> None:
    pattern = FORMULAS[name][0](nk)
    check_forms(pattern, pattern.dense(nq, nk))


@formulas
@pytest.mark.parametrize("nk", [1, 33, 70])
def test_suffix_law(name, nk) -> None:
    check_suffix(FORMULAS[name][0](nk), nk)


@formulas
def test_small_chunks_change_nothing(name, monkeypatch) -> None:
    pattern = FORMULAS[name][0](70)
    mask = pattern.dense(64, 70)
    monkeypatch.setattr(pattern_queries, "ROWS_PER_CHUNK", 5)
    monkeypatch.setattr(pattern_queries, "DENSE_PER_CHUNK", 100)
    assert torch.equal(pattern.dense(64, 70), mask)
    assert pattern.nnz(64, 70) == int(mask.sum())


@pytest.mark.gpu
@formulas
def test_the_gpu_keeps_the_same(name) -> None:
    for nq, nk in ((0, 7), (7, 0), (64, 70), (70, 33)):
        pattern = FORMULAS[name][0](nk)
        mask = pattern.dense(nq, nk, device="cuda")
        assert mask.is_cuda
        assert torch.equal(mask.cpu(), pattern.dense(nq, nk))


@pytest.mark.gpu
def test_a_pattern_of_gpu_tensors_lives_there() -> None:
    ids = torch.tensor([0, 0, 1], device="cuda")
    assert P.documents(ids).device == (P.causal() | ~P.documents(ids)).device == ids.device
    assert P.documents(ids).dense(3, 3).is_cuda
    assert P.documents(ids).nnz(3, 3) == 5
    with pytest.raises(LayoutError, match="index -1"):  # found at the first use, not before
        P.global_keys(ids - 1).nnz(3, 3)


def test_a_negative_position_keeps_what_the_formula_says() -> None:
    assert P.window(1).dense(2, 1).tolist() == [[True], [True]]  # position -1 is next to key 0
    assert P.causal().dense(2, 1).tolist() == [[False], [True]]
    assert P.global_queries([0]).dense(2, 1).tolist() == [[False], [True]]


# Batch entries and heads


def test_documents_of_a_batch() -> None:
    ids = torch.tensor([[0, 0, 1], [0, 1, 1], [0, 0, 1]])
    pattern = P.documents(ids)
    assert (pattern.lead, pattern.entry, len(pattern.distinct)) == ((3, 1), (0, 1, 0), 2)
    mask = pattern.dense(3, 3)
    assert torch.equal(mask, (ids[:, :, None] == ids[:, None, :])[:, None])
    assert pattern.nnz(3, 3) == int(mask.sum())


def test_per_head() -> None:
    parts = [P.window(1), P.causal(), P.window(1), P.window(1, 1)]
    pattern = P.per_head(parts)
    assert (pattern.lead, pattern.entry) == ((1, 4), (0, 1, 0, 0))
    mask = pattern.dense(5, 6)
    assert torch.equal(mask, torch.stack([p.dense(5, 6) for p in parts]))
    assert pattern.nnz(5, 6) == int(mask.sum())
    assert pattern.density(5, 6) == int(mask.sum()) / mask.numel()
    assert P.per_head([P.causal()]).dense(5, 6).shape == (1, 5, 6)


def test_per_batch_of_per_head() -> None:
    heads = P.per_head([P.window(1), P.full()])
    pattern = P.per_batch([heads, P.causal(), P.window(1)])
    assert (pattern.lead, pattern.entry) == ((3, 2), (0, 1, 2, 2, 0, 0))
    mask = pattern.dense(4, 4)
    assert mask.shape == (3, 2, 4, 4)
    assert torch.equal(mask[0], heads.dense(4, 4))
    assert torch.equal(mask[1, 1], P.causal().dense(4, 4))
    assert P.per_batch([P.causal()]).dense(4, 4).shape == (1, 1, 4, 4)


def test_operators_go_entry_by_entry() -> None:
    heads, batch = P.per_head([P.window(1), P.full()]), P.per_batch([P.causal(), P.sinks(2)])
    a, b = heads.dense(4, 6), batch.dense(4, 6)
    assert (heads | batch).lead == (2, 2)
    assert torch.equal((heads | batch).dense(4, 6), a | b)
    assert torch.equal((batch & heads).dense(4, 6), a & b)
    assert torch.equal((heads - batch).dense(4, 6), a & ~b)
    assert torch.equal((~heads).dense(4, 6), ~heads.dense(4, 6))
    flat = P.dilated(1, 2) | heads
    assert flat.lead == (1, 2)
    assert torch.equal(flat.dense(4, 6), P.dilated(1, 2).dense(4, 6) | heads.dense(4, 6))


def test_operators_merge_entries_that_become_equal() -> None:
    heads = P.per_head([P.window(1), P.window(2)])
    assert len((heads & P.per_head([P.window(2), P.window(1)])).distinct) == 2
    table = P.per_head([P.window(1), ~P.window(1)])
    assert len((~table).distinct) == 2
    assert torch.equal((~table).dense(3, 3), ~table.dense(3, 3))


def test_blocks_of_a_table_hold_for_all_entries() -> None:
    pattern = P.per_head([P.full(), P.causal()])
    assert pattern.block(1, 0, 2, 4, 4) == "full"
    assert pattern.block(0, 1, 2, 4, 4) == "partial"
    assert (pattern & P.sinks(1)).block(0, 1, 2, 4, 4) == "empty"


# What a user reads

TEXTS = {
    "window(256) | global_tokens([0, 7])": lambda: P.longformer(256, [0, 7]),
    "window(3, 0)": lambda: P.window(3, 0),
    "window(inf, 0)": lambda: P.window(math.inf, 0),
    "(causal() | sinks(4)) & ~window(2)": lambda: (P.causal() | P.sinks(4)) - P.window(2),
    "~(full() & causal())": lambda: ~(P.full() & P.causal()),
    "dilated(3, 2)": lambda: P.dilated(3, 2),
    "global_keys([0, 1, 2, …, 63; 64 in all])": lambda: P.global_keys(range(64)),
    "global_queries([])": lambda: P.global_queries([]),
    "documents([0, 0, 1])": lambda: P.documents([0, 0, 1]),
    "random(0.25, 3)": lambda: P.random(0.25, 3),
    "random_blocks(2, 16, 5)": lambda: P.random_blocks(2, 16, 5),
    "per_head([window(1), causal()])": lambda: P.per_head([P.window(1), P.causal()]),
    "per_batch([per_head([full(), full()]), per_head([full(), causal()])])": lambda: P.per_batch(
        [P.full(), P.per_head([P.full(), P.causal()])]
    ),
    "per_batch([full(), causal()])": lambda: P.per_batch([P.full(), P.causal()]),
    "nm(2, 4) & window(8)": lambda: P.window(8) & P.nm(2, 4),
    "nm(2, 4) & (window(8) | sinks(1))": lambda: P.nm(2, 4) & (P.window(8) | P.sinks(1)),
    "from_dense(<2x3>)": lambda: P.from_dense(torch.ones(2, 3, dtype=torch.bool)),
    "from_csr(<2 of 1x5>)": lambda: P.from_csr([0, 2], [1, 4], (1, 5)),
    "blocks(<2x3>, 16)": lambda: P.blocks(torch.ones(2, 3, dtype=torch.bool), 16),
}


@pytest.mark.parametrize("text", TEXTS)
def test_text_reads_like_the_expression(text) -> None:
    assert repr(TEXTS[text]()) == text


ERRORS = {
    "negative radius": (lambda: P.window(-1), LayoutError, "window.left.*-1 given"),
    "fractional radius": (lambda: P.window(2.5), LayoutError, "2.5 given"),
    "radius not a number": (lambda: P.window(3, math.nan), LayoutError, "window.right"),
    "radius as text": (lambda: P.window("3"), LayoutError, "'3' given"),
    "minus infinity": (lambda: P.window(-math.inf), LayoutError, "-inf given"),
    "radius as bool": (lambda: P.window(True), LayoutError, "True given"),
    "step 0": (lambda: P.dilated(2, 0), LayoutError, "integer >= 1"),
    "negative token": (lambda: P.global_tokens([3, -1]), LayoutError, "index -1"),
    "negative key": (lambda: P.global_keys([-2]), LayoutError, "index -2"),
    "negative query": (lambda: P.global_queries([-2]), LayoutError, "index -2"),
    "fractional token": (lambda: P.global_tokens([0.5]), DtypeError, "integers expected"),
    "tokens as a mask": (lambda: P.global_tokens([True]), DtypeError, "torch.bool given"),
    "tokens 2-D": (lambda: P.global_tokens([[1]]), ShapeError, "1-D expected"),
    "tokens as text": (lambda: P.global_tokens("ab"), LayoutError, "no tensor or sequence"),
    "negative sinks": (lambda: P.sinks(-1), LayoutError, "integer >= 0"),
    "ids 3-D": (lambda: P.documents(torch.zeros(1, 1, 1).long()), ShapeError, "1-D or 2-D"),
    "ids of no batch": (lambda: P.documents(torch.zeros(0, 4).long()), LayoutError, "at least one"),
    "float ids": (lambda: P.documents([0.0]), DtypeError, "integers expected"),
    "ids of another length": (
        lambda: P.documents([0, 1]).nnz(3, 3),
        LayoutError,
        "2 ids .* 3 keys",
    ),
    "density above 1": (lambda: P.random(1.5, 0), LayoutError, "from 0 to 1"),
    "density not a number": (lambda: P.random(math.nan, 0), LayoutError, "from 0 to 1"),
    "seed not an integer": (lambda: P.random(0.5, 0.5), LayoutError, "seed"),
    "blocks of 0": (lambda: P.random_blocks(1, 0, 0), LayoutError, "size"),
    "bigbird window": (lambda: P.bigbird(8, -1, 0, 0, 0), LayoutError, "bigbird.window"),
    "no heads": (lambda: P.per_head([]), LayoutError, "at least one"),
    "not a pattern": (lambda: P.per_head([3]), LayoutError, "3 given"),
    "batch in heads": (
        lambda: P.per_head([P.per_batch([P.full()])]),
        LayoutError,
        "not the reverse",
    ),
    "heads that differ in number": (
        lambda: P.per_head([P.full()] * 2) | P.per_head([P.full()] * 3),
        ShapeError,
        "2 and 3 heads",
    ),
    "heads that differ in a batch": (
        lambda: P.per_batch([P.per_head([P.full()] * 2), P.per_head([P.full()] * 3)]),
        ShapeError,
        "2 and 3 heads",
    ),
    "row of a table": (lambda: P.per_head([P.full()]).row(0, 2, 2), LayoutError, "distinct"),
    "factor of a table": (lambda: P.per_head([P.full()]).factor(None), LayoutError, "distinct"),
    "row beyond": (lambda: P.full().row(2, 2, 2), LayoutError, "0 <= row < 2"),
    "block beyond": (lambda: P.full().block(0, 1, 4, 4, 4), LayoutError, r"\(0, 0\) to \(0, 0\)"),
    "negative size": (lambda: P.full().nnz(-1, 4), ShapeError, "nq = -1"),
    "nm of more than m": (lambda: P.nm(5, 4), LayoutError, "n = 5 of m = 4"),
    "nm |": (lambda: P.nm(2, 4) | P.full(), LayoutError, "no |"),
    "| nm": (lambda: P.full() | P.nm(2, 4), LayoutError, "no |"),
    "nm -": (lambda: P.nm(2, 4) - P.full(), LayoutError, "no -"),
    "- nm": (lambda: P.full() - P.nm(2, 4), LayoutError, "no ~"),
    "~nm": (lambda: ~P.nm(2, 4), LayoutError, "no ~"),
    "nm & nm": (lambda: P.nm(2, 4) & P.nm(2, 4), LayoutError, "two P.nm"),
    "dense of nm": (lambda: P.nm(2, 4).dense(4, 4), LayoutError, "no dense"),
    "row of nm": (lambda: P.nm(2, 4).row(0, 4, 4), LayoutError, "no row"),
    "block of nm": (lambda: P.nm(2, 4).block(0, 0, 4, 4, 4), LayoutError, "no block"),
    "layout of nm": (lambda: P.nm(2, 4).to_layout("row", 4, 4), LayoutError, "no static layout"),
    "nm per head": (lambda: P.per_head([P.nm(2, 4)]), LayoutError, "combine P.nm"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(name) -> None:
    call, kind, text = ERRORS[name]
    with pytest.raises(kind, match=text):
        call()


@pytest.mark.parametrize("operator", ["__or__", "__and__", "__sub__"])
def test_operators_leave_other_types_alone(operator) -> None:
    assert getattr(P.full(), operator)(3) is NotImplemented


# Large: in a child process that may grow by so many MiB only; a mask of 65,536 squared is 4,096

CHILD = """
import resource, sys, time, torch
torch.set_num_threads(1)
from mixgrain.formats import patterns as P
n, limit = {n}, {mib} << 20
make = lambda: {expression}
make().nnz(1 << 10, 1 << 10)  # torch's first calls load and allocate
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
start = time.perf_counter()
print(make().nnz(n, n), time.perf_counter() - start)
"""


def count_in_child(expression: str, n: int, mib: int) -> tuple[int, float]:
    code = CHILD.format(n=n, mib=mib, expression=expression)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    total, seconds = done.stdout.split()
    return int(total), float(seconds)


@pytest.mark.slow
def test_a_million_tokens_are_counted_in_little_time_and_memory() -> None:
    n, radius, count = 1 << 20, 256, 64
    expression = f"P.longformer({radius}, [k * 16384 + k * 37 for k in range({count})])"
    total, seconds = count_in_child(expression, n, mib=256)
    assert seconds < 2
    rows, keys = torch.arange(n), torch.arange(count) * (16384 + 37)
    lo, hi = (rows - radius).clamp(min=0), (rows + radius + 1).clamp(max=n)
    inside = torch.searchsorted(keys, hi) - torch.searchsorted(keys, lo)
    kept = hi - lo + count - inside
    kept[keys] = n
    assert total == int(kept.sum())


@pytest.mark.slow
@pytest.mark.parametrize(
    "expression",
    [
        "P.window(64) & P.causal() & ~P.sinks(4) | P.sinks(2)",
        "P.dilated(16, 64)",
        "P.random(1e-3, 0)",
        "P.bigbird(64, 1, 3, 2, 0)",
        "P.longformer(64, range(0, n, 1024)) & P.causal()",
        "P.nm(2, 4) & P.longformer(64, range(0, n, 1024))",
    ],
)
def test_sixty_five_thousand_tokens_stay_far_from_a_mask(expression) -> None:
    n = 65536
    total, _ = count_in_child(expression, n, mib=1024)
    assert 0 < total < n * n // 8
