"""Patterns of a fixed shape, from dense masks, CSR indices, masks of blocks and BlockMasks."""

from __future__ import annotations

import numpy as np
import predicates as L
import pytest
import torch
from pattern_checks import check_forms
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from mixgrain.formats import pattern_fixed, pattern_flex
from mixgrain.formats import patterns as P
from mixgrain.formats.errors import DtypeError, LayoutError, ShapeError

SHAPES = [(0, 0), (0, 7), (7, 0), (1, 1), (2, 70), (33, 64), (64, 33), (70, 70)]
shapes = pytest.mark.parametrize("nq, nk", SHAPES)


def mask(*shape: int, seed: int = 0) -> torch.Tensor:
    """About half kept, with some full and some empty rows."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(shape, generator=generator) < 0.5
    if len(shape) > 1 and shape[-2] > 4:
        drawn[..., 1, :], drawn[..., 3, :] = True, False
    return drawn


# from_dense


@shapes
def test_from_dense(nq, nk) -> None:
    kept = mask(nq, nk)
    pattern = P.from_dense(kept)
    assert torch.equal(pattern.dense(nq, nk), kept)
    check_forms(pattern, kept)
    check_forms(~pattern, ~kept)


def test_from_dense_with_leading_dimensions() -> None:
    heads = mask(3, 5, 6)
    heads[2] = heads[0]
    pattern = P.from_dense(heads)
    assert (pattern.lead, pattern.entry) == ((1, 3), (0, 1, 0))
    assert torch.equal(pattern.dense(5, 6), heads)
    both = mask(2, 3, 5, 6)
    assert P.from_dense(both).lead == (2, 3)
    assert torch.equal(P.from_dense(both).dense(5, 6), both)
    assert P.from_dense(both[:, :1]).dense(5, 6).shape == (2, 1, 5, 6)
    assert P.from_dense(heads[:1]).dense(5, 6).shape == (1, 5, 6)


def test_from_dense_in_small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(pattern_fixed, "MASK_PER_CHUNK", 100)
    kept = mask(70, 33)
    check_forms(P.from_dense(kept), kept)


def test_from_dense_takes_views_and_lists() -> None:
    kept = mask(10, 12)
    assert torch.equal(P.from_dense(kept.T).dense(12, 10), kept.T)
    assert torch.equal(P.from_dense(kept[::2, 1::3]).dense(5, 4), kept[::2, 1::3])
    assert torch.equal(P.from_dense(kept.tolist()).dense(10, 12), kept)
    assert torch.equal(P.from_dense(kept.numpy()).dense(10, 12), kept)


# from_csr


@shapes
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_from_csr(nq, nk, index) -> None:
    kept = mask(nq, nk)
    columns = kept.nonzero()[:, 1]
    indptr = torch.cat((torch.zeros(1), kept.sum(1).cumsum(0))).to(index)
    pattern = P.from_csr(indptr, columns.to(index), (nq, nk))
    assert torch.equal(pattern.dense(nq, nk), kept)
    check_forms(pattern, kept)


def test_from_csr_sorts_within_rows() -> None:
    pattern = P.from_csr([0, 3, 3, 5], [4, 0, 2, 3, 1], (3, 5))
    assert pattern.dense(3, 5).int().tolist() == [[1, 0, 1, 0, 1], [0] * 5, [0, 1, 0, 1, 0]]


def test_from_csr_of_arrays() -> None:
    indptr, indices = np.array([0, 1, 2], dtype=np.int32), np.array([1, 0], dtype=np.int32)
    assert P.from_csr(indptr, indices, (2, 2)).dense(2, 2).int().tolist() == [[0, 1], [1, 0]]


def test_arrays_are_copied() -> None:
    """A numpy array does not say when it changes."""
    indices = np.array([1, 0])
    pattern = P.from_csr([0, 1, 2], indices, (2, 2))
    indices[0] = 0
    assert pattern.dense(2, 2).int().tolist() == [[0, 1], [1, 0]]


def test_tensors_are_followed() -> None:
    indptr, indices = torch.tensor([0, 1, 2]), torch.tensor([1, 0])
    pattern = P.from_csr(indptr, indices, (2, 2))
    indices[0] = 0
    assert pattern.dense(2, 2).int().tolist() == [[1, 0], [1, 0]]
    indptr[1] = 2
    indices[1] = 1
    assert pattern.dense(2, 2).int().tolist() == [[1, 1], [0, 0]]
    indices[0] = 5
    with pytest.raises(LayoutError, match="column 5 at entry 0"):
        pattern.dense(2, 2)


# blocks


@shapes
@pytest.mark.parametrize("size", [1, 8, 33, 100])
def test_blocks(nq, nk, size) -> None:
    held = mask(-(-nq // size), -(-nk // size))
    keep = L.blocks(lambda nq, nk: held.tolist(), size)
    pattern = P.blocks(held, size)
    assert torch.equal(pattern.dense(nq, nk), L.mask_of(keep, nq, nk))
    check_forms(pattern, pattern.dense(nq, nk))


def test_blocks_count_rows_from_the_first_query() -> None:
    """Their shape is fixed, so they do not move with the position of the queries."""
    held = torch.tensor([[True, False]])
    assert P.blocks(held, 4).dense(2, 6).int().tolist() == [[1, 1, 1, 1, 0, 0]] * 2


def test_blocks_with_leading_dimensions() -> None:
    held = mask(2, 3, 2, 2)
    expected = held.repeat_interleave(4, 2).repeat_interleave(4, 3)[..., :7, :6]
    assert torch.equal(P.blocks(held, 4).dense(7, 6), expected)
    assert torch.equal(P.blocks(held[0], 4).dense(7, 6), expected[0])


# Errors

ERRORS = {
    "dense, another shape": (
        lambda: P.from_dense(mask(4, 5)).dense(5, 5),
        LayoutError,
        "4 × 5, but 5 × 5",
    ),
    "dense, no rows": (lambda: P.from_dense(mask(4, 5)).dense(0, 5), LayoutError, "0 × 5"),
    "dense, in an expression": (
        lambda: (P.causal() | ~P.from_dense(mask(4, 5))).nnz(0, 5),
        LayoutError,
        "0 × 5",
    ),
    "dense, within nm": (
        lambda: (P.nm(2, 4) & P.from_dense(mask(4, 5))).nnz(0, 5),
        LayoutError,
        "0 × 5",
    ),
    "dense, floats": (lambda: P.from_dense(torch.ones(2, 2)), DtypeError, "bool expected"),
    "dense, 1-D": (lambda: P.from_dense(mask(4)), ShapeError, "2-D or 3-D or 4-D"),
    "dense, no head": (lambda: P.from_dense(mask(0, 2, 2)), LayoutError, "no entry"),
    "csr, another shape": (
        lambda: P.from_csr([0, 1], [0], (1, 2)).nnz(2, 2),
        LayoutError,
        "1 × 2, but 2 × 2",
    ),
    "csr, indptr too short": (lambda: P.from_csr([0, 1], [0], (2, 2)), LayoutError, "3 expected"),
    "csr, indptr starts late": (
        lambda: P.from_csr([1, 1, 1], [0], (2, 2)),
        LayoutError,
        "from 1 to 1",
    ),
    "csr, indptr ends early": (lambda: P.from_csr([0, 0], [0], (1, 2)), LayoutError, "from 0 to 0"),
    "csr, indptr falls": (
        lambda: P.from_csr([0, 2, 1, 2], [0, 1], (3, 2)),
        LayoutError,
        "from 2 to 1 at row 1",
    ),
    "csr, column too large": (
        lambda: P.from_csr([0, 1, 3], [0, 1, 2], (2, 2)),
        LayoutError,
        r"column 2 at entry 2 \(row 1\)",
    ),
    "csr, column negative": (lambda: P.from_csr([0, 1], [-1], (1, 2)), LayoutError, "column -1"),
    "csr, column twice": (
        lambda: P.from_csr([0, 0, 3], [1, 0, 1], (2, 2)),
        LayoutError,
        "column 1 stands twice in row 1",
    ),
    "csr, floats": (lambda: P.from_csr([0, 1], [0.0], (1, 1)), DtypeError, "indices"),
    "csr, shape": (lambda: P.from_csr([0, 1], [0], (1,)), ShapeError, "nq, nk"),
    "csr, negative shape": (lambda: P.from_csr([0], [], (0, -1)), LayoutError, "-1 given"),
    "blocks, of no size": (lambda: P.blocks(mask(2, 2), 0), LayoutError, "integer >= 1"),
    "blocks, of another shape": (
        lambda: P.blocks(mask(2, 2), 4).nnz(4, 8),
        LayoutError,
        "1 × 2 blocks expected",
    ),
    "blocks, integers": (lambda: P.blocks([[1, 0]], 4), DtypeError, "bool expected"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(name) -> None:
    call, kind, text = ERRORS[name]
    with pytest.raises(kind, match=text):
        call()


# from_block_mask

TABLE = torch.arange(300) // 37
BIAS = torch.tensor([0, 5, 40])


def causal(b, h, q, k):
    return q >= k


def sliding(b, h, q, k):
    return (q - k).abs() <= 17


def by_document(b, h, q, k):
    return (TABLE[q] == TABLE[k]) & (q >= k)  # would read beyond its table if asked past the edge


def by_head_and_batch(b, h, q, k):
    return (q + BIAS[h] >= k) & ((q + k + b) % 3 > 0)


def reduced(b, h, q, k):
    """Reduces over a table for each single pair, which only a mapped function gets right."""
    return (TABLE[:8] == (q + k) % 11).any()


FUNCTIONS = {f.__name__: f for f in (causal, sliding, by_document, by_head_and_batch, reduced)}


def block_mask(function, nq: int, nk: int, b=None, h=None, size=(32, 32)) -> BlockMask:
    return create_block_mask(function, b, h, nq, nk, device="cpu", BLOCK_SIZE=size)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("nq, nk", [(1, 1), (96, 96), (100, 300), (300, 130)])
@pytest.mark.parametrize("size", [(32, 32), (64, 16)])
def test_from_block_mask(name, nq, nk, size) -> None:
    function = FUNCTIONS[name]
    pattern = P.from_block_mask(block_mask(function, nq, nk, size=size))
    expected = create_mask(function, 1, 1, nq, nk, device="cpu")[0, 0]
    assert torch.equal(pattern.dense(nq, nk), expected)
    check_forms(pattern, expected)


def test_block_mask_per_head_and_batch() -> None:
    mask = block_mask(by_head_and_batch, 70, 100, 2, 3)
    pattern = P.from_block_mask(mask)
    assert pattern.lead == (2, 3)
    expected = create_mask(by_head_and_batch, 2, 3, 70, 100, device="cpu")
    assert torch.equal(pattern.dense(70, 100), expected)
    heads = P.from_block_mask(block_mask(by_head_and_batch, 70, 100, None, 3))
    assert heads.leading_dims == 1
    assert torch.equal(heads.dense(70, 100), expected[0])


def test_block_mask_in_small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(pattern_flex, "ELEMENTS_PER_CHUNK", 1)
    expected = create_mask(sliding, 1, 1, 100, 130, device="cpu")[0, 0]
    assert torch.equal(P.from_block_mask(block_mask(sliding, 100, 130)).dense(100, 130), expected)


def test_block_mask_without_full_blocks() -> None:
    """Hand-made lists: the entries after the count mean nothing."""
    counts = torch.tensor([[[1, 0]]], dtype=torch.int32)
    columns = torch.tensor([[[[1, 99], [99, 99]]]], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(
        counts, columns, BLOCK_SIZE=4, seq_lengths=(7, 6), compute_q_blocks=False
    )
    expected = torch.zeros(7, 6, dtype=torch.bool)
    expected[:4, 4:] = True
    assert torch.equal(P.from_block_mask(mask).dense(7, 6), expected)


def test_block_mask_identity() -> None:
    mask = block_mask(causal, 96, 96)
    key = P.from_block_mask(mask).expression_key()
    assert P.from_block_mask(mask).expression_key() == key
    assert P.from_block_mask(block_mask(lambda b, h, q, k: q >= k, 96, 96)).expression_key() != key


def test_block_mask_errors() -> None:
    mask = block_mask(causal, 96, 96)
    with pytest.raises(LayoutError, match="96 × 96, but 95 × 96"):
        P.from_block_mask(mask).nnz(95, 96)
    with pytest.raises(ShapeError, match="not a slice of its rows"):
        P.from_block_mask(mask[:, :, torch.tensor([1])])
    with pytest.raises(RuntimeError, match="mask_mod"):  # torch's own: a slice lost its mask_mod
        P.from_block_mask(mask[0]).nnz(96, 96)
    bad = BlockMask.from_kv_blocks(
        torch.ones(1, 1, 1, dtype=torch.int32),
        torch.full((1, 1, 1, 1), 3, dtype=torch.int32),
        BLOCK_SIZE=4,
        compute_q_blocks=False,
    )
    with pytest.raises(LayoutError, match=r"within \[0, 1\)"):
        P.from_block_mask(bad).nnz(4, 4)
