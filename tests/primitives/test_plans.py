"""Plans: buckets, the flattening that crosses the operator boundary, the cache."""

from __future__ import annotations

import pytest
import torch
from cases import BUILDERS, CASES, applies, build

from mixgrain.cuda.device import pretending
from mixgrain.formats.cache import clear_caches
from mixgrain.formats.patterns import window
from mixgrain.primitives.dispatch import TABLE, plan_for
from mixgrain.primitives.plans import cuda_block, cuda_row
from mixgrain.primitives.plans.block import bucket_rows
from mixgrain.primitives.plans.plan import join, split
from mixgrain.primitives.plans.row import MOST_WIDTHS, widths


def test_buckets_hold_every_row_once() -> None:
    counts = torch.randint(0, 5, (200,), generator=torch.Generator().manual_seed(0))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    buckets = bucket_rows(offsets)
    rows = torch.cat([bucket.rows for bucket in buckets])
    assert torch.equal(rows.sort().values, counts.nonzero()[:, 0])
    for bucket in buckets:
        assert bool((counts[bucket.rows] == bucket.count).all())
        assert torch.equal(bucket.first, offsets[bucket.rows])
        assert bool((bucket.rows.diff() > 0).all())
        pieces = bucket.split(7)
        assert torch.equal(torch.cat([piece.rows for piece in pieces]), bucket.rows)
        assert all(len(piece.rows) <= 7 for piece in pieces)


def test_consecutive_rows_are_seen() -> None:
    offsets = torch.tensor([0, 1, 3, 5, 7, 8])  # 1 2 2 2 1
    starts = {bucket.count: bucket.start for bucket in bucket_rows(offsets)}
    assert starts == {1: -1, 2: 1}
    assert [piece.start for piece in bucket_rows(offsets)[1].split(2)] == [1, 3]


def test_widths_of_irregular_rows_are_few_and_close() -> None:
    counts = torch.arange(0, 5000)
    padded = widths(counts)
    assert bool((padded >= counts).all()) and bool((padded <= counts * 9 / 8 + 1).all())
    assert padded.unique().numel() < 110
    regular = torch.arange(MOST_WIDTHS)
    assert torch.equal(widths(regular), regular)


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("name", ["odd sizes", "heads shared", "nothing kept"])
def test_plans_survive_the_boundary(kind: str, name: str) -> None:
    if not applies(kind, name):
        return
    layout = build(kind, name)
    plan = plan_for("spmm", layout)
    slots, shape, entry, parts = split(plan)
    assert (slots, shape, tuple(entry)) == (layout.slots, layout.shape, layout.entry)
    again = join(layout, parts)
    assert (again.dims, again.name) == (plan.dims, plan.name)
    assert all(a is b for a, b in zip(again.tensors, plan.tensors, strict=True))


def test_plans_are_made_once_and_forgotten_on_request() -> None:
    layout = build("mixed", "window")
    first = plan_for("spmm", layout)
    assert plan_for("softmax", layout) is first
    clear_caches()
    assert plan_for("spmm", layout) is not first


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_tables_of_one_architecture_are_planned_only_for_it(size: int) -> None:
    layout = window(30).to_layout("block", 300, 200, size=size)
    for arch, more in (("80", False), ("90a", True), ("100", False), ("90a", True)):
        with pretending(arch):
            for planner in (cuda_block.cuda, lambda it: cuda_block.part(it)):
                tensors = planner(layout).tensors
                assert len(tensors) == (10 if not more else 15 if size >= 64 else 17)
    with pretending("90a"):
        items, row_ptr, row_order = cuda_block.part(layout).tensors[:3]
        table, records = cuda_block.part(layout).tensors[10:12]
    if size >= 64:
        # Walking the records meets every item once, row by row, the longest first.
        assert records.tolist() == [
            [row, row_ptr[row], row_ptr[row + 1] - row_ptr[row]] for row in row_order.tolist()
        ]
        assert torch.equal(table[:, 1:3], items[:, 2:])


def test_every_case_reaches_every_cell() -> None:
    """The list keeps its promise: each kind of layout sees at least ten cases."""
    for cells in TABLE.values():
        for cls in cells:
            kinds = [kind for kind in BUILDERS if kind.split()[0] == cls.kind]
            assert kinds
            for kind in kinds:
                assert sum(applies(kind, name) for name in CASES) >= 10


@pytest.mark.parametrize("begin", [0, 2**31 - 100, 2**33 + 7])
def test_row_items_hold_every_position_once(begin: int) -> None:
    """Where an item starts is packed into two words; short ones stand entry by entry, sorted."""
    lines, counts = 5, torch.tensor([0, 513, 64, 65, 3, 5000, 1, 0, 2, 700])
    offsets = begin + torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    items, splits, (partials, long) = cuda_row.row_items(offsets, lines)
    row, packed, partial, low = items.long().unbind(1)
    length, first = packed & 0xFFFF, (packed >> 16 << 32) + (low & 0xFFFFFFFF)
    held = [torch.arange(int(a), int(a + n)) for a, n in zip(first, length, strict=True)]
    assert torch.equal(torch.cat(held).sort().values, torch.arange(begin, int(offsets[-1])))
    inside = (first >= offsets[row]) & (first + length <= offsets[row + 1])
    assert bool(inside.all())
    assert set(row.tolist()) == set(range(10))
    assert bool((length[:long] > cuda_row.SHORT).all())
    assert bool((length[long:] <= cuda_row.SHORT).all())
    assert bool((length[:long].diff() <= 0).all())
    key = row[long:] // lines * 100 - length[long:]
    assert bool((key.diff() >= 0).all())
    cut = partial >= 0
    assert sorted(partial[cut].tolist()) == list(range(partials))
    assert splits[:, 0].tolist() == [1, 5, 9]
    for line, start, many, _ in splits.tolist():
        mine = (row == line) & cut
        assert sorted(partial[mine].tolist()) == list(range(start, start + many))
        assert torch.equal(partial[mine].argsort(), first[mine].argsort())
