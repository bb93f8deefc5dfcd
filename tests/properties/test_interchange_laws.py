"""What leaves for other libraries comes back: layouts, sparse arrays, edge lists, block tensors."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("hypothesis")
from drawn import INTEGER, KINDS, LEADS, Example, examples, hostile, same_bits, seeds
from expressions import Expression, expressions, mask_of, pattern_of, sides
from hypothesis import example
from hypothesis import strategies as st
from laws import law

import mixgrain as mg
from mixgrain.formats import interchange as X
from mixgrain.formats import patterns as P
from mixgrain.formats.errors import LayoutError
from mixgrain.formats.sparse import SparseTensor

ALL = (*KINDS, "tile")
DTYPES = st.sampled_from((torch.float32, torch.float64, torch.float16, torch.bfloat16))
WIDE = st.sampled_from((torch.float32, torch.float64))
tables = st.lists(expressions(most=2), min_size=2, max_size=3)


def filled(x: Example, dtype: torch.dtype, zeros: float = 0.2) -> SparseTensor:
    """A SparseTensor of any bits, dead slots and stored zeros included."""
    layout = x.layout()
    return SparseTensor(layout, hostile(dtype, (*x.free, layout.slots), x.seed, zeros))


@law(1, x=examples(ALL), kind=st.sampled_from(("row", "block", "mixed")), dtype=DTYPES,
     masked=st.booleans())  # fmt: skip
def test_a_layout_becomes_another_and_comes_back(
    x: Example, kind: str, dtype: torch.dtype, masked: bool
) -> None:
    """Positions stay, and so does every bit; a run-time mask goes along."""
    s = filled(x, dtype)
    if masked:
        keep = torch.rand(x.shape[1], generator=x.generator(3)) < 0.6
        s = replace(s, keep=keep)
    made = s.to_layout(kind, size=16)
    made.layout.validate()
    assert made.layout.kind == kind and made.shape == s.shape and made.nnz == s.nnz
    assert torch.equal(made.layout.mask(), s.layout.mask())
    assert same_bits(made.to_dense(), s.to_dense())
    assert made.keep is s.keep
    back = made.to_layout(s.layout)
    assert same_bits(back.to_dense(), s.to_dense())
    live = s.layout.live()
    kept = torch.ones(s.layout.slots, dtype=torch.bool) if live is None else live
    assert same_bits(back.values[..., kept], s.values[..., kept])
    assert bool((back.values[..., ~kept] == 0).all())


@law(0.7, x=examples(ALL), dtype=DTYPES, keep=st.sampled_from((None, "columns", "rows")))
def test_files_hold_any_layout(x: Example, dtype: torch.dtype, keep: str | None) -> None:
    """Bit for bit, what stands in dead slots included; NMLayouts not transposed."""
    s = filled(x, dtype)
    if keep is not None:
        mask = torch.rand(x.shape[1], generator=x.generator(3)) < 0.6
        s = replace(s, keep=mask)
        s = s.T if keep == "rows" and not x.kind.startswith("nm") else s
    with tempfile.TemporaryDirectory() as folder:
        mg.save(Path(folder) / "x", s)
        back = mg.load(Path(folder) / "x")
    assert type(back.layout) is type(s.layout) and back.layout.key != s.layout.key
    assert same_bits(back.values, s.values) and same_bits(back.to_dense(), s.to_dense())
    assert all(map(torch.equal, back.layout.tensors(), s.layout.tensors()))
    assert back.keep_rows == s.keep_rows and (back.keep is None) == (s.keep is None)
    assert s.keep is None or torch.equal(back.keep, s.keep)
    assert repr(back) == repr(s)


@law(0.7, x=examples(("row", "block", "mixed"), leads=LEADS[:1]), dtype=DTYPES)
def test_whole_units_hold_what_touches_them(x: Example, dtype: torch.dtype) -> None:
    """tile and n:m keep more positions; the rest of them holds +0."""
    x = replace(x, free=())
    s = filled(x, dtype)
    for made in (s.to_layout("tile"), s.to_layout("nm", n=4, m=4)):
        made.layout.validate()
        assert same_bits(made.to_dense(), s.to_dense())
        assert not bool((s.layout.mask() & ~made.layout.mask()).any())


@law(0.7, x=examples(ALL, leads=LEADS[:1], free=((),)), dtype=WIDE,
     form=st.sampled_from(("csr", "csc", "coo", "bsr", None)))  # fmt: skip
def test_scipy_holds_the_same_bits(x: Example, dtype: torch.dtype, form: str | None) -> None:
    if form in ("bsr", None):
        x = replace(x, shape=tuple(-(-n // x.size) * x.size for n in x.shape))
    s = filled(x, dtype)
    back = X.from_scipy(X.to_scipy(s.to_layout("block", size=x.size) if form == "bsr" else s, form))
    back.layout.validate()
    assert same_bits(back.to_dense(), s.to_dense())
    if form in ("csr", "csc", "coo"):
        assert torch.equal(back.layout.mask(), s.layout.mask())


@law(0.7, x=examples(ALL), dtype=DTYPES,
     form=st.sampled_from(("sparse_csr", "sparse_csc", "sparse_coo")))  # fmt: skip
@example(x=Example("row", (5, 5), free=(2,)), dtype=torch.float16, form="sparse_csc")
@example(x=Example("row", (5, 5), free=(0,)), dtype=torch.float32, form="sparse_csr")
def test_torch_holds_the_same_bits(x: Example, dtype: torch.dtype, form: str) -> None:
    x = replace(x, free=x.free[:2] if x.lead == (1, 1) else ())
    s = filled(x, dtype)
    try:
        theirs = X.to_torch(s, getattr(torch, form))
    except LayoutError as error:
        # Compressed forms of a batch hold as many positions in each entry.
        per_entry = s.layout.mask().flatten(2).sum(-1)
        assert "entries keep" in str(error) and len(per_entry.unique()) > 1
        return
    assert tuple(theirs.shape) == s.shape
    if 0 in s.lead_shape:  # positions come from a matrix, and there is none
        with pytest.raises(LayoutError, match="no matrix"):
            X.from_torch(theirs)
        return
    back = X.from_torch(theirs)
    back.layout.validate()
    assert same_bits(back.to_dense().reshape(s.shape), s.to_dense())


@law(0.7, x=examples(ALL, leads=LEADS[:1], free=((),)), dtype=DTYPES, shuffled=st.booleans(),
     flow=st.sampled_from(("source_to_target", "target_to_source")))  # fmt: skip
def test_edge_lists_hold_the_same_graph(
    x: Example, dtype: torch.dtype, shuffled: bool, flow: str
) -> None:
    s = filled(x, dtype)
    edges = X.to_edges(s, flow=flow)
    index, weight = edges.edge_index, edges.edge_weight
    assert index.shape == (2, s.nnz)
    if shuffled:
        order = torch.randperm(s.nnz, generator=x.generator(3))
        index, weight = index[:, order], weight[order]
    back = X.from_edges(index, x.shape, weight, flow=flow)
    assert same_bits(back.to_dense(), s.to_dense())
    pattern = X.from_edges(index, x.shape, flow=flow)
    assert torch.equal(pattern.dense(*x.shape), s.layout.mask()[0, 0])


@law(1, a=tables, nq=sides, nk=sides, over=st.sampled_from(("all", "heads", "batch")))
def test_interval_masks_hold_any_pattern(a: list[Expression], nq: int, nk: int, over: str) -> None:
    patterns, masks = [pattern_of(e, nq, nk) for e in a], [mask_of(e, nq, nk) for e in a]
    if over == "all":
        back = X.from_intervals(X.to_intervals(patterns[0], nq, nk), (nq, nk))
        assert torch.equal(back.dense(nq, nk).reshape(nq, nk), masks[0])
        return
    table = P.per_head(patterns) if over == "heads" else P.per_batch(patterns)
    batch = len(a) if over == "batch" else 1
    ends = X.to_intervals(table, nq, nk)
    assert ends.shape[0] == (len(a) if over == "heads" else 1) and ends.shape[1] % 2
    back = X.from_intervals(ends, (nq, nk), batch=batch)
    assert torch.equal(back.dense(nq, nk).reshape(len(a), nq, nk), torch.stack(masks))


@law(1, e=expressions(), nq=sides, nk=sides)
def test_flashmask_holds_the_pattern_or_refuses(e: Expression, nq: int, nk: int) -> None:
    """What it takes comes back whole, in every form that takes it; two runs a key always fit."""
    p, mask = pattern_of(e, nq, nk), mask_of(e, nq, nk)
    took = 0
    for causal, columns in ((None, None), (True, 1), (True, 2), (False, 2), (False, 4)):
        try:
            theirs = X.to_flashmask(p, nq, nk, causal=causal, columns=columns)
        except LayoutError:
            continue
        took += 1
        back = X.from_flashmask(theirs.startend_row_indices, (nq, nk), theirs.causal)
        assert torch.equal(back.dense(nq, nk).reshape(nq, nk), mask)
    # Where every key is masked in at most two runs of rows, four columns say it.
    edges = torch.nn.functional.pad(~mask, (0, 0, 1, 0)).int().diff(dim=0)
    if bool(((edges > 0).sum(0) <= 2).all()):
        assert took


@law(0.5, e=expressions(), nq=sides, nk=sides, size=st.sampled_from((16, 32)),
     compact=st.booleans())  # fmt: skip
@example(e=("causal",), nq=5, nk=0, size=16, compact=False)
def test_flash_blocks_hold_any_pattern(
    e: Expression, nq: int, nk: int, size: int, compact: bool
) -> None:
    theirs = X.to_flash_blocks(pattern_of(e, nq, nk), nq, nk, size, compact)
    back = X.from_flash_blocks(theirs, (nq, nk))
    assert torch.equal(back.dense(nq, nk).reshape(nq, nk), mask_of(e, nq, nk))


@law(0.7, seed=seeds, nq=sides, nk=sides, size=st.sampled_from((16, 32)),
     b=st.sampled_from((1, 2)), h=st.sampled_from((1, 3)))  # fmt: skip
def test_block_indices_hold_blocks(seed: int, nq: int, nk: int, size: int, b: int, h: int) -> None:
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(b, h, -(-nq // size), -(-nk // size), generator=g) < 0.6
    p = P.blocks(kept, size)
    theirs = X.to_bsa(p, nq, nk, size, batch=b, heads=h)
    back = X.from_bsa(theirs.q2k_block_index, (nq, nk), theirs.q2k_block_nums,
                      theirs.block_sizes, size)  # fmt: skip
    wide = kept.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :nq, :nk]
    assert torch.equal(back.dense(nq, nk).reshape(b, h, nq, nk), wide)


def test_hostile_values_are_hostile() -> None:
    """Both zeros, infinities, NaN with payloads: what the laws above say they carry."""
    made = hostile(torch.float32, (4096,), 0, 0.1)
    bits = made.view(INTEGER[4])
    assert {int(b) for b in bits[made.isnan()]} > {0x7F800001, 0x7F800005}
    assert bool(made.isinf().any()) and bool((bits == -(2**31)).any()) and bool((bits == 0).any())
