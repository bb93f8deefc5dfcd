"""BlockMask, FlashAttention-4's block lists and cuDNN's block indices, in and out."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import mixgrain as mg
from mixgrain.formats import interchange as X
from mixgrain.formats import patterns as P
from mixgrain.formats.errors import LayoutError, ShapeError

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")

MIXED = P.causal() & P.longformer(20, [3, 77])
PATTERNS = {
    "flat": MIXED,
    "nothing": P.full() - P.full(),
    "everything": P.full(),
    "heads": P.per_head([MIXED, P.window(9), MIXED]),
    "batch": P.per_batch([P.full(), P.random(0.1, 1)]),
    "both": P.per_batch([P.per_head([P.full(), MIXED, P.window(9)]), P.per_head([MIXED] * 3)]),
}
SHAPES = [(100, 130), (64, 40), (1, 1)]


def full_dense(pattern: P.Pattern, nq: int, nk: int) -> torch.Tensor:
    """(b, h, nq, nk), whatever the pattern's leading dimensions."""
    return pattern.dense(nq, nk).reshape(*pattern.lead, nq, nk)


def blockwise(dense: torch.Tensor, high: int, wide: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks keep something and which everything, both bool (b, h, rows, columns)."""
    nq, nk = dense.shape[-2:]
    padded = torch.nn.functional.pad(dense, (0, -nk % wide, 0, -nq % high))
    cut = padded.unflatten(3, (-1, wide)).unflatten(2, (-1, high))
    return cut.any(5).any(3), cut.all(5).all(3)


def listed(counts: torch.Tensor, columns: torch.Tensor, across: int) -> torch.Tensor:
    """Bool (b, h, rows, across) of a block list, by a loop; fails on a column twice."""
    out = torch.zeros(*counts.shape, across, dtype=torch.bool)
    for place in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        for column in columns[tuple(place)][: int(counts[tuple(place)])].tolist():
            assert not out[(*place, column)]
            out[(*place, column)] = True
    return out


# BlockMask


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("nq, nk", SHAPES)
@pytest.mark.parametrize("size", [16, (64, 128), 48])
def test_block_mask_is_what_create_block_mask_makes(name, nq, nk, size) -> None:
    pattern = PATTERNS[name]
    made = X.to_block_mask(pattern, nq, nk, size)
    dense = full_dense(pattern, nq, nk)

    def asked(b, h, q, k):
        return dense[b, h, q.clamp(max=nq - 1), k.clamp(max=nk - 1)]

    expected = create_block_mask(asked, *pattern.lead, nq, nk, device="cpu", BLOCK_SIZE=size)
    assert made.shape == expected.shape and made.BLOCK_SIZE == expected.BLOCK_SIZE
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts = [getattr(m, f"{kind}_num_blocks") for m in (made, expected)]
        columns = [getattr(m, f"{kind}_indices") for m in (made, expected)]
        assert torch.equal(*counts) and columns[0].shape == columns[1].shape
        across = columns[0].shape[-1]
        assert torch.equal(listed(counts[0], columns[0], across),
                           listed(counts[1], columns[1], across))  # fmt: skip
    assert torch.equal(made.to_dense(), expected.to_dense())
    assert torch.equal(full_dense(P.from_block_mask(made), nq, nk), dense)


@pytest.mark.parametrize("name", PATTERNS)
def test_flex_attention_keeps_the_same_elements(name) -> None:
    """Eager: it asks the mask_mod about every element, whatever the block lists say."""
    pattern, (nq, nk) = PATTERNS[name], (100, 130)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16, dtype=torch.float64) for n in (nq, nk, nk))
    mask = pattern.dense(nq, nk)
    if name == "nothing":
        mask = mask[None, None]
    o = flex_attention(q, k, v, block_mask=X.to_block_mask(pattern, nq, nk, 32))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(o, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.slow
def test_compiled_flex_attention_agrees() -> None:
    """Compiled, it asks the mask_mod in partial blocks only and takes full ones whole."""
    pattern, n = P.per_head([MIXED, P.causal()]), 256
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, n, 16)
    mask = X.to_block_mask(pattern, n, n, 128)
    assert int(mask.full_kv_num_blocks.sum()) and int(mask.kv_num_blocks.sum())
    o = torch.compile(flex_attention)(q, k, v, block_mask=mask)
    expected = mg.attend(q, k, v, pattern, impl="reference")
    torch.testing.assert_close(o, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("kind", ["row", "block", "mixed"])
def test_block_mask_of_layouts_and_tensors(kind) -> None:
    pattern = PATTERNS["heads"]
    layout = pattern.to_layout(kind, 70, 90, size=32)
    s = mg.sparsify(torch.randn(2, 3, 70, 90), layout=layout)
    for source in (layout, s):
        made = P.from_block_mask(X.to_block_mask(source, block_size=32))
        assert torch.equal(full_dense(made, 70, 90), full_dense(pattern, 70, 90))
    assert X.to_block_mask(layout, 70, 90, 64).seq_lengths == (70, 90)


def test_block_masks_that_would_be_counted_twice() -> None:
    def bad(counts, columns, full_counts=None, full=None):
        lists = [
            None if t is None else torch.tensor(t, dtype=torch.int32)[None, None]
            for t in (counts, columns, full_counts, full)
        ]
        return BlockMask((32, 32), *lists, None, None, None, None, (16, 16), mod)

    def mod(b, h, q, k):
        return q >= k

    cases = [
        (([1, 2], [[0, 0], [1, 1]]), "listed twice"),
        (([1, 3], [[0, 0], [0, 1]]), "counts from 1 to 3"),
        (([-1, 1], [[0, 0], [0, 1]]), "counts from -1"),
        (([1, 1], [[0, 0], [2, 0]]), "within"),
        (([1, 1], [[0, 0], [1, 0]], [0, 1], [[0, 0], [1, 0]]), "both as full and as partial"),
    ]
    for arrays, text in cases:
        with pytest.raises(LayoutError, match=text):
            P.from_block_mask(bad(*arrays)).dense(32, 32)


# FlashAttention-4


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("nq, nk", SHAPES)
@pytest.mark.parametrize("size, compact", [((64, 16), False), (32, True)])
def test_flash_blocks(name, nq, nk, size, compact) -> None:
    pattern = PATTERNS[name]
    dense = full_dense(pattern, nq, nk)
    made = X.to_flash_blocks(pattern, nq, nk, size, compact)
    high, wide = made.block_size
    touched, whole = blockwise(dense, high, wide)
    across = touched.shape[-1]
    assert {t.dtype for t in made[:4]} == {torch.int32}
    assert torch.equal(listed(made.full_block_cnt, made.full_block_idx, across), whole)
    assert torch.equal(listed(made.mask_block_cnt, made.mask_block_idx, across), touched & ~whole)
    if compact:
        assert made.full_block_idx.shape[-1] == max(1, int(made.full_block_cnt.max()))
    # The documented formula, on the tables alone.
    entry, table, masks = made.aux_tensors
    q, k = torch.arange(nq)[:, None], torch.arange(nk)
    side = masks.shape[1]
    for b, h in torch.cartesian_prod(torch.arange(entry.shape[0]), torch.arange(entry.shape[1])):
        row = table[entry[b, h], q // side, k // side].long()
        kept = masks[row, q % side, k % side // 8] >> (k % 8) & 1
        assert torch.equal(kept.bool(), dense[b, h])
    back = X.from_flash_blocks(made, (nq, nk))
    assert torch.equal(full_dense(back, nq, nk), dense)


def test_flash_blocks_from_plain_tensors() -> None:
    counts, columns = torch.tensor([[[1, 2]]]), torch.tensor([[[[1, 7], [0, 1]]]])
    none = torch.zeros_like(counts)
    expected = torch.zeros(32, 48, dtype=torch.bool)
    expected[:16, 16:32] = expected[16:, :32] = True
    full = X.from_flash_blocks((none, columns, counts, columns), (32, 48), 16)
    assert torch.equal(full.dense(32, 48), expected)
    causal = X.from_flash_blocks((counts, columns), (32, 48), 16, lambda b, h, q, k: q >= k)
    assert torch.equal(causal.dense(32, 48), expected & torch.ones(32, 48).tril().bool())
    heads = X.from_flash_blocks(
        (counts.expand(1, 2, 2), columns), (32, 48), (16, 16), lambda b, h, q, k: q >= k * h
    )
    assert heads.lead == (1, 2) and torch.equal(heads.dense(32, 48)[0], expected)


def test_flash_block_errors() -> None:
    counts, columns = torch.tensor([[[1, 1]]]), torch.tensor([[[[0, 1], [1, 0]]]])
    mod = P.from_block_mask  # never called
    cases = [
        (lambda: X.from_flash_blocks((counts, columns), (32, 32), 16), LayoutError, "mask_mod"),
        (lambda: X.from_flash_blocks((counts, columns), (32, 32)), LayoutError, "block_size"),
        (lambda: X.from_flash_blocks((counts, columns), (48, 32), 16, mod), ShapeError, "3 block"),
        (lambda: X.from_flash_blocks((counts + 2, columns), (32, 32), 16, mod), LayoutError,
         "count 3"),
        (lambda: X.from_flash_blocks((counts + 1, columns * 0), (32, 32), 16, mod), LayoutError,
         "listed twice"),
        (lambda: X.from_flash_blocks((counts, columns + 2), (32, 32), 16, mod), LayoutError,
         "block column 2, 0 <= column < 2"),
        (lambda: X.from_flash_blocks((counts,), (32, 32), 16, mod), LayoutError, "1 tensors"),
        (lambda: X.from_flash_blocks((counts, columns), (32,), 16, mod), ShapeError, "nq, nk"),
        (lambda: X.to_flash_blocks(P.causal(), 32, 32, 24), LayoutError, "multiples of 16"),
        (lambda: X.to_flash_blocks(P.causal(), 32), ShapeError, "needs both"),
        (lambda: X.to_flash_blocks(P.nm(2, 4), 32, 32), LayoutError, "static"),
        (lambda: X.to_flash_blocks(torch.ones(3, 3), 3, 3), LayoutError, "Tensor given"),
    ]  # fmt: skip
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()


# cuDNN's block indices


def literal_bsa(indices: X.BlockIndices, nq: int, nk: int) -> torch.Tensor:
    """The mask that block indices stand for, bool (B, H, nq, nk), by loops."""
    index, nums, sizes, side = indices
    out = torch.zeros(*nums.shape[:2], nq, nk, dtype=torch.bool)
    for b in range(nums.shape[0]):
        for h in range(nums.shape[1]):
            for row in range(nums.shape[2]):
                for column in index[b, h, row, : int(nums[b, h, row])].tolist():
                    kept = side
                    if sizes is not None:
                        lead = (b, h)[: sizes.dim() - 1]
                        kept = int(sizes[(*lead, column)])
                    stop = min(column * side + kept, nk)
                    rows = slice(row * side, (row + 1) * side)
                    out[b, h, rows, column * side : stop] = True
    return out


BLOCKED = {
    "blocks": P.random_blocks(2, 16, 0),
    "heads": P.per_head([P.random_blocks(1, 16, 0), P.full(), P.random_blocks(1, 16, 0)]),
    "length": P.random_blocks(3, 16, 1) - P.global_keys(range(90, 112)),
    "lengths": P.per_batch([P.full(), P.full() - P.global_keys(range(50, 112))]),
    "lengths by head": P.per_batch(
        [P.per_head([P.full(), P.random_blocks(2, 16, 4) - P.global_keys([111])]),
         P.per_head([P.random_blocks(2, 16, 3), P.full()])]
    ),
    "nothing": P.full() - P.full(),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKED)
@pytest.mark.parametrize("nq, nk", [(64, 112), (60, 108), (100, 100)])
def test_bsa(name, nq, nk) -> None:
    pattern = BLOCKED[name]
    made = X.to_bsa(pattern, nq, nk, 16)
    assert made.q2k_block_index.dtype == made.q2k_block_nums.dtype == torch.int32
    dense = full_dense(pattern, nq, nk)
    assert torch.equal(literal_bsa(made, nq, nk), dense)
    # What their kernels ask for: sizes from 1, unique blocks, whole blocks unless sizes are given.
    assert made.block_sizes is None or int(made.block_sizes.min()) >= 1
    back = X.from_bsa(made[0], (nq, nk), made[1], made[2], 16)
    assert torch.equal(full_dense(back, nq, nk), dense)


def test_bsa_repeats_for_batch_and_heads() -> None:
    made = X.to_bsa(BLOCKED["length"], 112, 112, 16, batch=2, heads=3)
    assert made.q2k_block_index.shape[:2] == made.q2k_block_nums.shape[:2] == (2, 3)
    assert made.block_sizes.shape == (7,)
    expected = BLOCKED["length"].dense(112, 112)
    assert torch.equal(literal_bsa(made, 112, 112), expected.expand(2, 3, 112, 112))
    by_batch = X.to_bsa(BLOCKED["lengths"], 112, 112, 16, heads=3)
    assert by_batch.block_sizes.shape == (2, 7)
    assert X.to_bsa(BLOCKED["lengths by head"], 112, 112, 16).block_sizes.shape == (2, 2, 7)


def test_bsa_with_one_number_and_unsorted_blocks() -> None:
    index = torch.tensor([[[[2, 0, 9], [1, 2, -4]]]])
    pattern = X.from_bsa(index, (32, 44), 2, size=16)
    made = X.BlockIndices(index, torch.full((1, 1, 2), 2), None, 16)
    assert torch.equal(pattern.dense(32, 44), literal_bsa(made, 32, 44)[0, 0])


def test_bsa_errors() -> None:
    index, nums = torch.tensor([[[[0, 1], [1, 0]]]]), torch.tensor([[[1, 2]]])
    cases = [
        (lambda: X.to_bsa(P.causal(), 32, 32, 16), LayoutError, r"block \(0, 0\) .* cut inside"),
        (lambda: X.to_bsa(P.blocks(torch.eye(2) > 0, 16) - (P.from_dense(SHORT)), 32, 32, 16),
         LayoutError, "cut inside"),
        (lambda: X.to_bsa(STEPS, 32, 32, 16), LayoutError, "keeps its first 10 keys for some"),
        (lambda: X.to_bsa(P.full(), 32, 32, 24), LayoutError, "size 24"),
        (lambda: X.to_bsa(BLOCKED["heads"], 32, 32, 16, heads=2), ShapeError, "heads = 1, 2"),
        (lambda: X.from_bsa(index, (32, 48), nums, size=8), ShapeError, "4 block rows"),
        (lambda: X.from_bsa(index + 1, (32, 32), nums, size=16), LayoutError, "block column"),
        (lambda: X.from_bsa(index * 0, (32, 32), nums, size=16), LayoutError, "listed twice"),
        (lambda: X.from_bsa(index, (32, 32), nums + 1, size=16), LayoutError, "count 3"),
        (lambda: X.from_bsa(index, (32, 32), nums, torch.tensor([17, 3]), 16), LayoutError,
         "block size 17"),
        (lambda: X.from_bsa(index, (32, 32), nums, torch.tensor([7]), 16), ShapeError,
         "block_sizes"),
        (lambda: X.from_bsa(index.float(), (32, 32)), TypeError, "integers"),
    ]  # fmt: skip
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()


SHORT = torch.zeros(32, 32, dtype=torch.bool)
SHORT[3, 5] = True
STEPS = P.from_dense(torch.arange(32) < torch.tensor([10] * 16 + [12] * 16)[:, None])


@hypothesis.given(
    data=st.data(), nq=st.integers(0, 70), nk=st.integers(0, 70), lead=st.sampled_from([1, 2])
)
def test_any_mask_round_trips(data, nq, nk, lead) -> None:
    seed, density = data.draw(st.integers(0, 2**31)), data.draw(st.sampled_from([0.02, 0.5, 0.98]))
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(lead, 5, 5, generator=generator) < 0.5
    dense = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :nq, :nk]
    dense = dense & (torch.rand(lead, nq, nk, generator=generator) < density)
    pattern = P.from_dense(dense if lead > 1 else dense[0])
    size = data.draw(st.sampled_from([16, 32, (16, 48)]))
    made = P.from_block_mask(X.to_block_mask(pattern, nq, nk, size))
    assert torch.equal(full_dense(made, nq, nk)[0], dense)
    flash = X.from_flash_blocks(X.to_flash_blocks(pattern, nq, nk, size), (nq, nk))
    assert torch.equal(full_dense(flash, nq, nk)[0], dense)
