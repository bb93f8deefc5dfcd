"""Plans of the fused CUDA kernels, made on the CPU and read literally."""

import sys
import types

import fused_interpreter as literal
import pytest
import torch
from attention_cases import PATTERNS, bernoulli
from torch import Tensor

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.attention.cuda import forward as cuda_forward
from mixgrain.attention.cuda.cells import PACKED, register_words
from mixgrain.attention.cuda.choice import split_costs
from mixgrain.attention.cuda.plan import Work, build, count_work, unpack
from mixgrain.formats.costs import Costs
from mixgrain.formats.mixed import MixedLayout
from mixgrain.formats.panel import PanelLayout

H200 = Costs.h200()
GROUPS = 2
# Around the units: (nq, nk).
SIZES = [(1, 1), (63, 65), (64, 64), (170, 300), (300, 129), (1, 200)]
# Each line: what it is there for.
MIXTURES = {
    "longformer": lambda n: P.longformer(20, torch.randperm(n, generator=seeded())[:40]),  # gathers
    "front": lambda n: P.longformer(20, range(64)),  # panels that need no gathering
    "ragged front": lambda n: P.longformer(20, range(10, 75)),  # ranges that start inside a unit
    "single": lambda n: P.window(9) | P.random(0.004, 1),  # blocks and single entries
    "all": lambda n: P.longformer(20, [5, 77, 300]) | P.random(0.002, 2),  # every kind at once
    "queries": lambda n: P.global_queries([0, 63, 64, 200]) | P.random(0.01, 3),  # no blocks
    "lonely": lambda n: P.global_queries([3]) | (P.random(0.01, 3) - P.global_queries([3])),
    "dead": lambda n: P.window(40) - P.global_keys(range(70, 110)),  # keys that nobody keeps
}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.fixture(autouse=True, params=[2, 3], ids=["twos", "threes"])
def groups(request, monkeypatch) -> int:
    """Query units of an item, by which kernels differ."""
    monkeypatch.setattr(sys.modules[__name__], "GROUPS", request.param)
    return request.param


def planned(layout, D: int = 64) -> Work:
    made = build(layout, D, groups=GROUPS)
    assert all(t.is_contiguous() for t in made.tensors)
    return unpack(*made)


def check(work: Work, dense: Tensor) -> None:
    """Every kept position once, no other; every row of the output written once."""
    times, written = literal.expand(work)
    assert (written == 1).all()
    which = torch.tensor(work.entry)
    assert torch.equal(times[which].view(*work.lead, *work.shape), dense.long())


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_kept_position_once(name, size) -> None:
    pattern = PATTERNS[name](*size)
    layout = pattern.to_layout("mixed", *size, costs=H200)
    check(planned(layout), pattern.dense(*size)[None, None])


@pytest.mark.parametrize("kind", ["block", "row", "mixed"])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("name", ["from_dense", "longformer", "full", "random blocks", "nothing"])
def test_other_blocks_are_cut_or_joined(name, size, kind) -> None:
    pattern = PATTERNS[name](170, 300)
    layout = pattern.to_layout(kind, 170, 300, size)
    check(planned(layout), pattern.dense(170, 300)[None, None])


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("n", [448, 500])
def test_mixtures(name, n) -> None:
    pattern = MIXTURES[name](n)
    layout = pattern.to_layout("mixed", n, n, costs=H200)
    check(planned(layout), pattern.dense(n, n)[None, None])


def test_panels_written_out() -> None:
    # A masked one over a range that starts inside a unit, one over lists, one with a ragged range.
    mask = bernoulli(30, 40, 0.5, 3)
    panels = [
        (range(70, 100), range(10, 50), mask),
        (torch.tensor([1, 65, 150]), torch.arange(0, 200, 3), bernoulli(3, 67, 0.5, 4)),
        (torch.arange(0, 60, 2), torch.tensor([199]), None),
        (range(110, 149), range(64, 192), None),
    ]
    layout = PanelLayout.from_panels((200, 200), panels)
    layout.validate()
    whole = MixedLayout.from_parts((200, 200), None, layout)
    check(planned(whole), layout.mask())


def test_heads_and_batch_entries() -> None:
    heads = [P.window(30), P.random(0.02, 5), P.window(30), P.longformer(9, [7, 60, 200])]
    pattern = P.per_batch([P.per_head(heads), P.per_head(heads[::-1])])
    layout = pattern.to_layout("mixed", 260, 260, costs=H200)
    work = planned(layout)
    assert work.patterns == 3
    check(work, pattern.dense(260, 260))


def test_long_items_are_cut_and_the_rest_is_not() -> None:
    n = 8192
    for pattern in (P.causal(), P.full(), P.window(256)):
        work = planned(pattern.to_layout("mixed", n, n, costs=H200))
        assert not work.slots and len(work.items) == -(-n // (64 * GROUPS))
    front = planned(P.longformer(256, range(64)).to_layout("mixed", n, n, costs=H200))
    whole = 2 * GROUPS  # turns of all warpgroups
    assert front.slots and int(front.items[:, 4].max()) <= -(-32 // whole) * whole
    # One long line: all warpgroups work on it, about equally much.
    lone = front.items[front.items[:, 0] == front.items[:, 1]]
    assert len(lone) == 4
    own = [(front.steps[s : s + n, 1 : 1 + GROUPS] != -2).sum(0) for s, n in lone[:, 3:5].tolist()]
    assert all(int(x.max() - x.min()) <= 2 for x in own)
    decode = planned(P.full().to_layout("block", 1, 65536))
    assert len(decode.items) >= 16
    few = planned(P.full().to_layout("mixed", 300, 16384, costs=H200))
    assert few.slots and int(few.items[:, 4].max()) <= 128


def test_items_of_a_window_meet_the_same_keys_at_the_same_time() -> None:
    def units(pattern: P.Pattern, n: int) -> list[Tensor]:
        work = planned(pattern.to_layout("mixed", n, n, costs=H200))
        several = work.items[work.items[:, 1] >= 0]
        return [work.steps[at : at + count, 0] for at, count in several[:, 3:5].tolist()]

    for found in units(P.window(256), 4096):
        assert torch.equal(found % len(found), torch.arange(len(found)))
    # Others' items begin with the same keys, or have more steps than are turned.
    documents = P.documents(torch.arange(4096) // 1000) & P.causal()
    for pattern in (P.causal(), documents, P.longformer(256, range(64))):
        assert all((found.diff() > 0).all() for found in units(pattern, 4096))
    long = [found for found in units(P.window(1500), 4096) if len(found) > 32]
    assert long and all((found.diff() > 0).all() for found in long)
    gathered = units(P.longformer(256, range(0, 4096, 64)), 4096)
    for found in gathered[3:-3]:
        assert int(found[-1]) >= PACKED and (found[:-1] < PACKED).all()
        assert torch.equal(found[:-1] % (len(found) - 1), torch.arange(len(found) - 1))


def test_long_single_rows_are_cut() -> None:
    layout = (P.full() - P.global_keys([5])).to_layout("row", 3, 3000)
    work = planned(layout)
    assert int(work.row_items[:, 1].max()) <= 512
    check(work, layout.mask())


def test_a_plan_is_made_of_kept_units() -> None:
    small, large = (
        build(P.longformer(64, range(0, 4096, 100)).to_layout("mixed", n, n, costs=H200), 64)
        for n in (4096, 16384)
    )
    assert large.bytes < 5 * small.bytes
    steps, computed, size = count_work(large)
    assert size == large.bytes and steps > 0
    assert computed >= P.longformer(64, range(0, 4096, 100)).nnz(16384, 16384)


def test_register_words() -> None:
    masks = torch.randint(0, 256, (3, 64, 8), dtype=torch.uint8, generator=seeded())
    bits = (masks[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    words = register_words(masks)
    assert torch.equal(literal.literal_masks(words), bits.view(3, 64, 64).bool())


@pytest.fixture
def on_cpu(monkeypatch) -> None:
    """The CUDA forward with the interpreter in place of the kernels."""

    def entry(work, out):
        return torch.tensor(work.entry).view(work.lead).expand(out.shape[:2])

    def slots(partial, out):
        return [None, None] if partial is None else [p.unflatten(0, out.shape[:2]) for p in partial]

    def keep_work(tensors, ints):
        held["work"] = unpack(tensors, ints)
        return held["work"]

    def fused(
        out, lse, q, k, v, starts, tiles, items, steps, masks, scale, sink, packed, partial, keep
    ):
        work = held["work"]
        assert keep is None
        literal.run_items(
            work, q, k, v, packed or (q, k, v), scale, out, lse, *slots(partial, out), sink,
            entry(work, out),
        )  # fmt: skip

    def rows(out, lse, partial, q, k, v, keep, scale, work, ranges, sink):
        literal.run_rows(
            work, q, k, v, scale, out, lse, *slots(partial, out), sink, entry(work, out), keep
        )

    def merge(out, lse, partial, work, ranges, sink):
        literal.run_merge(work, out, lse, *slots(partial, out), sink, entry(work, out))

    held: dict[str, Work] = {}
    monkeypatch.setattr(cuda_forward.choice, "unit_kernel", lambda *_: "sm90")
    monkeypatch.setattr(cuda_forward.kernel, "walks", lambda *_: 13)
    monkeypatch.setattr(cuda_forward.kernel, "fused", fused)
    for name, value in {
        "rows": rows,
        "merge": merge,
        "tables": literal.tables,
        "gather": lambda *wanted: [literal.pack(*given) for given in wanted],
        "unpack": keep_work,
        "calls": types.SimpleNamespace(
            of=lambda name, launch_code, arguments: lambda *_: launch_code(*arguments),
            given=lambda arguments: [],
        ),
    }.items():
        monkeypatch.setattr(cuda_forward, name, value)


@pytest.mark.parametrize("name", ["longformer", "all", "queries", "dead", "single"])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2)], ids=["one head", "grouped"])
def test_the_whole_forward_around_the_kernels(on_cpu, name, heads) -> None:
    n = 300
    pattern = MIXTURES[name](n)
    if heads[0] > 1:
        pattern = P.per_head([pattern, P.window(3), pattern, P.causal() & pattern])
    layout = pattern.to_layout("mixed", n, n, costs=H200)
    made = build(layout, 32, groups=GROUPS)
    q = torch.randn(2, n, heads[0], 32, generator=seeded()).transpose(1, 2)
    k, v = (torch.randn(2, heads[1], n, d, generator=seeded()) for d in (32, 24))
    dropped = ~pattern.dense(n, n).view(-1, heads[1], heads[0] // heads[1], n, n).any((0, 2, 3))
    k[:, dropped] = torch.inf
    v[:, dropped] = torch.nan
    sink = torch.randn(heads[0], generator=seeded())
    o, lse = cuda_forward.forward(q, k, v, None, sink, 0.2, list(made.tensors), made.ints)
    options = {"enable_gqa": True, "sink_logits": sink, "scale": 0.2, "return_lse": True}
    right, logs = mg.attend(q, k, v, pattern, impl="reference", **options)
    assert o.stride() == right.stride() or o.stride()[1] == 24
    torch.testing.assert_close(o, right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, logs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scattered", "d", "kinds"),
    [
        (P.random(0.001, 0), 64, ["row"]),
        (P.random(0.005, 0), 64, ["row"]),
        (P.random(0.005, 0), 128, ["row"]),
        (P.random(0.02, 0), 64, ["block"]),
        (P.blocks(bernoulli(64, 64, 0.05, 0), 16), 64, ["block"]),
        (P.blocks(bernoulli(64, 64, 0.05, 0), 16), 128, ["block"]),
    ],
)
def test_scattered_positions_become_what_was_measured_to_be_fastest(scattered, d, kinds) -> None:
    """Of 4096² on an H200, µs for 16 heads: blocks 185, rows 28, 106; gathered columns 126, 439."""
    n = 1024 if "blocks" in repr(scattered) else 4096
    layout = scattered.to_layout("mixed", n, n, device="cpu", costs=split_costs(d))
    assert [part.kind for part in layout.parts] == kinds
