"""Plans made on the device straight from patterns: the same as those made from layouts."""

import pytest
import torch
from attention_cases import DIRECT, PATTERNS, UNIT_SIZES, block_mask, drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_checks import as_built, same
from torch import Tensor

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.attention.cuda.cells import PACKED
from mixgrain.attention.cuda.choice import split_costs
from mixgrain.attention.cuda.plan import NAMES, Plan, build, unpack
from mixgrain.attention.cuda.planner import device_plan, plan_pattern, sketches
from mixgrain.attention.cuda.tables import tables
from mixgrain.formats.costs import Costs
from mixgrain.formats.errors import LayoutError

CUDA = torch.device("cuda")
pytestmark = pytest.mark.gpu
# At 1024 gathering does not pay, and scattered columns of blocks are left to layouts.
GATHERED = ("scattered", "keys")


@pytest.mark.parametrize("size", UNIT_SIZES, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_small_ones_are_those_of_layouts(name, size) -> None:
    same(PATTERNS[name](*size), *size, Costs.h200(), False)


@pytest.mark.parametrize("n", [1024, 2000])
@pytest.mark.parametrize("name", DIRECT)
def test_large_ones_are_those_of_layouts(name, n) -> None:
    if n % 64 and name == "blocks":
        pytest.skip("a mask of whole blocks")
    # 2000 ends inside a unit: what is listed may then be a matter of single entries.
    must = n % 64 == 0 and name not in GATHERED
    same(DIRECT[name](n), n, n, split_costs(64), must)


@pytest.mark.parametrize("name", GATHERED)
def test_gathered_ones_are_those_of_layouts(name) -> None:
    same(DIRECT[name](4096), 4096, 4096, split_costs(64), True)


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("name", ["window", "front", "scattered", "sinks"])
def test_long_ones_are_those_of_layouts(name, groups) -> None:
    # 22 million units, of which some 50,000 are kept: there is no table of all of them.
    n = 300_032
    everywhere = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:64]
    pattern = {
        "window": P.window(256),
        "front": P.longformer(256, range(128, 192)),
        "scattered": P.longformer(256, everywhere),
        "sinks": P.causal() & (P.window(255, 0) | P.sinks(64)),
    }[name]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = device_plan(pattern, n, n, 64, CUDA, split_costs(64), groups)
    assert torch.cuda.max_memory_allocated() - before < 128 << 20
    assert made is not None
    made = Plan([t.cpu() for t in made.tensors], made.ints)
    as_built(made, pattern, n, n, split_costs(64), groups)


@pytest.mark.parametrize("size", [(1500, 2048), (2048, 1500), (1024, 2048)], ids=str)
@pytest.mark.parametrize("name", ["causal", "window", "front", "sinks", "bigbird", "full"])
def test_other_rectangles(name, size) -> None:
    same(DIRECT[name](2048), *size, split_costs(64), False)


def test_heads_and_batch_entries() -> None:
    heads = [P.causal(), P.window(50), P.causal(), P.longformer(100, range(64))]
    same(P.per_head(heads), 1024, 1024, split_costs(64), True)
    same(
        P.per_batch([P.per_head(heads), P.per_head(heads[::-1])]), 1024, 1024, split_costs(64), True
    )


def test_what_layouts_have_to_decide() -> None:
    for pattern in (P.random(0.01, 1), P.window(9) | P.random(0.01, 1), P.dilated(9, 3)):
        assert device_plan(pattern, 1024, 1024, 64, CUDA, split_costs(64)) is None
    # Too many units are kept, or would have to be looked at.
    for long in (P.causal(), P.per_head([P.causal(), P.window(64)])):
        assert device_plan(long, 1 << 19, 1 << 19, 64, CUDA, split_costs(64)) is None


def test_shapes_are_checked() -> None:
    with pytest.raises(LayoutError, match="blocks"):
        device_plan(P.blocks(block_mask(1024), 64), 2048, 2048, 64, CUDA, split_costs(64))


def test_plans_are_remembered_until_tensors_change() -> None:
    ids = torch.arange(2048) // 300
    pattern = P.documents(ids)
    made = plan_pattern(pattern, 2048, 2048, 64, CUDA, 2)
    assert plan_pattern(P.documents(ids), 2048, 2048, 64, CUDA, 2) is made
    ids[:] = 0
    again = plan_pattern(pattern, 2048, 2048, 64, CUDA, 2)
    assert again is not made and len(again.tensors[1]) > len(made.tensors[1])
    mg.clear_caches()
    assert plan_pattern(pattern, 2048, 2048, 64, CUDA, 2) is not again


def test_kernels_may_load_pairs_and_fours() -> None:
    made = device_plan(P.longformer(256, drawn(4096, 64)), 4096, 4096, 64, CUDA, split_costs(64))
    work = unpack(*made)
    base = work.items.data_ptr()
    for name in ("items", "steps", "key_rows", "query_rows"):
        assert (getattr(work, name).data_ptr() - base) % 256 == 0
    found = tables(work, (1, 3, 3), 1 << 20, 132)
    assert found.tiles.data_ptr() % 8 == 0 and found.tiles.is_contiguous()


@pytest.mark.parametrize("n", [4096, 16384])
def test_few_units_of_longformer_stay_masked(n) -> None:
    tokens = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:64]
    pattern = P.longformer(256, tokens)
    made = device_plan(pattern, n, n, 64, CUDA, split_costs(64))
    lines, units = n // 64, (tokens // 64).tolist()
    steps = unpack(*made).steps.cpu()
    cut, gathered = steps[:, 1:] >= 0, steps[:, 0] >= PACKED
    near, packed = int(cut[~gathered].sum()), int(cut[gathered].sum())
    # The ends of the window; and gathered keys where the window takes some of them back.
    assert near == 2 * (lines - 4)
    touched = {unit + beside for unit in units for beside in range(-3, 4)}
    assert packed >= len(touched & set(range(lines)))


def test_scattered_queries_beside_whole_columns() -> None:
    # Units of whole columns hold gathered rows as well, which must not count twice.
    drawn = torch.randperm(4096, generator=torch.Generator().manual_seed(1))[:64]
    whole = P.global_queries(drawn) | P.global_keys(range(64))
    # One long document: its last lines are cut.
    document = P.causal() & P.documents((torch.arange(4096) - 2560).clamp(min=0))
    for core in (P.window(100), document):
        same(core | whole, 4096, 4096, split_costs(64), True)
    # A line whose rows are all gathered keeps nothing of whole columns.
    listed = torch.cat([torch.arange(128, 192), drawn[drawn // 64 != 2][:60]])
    whole = P.global_queries(listed) | P.global_keys(range(64))
    same(P.window(100) | whole, 4096, 4096, split_costs(64), True)


def test_heads_of_their_own() -> None:
    n = 4096
    heads = [
        P.longformer(256, range(9, n, 64)),
        P.window(256),
        P.longformer(100, range(40, n, 64)),
        P.window(256) | P.global_keys(range(1, n, 64)),
    ]
    same(P.per_head(heads), n, n, split_costs(64), True)


@pytest.mark.parametrize("n", [4096 + 20, 4096 - 63])
def test_odd_lengths(n) -> None:
    for pattern in (
        P.longformer(256, range(17, n, 64)),
        P.longformer(256, [*range(17, n, 64)][1:]),
    ):
        same(pattern, n, n, split_costs(64), False)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(600, 1500), st.integers(600, 1500), st.integers(0, 300), st.integers(20, 90),
    st.integers(0, 63), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_window_and_globals(nq, nk, reach, step, first, rows, columns, causal) -> None:
    pattern = P.causal() & P.window(reach) if causal else P.window(reach)
    if rows:
        pattern = pattern | P.global_queries(range(first, nq, step))
    if columns:
        pattern = pattern | P.global_keys(range(first, nk, step))
    same(pattern, nq, nk, split_costs(64), False)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 900), st.integers(1, 900), st.lists(st.integers(0, 12), min_size=1, max_size=9),
    st.integers(0, 400), st.integers(0, 70), st.booleans(),
)  # fmt: skip
def test_any_intervals(nq, nk, lengths, reach, sinks, causal) -> None:
    sizes = torch.tensor(lengths).repeat(nk)[:nk] + 1
    ids = torch.repeat_interleave(torch.arange(len(sizes)), sizes * 7)[:nk]
    pattern = P.documents(ids) & (P.window(reach) | P.sinks(sinks))
    same(P.causal() & pattern if causal else pattern, nq, nk, split_costs(64), False)


def read(made: Plan) -> list[Tensor]:
    """All tensors, masks in the place of their numbers."""
    # Kinds of masks are numbered in the order in which they are met, which may differ.
    work = unpack(*made)
    masks = torch.cat([work.masks, work.masks.new_zeros(2, 128)])
    masks[-1, 0], masks[-2, 0] = -1, -2
    kinds = masks[work.steps[:, 1:].long()]
    return [
        kinds,
        *(getattr(work, name) for name in NAMES if name not in ("steps", "masks")),
    ]


def test_plans_repeat() -> None:
    pattern = P.per_head([P.longformer(256, drawn(4096, 64)), P.causal(), P.window(90)])

    first = device_plan(pattern, 4096, 4096, 64, CUDA, split_costs(64), 3)
    expected = [t.clone() for t in read(first)]
    for _ in range(50):
        again = device_plan(pattern, 4096, 4096, 64, CUDA, split_costs(64), 3)
        assert again.ints == first.ints
        assert all(torch.equal(a, b) for a, b in zip(read(again), expected, strict=True))


def test_tensors_on_the_device() -> None:
    ids, tokens, mask = torch.arange(4096) // 300, drawn(4096, 64), block_mask(4096)
    for make in (
        lambda where: P.causal() & P.documents(ids.to(where)),
        lambda where: P.longformer(200, tokens.to(where)),
        lambda where: P.blocks(mask.to(where), 64),
    ):
        here, there = (
            device_plan(make(where), 4096, 4096, 64, CUDA, split_costs(64), 3)
            for where in ("cpu", "cuda")
        )
        assert here.ints == there.ints
        assert all(torch.equal(a, b) for a, b in zip(read(here), read(there), strict=True))
    for pattern in (P.from_dense(torch.rand(300, 300, device="cuda") < 0.01), P.random(0.01, 1)):
        assert device_plan(pattern, 300, 300, 64, CUDA, split_costs(64)) is None


def test_patterns_of_a_table_are_planned_as_each_alone() -> None:
    # What is light, and how many masked cells there may be, is a matter of one pattern.
    heads = P.per_head([P.window(70), P.window(71)])
    assert device_plan(heads, 16384, 16384, 128, CUDA, split_costs(128)) is not None
    heads = P.per_head([P.window(90 + 2 * n) for n in range(6)])
    assert device_plan(heads, 1 << 16, 1 << 16, 64, CUDA, split_costs(64)) is not None
    assert device_plan(P.window(3), 1 << 21, 64, 64, CUDA, split_costs(64)) is None


def test_too_many_masked_units_are_left_to_layouts() -> None:
    n = 1 << 17
    pattern = (
        P.window(300, 0) | P.documents(torch.arange(n) // 97) | P.window(0, 700) | P.window(900, 0)
    )
    assert device_plan(pattern, n, n, 64, CUDA, split_costs(64)) is None


def test_more_lines_than_can_be_counted_are_left_to_layouts() -> None:
    # 7 × 16,384 lines of as many units; from 149,798 gathered queries on they pass 2^31 units.
    n, costs = 1 << 20, split_costs(64)
    for queries, planned in ((140_000, True), (152_000, False)):
        tokens = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:queries]
        heads = P.per_head([P.window(100 + i) | P.global_queries(tokens) for i in range(7)])
        assert (sketches(heads, n, n, costs) is not None) == planned


def test_another_stream_and_a_busy_device() -> None:
    busy = torch.rand(4096, 4096, device="cuda")
    side = torch.cuda.Stream()
    for _ in range(20):
        busy = busy @ busy / 1000
    with torch.cuda.stream(side):
        made = device_plan(P.window(100), 2048, 2048, 64, CUDA, split_costs(64))
    work = unpack(*made)
    right = unpack(*build(P.window(100).to_layout("mixed", 2048, 2048), 64))
    assert torch.equal(work.items.cpu(), right.items)
