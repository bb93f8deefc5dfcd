"""Units made whole: exact where it counts, and few stay masked."""

import pytest
import torch
from fused_interpreter import expand
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixgrain import patterns as P
from mixgrain.attention.cuda.plan import Work, build, unpack
from mixgrain.formats.mixed import MixedLayout
from mixgrain.formats.panel import PanelLayout

PACKED = 1 << 24
Panels = list[tuple[Tensor, Tensor, Tensor | None]]


def ranged(members: Tensor) -> range | Tensor:
    """As a range where they are one: those may stay where they are, others are gathered."""
    first, last = int(members[0]), int(members[-1])
    return range(first, last + 1) if last - first + 1 == len(members) else members


def written(core: Tensor, queries: list[int], keys: list[int], panels: Panels = ()) -> MixedLayout:
    """A layout of blocks, two shared panels and more of them; the core loses what panels keep."""
    nq, nk = core.shape
    others = torch.ones(nq, dtype=torch.bool)
    others[queries] = False
    shared = []
    if queries:
        shared.append((torch.tensor(queries), torch.arange(nk), None))
    if keys and others.any():
        shared.append((others.nonzero()[:, 0], torch.tensor(keys), None))
    left, more = core.clone(), []
    left[queries] = False
    left[:, keys] = False
    for rows, columns, mask in panels:
        rows, columns = rows[others[rows]], columns[~torch.isin(columns, torch.tensor(keys))]
        if len(rows) and len(columns):
            keep = None if mask is None else mask[: len(rows), : len(columns)]
            more.append((ranged(rows), ranged(columns), keep))
            left[rows[:, None], columns] = False
    blocks = P.from_dense(left).to_layout("block", nq, nk, 64) if left.any() else None
    if not (shared or more):
        return MixedLayout.from_parts((nq, nk), blocks)
    return MixedLayout.from_parts(
        (nq, nk), blocks, PanelLayout.from_panels((nq, nk), [*shared, *more])
    )


def check(layout: MixedLayout, groups: int = 2, D: int = 64) -> Work:
    """Every kept position once in what reaches the output, no other; every row written once."""
    layout.validate()
    work = unpack(*build(layout, D, groups=groups))
    times, final = expand(work)
    assert (final == 1).all()
    assert torch.equal(times[torch.tensor(work.entry)].view(*work.lead, *work.shape),
                       layout.mask().long().view(*work.lead, *work.shape))  # fmt: skip
    assert len(work.masks) == len(work.steps[:, 1:][work.steps[:, 1:] >= 0].unique())
    return work


def masked(work: Work) -> tuple[int, int]:
    """Masked units: of neighbours' keys, and of gathered ones."""
    mask = work.steps[:, 1:] >= 0
    packed = work.steps[:, 0] >= PACKED
    return int(mask[~packed].sum()), int(mask[packed].sum())


def band(nq: int, nk: int, reach: int) -> Tensor:
    return (torch.arange(nq)[:, None] - torch.arange(nk)).abs() <= reach


def test_a_window_keeps_its_edges_alone() -> None:
    # A global token in every unit: the ends of the window stay masked, and each gathered unit.
    for place in (0, 17, 63):
        tokens = list(range(place, 1024, 64))
        work = check(written(band(1024, 1024, 256), tokens, tokens))
        near, packed = masked(work)
        # Four units on each side of every line's own; the outermost two are cut by the window.
        assert near == sum((line >= 4) + (line + 4 < 16) for line in range(16))
        assert packed == 16


def test_global_tokens_side_by_side_and_whole_units() -> None:
    # Two in one unit, a unit of none but global rows, neighbours across an edge, the last one.
    core = band(700, 700, 200)
    for tokens in ([5, 6, 300], list(range(128, 192)), [63, 64, 127, 128], [699], [640, 699]):
        check(written(core, tokens, tokens))
        check(written(core, tokens, []))
        check(written(core, [], tokens))
        check(written(core, tokens, tokens[:1]), 3)
    check(written(core, list(range(700)), []))
    check(written(core, [], list(range(700))))


@pytest.mark.parametrize("size", [(300, 700), (700, 300), (65, 640), (640, 1), (1, 640)], ids=str)
def test_rectangles(size) -> None:
    nq, nk = size
    for queries in ([0], [nq - 1], list(range(0, nq, 31))):
        for keys in ([0], [nk - 1], list(range(7 % nk, nk, 53))):
            check(written(band(nq, nk, 100), sorted({*queries}), keys))


def test_units_that_end_with_the_queries() -> None:
    # Rows behind the last query are nobody's: whole units but for keys behind the last.
    work = check(written(torch.ones(70, 200, dtype=torch.bool), [], []))
    assert masked(work) == (2, 0)


def test_columns_stay_where_units_would_not_be_whole() -> None:
    core = band(640, 640, 200)
    core[:, 130] = False  # not all that is missing is gathered
    tokens = [140, 500]
    work = check(written(core, [], tokens))
    inside = work.steps[work.steps[:, 0] == 2, 1:]
    assert (inside == -1).sum() == 0
    assert masked(work)[0] > masked(check(written(band(640, 640, 200), [], tokens)))[0]


def test_private_panels() -> None:
    core = band(640, 640, 150)
    generator = torch.Generator().manual_seed(3)
    some, many = torch.arange(3, 640, 97), torch.arange(0, 640, 45)
    mask = torch.rand(len(some), len(many), generator=generator) < 0.5
    half = torch.arange(0, 320)
    # Rows that a gathered line and their neighbours' keep both; keys that only some rows see.
    for queries, keys in (([], []), ([4, 100, 333], [7, 200]), ([3, 99], [45, 91])):
        check(written(core, queries, keys, [(some, many, mask)]))
        check(written(core, queries, keys, [(half, many, None)]))
        check(written(core, queries, keys, [(half, many[:5], None), (half + 320, many, None)]))


def test_free_rows_of_long_lines_are_not_merged() -> None:
    # A line of many units is cut, so that its results go to slots; one of its rows is gathered.
    n = 4096
    core = band(n, n, 64)
    queries = [3, 121, *range(400, n, 300)]
    dense = torch.arange(64, 120)
    panels = [(dense, torch.arange(n), torch.ones(len(dense), n, dtype=torch.bool))]
    work = check(written(core, queries, [], panels))
    assert work.slots > 2
    rows = work.merge_rows.tolist()
    sizes = dict(zip(rows, work.merge_ptr.diff().tolist(), strict=True))
    # The gathered line is cut, too.
    assert sizes[64] > 1 and sizes[121] == sizes[3] == 3


def test_rows_are_not_gathered_for_the_sake_of_free_ones() -> None:
    # So many gathered keys that rows without global ones would be gathered if those cost masks.
    tokens = list(range(17, 640, 64))
    work = check(written(band(640, 13312, 150), tokens, list(range(3, 13312, 8))))
    assert work.query_rows.shape == (1, 64) and work.key_rows.shape == (1, 26 * 64)


def test_values_nobody_keeps_stay_blanked() -> None:
    core = band(640, 640, 200)
    core[:, 130] = False
    tokens = [140, 500]
    # The gathered rows keep every key.
    assert not check(written(core, tokens, tokens)).dead.numel()
    work = check(written(core, [], tokens))
    assert work.dead[0].nonzero().tolist() == [[130]]


@st.composite
def _cases(draw) -> MixedLayout:
    nq, nk = draw(st.integers(1, 330)), draw(st.integers(1, 330))

    def members(n: int) -> list[int]:
        start, step = draw(st.integers(0, n - 1)), draw(st.integers(1, 90))
        found = set(range(start, n, step)[: draw(st.integers(0, 40))])
        return sorted(found | set(draw(st.lists(st.integers(0, n - 1), max_size=4))))

    core = band(nq, nk, draw(st.integers(0, 330)))
    if draw(st.booleans()):
        core &= torch.rand(nq, nk, generator=torch.Generator().manual_seed(nq)) < 0.98
    panels = []
    if draw(st.booleans()):
        rows, columns = torch.tensor(members(nq)), torch.tensor(members(nk))
        mask = torch.rand(len(rows), len(columns)) < 0.6 if draw(st.booleans()) else None
        if len(rows) and len(columns):
            panels.append((rows, columns, mask))
    return written(core, members(nq), members(nk), panels)


@settings(max_examples=150, deadline=None)
@given(_cases(), st.sampled_from([2, 3]), st.sampled_from([64, 256]))
def test_every_position_counts_once(layout, groups, D) -> None:
    layout.validate()
    work = unpack(*build(layout, D, groups=groups))
    times, final = expand(work)
    assert (final == 1).all() and torch.equal(times[0], layout.mask().long().view(work.shape))
    # Keys inside units of neighbours that are not blanked are kept by a query.
    kept = times[0].any(0)
    dead = work.dead[0] if work.dead.numel() else torch.zeros_like(kept)
    loaded = torch.zeros_like(kept)
    for unit in work.steps[:, 0][work.steps[:, 0] < PACKED].unique().tolist():
        loaded[64 * unit : 64 * unit + 64] = True
    assert torch.equal(dead, loaded & ~kept)
