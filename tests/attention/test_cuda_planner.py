"""Plans made on the device straight from patterns: the same as those made from layouts."""

import numpy as np
import pytest
import torch
from attention_cases import PATTERNS
from plan_checks import same
from torch import Tensor

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.attention.cuda.choice import split_costs
from mixgrain.attention.cuda.plan import unpack
from mixgrain.attention.cuda.planner import device_plan, plan_pattern
from mixgrain.attention.cuda.tables import tables
from mixgrain.cuda.derived import derived
from mixgrain.formats.costs import Costs
from mixgrain.formats.errors import LayoutError

CUDA = torch.device("cuda")
pytestmark = pytest.mark.gpu
# At 1024 gathering does not pay, and scattered columns of blocks are left to layouts.
GATHERED = ("scattered", "keys")
SIZES = [(1, 1), (63, 65), (64, 64), (170, 300), (300, 129), (1, 200)]


def drawn(n: int, count: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(1))[:count]


def block_mask(n: int) -> Tensor:
    kept = torch.rand(n // 64, n // 64, generator=torch.Generator().manual_seed(2)) < 0.2
    kept[:1] = True
    return kept


# Each line: what it is there for. All of them are planned so at multiples of 64.
DIRECT = {
    "causal": lambda n: P.causal(),  # ends that rise
    "window": lambda n: P.window(256),  # both ends, runs of full units between
    "front": lambda n: P.longformer(256, range(64)),  # whole units beside an interval
    "ragged front": lambda n: P.longformer(256, range(10, 75)),  # keys that are a second interval
    "scattered": lambda n: P.longformer(256, drawn(n, 64)),  # gathered keys and queries
    "keys": lambda n: P.window(70) | P.global_keys(drawn(n, 90)),  # two gathered units, one ragged
    "queries": lambda n: P.causal() | P.global_queries(drawn(n, 90)),  # queries alone
    "sinks": lambda n: P.causal() & (P.window(300, 0) | P.sinks(4)),  # two intervals a row
    "documents": lambda n: P.causal() & P.documents(torch.arange(n) // 300),  # ends in steps
    "far apart": lambda n: P.window(3) | P.documents(torch.arange(n) % 2 * 0),  # all in one
    "blocks": lambda n: P.blocks(block_mask(n), 64),  # whole units, long lines
    "bigbird": lambda n: P.bigbird(64, 1, 3, 2, 0),  # whole units, drawn and joined
    "wide blocks": lambda n: P.bigbird(128, 1, 1, 1, 3),  # two units each
    "full": lambda n: P.full(),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
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
    assert device_plan(P.causal(), 1 << 18, 1 << 18, 64, CUDA, split_costs(64)) is None


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
    at_hand = derived(work.items, "costs", lambda: None)  # not read back from the device
    assert np.array_equal(at_hand, work.costs.cpu().numpy())
    found = tables(work, (1, 3, 3), 1 << 20, 132)
    assert found.tiles.data_ptr() % 8 == 0 and found.tiles.is_contiguous()
