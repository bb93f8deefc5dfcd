"""PanelLayout: ranges, lists, masks, padding, transposes, and what validate finds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layout_cases import check_layout, random_mask

from mixgrain.formats.errors import LayoutError
from mixgrain.formats.panel import PanelLayout


def _example() -> PanelLayout:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    return PanelLayout.from_panels(
        (6, 8),
        [
            (torch.tensor([4]), range(8), None),
            (torch.tensor([0, 1, 2, 3, 5]), torch.tensor([1, 6]), None),
            (range(2), torch.tensor([0, 3, 5]), mask),
        ],
    )


def _example_mask() -> torch.Tensor:
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[:, [1, 6]] = True
    mask[4] = True
    mask[0, [0, 3]] = mask[1, [3, 5]] = True
    return mask


def test_the_drawing_in_the_docstring() -> None:
    layout = _example()
    assert layout.row_start.tolist() == [-1, -1, 0]
    assert layout.row_list_offset.tolist() == [0, 1, 0]
    assert layout.row_list.tolist() == [4, 0, 1, 2, 3, 5]
    assert layout.col_start.tolist() == [0, -1, -1]
    assert layout.col_list_offset.tolist() == [0, 0, 2]
    assert layout.mask_offset.tolist() == [-1, -1, 0]
    assert layout.mask_bits.tolist() == [0b011, 0b110]
    assert layout.slot_offsets.tolist() == [0, 128, 256, 384]
    assert layout.pitch.tolist() == [8, 8, 8]
    check_layout(layout, _example_mask()[None, None])


def test_rows_and_columns_of_a_panel() -> None:
    layout = _example()
    assert layout.rows_of(1).tolist() == [0, 1, 2, 3, 5]
    assert layout.rows_of(2).tolist() == [0, 1]
    assert layout.cols_of(2).tolist() == [0, 3, 5]
    assert layout.cols_of(0).tolist() == list(range(8))


def test_no_panels() -> None:
    layout = PanelLayout.from_panels((6, 8), [])
    assert layout.slots == layout.nnz == 0
    check_layout(layout, torch.zeros(1, 1, 6, 8, dtype=torch.bool))


def test_panels_of_several_entries() -> None:
    one, other = random_mask(0, 20, 11), random_mask(1, 3, 70)
    layout = PanelLayout.from_panels(
        (40, 80),
        [
            (range(20), torch.arange(0, 33, 3), one),
            (torch.tensor([21, 39]), range(80), None),
            (torch.tensor([3, 4, 30]), range(5, 75), other),
        ],
        lead=(1, 3), entry=(0, 1, 0), panel_entry=(0, 0, 1),
    )  # fmt: skip
    masks = torch.zeros(2, 40, 80, dtype=torch.bool)
    masks[0, :20, :33:3] = one
    masks[0, [21, 39]] = True
    masks[1, [3, 4, 30], 5:75] = other
    check_layout(layout, masks[[0, 1, 0]][None])


def _put(field: str, at: int, value: int) -> PanelLayout:
    tensor = getattr(_example(), field).clone()
    tensor[at] = value
    return replace(_example(), **{field: tensor})


@pytest.mark.parametrize(
    "field, at, value, says",
    [
        ("panel_entry", 2, 1, "0 … 1; expected distinct patterns 0 … 0"),
        ("row_count", 0, 0, "0 for panel 0; expected at least 1"),
        ("row_start", 2, 5, r"5 \+ 2 for panel 2"),
        ("col_start", 0, -2, r"-2 \+ 8 for panel 0"),
        ("row_list_offset", 1, 2, "2 for panel 1; expected 5 members inside the 6 of row_list"),
        ("row_list", 2, 0, "0 as member 1 of a list; expected strictly rising"),
        ("col_list", 4, 8, r"8 as member 2 of a list; .* in \[0, 8\)"),
        ("mask_offset", 2, 1, "1 for panel 2; expected −1, or 2 bytes inside the 2"),
        ("mask_bits", 0, 0b1011, "bits beyond the columns of masked panel 0"),
        ("slot_offsets", 1, 64, "64 at 1; expected 128"),
    ],
)
def test_validate_names_the_field(field: str, at: int, value: int, says: str) -> None:
    with pytest.raises(LayoutError, match=rf"PanelLayout\.{field}: .*{says}"):
        _put(field, at, value).validate()


def test_validate_finds_panels_that_overlap() -> None:
    layout = PanelLayout.from_panels(
        (70, 70), [(range(70), torch.tensor([1, 66]), None), (torch.tensor([68]), range(70), None)]
    )
    with pytest.raises(LayoutError, match=r"position \(68, 1\) of pattern 0 is held twice"):
        layout.validate()


def test_a_wrong_count_is_found() -> None:
    with pytest.raises(LayoutError, match="nnz: 3"):
        replace(_example(), nnz=3).validate()
