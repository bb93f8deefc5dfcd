"""Layouts and what is stored in them: positions, transposition, conversions, files, arithmetic."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

pytest.importorskip("hypothesis")
from drawn import (
    EXACT,
    INTEGER,
    KINDS,
    LEADS,
    NM,
    Example,
    examples,
    hostile,
    real,
    same_bits,
    seeds,
    whole,
)
from hypothesis import example
from hypothesis import strategies as st
from laws import law
from torch import Tensor
from torch.utils import _pytree as pytree

import mixgrain as mg
from mixgrain.formats.interchange import from_scipy, from_torch, to_scipy, to_torch
from mixgrain.formats.nm import choose
from mixgrain.formats.sparse import SparseTensor

ALL = (*KINDS, "tile")
STORED = ("row", "block", "nm", "tile", "mixed")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPES = st.tuples(*[st.sampled_from((5, 0, 1, 2, 16, 17, 24, 33))] * 2)
OUTER = st.sampled_from(((), (2,), (2, 2), (1, 3), (0,), (2, 0)))


@law(3, x=examples(EXACT))
def test_a_layout_keeps_its_masks(x: Example) -> None:
    layout, expected = x.layout(), x.full_mask()
    layout.validate()
    assert torch.equal(layout.mask(), expected)
    assert layout.nnz == int(expected.sum())
    assert layout.density == (layout.nnz / expected.numel() if expected.numel() else 0)
    assert layout.lead == x.lead and layout.entry_slots[-1] == layout.slots


@law(3, x=examples(ALL))
def test_live_slots_are_the_kept_positions_each_once(x: Example) -> None:
    layout = x.layout()
    (row, column), live = layout.indices(), layout.live()
    live = torch.ones(layout.slots, dtype=torch.bool) if live is None else live
    place = (layout.slot_entry() * x.shape[0] + row) * x.shape[1] + column
    assert row.shape == column.shape == live.shape == (layout.slots,)
    counts = torch.bincount(place[live], minlength=layout.mask().numel())
    assert torch.equal(counts, layout.mask().flatten().long())
    assert layout.nnz == int(live.sum())


@law(2, x=examples(ALL))
def test_transposition_is_an_involution(x: Example) -> None:
    layout = x.layout()
    turned = layout.T
    turned.validate()
    assert turned.shape == x.shape[::-1] and turned.nnz == layout.nnz
    assert torch.equal(turned.mask(), layout.mask().mT)
    assert turned.T.key == layout.key
    assert all(map(torch.equal, turned.T.tensors(), layout.tensors()))
    s = x.sparse(layout, x.generator())
    assert torch.equal(s.T.to_dense(), s.to_dense().mT)
    assert torch.equal(s.T.T.to_dense(), s.to_dense())
    assert s.T.shape == (*x.lead_shape, *x.shape[::-1])


@law(1, x=examples(EXACT), kind=st.sampled_from(STORED))
def test_conversions_commute_with_to_dense(x: Example, kind: str) -> None:
    """Through any other layout and back, and sampled at any layout that keeps as much."""
    s = SparseTensor(x.layout(), whole(x.generator(), x.layout().slots))
    dense = s.to_dense()
    if kind == "tile":
        dense = dense[(0,) * (dense.dim() - 2)]
    other = mg.sparsify(dense, kind, **({"n": 4} if kind == "nm" else {}))
    assert same_bits(other.to_dense(), dense)
    if kind != "tile":
        back = mg.sparsify(other.to_dense(), layout=s.layout)
        assert same_bits(back.to_dense(), dense)


_bits = {
    "outer": OUTER, "shape": SHAPES, "kind": st.sampled_from(STORED), "seed": seeds,
    "dtype": st.sampled_from(DTYPES), "zeros": st.sampled_from((0.9, 0.5, 0.0, 1.0)),
}  # fmt: skip


def stored(
    outer: tuple[int, ...], shape: tuple[int, int], kind: str, seed: int, dtype: torch.dtype,
    zeros: float,
) -> tuple[Tensor, SparseTensor]:  # fmt: skip
    dense = hostile(dtype, (*(() if kind == "tile" else outer), *shape), seed, zeros)
    options = {"size": 16} if kind in ("block", "mixed") else {"n": 4} if kind == "nm" else {}
    return dense, mg.sparsify(dense, kind, **options)


@law(3, **_bits)
def test_dense_to_sparse_to_dense_keeps_every_bit(
    outer: tuple[int, ...], shape: tuple[int, int], kind: str, seed: int, dtype: torch.dtype,
    zeros: float,
) -> None:  # fmt: skip
    dense, s = stored(outer, shape, kind, seed, dtype, zeros)
    s.layout.validate()
    assert s.shape == tuple(dense.shape)
    assert same_bits(s.to_dense(), dense)
    assert same_bits(s.T.to_dense().mT.contiguous(), dense)
    if kind in ("row", "mixed") and 0 not in outer:
        assert s.nnz == int((dense.view(INTEGER[dtype.itemsize]) != 0).sum())


@law(1, x=examples(ALL), how=st.sampled_from(("pickle", "deepcopy", "pytree")))
def test_copies_stand_for_the_same_matrix(x: Example, how: str) -> None:
    s = x.sparse(x.layout(), x.generator())
    if how == "pytree":
        leaves, tree = pytree.tree_flatten(s)
        again = pytree.tree_unflatten(leaves, tree)
        assert again.layout.key == s.layout.key
    else:
        again = copy.deepcopy(s) if how == "deepcopy" else pickle.loads(pickle.dumps(s))
        assert again.layout.key != s.layout.key
    again.layout.validate()
    assert same_bits(again.to_dense(), s.to_dense())
    assert repr(again) == repr(s)


@law(0.7, x=examples(("row", "block"), leads=LEADS[:1], free=((),)))
def test_scipy_and_torch_hold_the_same_matrix(x: Example) -> None:
    if x.kind == "block":  # their blocks do not hang over the edge
        whole_blocks = tuple(-(-n // x.size) * x.size for n in x.shape)
        x = Example(**{**vars(x), "shape": whole_blocks})
    s = x.sparse(x.layout(), x.generator())
    theirs, torchs = to_scipy(s), to_torch(s)
    assert torch.equal(torch.from_numpy(theirs.toarray()), s.to_dense())
    # torch has no to_dense of a matrix without blocks or without rows
    if s.nnz:
        assert torch.equal(torchs.to_dense(), s.to_dense())
    for back in (from_scipy(theirs), from_torch(torchs)):
        assert same_bits(back.to_dense() + 0.0, s.to_dense() + 0.0)
        assert back.layout.shape == s.layout.shape


@law(2, x=examples(ALL))
def test_parts_are_disjoint_and_make_the_whole(x: Example) -> None:
    s = x.sparse(x.layout(), x.generator())
    parts = [s.part(i) for i in range(len(s.layout.parts))]
    total = sum((part.to_dense() for part in parts), torch.zeros(s.shape, dtype=s.dtype))
    assert torch.equal(total, s.to_dense())
    held = sum((p.mask().long() for p in s.layout.parts), torch.zeros((), dtype=torch.int64))
    assert torch.equal(held.expand_as(s.layout.mask()), s.layout.mask().long())


@law(1, x=examples(ALL), a=st.integers(-4, 4))
def test_arithmetic_is_that_of_matrices(x: Example, a: int) -> None:
    layout, g = x.layout(), x.generator()
    s, t = x.sparse(layout, g), x.sparse(layout, g)
    ds, dt = s.to_dense(), t.to_dense()
    assert torch.equal((s + t).to_dense(), ds + dt)
    assert torch.equal((s - t).to_dense(), ds - dt)
    assert torch.equal((s * a).to_dense(), ds * a)
    assert torch.equal((a * s).to_dense(), (s * a).to_dense())
    assert torch.equal((s / 4).to_dense(), ds / 4)
    assert torch.equal((-s).to_dense() + 0.0, 0.0 - ds)
    assert torch.equal(s.with_values(t.values).to_dense(), dt)
    assert torch.equal(((s + t) * a).to_dense(), (s * a + t * a).to_dense())
    assert torch.equal(s.T.with_values(s.T.values + 1).to_dense().mT,
                       s.with_values(s.values + 1).to_dense())  # fmt: skip


@law(1, x=examples(ALL), masked=st.booleans())
@example(x=Example("row", (2, 2)), masked=False)
def test_map_knows_where_it_is(x: Example, masked: bool) -> None:
    """Map sees each kept value with its own row, column and head; elsewhere it leaves zeros."""
    layout, g = x.layout(), x.generator()
    s = x.sparse(layout, g)
    if masked:
        s = SparseTensor(layout, s.values, torch.rand(x.shape[1], generator=g) < 0.5)
    kept = s.with_values(torch.ones_like(s.values)).to_dense()
    i = torch.arange(x.shape[0], dtype=torch.float64)[:, None]
    j = torch.arange(x.shape[1], dtype=torch.float64)
    heads = x.lead_shape[-1] if x.lead_shape else 1
    h = torch.arange(heads, dtype=torch.float64)[:, None, None]
    h = h if x.lead_shape else h[0]
    dense = s.to_dense()
    assert torch.equal(s.map(lambda v, i, j: v).to_dense(), dense)
    moved = s.map(lambda v, i, j: v * 2 + i - j)
    assert torch.equal(moved.to_dense(), (dense * 2 + i - j) * kept)
    by_head = s.map(lambda v, i, j, h: v + 100 * h)
    assert torch.equal(by_head.to_dense(), (dense + 100 * h) * kept)
    live = s.live()
    if live is not None:
        assert bool((by_head.values[~live.expand_as(s.values)] == 0).all())
    twice = s.map(lambda v, i, j: v + i).map(lambda v, i, j: v * j)
    assert torch.equal(twice.to_dense(), s.map(lambda v, i, j: (v + i) * j).to_dense())
    # What dead slots hold, NaN included, is discarded.
    if live is not None:
        spoilt = s.with_values(torch.where(live, s.values, torch.nan))
        assert torch.equal(spoilt.to_dense(), dense)
        assert torch.equal(spoilt.map(lambda v, i, j: v + 1).to_dense(), (dense + 1) * kept)


@law(2, x=examples(ALL))
def test_sampling_at_a_layout_is_masking(x: Example) -> None:
    layout = x.layout()
    b, h = x.lead
    outer = (b, h) if b > 1 else (2, h) if h > 1 else x.free[:2]
    dense = real(x.generator(), *outer, *x.shape)
    s = mg.sparsify(dense, layout=layout)
    mask = layout.mask()
    mask = mask if b > 1 else mask[0] if h > 1 else mask[0, 0]
    assert torch.equal(s.to_dense(), torch.where(mask, dense, 0.0))
    assert s.live() is None or bool((s.values[..., ~s.live()] == 0).all())


def literal_choice(scores: list[float], live: list[bool], n: int) -> list[int]:
    """The n largest live ones of one group, the lower index first among equals."""
    ranked = sorted((j for j, on in enumerate(live) if on), key=lambda j: (-scores[j], j))[:n]
    # What fills up a group: its lowest other members.
    rest = [j for j in range(len(scores)) if j not in ranked]
    return sorted(ranked + rest[: n - len(ranked)])


@law(5, nm=st.sampled_from((*NM, (2, 3), (5, 7))), columns=st.integers(0, 20), seed=seeds,
     few=st.booleans(), share=st.sampled_from((1.0, 0.5, 0.0)))  # fmt: skip
@example(nm=(1, 4), columns=13, seed=0, few=False, share=1.0)  # NaN beside infinity
def test_choose_is_a_literal_top_n(
    nm: tuple[int, int], columns: int, seed: int, few: bool, share: float
) -> None:
    """Scores with ties, infinities, both zeros and NaN."""
    n, m = nm
    g = torch.Generator().manual_seed(seed)
    table = [1.0, -0.0, 0.0, 2.0] if few else [1.0, -0.0, 0.0, -1.0, torch.inf, -torch.inf,
                                               torch.nan, 3e38, -1e-45, 2.0]  # fmt: skip
    picked = torch.randint(0, len(table), (2, columns), generator=g)
    scores = torch.tensor(table)[picked]
    live = torch.rand(2, columns, generator=g) < share
    choice = choose(scores, live, n, m)
    groups = -(-columns // m)
    assert choice.shape == (2, groups, n) and choice.dtype == torch.uint8
    for i in range(2):
        for group in range(groups):
            inside = range(group * m, min((group + 1) * m, columns))
            # A NaN counts as infinite.
            values = [float("inf") if scores[i, j] != scores[i, j] else float(scores[i, j])
                      for j in inside] + [0.0] * (m - len(inside))  # fmt: skip
            alive = [bool(live[i, j]) for j in inside] + [False] * (m - len(inside))
            assert choice[i, group].tolist() == literal_choice(values, alive, n)


@law(3, shape=SHAPES, outer=st.sampled_from(((), (2,), (2, 2))), seed=seeds, nm=st.sampled_from(NM))
def test_pruning_to_nm_keeps_the_largest_of_each_group(
    shape: tuple[int, int], outer: tuple[int, ...], seed: int, nm: tuple[int, int]
) -> None:
    n, m = nm
    dense = whole(torch.Generator().manual_seed(seed), *outer, *shape)
    s = mg.sparsify(dense, "nm", n=n, m=m, prune=True)
    s.layout.validate()
    got = s.to_dense().flatten(0, -2).tolist()
    for row, kept in zip(dense.flatten(0, -2).tolist(), got, strict=True):
        for at in range(0, shape[1], m):
            part = row[at : at + m]
            order = sorted(range(len(part)), key=lambda j: (-abs(part[j]), j))[:n]
            assert kept[at : at + m] == [v if j in order else 0 for j, v in enumerate(part)]


@law(2, shape=SHAPES, outer=st.sampled_from(((), (2,), (2, 2))), seed=seeds,
     kind=st.sampled_from(("row", "mixed", "block", "tile")),
     percent=st.integers(0, 100), zeros=st.booleans())  # fmt: skip
def test_pruning_to_a_density_keeps_the_largest_units(
    shape: tuple[int, int], outer: tuple[int, ...], seed: int, kind: str, percent: int, zeros: bool
) -> None:
    outer = () if kind == "tile" else outer
    g = torch.Generator().manual_seed(seed)
    dense = whole(g, *outer, *shape)
    if zeros:
        dense = dense * (torch.rand(dense.shape, generator=g) < 0.3)
        dense = dense + 0.0  # no −0
    options = {"size": 16} if kind in ("block", "mixed") else {}
    s = mg.sparsify(dense, kind, prune=True, density=percent / 100, **options)
    s.layout.validate()
    got = s.to_dense()
    assert bool(((got == dense) | (got == 0)).all())

    def flat(t: Tensor) -> Tensor:
        return t.flatten(0, -3) if t.dim() > 2 else t[None]

    side = 16 if kind in ("block", "tile") else 1
    rows, columns = (-(-n // side) for n in shape)
    pad = (0, columns * side - shape[1], 0, rows * side - shape[0])
    for before, after in zip(flat(dense), flat(got), strict=True):
        energy, left = (
            torch.nn.functional.pad(t, pad).reshape(rows, side, columns, side).square().sum((1, 3))
            for t in (before, after)
        )
        weights = energy.flatten().tolist()
        order = sorted(range(len(weights)), key=lambda u: (-weights[u], u))
        chosen = {u for u in order[: percent * len(weights) // 100] if weights[u]}
        kept = {u for u, weight in enumerate(left.flatten().tolist()) if weight}
        assert kept == chosen
        assert torch.equal(left.flatten()[sorted(kept)], energy.flatten()[sorted(kept)])
