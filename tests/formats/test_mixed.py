"""MixedLayout: parts, gaps, transposes, and what validate finds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layout_cases import block_layout, check_layout, random_mask, row_layout

from mixgrain.formats.errors import LayoutError
from mixgrain.formats.mixed import MixedLayout
from mixgrain.formats.panel import PanelLayout


def _parts(nq: int = 40, nk: int = 50):
    blocks = torch.zeros(nq, nk, dtype=torch.bool)
    blocks[:16, :16] = True
    blocks[20:30, 33:40] = True
    rest = torch.zeros(nq, nk, dtype=torch.bool)
    rest[5, 20] = rest[6, 49] = rest[39, 0] = True
    panel = PanelLayout.from_panels((nq, nk), [(range(18, 39), torch.tensor([2, 17, 41]), None)])
    whole = blocks | rest
    whole[18:39, [2, 17, 41]] = True
    return block_layout(blocks, 16), panel, row_layout(rest), whole


def test_parts_lie_one_after_the_other_at_multiples_of_128() -> None:
    blocks, panel, rest, mask = _parts()
    layout = MixedLayout.from_parts((40, 50), blocks, panel, rest)
    assert layout.parts == (blocks, panel, rest)
    starts = layout.part_offsets
    assert starts[0] == 0 and all(start % 128 == 0 for start in starts)
    assert starts[1] == blocks.slots and layout.slots == starts[-1] == starts[2] + 128
    check_layout(layout, mask[None, None])


@pytest.mark.parametrize("kept", range(8))
def test_any_part_may_be_missing(kept: int) -> None:
    parts = [p if kept >> i & 1 else None for i, p in enumerate(_parts()[:3])]
    layout = MixedLayout.from_parts((40, 50), *parts)
    mask = torch.zeros(1, 1, 40, 50, dtype=torch.bool)
    for part in layout.parts:
        mask |= part.mask()
    assert len(layout.parts) == kept.bit_count()
    check_layout(layout, mask)


def test_empty_parts_are_left_out() -> None:
    nothing = torch.zeros(40, 50, dtype=torch.bool)
    layout = MixedLayout.from_parts(
        (40, 50), block_layout(nothing, 16), PanelLayout.from_panels((40, 50), []),
        row_layout(nothing),
    )  # fmt: skip
    assert layout.parts == () and layout.slots == 0 and layout.part_offsets == (0,)
    check_layout(layout, nothing[None, None])


def test_a_mixed_layout_of_several_entries() -> None:
    masks = random_mask(0, 2, 33, 40)
    coarse = masks.clone()
    coarse[:, :, 16:] = False
    layout = MixedLayout.from_parts(
        (33, 40),
        block_layout(coarse, 16, (1, 3), (1, 0, 1)), None,
        row_layout(masks & ~coarse, (1, 3), (1, 0, 1)), (1, 3), (1, 0, 1),
    )  # fmt: skip
    check_layout(layout, masks[[1, 0, 1]][None])


def test_validate_finds_an_overlap_of_each_pair_of_parts() -> None:
    blocks, panel, rest, _ = _parts()
    twice = torch.zeros(40, 50, dtype=torch.bool)
    twice[21, 34] = True
    corner = PanelLayout.from_panels((40, 50), [(range(29, 31), range(39, 41), None)])
    for parts, says in [
        ((blocks, None, row_layout(twice)), r"rest: position \(21, 34\) of pattern 0"),
        (
            (None, panel, row_layout(panel.mask()[0, 0] & (torch.arange(50) == 17))),
            r"rest: position \(18, 17\) of pattern 0",
        ),
        (
            (blocks, corner, rest),
            r"panels: position \(29, 39\) of pattern 0",
        ),
    ]:
        layout = MixedLayout.from_parts((40, 50), *parts)
        with pytest.raises(LayoutError, match=rf"MixedLayout\.{says} is held twice"):
            layout.validate()


def test_a_dead_position_of_a_block_may_belong_to_another_part() -> None:
    blocks, _, _, mask = _parts()
    other = torch.zeros(40, 50, dtype=torch.bool)
    other[31, 33] = True
    layout = MixedLayout.from_parts((40, 50), blocks, None, row_layout(other))
    check_layout(layout, (blocks.mask() | other))
    assert mask[20, 33] and not blocks.mask()[0, 0, 31, 33]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"starts": (0, 768, 1280, 1281)}, r"starts: \(0, 768, 1280, 1281\); expected"),
        ({"nnz": 1}, "nnz: 1"),
        ({"entry_slots": (0, 5)}, r"entry_slots: \(0, 5\)"),
        ({"shape": (40, 51)}, r"blocks: shape \(40, 50\); expected that of the whole"),
        ({"rest": 3}, "rest: a int; expected a RowLayout or None"),
    ],
)
def test_validate_names_the_field(change, says: str) -> None:
    blocks, panel, rest, _ = _parts()
    layout = MixedLayout.from_parts((40, 50), blocks, panel, rest)
    with pytest.raises(LayoutError, match=rf"MixedLayout\.{says}"):
        replace(layout, **change).validate()


def test_validate_looks_into_the_parts() -> None:
    blocks, panel, rest, _ = _parts()
    bad = replace(rest, columns=rest.columns + 50)
    with pytest.raises(LayoutError, match=r"RowLayout\.columns"):
        MixedLayout.from_parts((40, 50), blocks, panel, bad).validate()
