"""TileLayout: fragment order against the mma.m16n8k16 formula, transposes, edges, validation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mixgrain.formats.errors import LayoutError
from mixgrain.formats.sparse import SparseTensor
from mixgrain.formats.tile import FRAGMENT, TileLayout

SHAPES = [(0, 0), (0, 20), (20, 0), (1, 1), (16, 16), (15, 33), (32, 48), (100, 70)]


def random_tiles(shape: tuple[int, int]) -> tuple[torch.Tensor, TileLayout]:
    kept = torch.rand(-(-shape[0] // 16), -(-shape[1] // 16)) < 0.6
    return kept, TileLayout.from_tile_mask(kept, shape)


def test_fragment_is_the_a_operand() -> None:
    """PTX ISA, mma.m16n8k16, A: row = g for a0 a1 a4 a5, g + 8 otherwise; column = 2 t + (i & 1),
    + 8 from a4 on."""
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(8):
            row = g if i < 2 or 4 <= i < 6 else g + 8
            column = t * 2 + (i & 1) + (8 if i >= 4 else 0)
            assert int(FRAGMENT[lane * 8 + i]) == row * 16 + column
    assert sorted(FRAGMENT.tolist()) == list(range(256))


@pytest.mark.parametrize("shape", SHAPES)
def test_positions(shape) -> None:
    kept, layout = random_tiles(shape)
    layout.validate()
    expected = kept.repeat_interleave(16, 0).repeat_interleave(16, 1)[: shape[0], : shape[1]]
    assert torch.equal(layout.mask()[0, 0], expected)
    assert layout.nnz == int(expected.sum())
    assert layout.slots == 256 * int(kept.sum())
    live = layout.live()
    assert layout.nnz == (layout.slots if live is None else int(live.sum()))


@pytest.mark.parametrize("shape", SHAPES)
def test_transpose(shape) -> None:
    _, layout = random_tiles(shape)
    s = SparseTensor(layout, torch.randn(layout.slots))
    s.T.layout.validate()
    assert torch.equal(s.T.to_dense(), s.to_dense().mT)
    live = layout.live()
    again = s.T.T
    assert again.layout.key == layout.key
    for name in ("tile_offsets", "tile_columns", "t_offsets", "t_rows", "t_order"):
        assert torch.equal(getattr(again.layout, name), getattr(layout, name)), name
    mask = slice(None) if live is None else live
    assert torch.equal(again.values[mask], s.values[mask])


def test_docstring_example() -> None:
    kept = torch.tensor([[0, 1, 0], [1, 0, 1]], dtype=torch.bool)
    layout = TileLayout.from_tile_mask(kept, (32, 48))
    assert layout.tile_offsets.tolist() == [0, 1, 3]
    assert layout.tile_columns.tolist() == [1, 0, 2]
    assert layout.t_offsets.tolist() == [0, 1, 2, 3]
    assert layout.t_rows.tolist() == [1, 0, 1]
    assert layout.t_order.tolist() == [1, 0, 2]


def test_validate_names_the_field() -> None:
    kept = torch.tensor([[0, 1, 1], [1, 0, 1]], dtype=torch.bool)
    good = TileLayout.from_tile_mask(kept, (32, 40))
    good.validate()
    cases = {
        "lead": {"lead": (1, 2)},
        "shape": {"shape": (-1, 40)},
        "tile_offsets": {"tile_offsets": torch.tensor([0, 3, 2], dtype=torch.int32)},
        "tile_columns": {"tile_columns": good.tile_columns.flip(0)},
        "t_offsets": {"t_offsets": good.t_offsets + 1},
        "t_rows": {"t_rows": 1 - good.t_rows},
        "t_order": {"t_order": good.t_order.flip(0)},
        "nnz": {"nnz": 4 * 256},
        "entry_slots": {"entry_slots": (0, 256)},
    }
    for name, change in cases.items():
        with pytest.raises(LayoutError, match=f"TileLayout.{name}"):
            dataclasses.replace(good, **change).validate()
    wide = {"tile_columns": torch.tensor([1, 3, 0, 2], dtype=torch.int32)}
    with pytest.raises(LayoutError, match="tile_columns"):
        dataclasses.replace(good, **wide).validate()
    with pytest.raises(LayoutError, match="t_rows"):
        dataclasses.replace(good, t_rows=good.t_rows.long()).validate()


def test_mask_of_the_wrong_size() -> None:
    with pytest.raises(LayoutError, match=r"expected one bool per 16×16 tile, \(2, 3\)"):
        TileLayout.from_tile_mask(torch.ones(2, 2, dtype=torch.bool), (32, 40))
