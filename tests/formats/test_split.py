"""The split of patterns into layouts: exact, disjoint, cheap, and of the expected parts."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from layout_cases import RATES, check_layout, literal_mask

from mixgrain import patterns as P
from mixgrain.formats import cells
from mixgrain.formats.costs import Costs
from mixgrain.formats.errors import LayoutError
from mixgrain.formats.split import to_layout
from mixgrain.formats.words import count, distinct, pair_words, positions, used_columns

SHAPES = [(0, 0), (0, 5), (5, 0), (1, 1), (33, 70), (70, 33), (70, 70)]
SCATTERED = [3, 50, 51, 64]


PATTERNS = {
    "full": P.full(),
    "nothing": P.window(3) - P.full(),
    "causal": P.causal(),
    "window": P.window(9),
    "one side of a window, unbounded": P.window(4, float("inf")),
    "longformer, scattered": P.longformer(7, [1, 40, 60]),
    "longformer, first": P.longformer(7, [0, 1, 2]),
    "globals alone": P.global_tokens([1, 2, 30]),
    "global keys": P.window(3) | P.global_keys([3, 33]),
    "global queries": P.window(3) | P.global_queries([3, 33]),
    "every query global": P.global_queries(list(range(70))),
    "sinks and a causal window": P.sinks(3) | (P.causal() & P.window(8)),
    "bigbird": P.bigbird(16, 1, 1, 1, 0),
    "random": P.random(0.05, 1),
    "window and random": P.window(5) | P.random(0.02, 0),
    "vertical lines under the diagonal": P.causal() & P.global_keys([3, 40, 55]),
    "all but a window": ~P.window(4),
    "dilated": P.dilated(5, 3),
    "causal with holes": P.causal() - P.random(0.1, 3),
    "per head": P.per_head([P.window(3), P.random(0.1, 1), P.window(3), P.longformer(3, [7, 45])]),
    "per batch of per head": P.per_batch(
        [P.per_head([P.window(3), P.causal()]), P.per_head([P.causal(), P.global_keys([9])])]
    ),
}


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_mixed_layout_is_the_pattern_and_its_parts_are_disjoint(name: str, rates: str) -> None:
    pattern = PATTERNS[name]
    for nq, nk in SHAPES:
        mask = pattern.dense(nq, nk).reshape(*pattern.lead, nq, nk)
        layout = to_layout(pattern, "mixed", nq, nk, 16, costs=RATES[rates])
        check = check_layout if (nq, nk) == (33, 70) else _check_quickly
        check(layout, mask)


def _check_quickly(layout, mask) -> None:
    layout.validate()
    assert torch.equal(literal_mask(layout), mask)
    assert torch.equal(layout.T.mask(), mask.transpose(-1, -2))
    assert layout.nnz == int(mask.sum())


# As of the fused kernels: scores never travel, a gathered column is dear, and so is one more part.
FUSED = {"private_panel_factor": 5.6, "slot_passes": 0.0, "row_seconds": 3e-10}


def test_a_few_blocks_join_the_entries() -> None:
    n = 4096
    pattern = P.random(0.006, 0)
    dear, free = (Costs(3.7e14, 4.2e12, 7e12, launch_seconds=t, **FUSED) for t in (3e-6, 0.0))
    mixed, alone = (to_layout(pattern, "mixed", n, n, costs=c) for c in (free, dear))
    assert [part.kind for part in mixed.parts] == ["block", "row"]
    assert [part.kind for part in alone.parts] == ["row"]
    assert mixed.nnz == alone.nnz == alone.parts[0].nnz
    assert torch.equal(alone.mask(), pattern.dense(n, n)[None, None])
    # Rows that held no entry before cost more than what a part of blocks does.
    diagonal = to_layout(P.window(0) | P.random(1e-5, 0), "mixed", 65536, 65536, costs=dear)
    assert diagonal.parts[0].kind == "block" and diagonal.parts[-1].nnz < 1000
    # What fills its block stays one.
    filled = torch.zeros(64, 64, dtype=torch.bool)
    filled[3, 5] = True
    both = to_layout(pattern | P.blocks(filled, 64), "mixed", n, n, costs=dear)
    assert "block" in [part.kind for part in both.parts]


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("name", PATTERNS)
def test_every_block_size(name: str, size: int) -> None:
    pattern = PATTERNS[name]
    for nq, nk in [(70, 33), (130, 200)]:
        mask = pattern.dense(nq, nk).reshape(*pattern.lead, nq, nk)
        for kind in ("block", "mixed"):
            layout = to_layout(pattern, kind, nq, nk, size, costs=RATES["no launches"])
            layout.validate()
            assert torch.equal(layout.mask(), mask)
            assert layout.nnz == int(mask.sum())


@pytest.mark.parametrize("name", PATTERNS)
def test_row_and_block_layouts(name: str) -> None:
    pattern = PATTERNS[name]
    for nq, nk in SHAPES:
        mask = pattern.dense(nq, nk).reshape(*pattern.lead, nq, nk)
        for kind in ("row", "block"):
            layout = to_layout(pattern, kind, nq, nk, 16)
            assert layout.kind == kind and layout.lead == pattern.lead
            check = check_layout if (nq, nk) == (33, 70) else _check_quickly
            check(layout, mask)


def test_random_expressions() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = pytest.importorskip("hypothesis.strategies")
    index = st.lists(st.integers(0, 80), min_size=1, max_size=6, unique=True)
    leaf = st.one_of(
        st.builds(P.window, st.integers(0, 40), st.integers(0, 40)),
        st.builds(P.global_tokens, index),
        st.builds(P.global_keys, index),
        st.builds(P.global_queries, index),
        st.builds(P.sinks, st.integers(0, 20)),
        st.builds(P.random, st.sampled_from([0.01, 0.1, 0.6]), st.integers(0, 5)),
        st.builds(P.dilated, st.integers(0, 9), st.integers(1, 5)),
        st.builds(P.causal),
    )
    tree = st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a - b, inner, inner),
            st.builds(lambda a: ~a, inner),
            st.builds(lambda a, b: P.per_head([a, b, a]), leaf, leaf),
        ),
        max_leaves=5,
    )

    @hypothesis.given(
        tree, st.integers(0, 80), st.integers(0, 80), st.sampled_from([16, 32, 64]),
        st.sampled_from(sorted(RATES)),
    )  # fmt: skip
    def check(pattern, nq, nk, size, rates) -> None:
        mask = pattern.dense(nq, nk).reshape(*pattern.lead, nq, nk)
        layout = to_layout(pattern, "mixed", nq, nk, size, costs=RATES[rates])
        layout.validate()
        together = torch.zeros_like(mask, dtype=torch.int64)
        for part in layout.parts:
            together += literal_mask(part)
        assert torch.equal(together, mask.long())

    check()


def _parts(pattern, n: int, costs: Costs, size: int = 64) -> dict[str, int]:
    return {p.kind: p.nnz for p in to_layout(pattern, "mixed", n, n, size, costs=costs).parts}


def _scattered(n: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:64].sort()[0].tolist()


@pytest.mark.parametrize("costs", [Costs.h200(), Costs.cpu()], ids=["h200", "cpu"])
def test_scattered_global_tokens_become_two_shared_panels(costs: Costs) -> None:
    n = 16384
    layout = to_layout(P.longformer(256, _scattered(n)), "mixed", n, n, costs=costs)
    assert [p.kind for p in layout.parts] == ["block", "panel"]
    blocks, panels = layout.parts
    assert panels.panels == 2
    assert sorted(panels.row_count.tolist()) == [64, n - 64]
    assert blocks.slots <= n // 64 * 9 * 64 * 64
    assert panels.slots == 2 * 64 * n - 64 * 64


@pytest.mark.parametrize("costs", [Costs.h200(), Costs.cpu()], ids=["h200", "cpu"])
@pytest.mark.parametrize(
    "pattern",
    [
        P.window(256), P.causal(), P.full(), P.bigbird(64, 1, 3, 2, 0), P.window(128),
        P.window(256) | P.global_tokens(list(range(64))),
        P.documents(torch.arange(8192) // 1000) & P.causal(),
    ],
    ids=["window", "causal", "full", "bigbird", "narrow window", "first 64 global", "documents"],
)  # fmt: skip
def test_coarse_patterns_become_blocks_only(pattern, costs: Costs) -> None:
    assert list(_parts(pattern, 8192, costs)) == ["block"]


@pytest.mark.parametrize("costs", [Costs.h200(), Costs.cpu()], ids=["h200", "cpu"])
def test_a_window_with_sparse_random_keys_becomes_blocks_and_fine_parts(costs: Costs) -> None:
    n = 8192
    pattern = P.window(256) | P.random(0.005, 0)
    parts = _parts(pattern, n, costs)
    assert list(parts) == ["block", "row"]
    assert parts["row"] >= 0.9 * (pattern.nnz(n, n) - P.window(256).nnz(n, n))


def test_columns_that_a_row_group_shares_become_a_private_panel() -> None:
    n = 16384
    pattern = (P.causal() & P.global_keys(_scattered(n))) | (P.causal() & P.window(256))
    layout = to_layout(pattern, "mixed", n, n, costs=Costs.h200())
    assert [p.kind for p in layout.parts] == ["block", "panel"]
    assert layout.parts[1].panels > 200


def test_tiny_matrices_are_blocks() -> None:
    for name, pattern in PATTERNS.items():
        layout = to_layout(pattern, "mixed", 70, 70, costs=Costs.h200())
        assert {p.kind for p in layout.parts} <= {"block"}, name


def test_masks_of_a_window_are_a_handful() -> None:
    layout = to_layout(P.window(100), "block", 4096, 4096)
    assert layout.masks.shape[0] <= 4
    heads = P.per_head([P.window(100), P.window(100) | P.global_keys([0]), P.causal()])
    assert to_layout(heads, "block", 4096, 4096).masks.shape[0] <= 12


def test_equal_heads_are_stored_once() -> None:
    layout = to_layout(P.per_head([P.window(9)] * 5), "mixed", 640, 640)
    one = to_layout(P.window(9), "mixed", 640, 640)
    assert layout.nnz == 5 * one.nnz and layout.entry == (0,) * layout.entries
    assert layout.parts[0].block_columns.numel() == one.parts[0].block_columns.numel()


@pytest.mark.parametrize(
    "kind, size, says",
    [("tile", 64, "kind 'tile'; choose one of 'block', 'row', 'mixed'"), ("mixed", 48, "size 48")],
)
def test_what_cannot_be_built_is_refused(kind: str, size: int, says: str) -> None:
    with pytest.raises(LayoutError, match=says):
        to_layout(P.causal(), kind, 64, 64, size)


def test_a_pattern_of_a_fixed_shape_refuses_another() -> None:
    pattern = P.from_dense(torch.ones(8, 8, dtype=torch.bool))
    for kind in ("block", "row", "mixed"):
        with pytest.raises(LayoutError):
            to_layout(pattern, kind, 8, 9)


def test_costs_compare_as_the_design_says() -> None:
    for costs in (Costs.h200(), Costs.cpu()):
        block = costs.block_seconds(64)
        assert costs.block_seconds(64, 128) > block
        assert costs.panel_seconds(64, 64, private=True) == pytest.approx(
            costs.private_panel_factor * block
        )
        shared = costs.panel_seconds(64 * 1000, 64) / 1000
        assert block <= shared < 1.01 * block
        assert costs.panel_seconds(0, 64) == costs.panel_seconds(64, 0) == 0
        assert costs.entries_seconds(10) == pytest.approx(10 * costs.entries_seconds(1))
        assert hash(costs) == hash(type(costs)(**vars(costs)))


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_words_round_trip_count_and_deduplicate(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    masks = torch.rand(6, size, size, generator=generator) < 0.3
    masks[3], masks[4] = masks[0], masks[1]
    masks[5, :, 1:] = False
    block, row, col = masks.nonzero(as_tuple=True)
    words = pair_words(block, row, col, 6, size)
    for found, expected in zip(positions(words, size), (block, row, col), strict=True):
        assert torch.equal(found, expected)
    assert count(words).tolist() == masks.flatten(1).sum(1).tolist()
    assert used_columns(words).tolist() == masks.any(1).sum(1).tolist()
    first, kind = distinct(words)
    assert first.tolist() == [0, 1, 2, 5] and kind.tolist() == [0, 1, 2, 0, 1, 3]


def test_masks_that_differ_in_the_topmost_bit_only_stay_apart() -> None:
    words = torch.zeros(64, 64, 1, dtype=torch.int64)
    words[torch.arange(64), torch.arange(64), 0] = -(1 << 63)
    assert distinct(words)[0].numel() == 64


def test_the_split_of_65536_tokens_is_fast() -> None:
    n = 65536
    pattern = P.longformer(256, _scattered(n))
    best = min(_timed(lambda: to_layout(pattern, "mixed", n, n)) for _ in range(5))
    assert best < 0.5, f"{best:.3f} s; 0.015 s on one idle core"


def _timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def test_a_million_tokens_fit_into_500_mib() -> None:
    root = Path(__file__).resolve().parents[2]
    code = """
        import resource, sys, torch
        from mixgrain import patterns as P
        from mixgrain.formats.split import to_layout
        torch.set_num_threads(1)
        to_layout(P.longformer(4, [1, 9]), "mixed", 99, 99)
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + (500 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        n = 1 << 20
        heavy = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:64].sort()[0]
        layout = to_layout(P.longformer(256, heavy), "mixed", n, n)
        assert [p.kind for p in layout.parts] == ["block", "panel"]
        print(layout.nnz)
    """
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc to see the size of the address space")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, env={"PYTHONPATH": str(root / "src"), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    n = 1 << 20
    assert int(done.stdout) == P.longformer(256, _scattered(n)).nnz(n, n)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_chunks_a_pattern_is_split_in_do_not_show(name: str, monkeypatch) -> None:
    pattern = PATTERNS[name]
    nq, nk = 150, 131
    whole = to_layout(pattern, "mixed", nq, nk, 16, costs=RATES["no launches"])
    for constant, few in [
        ("ROWS_PER_CHUNK", 48), ("CELLS_PER_CHUNK", 7), ("WORDS_PER_CHUNK", 64),
        ("RUNS_PER_CHUNK", 5),
    ]:  # fmt: skip
        monkeypatch.setattr(cells, constant, few)
    chunked = to_layout(pattern, "mixed", nq, nk, 16, costs=RATES["no launches"])
    chunked.validate()
    assert torch.equal(chunked.mask(), whole.mask())
    assert [p.kind for p in chunked.parts] == [p.kind for p in whole.parts]
    assert chunked.part_offsets == whole.part_offsets


def test_rows_whose_intervals_lie_far_apart_leave_no_empty_blocks() -> None:
    n, size = 4096, 16
    # Row i of every block sees one key of its own, far from those of its neighbours.
    columns = (torch.arange(n) * 1021) % n
    pattern = P.from_csr(torch.arange(n + 1), columns, (n, n))
    layout = to_layout(pattern, "block", n, n, size)
    layout.validate()
    blocks = torch.unique(torch.arange(n) // size * (n // size) + columns // size)
    assert layout.nnz == n and layout.block_columns.numel() == blocks.numel()
