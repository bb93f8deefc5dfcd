"""Products on every layout: adjoint, linear, equivariant, independent of what stands beside them.

Whole numbers in float64 do not round, so almost everything here is equality.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("hypothesis")
from drawn import (
    EXACT,
    FREE,
    KINDS,
    LEADS,
    NM,
    SIDES,
    Example,
    examples,
    real,
    same_bits,
    seeds,
    spread,
    whole,
)
from expressions import Expression, expressions, pattern_of
from hypothesis import example
from hypothesis import strategies as st
from laws import law
from torch import Tensor

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives.linear import linear
from mixgrain.primitives.sddmm import sddmm
from mixgrain.primitives.softmax import softmax
from mixgrain.primitives.spmm import spmm

ALL = (*KINDS, "tile")
#: Twice as often what most people use.
OFTEN = ("row", "block", "row", "block", "nm", "panel", "mixed", "nm within")
LARGER = st.sampled_from((65, 1, 64, 100, 127, 128, 130, 200))
FLOATS = st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16))


@law(1.5, x=examples(OFTEN))
def test_sddmm_and_spmm_are_adjoint(x: Example) -> None:
    """<sddmm(q, k), s> = <q, s k> = <k, sᵀ q>."""
    g = x.generator(1)
    (q, k), layout = x.operands(g), x.layout()
    s = x.sparse(layout, g)
    live = layout.live()
    kept = s.values if live is None else torch.where(live, s.values, 0)
    scores = sddmm(q, k, layout).values
    left = (scores * kept).sum()
    assert left == (q * spmm(s, k)).sum() == (k * spmm(s.T, q)).sum()


@law(1, x=examples(OFTEN), scale=st.sampled_from((1.0, 2.0, -0.5)))
def test_sddmm_is_a_masked_product(x: Example, scale: float) -> None:
    (q, k), layout = x.operands(x.generator(1)), x.layout()
    s = sddmm(q, k, layout, scale=scale)
    mask = spread(layout.mask(), x)
    assert torch.equal(s.to_dense(), torch.where(mask, scale * (q @ k.mT), 0.0))
    live = layout.live()
    assert live is None or bool((s.values[..., ~live] == 0).all())


@law(1.5, x=examples((*OFTEN, "tile")))
def test_spmm_is_a_dense_product(x: Example) -> None:
    g = x.generator(1)
    (q, k), s = x.operands(g), x.sparse(x.layout(), g)
    assert torch.equal(spmm(s, k), s.to_dense() @ k)
    assert torch.equal(spmm(s.T, q), s.to_dense().mT @ q)


@law(1, x=examples((*OFTEN, "tile"), leads=LEADS[:1], free=((),)), biased=st.booleans(),
     tokens=st.sampled_from(((), (3,), (0,), (2, 3))))  # fmt: skip
def test_linear_is_a_dense_product(x: Example, biased: bool, tokens: tuple[int, ...]) -> None:
    g = x.generator(1)
    w = x.sparse(x.layout(), g)
    t, bias = whole(g, *tokens, x.shape[1]), whole(g, x.shape[0]) if biased else None
    expected = torch.nn.functional.linear(t, w.to_dense(), bias)
    assert torch.equal(linear(t, w, bias), expected)


@law(0.7, x=examples(OFTEN), a=st.integers(-3, 3))
def test_products_are_linear_in_each_argument(x: Example, a: int) -> None:
    g, layout = x.generator(1), x.layout()
    (q, k), (r, m) = x.operands(g), x.operands(g)
    s, t = x.sparse(layout, g), x.sparse(layout, g)
    assert torch.equal(
        sddmm(a * q + r, k, layout).values, (sddmm(q, k, layout) * a + sddmm(r, k, layout)).values
    )
    assert torch.equal(spmm(s * a + t, k), a * spmm(s, k) + spmm(t, k))
    assert torch.equal(spmm(s, a * k + m), a * spmm(s, k) + spmm(s, m))


@law(1, x=examples(EXACT))
def test_rows_and_columns_in_another_order(x: Example) -> None:
    """Queries and keys permuted under a mask permuted alike: scores and outputs permute."""
    g, masks = x.generator(1), x.masks()
    (q, k), (nq, nk) = x.operands(g), x.shape
    rows, columns = torch.randperm(nq, generator=g), torch.randperm(nk, generator=g)
    ours = sddmm(q, k, x.layout(masks))
    theirs = sddmm(q[..., rows, :], k[..., columns, :], x.layout(masks[:, rows][..., columns]))
    assert torch.equal(theirs.to_dense(), ours.to_dense()[..., rows, :][..., columns])
    assert torch.equal(spmm(theirs, k[..., columns, :]), spmm(ours, k)[..., rows, :])


@law(1, x=examples(EXACT, leads=LEADS[1:]))
def test_entries_in_another_order(x: Example) -> None:
    """Batch entries and heads permuted, positions with them: results permute."""
    g = x.generator(1)
    q, k = x.operands(g)
    (b, h), masks = x.lead, x.masks()
    batch, heads = torch.randperm(b, generator=g), torch.randperm(h, generator=g)
    entry = torch.tensor(x.entry).view(b, h)[batch][:, heads].flatten().tolist()
    first = list(dict.fromkeys(entry))
    moved = Example(**{**vars(x), "entry": tuple(first.index(e) for e in entry)})

    def turn(t: Tensor) -> Tensor:
        t = t if h == 1 else t.index_select(-3, heads)
        return t if b == 1 else t.index_select(-4, batch)

    ours, theirs = x.layout(masks), moved.layout(masks[first])
    one, other = sddmm(q, k, ours), sddmm(turn(q), turn(k), theirs)
    assert torch.equal(other.to_dense(), turn(one.to_dense()))
    assert torch.equal(spmm(other, turn(k)), turn(spmm(one, k)))


@law(1, x=examples(OFTEN), masked=st.sampled_from(("keys", "batch of keys")))
@example(x=Example("row", (5, 5), lead=(1, 2), entry=(0, 1), free=(0,)), masked="batch of keys")
def test_a_key_mask_drops_columns(x: Example, masked: str) -> None:
    """The same as a matrix whose columns are zero there, in every operation that follows."""
    g, layout = x.generator(1), x.layout()
    q, k = x.operands(g)
    if masked == "keys" or len(x.lead_shape) < 2:
        keep = torch.rand(x.shape[1], generator=g) < 0.6
        wide = keep[None, :]
    else:
        keep = torch.rand(x.lead_shape[-2], x.shape[1], generator=g) < 0.6
        wide = keep[:, None, None, :]
    s, all_of = sddmm(q, k, layout, key_mask=keep), sddmm(q, k, layout)
    dense = torch.where(wide, all_of.to_dense(), 0.0)
    assert torch.equal(s.to_dense(), dense)
    assert torch.equal(spmm(s, k), dense @ k)
    assert torch.equal(spmm(s.T, q), dense.mT @ q)
    assert torch.equal((s + all_of).to_dense(), 2 * dense)
    assert s.key_mask is keep and s.T.key_mask is None and s.T.keep is keep
    # NaN in a dropped key reaches nothing.
    poisoned = torch.where(keep[:, None, :, None] if keep.dim() == 2 else keep[:, None], k,
                           torch.nan)  # fmt: skip
    again = sddmm(q, poisoned, layout, key_mask=keep)
    assert torch.equal(again.to_dense(), dense)
    assert torch.equal(spmm(again, poisoned), dense @ k)


@law(1, x=examples((*OFTEN, "tile")))
def test_what_dead_slots_hold_is_absent(x: Example) -> None:
    g, layout = x.generator(1), x.layout()
    (q, k), live = x.operands(g), layout.live()
    s = x.sparse(layout, g)
    if live is not None:
        spoilt = s.with_values(torch.where(live, s.values, torch.nan))
        assert torch.equal(spoilt.to_dense(), s.to_dense())
        assert torch.equal(spmm(spoilt, k), spmm(s, k))
        assert torch.equal(spmm(spoilt.T, q), spmm(s.T, q))
        if x.kind != "tile":
            p = softmax(spoilt)
            assert torch.equal(p.values, softmax(s).values)
            assert bool((p.values[..., ~live] == 0).all())


@law(1, x=examples(EXACT), free=st.sampled_from(FREE[1:]))
def test_what_is_not_kept_reaches_nothing(x: Example, free: tuple[int, ...]) -> None:
    """NaN and infinity in rows that nothing keeps; element by element on the CPU."""
    x = Example(**{**vars(x), "free": free})
    g, layout = x.generator(1), x.layout()
    q, k = x.operands(g)
    mask = spread(layout.mask(), x)
    lost = torch.where(torch.rand(k.shape[:-1], generator=g) < 0.5, torch.nan, torch.inf)
    wild = torch.where(mask.any(-2)[..., None], k, lost[..., None])
    s = sddmm(q, k, layout)
    assert torch.equal(sddmm(q, wild, layout).values, s.values)
    assert torch.equal(spmm(s, wild), spmm(s, k))
    blind = torch.where(mask.any(-1)[..., None], q, torch.nan)
    assert torch.equal(sddmm(blind, k, layout).values, s.values)
    assert torch.equal(spmm(s.T, blind), spmm(s.T, q))


@law(0.15, nq=LARGER, nk=LARGER, size=st.sampled_from((16, 32, 64, 128)), seed=seeds,
     kind=st.sampled_from(("row", "block", "mixed")), e=expressions(most=2))  # fmt: skip
def test_larger_matrices_are_exact_too(
    nq: int, nk: int, size: int, seed: int, kind: str, e: Expression
) -> None:
    """Every size of block, several of them, and patterns that the library splits itself."""
    g, p = torch.Generator().manual_seed(seed), pattern_of(e, nq, nk)
    layout, mask = p.to_layout(kind, nq, nk, size=size), p.dense(nq, nk)
    q, k = whole(g, 2, nq, 5), whole(g, 2, nk, 5)
    s = sddmm(q, k, layout)
    dense = torch.where(mask, q @ k.mT, 0.0)
    assert torch.equal(s.to_dense(), dense)
    assert torch.equal(spmm(s, k), dense @ k)
    assert torch.equal(spmm(s.T, q), dense.mT @ q)


@law(0.2, x=examples(("row",)))
def test_all_layouts_of_a_mask_agree(x: Example) -> None:
    g, masks = x.generator(1), x.masks()
    q, k = x.operands(g)
    results = []
    for kind in EXACT:
        s = sddmm(q, k, Example(**{**vars(x), "kind": kind}).layout(masks))
        results.append((s.to_dense(), spmm(s, k), spmm(s.T, q)))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@law(1, x=examples(OFTEN, leads=LEADS[:4], free=((2,), (1, 2))), heads=st.sampled_from((1, 2, 3)),
     group=st.sampled_from((2, 3, 1)))  # fmt: skip
def test_grouped_heads_are_repeated_heads(x: Example, heads: int, group: int) -> None:
    """Grouped-query attention: head i of q meets head i // group of k."""
    g = x.generator(1)
    b, h = x.lead
    if h > 1:  # the layout says how many heads q has
        group = 2 if h % 2 == 0 else 1
        heads = h // group
    batch, layout = max(b, 2), x.layout()
    q = whole(g, batch, heads * group, x.shape[0], x.dim)
    k = whole(g, batch, heads, x.shape[1], x.dim)
    wide = k.repeat_interleave(group, 1)
    s = sddmm(q, k, layout)
    assert torch.equal(s.values, sddmm(q, wide, layout).values)
    assert torch.equal(spmm(s, k), spmm(s, wide))


@law(1, x=examples(OFTEN, leads=LEADS[:1], free=((),)),
     left=st.sampled_from(((2, 3), (3,), (), (1, 3))),
     right=st.sampled_from(((3,), (), (2, 1), (2, 3))))  # fmt: skip
def test_leading_dimensions_broadcast(
    x: Example, left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    g, layout = x.generator(1), x.layout()
    q, k = whole(g, *left, x.shape[0], x.dim), whole(g, *right, x.shape[1], x.dim)
    lead = torch.broadcast_shapes(left, right)
    wide = [t.expand(*lead, *t.shape[-2:]).contiguous() for t in (q, k)]
    s = sddmm(q, k, layout)
    assert s.lead_shape == tuple(lead)
    assert torch.equal(s.values, sddmm(*wide, layout).values)
    sparse = SparseTensor(layout, whole(g, *left, layout.slots))
    assert torch.equal(spmm(sparse, k), sparse.to_dense() @ k)


@law(1, x=examples(OFTEN, leads=LEADS[:1], free=((2, 3),)), dtype=FLOATS, b=st.integers(0, 1),
     h=st.integers(0, 2))  # fmt: skip
@example(x=Example("panel", (5, 5), free=(2, 3), dim=5), dtype=torch.float32, b=0, h=2)
@example(x=Example("panel", (5, 13), free=(2, 3), dim=1), dtype=torch.float32, b=0, h=1)
def test_a_result_does_not_depend_on_its_batch(
    x: Example, dtype: torch.dtype, b: int, h: int
) -> None:
    """One entry computed alone, at another place in memory, has the bits it has among others."""
    g, layout = x.generator(1), x.layout()
    q, k = (real(g, 2, 3, n, x.dim, dtype=dtype) for n in x.shape)
    s = sddmm(q, k, layout, scale=0.3)
    p, lse = softmax(s, return_lse=True)
    o, turned = spmm(p, k), spmm(p.T, q)
    q, k = q[b, h].clone(), k[b, h].clone()
    one = sddmm(q, k, layout, scale=0.3)
    alone, lse_alone = softmax(one, return_lse=True)
    assert same_bits(one.values, s.values[b, h])
    assert same_bits(alone.values, p.values[b, h])
    assert same_bits(lse_alone, lse[b, h])
    assert same_bits(spmm(alone, k), o[b, h])
    assert same_bits(spmm(alone.T, q), turned[b, h])


@law(0.7, x=examples(OFTEN), dtype=FLOATS)
@example(x=Example("nm", (5, 5), free=(2,), dim=5, nm=(1, 4)), dtype=torch.float32)
def test_repeats_have_the_same_bits(x: Example, dtype: torch.dtype) -> None:
    """Again, from other strides, and after every cache was emptied."""
    g, layout = x.generator(1), x.layout()
    q, k = (real(g, *x.lead_shape, n, x.dim, dtype=dtype) for n in x.shape)

    def run(q: Tensor, k: Tensor) -> list[Tensor]:
        s = sddmm(q, k, layout, scale=0.3)
        p, lse = softmax(s, return_lse=True)
        return [s.values, p.values, lse, spmm(p, k), spmm(p.T, q)]

    first = run(q, k)
    strided = [torch.stack([t, t], -1)[..., 0] for t in (q, k)]
    assert all(map(same_bits, first, run(*strided)))
    mg.clear_caches()
    assert all(map(same_bits, first, run(q, k)))


@law(1, x=examples(OFTEN), dtype=st.sampled_from((torch.bfloat16, torch.float16)))
def test_half_precision_is_float32_rounded_once(x: Example, dtype: torch.dtype) -> None:
    g, layout = x.generator(1), x.layout()
    q, k = (whole(g, *x.lead_shape, n, x.dim, dtype=dtype) / 4 for n in x.shape)
    s, wide = sddmm(q, k, layout, scale=0.3), sddmm(q.float(), k.float(), layout, scale=0.3)
    assert same_bits(s.values, wide.values.to(dtype))
    kept = sddmm(q, k, layout, scale=0.3, out_dtype=torch.float32)
    assert same_bits(kept.values, wide.values)
    t = whole(g, *x.free, layout.slots, dtype=dtype)
    sparse = SparseTensor(layout, t)
    assert same_bits(spmm(sparse, k), spmm(sparse.to(torch.float32), k.float()).to(dtype))


@law(1, nm=st.sampled_from(NM), nq=st.sampled_from(SIDES), nk=st.sampled_from(SIDES), seed=seeds,
     lead=st.sampled_from(((), (2,), (2, 3), (0,), (0, 2))), within=st.booleans(),
     masked=st.booleans(), dim=st.sampled_from((2, 1, 0, 5)))  # fmt: skip
@example(nm=(2, 4), nq=5, nk=7, seed=0, lead=(0, 2), within=False, masked=False, dim=2)
def test_dynamic_nm_keeps_the_best_live_scores(
    nm: tuple[int, int], nq: int, nk: int, seed: int, lead: tuple[int, ...], within: bool,
    masked: bool, dim: int,
) -> None:  # fmt: skip
    """Of every m keys the n with the largest scores, with many ties; a literal choice decides."""
    n, m = nm
    within = within and 64 % m == 0
    g = torch.Generator().manual_seed(seed)
    q, k = whole(g, *lead, nq, dim), whole(g, *lead, nk, dim)
    live = torch.rand(nq, nk, generator=g) < 0.6 if within else torch.ones(nq, nk).bool()
    pattern = P.nm(n, m) & P.from_dense(live) if within else P.nm(n, m)
    keep = torch.rand(nk, generator=g) < 0.7 if masked else None
    s = sddmm(q, k, pattern, key_mask=keep)
    alive = live & keep if masked else live
    dense = q @ k.mT
    got = s.with_values(torch.ones_like(s.values)).to_dense()
    assert torch.equal(s.to_dense(), dense * got)
    s.layout.validate()
    if not math.prod(lead):
        return
    which = tuple(size // 2 for size in lead)  # one of the matrices, literally
    expected = torch.zeros(nq, nk)
    for i, row in enumerate(dense[which].tolist()):
        for at in range(0, nk, m):
            group = [j for j in range(at, min(at + m, nk)) if alive[i, j]]
            for j in sorted(group, key=lambda j: (-row[j], j))[:n]:
                expected[i, j] = 1
    assert torch.equal(got[which], expected.double())
