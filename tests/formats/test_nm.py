"""NMLayout: the choice, its four encodings (torch's own reorder as judge), grids, within, views."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass as torch_compress,
)
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_to_dense_cutlass as torch_decompress,
)
from torch.utils import _pytree as pytree

from mixgrain.formats import patterns as P
from mixgrain.formats.block import BlockLayout
from mixgrain.formats.entries import pack_bits
from mixgrain.formats.errors import LayoutError
from mixgrain.formats.nm import NMLayout, choose
from mixgrain.formats.nm_metadata import pack, swizzle, unpack, unswizzle
from mixgrain.formats.sparse import SparseTensor

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


def blocks_of(mask: torch.Tensor, size: int) -> BlockLayout:
    """The BlockLayout of a dense mask (heads, nq, nk), every touched block with its own bits."""
    heads, nq, nk = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -nk % size, 0, -nq % size))
    tiles = padded.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
    touched = tiles.flatten(3).any(-1)  # (heads, block rows, block columns)
    offsets = torch.zeros(heads * touched.shape[1] + 1, dtype=torch.int64)
    offsets[1:] = touched.sum(-1).flatten().cumsum(0)
    bits = tiles[touched]
    index = torch.where(bits.flatten(1).all(1), -1, torch.arange(bits.shape[0]))
    return BlockLayout.from_blocks(
        (nq, nk), size, offsets, touched.nonzero()[:, 2], index, pack_bits(bits),
        lead=(1, heads), entry=range(heads),
    )  # fmt: skip


def literal_choice(scores: list[float], live: list[bool], n: int, m: int) -> list[list[int]]:
    """The rule of ``choose``, one group at a time."""
    groups = []
    for start in range(0, len(scores), m):
        members = range(start, min(start + m, len(scores)))
        best = sorted((j for j in members if live[j]), key=lambda j: (-scores[j], j))[:n]
        others = [j for j in range(start, start + m) if j not in best]
        groups.append(sorted(j - start for j in best + others[: n - len(best)]))
    return groups


@hypothesis.given(data=st.data(), m=st.integers(1, 16), columns=st.integers(0, 35))
def test_choose_is_the_rule(data, m, columns) -> None:
    n = data.draw(st.integers(1, m))
    value = st.sampled_from([-torch.inf, -2.0, -0.0, 0.0, 1e-40, 1.0, 3.0, torch.inf])
    scores = data.draw(st.lists(value, min_size=columns, max_size=columns))
    live = data.draw(st.lists(st.booleans(), min_size=columns, max_size=columns))
    for dtype in (torch.float32, torch.float64):
        made = choose(torch.tensor(scores, dtype=dtype), torch.tensor(live, dtype=torch.bool), n, m)
        assert made.tolist() == literal_choice(scores, live, n, m)
        assert made.dtype == torch.uint8


def test_choose_broadcasts_and_treats_nan_as_infinite() -> None:
    scores = torch.tensor([[1.0, torch.nan, 2.0, torch.inf], [-torch.nan, -1.0, -1.0, 5.0]])
    assert choose(scores, None, 1, 4).tolist() == [[[1]], [[0]]]
    assert choose(scores, torch.tensor([True, False, True, True]), 2, 4).tolist() == [
        [[2, 3]],
        [[0, 3]],
    ]
    assert choose(scores.half(), None, 2, 4).shape == (2, 1, 2)


def kept_dense(rows: int, columns: int, n: int, m: int, dtype: torch.dtype) -> torch.Tensor:
    """Random values, exactly n of every m not zero.

    They are bfloat16 numbers: torch moves a float32 as two halves and would change some others
    (a half that happens to be a signalling NaN comes back quiet).
    """
    values = torch.randn(rows, columns).bfloat16().to(dtype)
    values[values == 0] = 1
    order = torch.rand(rows, columns // m, m).argsort(-1) < n
    return torch.where(order.reshape(rows, columns), values, torch.zeros((), dtype=dtype))


@pytest.mark.parametrize("rows, columns", [(32, 64), (64, 128), (96, 192), (160, 64)])
@pytest.mark.parametrize(
    "n, m, dtype", [(2, 4, torch.half), (2, 4, torch.bfloat16), (1, 2, torch.float32)]
)
def test_metadata_is_torchs_to_the_bit(rows, columns, n, m, dtype) -> None:
    dense = kept_dense(rows, columns, n, m, dtype)
    values, metadata = torch_compress(dense)
    choice = choose((dense != 0).float(), dense != 0, n, m)
    layout = NMLayout.from_choice(choice[None], (rows, columns), n, m, dtype=dtype)
    layout.validate()
    assert torch.equal(layout.metadata[0].flatten(), metadata.flatten())
    row, column = layout.indices()
    ours = dense[row, column]
    assert torch.equal(ours, values.flatten())  # values, too, lie in torch's order
    assert torch.equal(torch_decompress(values, layout.metadata[0].view_as(metadata)), dense)
    assert torch.equal(SparseTensor(layout, ours).to_dense(), dense)


def test_one_of_two_in_half_precision_is_a_2_4_that_torch_reads() -> None:
    dense = kept_dense(64, 128, 1, 2, torch.half)
    choice = choose((dense != 0).float(), None, 1, 2)
    layout = NMLayout.from_choice(choice[None], (64, 128), 1, 2, dtype=torch.half)
    assert layout.encoding == "1:2-half"
    row, column = layout.indices()
    values = dense[row, column].reshape(64, 64)
    assert torch.equal(torch_decompress(values, layout.metadata[0]), dense)


def test_nibbles() -> None:
    pairs = torch.tensor(list(itertools.combinations(range(4), 2)), dtype=torch.uint8)
    codes = []
    for pair in pairs:
        words = pack(pair.expand(1, 16, 4, 2), "2:4")
        assert words.shape == (1, 16, 1)
        codes.append(int(words[0, 0, 0]) & 15)
    assert codes == [4, 8, 12, 9, 13, 14]
    one = torch.tensor([0, 1, 1, 0, 1, 1, 0, 0], dtype=torch.uint8).expand(1, 16, 8)[..., None]
    half = int(pack(one, "1:2-half")[0, 0, 0]) & 0xFFFF
    assert [half >> 4 * i & 15 for i in range(4)] == [12, 9, 13, 8]
    single = pack(one, "1:2-float32")[0, 0]
    assert [int(single[i // 4]) >> 4 * (i % 4) & 15 for i in range(8)] == [
        4, 14, 14, 4, 14, 14, 4, 4
    ]  # fmt: skip


@hypothesis.given(
    encoding=st.sampled_from(["2:4", "1:2-half", "1:2-float32", "bytes"]),
    rows=st.sampled_from([0, 16, 32, 64, 96]),
    columns=st.sampled_from([0, 16, 32, 64, 192]),
    matrices=st.integers(0, 3),
)
def test_pack_and_unpack_are_inverse(encoding, rows, columns, matrices) -> None:
    n, m = {"2:4": (2, 4), "bytes": (3, 8)}.get(encoding, (1, 2))
    choice = choose(torch.rand(matrices, rows, columns), None, n, m)
    assert torch.equal(unpack(pack(choice, encoding), encoding), choice)
    words = torch.randint(-(2**15), 2**15, (matrices, rows, columns // 16), dtype=torch.int16)
    assert torch.equal(unswizzle(swizzle(words)), words)


SHAPES = [(0, 0), (0, 8), (5, 0), (1, 1), (3, 7), (32, 64), (33, 65), (70, 34)]
KINDS = [(2, 4, torch.half), (1, 2, torch.half), (1, 2, torch.float32), (3, 5, torch.half),
         (1, 1, torch.half), (4, 16, torch.half)]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n, m, dtype", KINDS)
def test_alone(shape, n, m, dtype) -> None:
    lead = (2, 3)
    scores = torch.randn(6, *shape)
    choice = choose(scores, None, n, m)
    layout = NMLayout.from_choice(choice, shape, n, m, lead=lead, dtype=dtype)
    layout.validate()
    expected = torch.zeros(6, *shape, dtype=torch.bool)
    for e, i in itertools.product(range(6), range(shape[0])):
        for g, group in enumerate(literal_choice(scores[e, i].tolist(), [True] * shape[1], n, m)):
            for j in group:
                if g * m + j < shape[1]:
                    expected[e, i, g * m + j] = True
    assert torch.equal(layout.mask(), expected.reshape(*lead, *shape))
    assert layout.nnz == int(expected.sum())
    assert layout.slots == torch.Size(layout.grid).numel()
    stored = layout.choice()[:, : shape[0], : choice.shape[2]]
    assert torch.equal(stored, choice)
    columns = layout.columns()
    assert columns.dtype == torch.int32
    live = layout.live()
    if live is not None:
        assert torch.equal(columns[live].long(), layout.indices()[1][live])
    groups = torch.arange(choice.shape[2])[:, None] * m
    again = NMLayout.from_columns(choice + groups, shape, n, m, lead=lead, dtype=dtype)
    assert torch.equal(again.metadata, layout.metadata)


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("n, m, dtype", [*KINDS[:3], (3, 8, torch.half), (5, 16, torch.half)])
@pytest.mark.parametrize("within_lead", ["shared", "heads"])
def test_within(size, n, m, dtype, within_lead) -> None:
    nq, nk, lead = 75, 101, (2, 2)
    pattern = P.window(20) | P.global_keys([0, 50])
    masks = pattern.dense(nq, nk)[None]
    if within_lead == "heads":
        masks = torch.cat((masks, P.causal().dense(nq, nk)[None]))
    within = blocks_of(masks, size)
    within.validate()
    kept = masks.expand(2, 2, nq, nk).reshape(4, nq, nk)
    scores = torch.randn(4, nq, nk)
    whole = choose(scores, kept, n, m)  # (4, nq, groups, n)
    # The same choice block by block, by the literal definition of the order of slots.
    side = size // m
    pieces = []
    for e in range(4):
        at = [(i, j) for i in range(-(-nq // size)) for j in range(-(-nk // size))]
        for i, j in at:
            rows, columns = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
            if kept[e, rows, columns].any():
                block = torch.arange(n, dtype=torch.uint8).repeat(size, side, 1)
                part = whole[e, rows, j * side : (j + 1) * side]
                block[: part.shape[0], : part.shape[1]] = part
                pieces.append(block)
    choice = torch.stack(pieces)
    layout = NMLayout.from_choice(choice, (nq, nk), n, m, lead=lead, dtype=dtype, within=within)
    layout.validate()
    assert layout.grid == tuple(choice.shape)
    assert torch.equal(layout.choice(), choice)
    expected = torch.zeros(4, nq, nk, dtype=torch.bool)
    groups = torch.arange(-(-nk // m))[:, None] * m
    column = (whole + groups).flatten(-2)
    padded = torch.zeros(4, nq, groups.numel() * m, dtype=torch.bool)
    expected = padded.scatter(-1, column.long(), True)[..., :nk] & kept
    assert torch.equal(layout.mask().reshape(4, nq, nk), expected)
    assert layout.nnz == int(expected.sum())


def test_transposed_view() -> None:
    dense = torch.randn(2, 5, 9)
    layout = NMLayout.from_choice(choose(dense, None, 2, 4), (5, 9), 2, 4, lead=(1, 2))
    s = SparseTensor(layout, torch.randn(layout.slots))
    assert torch.equal(s.T.to_dense(), s.to_dense().mT)
    assert s.T.layout.transposed and s.T.layout.key == -layout.key
    assert s.T.T.layout.key == layout.key and not s.T.T.layout.transposed
    assert torch.equal(s.T.T.to_dense(), s.to_dense())
    assert s.T.values.equal(s.values)
    s.T.layout.validate()
    assert "transposed view" in repr(s.T.layout) and "2:4" in repr(layout)


def test_pytree_keeps_everything() -> None:
    within = blocks_of(P.window(9).dense(40, 40)[None], 16)
    choice = choose(torch.rand(within.block_columns.numel(), 16, 16), None, 2, 4)
    layout = NMLayout.from_choice(choice, (40, 40), 2, 4, within=within)
    leaves, spec = pytree.tree_flatten(layout)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    again = pytree.tree_unflatten(leaves, spec)
    assert again.key == layout.key and again.within.key == within.key
    assert torch.equal(again.indices()[1], layout.indices()[1])


def test_no_grid_holds_a_dense_matrix() -> None:
    """65,536 × 65,536 within a narrow window costs what the window costs."""
    within = P.window(16).to_layout("block", 65536, 65536, size=16)
    live = within.live().view(-1, 16, 16)
    blocks = live.shape[0]
    choice = choose(torch.zeros(live.shape), live, 2, 4)
    layout = NMLayout.from_choice(choice, (65536, 65536), 2, 4, within=within)
    layout.validate()
    assert layout.slots == blocks * 128
    assert layout.nnz <= layout.slots


def broken(layout: NMLayout, **change: object) -> NMLayout:
    return dataclasses.replace(layout, **change)


def test_validate_names_the_field() -> None:
    within = blocks_of(P.window(9).dense(40, 40)[None], 16)
    count = within.block_columns.numel()
    choice = torch.tensor([0, 1], dtype=torch.uint8).repeat(count, 16, 4, 1)
    alone = NMLayout.from_choice(choose(torch.rand(1, 5, 9), None, 2, 4), (5, 9), 2, 4)
    other = NMLayout.from_choice(choose(torch.rand(1, 5, 9), None, 3, 5), (5, 9), 3, 5)
    inside = NMLayout.from_choice(choice, (40, 40), 2, 4, within=within)
    falling = torch.tensor([2, 1, 0], dtype=torch.uint8).expand(1, 5, 2, 3)
    late = torch.tensor([1, 2, 3], dtype=torch.uint8).repeat(1, 5, 2, 1)
    late[:, :, 1] = torch.tensor([2, 3, 4], dtype=torch.uint8)  # column 9 of 9: one live too few
    cases = [
        (broken(alone, m=5), "encoding"),
        (broken(alone, n=0), "1 ≤ n"),
        (broken(alone, m=32, encoding="bytes"), "1 ≤ n"),
        (broken(alone, encoding="1:2-half"), "encoding"),
        (broken(alone, encoding="3:4"), "encoding"),
        (broken(alone, shape=(-1, 9)), "shape"),
        (broken(alone, lead=(0, 1), entry=()), "lead"),
        (broken(alone, entry=(1,)), "entry"),
        (broken(alone, entry=(0, 1)), "entry"),
        (broken(alone, entry_slots=(0, 4)), "entry_slots"),
        (broken(alone, nnz=3), "nnz"),
        (broken(alone, metadata=alone.metadata[:, :1]), "metadata"),
        (broken(alone, metadata=alone.metadata.int()), "metadata"),
        (broken(alone, metadata=torch.zeros_like(alone.metadata)), "metadata"),
        (broken(other, metadata=falling), "metadata"),
        (broken(other, metadata=falling + 9), "metadata"),
        (broken(other, metadata=late), "nnz"),
        (broken(inside, within_entry=(1,)), "within_entry"),
        (broken(inside, shape=(40, 41)), "within"),
        (broken(inside, within=dataclasses.replace(within, nnz=1)), "BlockLayout.nnz"),
    ]
    for layout, field in cases:
        with pytest.raises(LayoutError, match=field):
            layout.validate()


def test_constructors_refuse_what_cannot_be() -> None:
    big = blocks_of(P.causal().dense(256, 256)[None], 128)
    choice = torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    with pytest.raises(LayoutError, match="16, 32 or 64"):
        NMLayout.from_choice(choice, (256, 256), 2, 4, within=big)
    small = blocks_of(P.causal().dense(64, 64)[None], 16)
    with pytest.raises(LayoutError, match="whole groups"):
        NMLayout.from_choice(choice, (64, 64), 1, 3, within=small)
    with pytest.raises(LayoutError, match="broadcasts"):
        heads = blocks_of(torch.ones(2, 64, 64, dtype=torch.bool), 16)
        NMLayout.from_choice(choice.expand(3, 16, 4, 2), (64, 64), 2, 4, lead=(1, 3), within=heads)
    with pytest.raises(LayoutError, match=r"1:2-half.*bytes|bytes"):
        NMLayout.from_choice(choice, (1, 2), 1, 2, encoding="2:4")
    with pytest.raises(LayoutError, match=r"expected \(1, 2, 1, 1\)"):
        NMLayout.from_choice(choice, (2, 1), 1, 1)
    with pytest.raises(LayoutError, match="within no BlockLayout"):
        NMLayout.from_choice(choice, (1, 1), 1, 1).blocks()
