"""The masks that transformers describes by functions, against the 4-D tensors it makes of them."""

from __future__ import annotations

import time

import pytest
import torch

from mixgrain.attention.hf import evaluate as evaluating
from mixgrain.attention.hf import kinds, readers
from mixgrain.attention.hf.mask import Mask, make_mask
from mixgrain.attention.hf.mask_functions import translate
from mixgrain.attention.hf.scope import Scope
from mixgrain.formats import patterns as P
from mixgrain.formats.errors import ShapeError, UnsupportedError

masking = pytest.importorskip("transformers.masking_utils")
if not hasattr(masking, "packed_sequence_compatibility_function"):
    pytest.skip("this transformers has other mask functions", allow_module_level=True)
hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

BATCH, LONGEST = 3, 40

# (queries, keys, position of the first query, position of the first key)
PLACES = {
    "a whole sequence": (17, 17, 0, 0),
    "prefill of a static cache": (9, 31, 0, 0),
    "decoding, dynamic cache": (1, 20, 19, 0),
    "decoding, static cache": (1, 31, 12, 0),
    "several tokens, static cache": (4, 31, 12, 0),
    "decoding, full sliding cache": (1, 8, 20, 13),
    "several tokens, sliding cache": (5, 11, 20, 14),
    "one token": (1, 1, 0, 0),
    "queries behind all keys": (4, 10, 8, 0),
}
IDS = torch.tensor([[0] * 5 + [1] * 9 + [2] * 26, [0] * 40, [3] * 1 + [4] * 38 + [5]])
SPANS = torch.where(IDS == 1, -1, IDS)
SCATTERED = torch.arange(LONGEST)[None] % torch.tensor([[3], [4], [5]])
POSITIONS = torch.cat([torch.arange(5), torch.arange(9), torch.arange(26)])[None].expand(3, -1)
PACKED = torch.tensor([0] * 5 + [1] * 9 + [2] * 26)[None].expand(3, -1)


def custom(b, h, q, k):
    """What nobody knows: depends on the batch entry and on absolute positions."""
    return (q * 3 + k * 5 + b) % 4 != 0


def other(b, h, q, k):
    """Another one."""
    return (q + k) % 3 != b


def packed(inner):
    return masking.packed_sequence_compatibility_function(inner, POSITIONS, PACKED)


LEFT = torch.tensor([0, 3, 7])
FUNCTIONS = {
    "causal": masking.causal_mask_function,
    "bidirectional": masking.bidirectional_mask_function,
    "window": masking.sliding_window_causal_mask_function(6),
    "window of one": masking.sliding_window_causal_mask_function(1),
    "two-sided window": masking.sliding_window_bidirectional_mask_function(4),
    "chunks": masking.chunked_causal_mask_function(5, torch.zeros(3, dtype=torch.int64)),
    "chunks, left padding": masking.chunked_causal_mask_function(5, LEFT),
    "documents": masking.and_masks(
        masking.causal_mask_function, masking.packed_sequence_mask_function(IDS)
    ),
    "scattered documents": masking.packed_sequence_mask_function(SCATTERED),
    "spans that see each other": masking.or_masks(
        masking.causal_mask_function, masking.blockwise_overlay(SPANS)
    ),
    "packed": packed(masking.causal_mask_function),
    "packed, window": packed(masking.sliding_window_causal_mask_function(3)),
    "packed, chunks": packed(
        masking.chunked_causal_mask_function(4, torch.zeros(3, dtype=torch.int64))
    ),
    "packed, other positions": masking.packed_sequence_compatibility_function(
        masking.causal_mask_function, POSITIONS * 2, PACKED
    ),
    "packed, positions fall": masking.packed_sequence_compatibility_function(
        masking.causal_mask_function, 40 - POSITIONS, PACKED
    ),
    "two customs": masking.and_masks(custom, masking.causal_mask_function, other),
    "custom": custom,
    "custom within a window": masking.and_masks(
        masking.sliding_window_causal_mask_function(4), custom
    ),
    "custom or causal": masking.or_masks(masking.causal_mask_function, custom),
    "padding inside": masking.and_masks(
        masking.causal_mask_function, masking.padding_mask_function(SCATTERED > 0)
    ),
}  # fmt: skip
UNKNOWN = {"custom", "custom within a window", "custom or causal", "padding inside"}
UNKNOWN |= {"packed, chunks", "packed, other positions", "packed, positions fall", "two customs"}


def expected(function, place, attention_mask) -> torch.Tensor:
    nq, nk, q_offset, kv_offset = PLACES[place]
    return masking.sdpa_mask(
        BATCH, nq, nk, q_offset, kv_offset, function, attention_mask,
        allow_is_causal_skip=False, use_vmap=True,
    )  # fmt: skip


def made(function, place, attention_mask) -> Mask:
    nq, nk, q_offset, kv_offset = PLACES[place]
    return make_mask(BATCH, nq, nk, q_offset, kv_offset, function, attention_mask, allow_x=True)


def dense(mask: Mask) -> torch.Tensor:
    nq, nk = mask.shape[2:]
    kept = mask.pattern.dense(nq, nk).reshape(*mask.pattern.lead, nq, nk).expand(BATCH, 1, nq, nk)
    return kept if mask.key_mask is None else kept & mask.key_mask[:, None, None]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_masks_are_those_of_transformers(name, place) -> None:
    padding = torch.ones(BATCH, LONGEST, dtype=torch.bool)
    padding[1, :4] = padding[2, 9:13] = False
    for attention_mask in (None, padding, padding[:, :10], torch.ones_like(padding)):
        mask = made(FUNCTIONS[name], place, attention_mask)
        assert torch.equal(dense(mask), expected(FUNCTIONS[name], place, attention_mask))
    assert made(FUNCTIONS[name], place, torch.ones_like(padding)).key_mask is None


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - UNKNOWN))
def test_known_functions_are_not_called(name, monkeypatch) -> None:
    kinds.known_kinds()  # proves them by calling them, once

    def refuse(*given):
        raise AssertionError("called")

    monkeypatch.setattr(evaluating, "_call", refuse)
    for place in PLACES:
        made(FUNCTIONS[name], place, None)


@st.composite
def compositions(draw, depth=2):
    leaves = ["causal", "bidirectional", "window", "two-sided window", "chunks, left padding"]
    leaves += ["scattered documents", "spans that see each other", "custom"]
    if depth == 0 or draw(st.booleans()):
        return FUNCTIONS[draw(st.sampled_from(leaves))]
    join = draw(st.sampled_from([masking.and_masks, masking.or_masks]))
    terms = draw(st.lists(compositions(depth=depth - 1), min_size=1, max_size=3))
    return join(*terms)


@hypothesis.settings(max_examples=20)
@hypothesis.given(function=compositions(), place=st.sampled_from(sorted(PLACES)))
def test_any_composition(function, place) -> None:
    assert torch.equal(dense(made(function, place, None)), expected(function, place, None))


def test_a_kind_that_changed_its_meaning_is_evaluated(monkeypatch) -> None:
    monkeypatch.setitem(readers.READERS, "sliding_window_overlay", lambda scope, **given: P.full())
    left = kinds.known_kinds.__wrapped__()
    assert "sliding_window_overlay" not in left.values()
    assert "causal_mask_function" in left.values()
    monkeypatch.setattr("mixgrain.attention.hf.mask_functions.known_kinds", lambda: left)
    for place in PLACES:
        mask = made(FUNCTIONS["window"], place, None)
        assert torch.equal(dense(mask), expected(FUNCTIONS["window"], place, None))


def test_unknown_functions_are_called_where_the_rest_keeps(monkeypatch) -> None:
    pairs = []
    call = evaluating._call

    def counted(functions, b, h, q, k):
        pairs.append(q.numel())
        return call(functions, b, h, q, k)

    monkeypatch.setattr(evaluating, "_call", counted)
    n = 4096
    function = masking.and_masks(masking.sliding_window_causal_mask_function(16), custom)
    mask = make_mask(1, n, n, mask_function=function)
    kept = P.window(15, 0).nnz(n, n)
    assert sum(pairs) == kept
    rows = torch.tensor([0, 1, 2000, 4095])
    for i in rows.tolist():
        keys = [j for j in range(max(0, i - 15), i + 1) if (i * 3 + j * 5) % 4]
        assert mask.pattern.row(i, n, n).tolist() == keys


def test_equal_masks_share_a_layout() -> None:
    first, again = (make_mask(2, 9, 9, mask_function=custom) for _ in range(2))
    assert first.pattern.to_layout("mixed", 9, 9) is again.pattern.to_layout("mixed", 9, 9)


def test_equal_long_documents_share_a_layout() -> None:
    """Every forward brings tensors of its own; only their content says that they are the same."""
    n = 20_000
    for make in (
        lambda: masking.chunked_causal_mask_function(512, torch.tensor([0, 9])),
        lambda: masking.packed_sequence_mask_function(torch.arange(n).repeat(2, 1) // 700),
    ):
        first, again = (make_mask(2, n, n, mask_function=make()) for _ in range(2))
        assert first.pattern.expression_key() == again.pattern.expression_key()


def test_entries_that_agree_are_one_pattern() -> None:
    function = lambda b, h, q, k: (q + k) % 3 == 0  # noqa: E731
    assert make_mask(4, 9, 9, mask_function=function).pattern.lead == (1, 1)
    assert make_mask(4, 9, 9, mask_function=custom).pattern.lead == (4, 1)
    assert len(make_mask(4, 9, 9, mask_function=masking.or_masks(custom)).pattern.distinct) == 4


def test_long_masks_cost_little() -> None:
    n, start = 1 << 20, time.perf_counter()
    for name in ("causal", "window", "two-sided window"):
        mask = make_mask(2, n, n, 0, 0, FUNCTIONS[name], torch.ones(2, n, dtype=torch.bool))
        assert mask.shape == (2, 1, n, n)
        mask.pattern.row(n - 1, n, n)
    chunks = masking.chunked_causal_mask_function(8192, torch.zeros(2, dtype=torch.int64))
    assert make_mask(2, n, n, 0, 0, chunks).pattern.nnz(n, n) == n // 8192 * (8192 * 8193 // 2)
    assert time.perf_counter() - start < 5  # an n × n tensor would be 1 TiB


def test_a_mask_has_no_elements() -> None:
    mask = make_mask(2, 9, 9, attention_mask=torch.tensor([[1] * 9, [0] * 2 + [1] * 7]))
    assert isinstance(mask, torch.Tensor) and mask.shape == (2, 1, 9, 9)
    for same in (mask.contiguous(), mask.to("cpu"), mask.detach(), mask.clone()):
        assert isinstance(same, Mask) and same.pattern is mask.pattern
        assert torch.equal(same.key_mask, mask.key_mask)
    for use in (
        lambda: mask[:, :, :, :3],
        lambda: mask + 1,
        lambda: mask.all(),
        lambda: mask.float(),
    ):
        with pytest.raises(UnsupportedError, match="pattern without elements"):
            use()


def test_attention_mask_of_another_shape() -> None:
    with pytest.raises(ShapeError, match=r"\(batch, tokens\)"):
        make_mask(2, 9, 9, attention_mask=torch.ones(2, 9, 9))
    with pytest.raises(ShapeError, match="batch 2"):
        make_mask(2, 9, 9, attention_mask=torch.ones(3, 9))


def test_a_table_for_fewer_entries() -> None:
    """transformers reads such a table out of range; so do we, and do not guess what is meant."""
    with pytest.raises(IndexError):
        make_mask(2, 9, 9, mask_function=masking.packed_sequence_mask_function(IDS[:1, :9]))


def test_a_static_cache_gives_its_offset_as_a_tensor() -> None:
    mask = make_mask(BATCH, 1, 31, torch.tensor([12]), 0, FUNCTIONS["window"])
    assert mask.pattern.row(0, 1, 31).tolist() == [7, 8, 9, 10, 11, 12]


def test_placed_patterns_factor() -> None:
    scope = Scope(1, 4, 31, 12, 0, torch.device("cpu"))
    placed = scope.place(P.longformer(2, [0, 13, 30]))
    keep = placed.dense(4, 31)
    whole = P.longformer(2, [0, 13, 30]).dense(31, 31)[12:16]
    assert torch.equal(keep, whole)
    assert torch.equal(placed.to_layout("mixed", 4, 31).mask()[0, 0], whole)
    assert placed.nnz(4, 31) == int(whole.sum())
    assert translate(FUNCTIONS["causal"], Scope(1, 4, 9, 5, 0, torch.device("cpu"))).row(
        0, 4, 9
    ).tolist() == list(range(6))
