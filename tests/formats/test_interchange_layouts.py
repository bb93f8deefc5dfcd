"""Between our own layouts: to_layout commutes with to_dense, and layouts become patterns again."""

from __future__ import annotations

import pytest
import torch
from layout_cases import RATES, check_layout

import mixgrain as mg
from mixgrain.formats import patterns as P
from mixgrain.formats.errors import LayoutError
from mixgrain.formats.layout import Layout
from mixgrain.formats.relayout import convert_layout
from mixgrain.formats.sparse import SparseTensor

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

EXACT = ("row", "block", "mixed")
MIXED = P.causal() & P.longformer(5, [3, 20])
PATTERNS = {
    "flat": MIXED,
    "everything": P.full(),
    "nothing": P.full() - P.full(),
    "scattered": P.random(0.2, 1),
    "blocks": P.bigbird(8, 1, 1, 1, 0),
    "heads": P.per_head([MIXED, P.random(0.1, 2), MIXED]),
    "batch": P.per_batch([P.window(2), MIXED]),
    "both": P.per_batch(
        [P.per_head([P.window(3), P.random(0.1, 2), P.window(3)]),
         P.per_head([P.causal(), P.longformer(5, [7]), P.full()])]
    ),
}  # fmt: skip
SHAPES = [(40, 56), (64, 33), (0, 4), (4, 0)]


def full(layout: Layout) -> list[tuple[int, ...]]:
    """Leading dimensions of dense tensors that the layout can sample."""
    b, h = layout.lead
    outer = [(b, h)] if b > 1 else [(h,), (2, h)] if h > 1 else [(), (3,), (2, 3)]
    return [*outer, (b, 3)] if b > 1 and h == 1 else outer


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("nq, nk", SHAPES)
@pytest.mark.parametrize("kind", EXACT)
def test_a_layout_is_a_pattern_again(name, nq, nk, kind) -> None:
    pattern = PATTERNS[name]
    for costs in RATES.values() if kind == "mixed" else [None]:
        layout = pattern.to_layout(kind, nq, nk, size=16, costs=costs)
        back = P.from_layout(layout)
        assert back.lead == layout.lead
        assert torch.equal(back.dense(nq, nk).reshape(*layout.lead, nq, nk), layout.mask())
    assert P.from_layout(layout.T).nnz(nk, nq) == layout.nnz


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("source", EXACT)
@pytest.mark.parametrize("target", EXACT)
def test_exact_layouts(name, source, target) -> None:
    pattern = PATTERNS[name]
    for nq, nk in SHAPES[:2]:
        layout = pattern.to_layout(source, nq, nk, size=16)
        for outer in full(layout):
            generator = torch.Generator().manual_seed(nq)
            dense = torch.randn(*outer, nq, nk, generator=generator)
            s = mg.sparsify(dense, layout=layout)
            made = s.to_layout(target, size=32)
            assert made.layout.kind == target and made.layout.lead == layout.lead
            assert made.nnz == s.nnz and made.shape == s.shape
            assert torch.equal(made.to_dense(), s.to_dense())
            back = made.to_layout(layout)
            assert back.layout is layout
            assert torch.equal(back.to_dense(), s.to_dense())
        if source != target:
            check_layout(made.layout, layout.mask())


def test_equal_heads_stay_shared() -> None:
    for kind in EXACT:
        layout = PATTERNS["heads"].to_layout("row", 40, 56)
        made = convert_layout(layout, kind, size=16)
        assert layout.entry == made.entry == (0, 1, 0)


def test_whole_units() -> None:
    torch.manual_seed(0)
    dense = torch.where(torch.rand(40, 56) < 0.05, torch.randn(40, 56), 0.0)
    for kind in EXACT:
        s = mg.sparsify(dense, kind, size=16)
        tiles = s.to_layout("tile")
        tiles.layout.validate()
        assert torch.equal(tiles.to_dense(), dense)
        assert tiles.layout.tiles == mg.sparsify(dense, "tile").layout.tiles or kind == "block"
        groups = s.to_layout("nm", n=4, m=4) if kind == "block" else s.to_layout("nm", n=5, m=8)
        groups.layout.validate()
        assert torch.equal(groups.to_dense(), dense)
        for unit in (tiles, groups):
            for back in EXACT:
                assert torch.equal(unit.to_layout(back, size=16).to_dense(), dense)


def test_dynamic_choices_leave_their_pattern() -> None:
    """N:M within blocks, and the transposed view of one."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 48, 8)
    s = mg.sddmm(q, k, P.causal() & P.nm(2, 4))
    for source in (s, s.T):
        for kind in EXACT:
            made = source.to_layout(kind, size=16)
            made.layout.validate()
            assert made.nnz == source.nnz
            assert torch.equal(made.to_dense(), source.to_dense())


def test_masks_are_kept_and_dead_slots_stay_out() -> None:
    layout = MIXED.to_layout("block", 40, 56, size=16)
    keep = torch.rand(2, 56, generator=torch.Generator().manual_seed(0)) < 0.7
    values = torch.randn(2, 3, layout.slots)
    values = torch.where(layout.live(), values, torch.nan)
    s = SparseTensor(layout, values, keep)
    for source in (s, s.T):
        for kind in EXACT:
            made = source.to_layout(kind, size=32)
            assert torch.equal(made.keep, keep) and made.keep_rows == source.keep_rows
            assert torch.equal(made.to_dense(), source.to_dense())
            assert not made.values.isnan().any()


@pytest.mark.parametrize("target", [*EXACT, "tile", "nm"])
def test_gradients_and_bits(target) -> None:
    dense = torch.zeros(16, 16, dtype=torch.float64)
    dense[0, :4] = torch.tensor([-0.0, torch.inf, 5e-324, 1.0], dtype=torch.float64)
    s = mg.sparsify(dense, "row")
    values = s.values.clone().requires_grad_()
    made = s.with_values(values).to_layout(target, n=4, m=4, size=16)
    assert torch.equal(made.to_dense().view(torch.int64), dense.view(torch.int64))
    (made.to_dense().nan_to_num(0, 0, 0) * torch.arange(256.0).reshape(16, 16)).sum().backward()
    assert torch.equal(values.grad[2:], torch.tensor([2.0, 3.0], dtype=torch.float64))
    for dtype in (torch.float16, torch.bfloat16):  # a signalling NaN of a half
        half = torch.zeros(16, 16, dtype=dtype)
        half.view(torch.int16)[3, 5] = 0x7C01 if dtype == torch.float16 else 0x7F81
        out = mg.sparsify(half, "row").to_layout(target, size=16).to_dense()
        assert torch.equal(out.view(torch.int16), half.view(torch.int16))


def test_errors() -> None:
    s = mg.sparsify(torch.ones(4, 8), "row")
    heads = mg.sparsify(torch.ones(2, 4, 8), "row")
    causal = P.causal().to_layout("row", 4, 8)
    cases = [
        (lambda: s.to_layout("csr"), "kind 'csr'; choose one of"),
        (lambda: s.to_layout("block", size=7), "size 7"),
        (lambda: s.to_layout("nm"), "4 positions in one group of 4, first in entry 0, row 0"),
        (lambda: s.to_layout("nm", n=5), "5:4"),
        (lambda: heads.to_layout("tile"), "one 2-D matrix"),
        (lambda: s.to_layout(causal), "lacks 6 of 32 positions, first row 0, column 5 of entry 0"),
        (lambda: heads.to_layout(causal), "same shape, lead"),
        (lambda: s.to_layout(P.causal()), "Causal given; give a kind"),
        (lambda: convert_layout(s.layout, "csr"), "kind 'csr'"),
        (lambda: P.from_layout(s), "SparseTensor given"),
    ]
    for call, text in cases:
        with pytest.raises(LayoutError, match=text):
            call()


@hypothesis.given(
    seed=st.integers(0, 2**31), nq=st.integers(0, 40), nk=st.integers(0, 40),
    density=st.sampled_from([0.02, 0.3, 0.97]), lead=st.sampled_from([(), (2,), (2, 2)]),
    path=st.lists(st.sampled_from(EXACT), min_size=2, max_size=4),
)  # fmt: skip
def test_any_path_of_layouts_keeps_everything(seed, nq, nk, density, lead, path) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(*lead, nq, nk, generator=generator)
    dense[torch.rand(*lead, nq, nk, generator=generator) >= density] = 0
    s = mg.sparsify(dense, "row")
    made = s
    for kind in path:
        made = made.to_layout(kind, size=16)
        assert torch.equal(made.to_dense(), dense) and made.nnz == s.nnz
    assert torch.equal(made.to_layout(s.layout).values, s.values)
    assert torch.equal(made.T.to_dense(), dense.mT)
