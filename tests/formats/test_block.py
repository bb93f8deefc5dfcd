"""BlockLayout: arrays, slots, edges, transposes, and what validate finds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layout_cases import block_layout, check_layout, random_mask

from mixgrain.formats.block import BlockLayout
from mixgrain.formats.entries import pack_bits, unpack_bits
from mixgrain.formats.errors import LayoutError

SHAPES = [(0, 0), (0, 5), (5, 0), (1, 1), (16, 32), (33, 20), (20, 70)]


def _with_full_and_empty_blocks(seed: int, *shape: int) -> torch.Tensor:
    mask = random_mask(seed, *shape)
    mask[..., :16, :16] = True
    mask[..., 16:32, :16] = False
    return mask


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_layout_holds_its_mask(shape: tuple[int, int], size: int) -> None:
    mask = _with_full_and_empty_blocks(0, *shape)
    check_layout(block_layout(mask, size), mask[None, None])


@pytest.mark.parametrize("size", [64, 128])
def test_large_blocks(size: int) -> None:
    mask = random_mask(1, 130, 100)
    mask[:128] = True
    check_layout(block_layout(mask, size), mask[None, None])


@pytest.mark.parametrize(
    "lead, entry", [((1, 3), (0, 1, 0)), ((3, 1), (0, 0, 1)), ((2, 2), (1, 0, 0, 1))]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_entries_are_stored_once(shape, lead, entry) -> None:
    masks = _with_full_and_empty_blocks(2, 2, *shape)
    masks[1, 16:] = False
    layout = block_layout(masks, 16, lead, entry)
    layout.validate()
    check_layout(layout, masks[list(entry)].reshape(*lead, *shape))


def test_full_blocks_need_no_masks() -> None:
    layout = BlockLayout.from_blocks(
        (32, 64), 32, torch.tensor([0, 2]), torch.tensor([0, 1], dtype=torch.int32)
    )
    layout.validate()
    assert layout.nnz == layout.slots == 2048 and layout.live() is None
    assert layout.masks.shape == (0, 32, 4) and layout.block_shape == (1, 2)


def test_index_dtypes_and_repr() -> None:
    layout = block_layout(random_mask(3, 40, 40), 16)
    for name in ("block_offsets", "block_columns", "mask_index", "t_offsets", "t_rows", "t_order"):
        assert getattr(layout, name).dtype == torch.int32, name
    assert repr(layout).startswith("BlockLayout(40×40, nnz=")


def test_a_size_that_no_kernel_takes_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"size 48; choose one of \(16, 32, 64, 128\)"):
        BlockLayout.from_blocks((48, 48), 48, torch.tensor([0, 1]), torch.zeros(1))


@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (3, 16), (2, 4, 8)])
def test_bits_are_little_endian_and_round_trip(shape: tuple[int, ...]) -> None:
    bits = random_mask(4, *shape)
    packed = pack_bits(bits)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], shape[-1] // 8)
    assert torch.equal(unpack_bits(packed), bits)
    assert pack_bits(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0]).bool()).tolist() == [1]


def _example() -> BlockLayout:
    mask = torch.zeros(32, 48, dtype=torch.bool)
    mask[:16, :16] = True
    mask[:16, 32:] = torch.ones(16, 16).tril().bool()
    mask[16:, 16:32] = torch.ones(16, 16).tril().bool()
    return block_layout(mask, 16)


@pytest.mark.parametrize(
    "field, at, value, says",
    [
        ("block_offsets", 0, 1, "starts at 1"),
        ("block_offsets", 1, 4, "falls from 4 to 3 at 2"),
        ("block_offsets", 2, 4, "ends at 4; expected 3"),
        ("block_columns", 1, 3, r"3 at 1; expected values in \[0, 3\)"),
        ("block_columns", 1, 0, "0 then 0 at 0; expected strictly rising values inside a block"),
        ("mask_index", 1, 2, r"2 at 1; expected values in \[-1, 2\)"),
        ("mask_index", 1, -2, "-2 at 1"),
        ("t_offsets", 1, 0, "0 at 1; expected 1"),
        ("t_rows", 1, 0, "0 at 1; expected 1"),
        ("t_order", 1, 1, "1 at 1; expected 2"),
    ],
)
def test_validate_names_the_field(field: str, at: int, value: int, says: str) -> None:
    layout = _example()
    layout.validate()
    tensor = getattr(layout, field).clone()
    tensor[at] = value
    with pytest.raises(LayoutError, match=rf"BlockLayout\.{field}: .*{says}"):
        replace(layout, **{field: tensor}).validate()


@pytest.mark.parametrize(
    "change, says",
    [
        ({"size": 8}, r"size: 8; expected one of"),
        ({"nnz": 5}, r"nnz: 5"),
        ({"entry_slots": (0, 9)}, r"entry_slots: \(0, 9\); expected \(0, 768\)"),
        ({"masks": torch.zeros(2, 16, 4, dtype=torch.uint8)}, r"masks: shape \(2, 16, 4\)"),
        ({"mask_index": torch.zeros(3)}, r"mask_index: dtype torch.float32"),
        ({"shape": (31, 48)}, r"mask_index: block 2 keeps rows beyond 31"),
        ({"shape": (32, 47)}, r"mask_index: block 1 keeps columns beyond 47"),
    ],
)
def test_validate_checks_the_other_fields(change, says: str) -> None:
    with pytest.raises(LayoutError, match=rf"BlockLayout\.{says}"):
        replace(_example(), **change).validate()
