"""RowLayout: arrays, slots, transposes, and what validate finds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layout_cases import check_layout, random_mask, row_layout

from mixgrain.formats.errors import LayoutError
from mixgrain.formats.row import RowLayout

SHAPES = [(0, 0), (0, 5), (5, 0), (1, 1), (7, 7), (5, 9), (33, 20)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_a_row_layout_holds_its_mask(shape: tuple[int, int], density: float) -> None:
    mask = random_mask(0, *shape, density=density)
    check_layout(row_layout(mask), mask[None, None])


@pytest.mark.parametrize(
    "lead, entry", [((1, 3), (0, 1, 0)), ((3, 1), (0, 0, 1)), ((2, 2), (1, 0, 0, 1))]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_entries_are_stored_once(shape, lead, entry) -> None:
    masks = random_mask(1, 2, *shape)
    layout = row_layout(masks, lead, entry)
    assert layout.columns.numel() == int(masks.sum())
    check_layout(layout, masks[list(entry)].reshape(*lead, *shape))


def test_the_drawing_in_the_docstring() -> None:
    mask = torch.tensor([[1, 0, 0, 0, 1, 0], [0] * 6, [0, 1, 1, 0, 1, 0]]).bool()
    layout = row_layout(mask)
    assert layout.row_offsets.tolist() == [0, 2, 2, 5]
    assert layout.columns.tolist() == [0, 4, 1, 2, 4]
    assert layout.t_offsets.tolist() == [0, 1, 2, 3, 3, 5, 5]
    assert layout.t_rows.tolist() == [0, 2, 2, 0, 2]
    assert layout.t_order.tolist() == [0, 2, 3, 1, 4]
    assert repr(layout) == "RowLayout(3×6, nnz=5, density=0.2778, slots=5)"


def test_index_dtypes() -> None:
    layout = row_layout(random_mask(2, 5, 6))
    assert layout.row_offsets.dtype == layout.t_offsets.dtype == torch.int64
    assert layout.columns.dtype == layout.t_rows.dtype == layout.t_order.dtype == torch.int32


def _changed(layout: RowLayout, field: str, at: int, value: int) -> RowLayout:
    tensor = getattr(layout, field).clone()
    tensor[at] = value
    return replace(layout, **{field: tensor})


@pytest.mark.parametrize(
    "field, at, value, says",
    [
        ("row_offsets", 0, 1, "starts at 1"),
        ("row_offsets", 2, 0, "falls from 2 to 0 at 2"),
        ("row_offsets", 3, 9, "ends at 9"),
        ("columns", 1, 6, r"6 at 1; expected values in \[0, 6\)"),
        ("columns", 0, -1, "-1 at 0"),
        ("columns", 3, 1, "1 then 1 at 2; expected strictly rising values inside a row"),
        ("t_offsets", 1, 0, "0 at 1; expected 1"),
        ("t_rows", 0, 2, "2 at 0; expected 0"),
        ("t_order", 2, 2, "2 at 2; expected 3"),
    ],
)
def test_validate_names_the_field(field: str, at: int, value: int, says: str) -> None:
    mask = torch.tensor([[1, 0, 0, 0, 1, 0], [0] * 6, [0, 1, 1, 0, 1, 0]]).bool()
    with pytest.raises(LayoutError, match=rf"RowLayout\.{field}: .*{says}"):
        _changed(row_layout(mask), field, at, value).validate()


@pytest.mark.parametrize(
    "change, says",
    [
        ({"nnz": 4}, r"nnz: 4; expected the number of live slots, 5"),
        ({"entry_slots": (0, 6)}, r"entry_slots: \(0, 6\); expected \(0, 5\)"),
        ({"entry": (0, 0)}, r"entry: 2 entries; expected b \* h = 1"),
        ({"entry": (1,)}, r"entry: \(1,\); expected every distinct pattern"),
        ({"shape": (3, -1)}, r"shape: \(3, -1\)"),
        ({"lead": (0, 1)}, r"lead: \(0, 1\)"),
        ({"columns": torch.zeros(5)}, r"columns: dtype torch.float32; expected torch.int32"),
        ({"row_offsets": torch.zeros(9).long()}, r"shape \(9,\); expected shape \(4,\)"),
        ({"t_rows": None}, r"t_rows: a NoneType; expected a tensor"),
    ],
)
def test_validate_checks_the_static_fields(change, says: str) -> None:
    mask = torch.tensor([[1, 0, 0, 0, 1, 0], [0] * 6, [0, 1, 1, 0, 1, 0]]).bool()
    with pytest.raises(LayoutError, match=says):
        replace(row_layout(mask), **change).validate()
