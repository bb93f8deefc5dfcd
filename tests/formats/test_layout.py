"""SparseTensor on every layout: folding, parts, map, arithmetic, moves, pytrees, key masks."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import pytest
import torch
from layout_cases import RATES
from torch.utils import _pytree as pytree

from mixgrain import patterns as P
from mixgrain.formats.errors import LayoutError, ShapeError
from mixgrain.formats.sparse import SparseTensor
from mixgrain.formats.split import to_layout

SHARED = P.window(5) | P.global_tokens([2, 40, 41]) | P.random(0.03, 0)
LEADS = {
    "shared": (SHARED, (1, 1), (2, 3)),
    "per head": (P.per_head([SHARED, P.causal(), SHARED]), (1, 3), (2,)),
    "per batch": (P.per_batch([SHARED, P.window(2)]), (2, 1), (3,)),
    "per batch and head": (
        P.per_batch([P.per_head([SHARED, P.causal()]), P.per_head([P.window(1), SHARED])]),
        (2, 2), (),
    ),
}  # fmt: skip


def _tensor(
    kind: str, lead: str, nq: int = 45, nk: int = 50, dtype: torch.dtype = torch.float64
) -> tuple[SparseTensor, torch.Tensor]:
    """A tensor with values everywhere (NaN at dead slots), and the mask (b, h, nq, nk)."""
    pattern, shape, free = LEADS[lead]
    layout = to_layout(pattern, kind, nq, nk, 16, costs=RATES["no launches"])
    assert layout.lead == shape
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(*free, layout.slots, generator=generator, dtype=torch.float64)
    live = layout.live()
    if live is not None:
        values = torch.where(live, values, torch.nan)
    return SparseTensor(layout, values.to(dtype)), layout.mask()


CASES = [(kind, lead) for kind in ("row", "block", "mixed") for lead in LEADS]
all_cases = pytest.mark.parametrize("kind, lead", CASES)


@all_cases
def test_values_fold_and_unfold(kind: str, lead: str) -> None:
    s, mask = _tensor(kind, lead)
    heads = 2 if lead == "per batch and head" else 3
    assert s.shape == (2, heads, 45, 50) and s.lead_shape == (2, heads)
    dense = s.to_dense()
    assert dense.shape == s.shape
    assert torch.equal(dense != 0, mask.expand(2, heads, 45, 50))
    row, column = s.layout.indices()
    entry, (b, h) = s.layout.slot_entry(), s.layout.lead
    live = s.layout.live()
    for slot in range(0, s.layout.slots, 37):
        if live is not None and not live[slot]:
            continue
        batch = slice(None) if b == 1 else int(entry[slot]) // h
        head = slice(None) if h == 1 else int(entry[slot]) % h
        given = dense[batch, head, row[slot], column[slot]]
        assert torch.equal(given.flatten(), s.values[..., slot].flatten())


@all_cases
def test_the_transpose_is_the_dense_transpose(kind: str, lead: str) -> None:
    s, _ = _tensor(kind, lead)
    assert torch.equal(s.T.to_dense(), s.to_dense().transpose(-1, -2))
    assert s.T.shape == (*s.shape[:-2], 50, 45)
    assert torch.equal(s.T.T.to_dense(), s.to_dense())
    assert s.T.T.layout.key == s.layout.key
    assert (s.T + s.T).layout.key == s.T.layout.key


@all_cases
def test_to_dense_and_transpose_are_differentiable(kind: str, lead: str) -> None:
    s, _ = _tensor(kind, lead, 20, 17)
    values = s.values.nan_to_num().requires_grad_()
    weight = torch.randn(*s.shape, dtype=torch.float64)
    (s.with_values(values).T.to_dense() * weight.mT).sum().backward()
    row, column = s.layout.indices()
    entry, (b, h) = s.layout.slot_entry(), s.layout.lead
    expected = torch.zeros_like(values)
    for slot in range(s.layout.slots):
        batch = slice(None) if b == 1 else int(entry[slot]) // h
        head = slice(None) if h == 1 else int(entry[slot]) % h
        expected[..., slot] = weight[batch, head, row[slot], column[slot]]
    live = s.layout.live()
    if live is not None:
        expected = torch.where(live, expected, 0.0)
    assert torch.equal(values.grad, expected)


@all_cases
def test_map_sees_positions_and_heads(kind: str, lead: str) -> None:
    s, mask = _tensor(kind, lead)
    row, column = torch.arange(45)[:, None], torch.arange(50)
    heads = torch.arange(s.shape[1])[:, None, None]
    dense = s.to_dense()
    made = s.map(lambda v, i, j: 2 * v + 100 * i + j)
    assert torch.equal(made.to_dense(), (2 * dense + 100 * row + column) * mask)
    made = s.map(lambda v, i, j, h: v * 0 + 1 + h)
    assert torch.equal(made.to_dense(), ((1 + heads) * mask).double().expand(s.shape))
    live = s.layout.live()
    if live is not None:
        dead = made.values[..., ~live]
        assert torch.equal(dead, torch.zeros_like(dead))


def test_map_must_keep_the_shape() -> None:
    s, _ = _tensor("row", "shared")
    with pytest.raises(ShapeError, match="must return a tensor of the shape it was given"):
        s.map(lambda v, i, j: v[..., :3])
    with pytest.raises(ShapeError, match="f returned int"):
        s.map(lambda v, i, j: 3)


@all_cases
def test_parts_add_up(kind: str, lead: str) -> None:
    s, _ = _tensor(kind, lead)
    together = torch.zeros(s.shape, dtype=torch.float64)
    for i in range(len(s.layout.parts)):
        part = s.part(i)
        assert part.values.data_ptr() == s.values[..., s.layout.part_offsets[i] :].data_ptr()
        together += part.to_dense()
    assert torch.equal(together, s.to_dense())
    with pytest.raises(LayoutError, match="give an index from 0 to"):
        s.part(len(s.layout.parts))


@all_cases
def test_arithmetic(kind: str, lead: str) -> None:
    s, _ = _tensor(kind, lead)
    dense = s.to_dense()
    assert torch.equal((s * 3).to_dense(), dense * 3)
    assert torch.equal((3 * s).to_dense(), dense * 3)
    assert torch.equal((s / 4).to_dense(), dense / 4)
    assert torch.equal((-s).to_dense(), -dense + 0)
    assert torch.equal((s + s * 2).to_dense(), dense + dense * 2)
    assert torch.equal((s - s * 2).to_dense(), dense - dense * 2)
    scale = torch.rand(*s.values.shape[:-1], 1, dtype=torch.float64)
    assert (s * scale).values.shape == s.values.shape


def test_tensors_of_different_layouts_do_not_add() -> None:
    one, other = _tensor("row", "shared")[0], _tensor("row", "shared")[0]
    with pytest.raises(LayoutError, match="the layouts differ"):
        one + other


def test_values_must_fit_the_layout() -> None:
    s, _ = _tensor("block", "shared")
    with pytest.raises(ShapeError, match="the last dimension must be its"):
        s.with_values(torch.zeros(3))
    with pytest.raises(ShapeError):
        s.with_values(torch.zeros(()))


@all_cases
def test_moves_and_casts(kind: str, lead: str) -> None:
    s, _ = _tensor(kind, lead)
    half = s.to(torch.float16)
    assert half.dtype == torch.float16 and half.layout is s.layout
    assert s.to("cpu").layout is s.layout
    gone = s.layout.to("meta")
    assert gone.device.type == "meta" and gone.key == s.layout.key and gone == s.layout
    assert {t.device.type for t in gone.tensors()} == {"meta"}


@all_cases
def test_pytrees_keep_the_key(kind: str, lead: str) -> None:
    s, _ = _tensor(kind, lead)
    leaves, spec = pytree.tree_flatten(s)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves if leaf is not None)
    again = pytree.tree_unflatten(leaves, spec)
    assert again.layout.key == s.layout.key and again.layout == s.layout
    assert hash(again.layout) == hash(s.layout)
    assert torch.equal(again.to_dense(), s.to_dense())
    assert pytree.tree_flatten(again)[1] == spec
    doubled = pytree.tree_map(lambda t: t, s)
    assert (doubled + s).layout.key == s.layout.key
    pytree.tree_unflatten([None] * len(leaves), spec)


@all_cases
def test_a_layout_read_back_is_a_new_identity(kind: str, lead: str) -> None:
    s, _ = _tensor(kind, lead)
    file = io.BytesIO()
    torch.save(s.layout, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    assert read.key not in (s.layout.key, -s.layout.key) and read != s.layout
    assert torch.equal(read.mask(), s.layout.mask())
    assert torch.equal(copy.deepcopy(s.layout).mask(), s.layout.mask())
    for part, old in zip(read.parts, s.layout.parts, strict=True):
        assert part.key != old.key


@all_cases
def test_a_key_mask_kills_slots(kind: str, lead: str) -> None:
    s, _ = _tensor(kind, lead)
    keep = torch.rand(2, 50, generator=torch.Generator().manual_seed(1)) < 0.6
    masked = replace(s, keep=keep)
    dense = s.to_dense() * keep[:, None, None]
    assert masked.key_mask is keep
    assert torch.equal(masked.to_dense(), dense)
    live = masked.live().expand(s.values.shape)
    assert torch.equal(masked.with_values(live.double()).to_dense() != 0, dense != 0)
    ones = masked.map(lambda v, i, j: torch.ones_like(v))
    assert torch.equal(ones.to_dense(), (dense != 0).double())
    assert ones.key_mask is keep and (masked * 2).key_mask is keep
    turned = masked.T
    assert turned.key_mask is None and turned.keep is keep and turned.keep_rows
    assert torch.equal(turned.to_dense(), dense.mT)
    assert torch.equal(turned.T.to_dense(), dense) and turned.T.key_mask is keep
    assert torch.equal((masked + s).to_dense(), dense + dense)
    assert (s + masked).key_mask is keep
    for i in range(len(s.layout.parts)):
        assert masked.part(i).key_mask is keep
    one = replace(s, keep=keep[0])
    assert torch.equal(one.to_dense(), s.to_dense() * keep[0])


def test_two_key_masks_meet() -> None:
    s, _ = _tensor("mixed", "shared")
    first, second = torch.arange(50) % 2 == 0, torch.arange(50) % 3 == 0
    both = replace(s, keep=first) + replace(s, keep=second)
    assert torch.equal(both.key_mask, first & second)
    with pytest.raises(LayoutError, match="one tensor carries a key mask, the other a row mask"):
        _ = replace(s, keep=first) + replace(s, keep=first[:45], keep_rows=True)


def test_a_key_mask_with_a_batch_needs_a_batch() -> None:
    s, _ = _tensor("row", "shared")
    alone = replace(s, values=s.values[0, 0], keep=torch.ones(2, 50, dtype=torch.bool))
    with pytest.raises(ShapeError, match="has a batch dimension but the tensor has none"):
        alone.to_dense()


def test_reprs_are_one_line() -> None:
    s, _ = _tensor("mixed", "per head", dtype=torch.float16)
    assert repr(s).startswith("SparseTensor(2×3×45×50, MixedLayout, float16, nnz=")
    assert "\n" not in repr(s) + repr(s.layout)
    assert "key mask" in repr(replace(s, keep=torch.ones(50, dtype=torch.bool)))


@pytest.mark.parametrize("kind", ["row", "block", "mixed"])
@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (4, 0)])
def test_empty_matrices(kind: str, shape: tuple[int, int]) -> None:
    layout = to_layout(P.full(), kind, *shape, 16)
    s = SparseTensor(layout, torch.zeros(2, layout.slots))
    assert s.to_dense().shape == (2, *shape)
    assert s.T.to_dense().shape == (2, *shape[::-1])
    assert s.map(lambda v, i, j: v).values.shape == (2, 0)
    assert s.density == 0
