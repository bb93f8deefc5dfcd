"""TileLayout: kept 16×16 tiles of a weight matrix, values in tensor-core fragment order."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from .arguments import as_shape, check_dense, check_index, check_inside
from .checks import (
    check_nnz,
    check_offsets,
    check_range,
    check_rising,
    check_shape,
    check_slots,
    check_tensor,
    check_transposed,
    fail,
    same_numbers,
)
from .entries import transposed_order
from .errors import DtypeError, LayoutError, ShapeError, UnsupportedError
from .layout import Layout, next_key, register_layout

SIZE = 16  # rows and columns of a tile
AREA = SIZE * SIZE


def _fragment() -> Tensor:
    """Row-major index of each slot of a tile.

    Lane 4 g + t holds 8 consecutive slots, its share of the A operand of mma.m16n8k16 (PTX ISA,
    "Matrix fragments for mma.m16n8k16").
    """
    lane, item = torch.arange(AREA) // 8, torch.arange(AREA) % 8
    row = lane // 4 + 8 * (item // 2 % 2)
    column = 2 * (lane % 4) + item % 2 + 8 * (item // 4)
    return row * SIZE + column


#: int64 (256,): slot p of a tile holds element divmod(FRAGMENT[p], 16).
FRAGMENT = _fragment()


def _count_live(rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> int:
    """Elements of these tiles inside the shape: those at its lower and right edge may hang over."""
    height = (shape[0] - SIZE * rows).clamp(max=SIZE)
    width = (shape[1] - SIZE * columns).clamp(max=SIZE)
    return int((height * width).sum())


@register_layout
@dataclass(frozen=True, eq=False, repr=False)
class TileLayout(Layout):
    """Kept 16×16 tiles of one (n_out, n_in) matrix: no heads, no masks.

    A 32×48 weight that keeps the tiles marked #, numbered in row order:

        . #0 .        tile_offsets  [0, 1, 3]      tiles of tile row 0: [0, 1), of row 1: [1, 3)
        #1 . #2       tile_columns  [1, 0, 2]
                      t_offsets  [0, 1, 2, 3]      the same tiles, column after column:
                      t_rows     [1, 0, 1]         their tile rows
                      t_order    [1, 0, 2]         and their numbers in row order

    Slots: tile after tile in row order, 256 each, in fragment order: lane L = 4 g + t of a warp
    holds 8 consecutive slots, elements (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1), then the same
    four 8 columns on; so one 16-byte load (half precision) brings a lane its whole A fragment.
    Slots beyond the shape (tiles at its edge) are dead.

    Attributes:
        tile_offsets: int32 (tile rows + 1), rising, where each tile row's tiles start.
        tile_columns: int32 (tiles,), rising within a tile row.
        t_offsets: int32 (tile columns + 1), where each tile column's tiles start in ``t_order``.
        t_rows: int32 (tiles,), tile row of each tile in column order.
        t_order: int32 (tiles,), number in row order of each tile in column order.

    Source: E.T. (SC'21), tensor tiles; fragment order as marlin and cuSPARSELt pre-arrange weights.
    """

    kind: ClassVar[str] = "tile"

    shape: tuple[int, int]
    nnz: int
    entry_slots: tuple[int, ...]
    tile_offsets: Tensor
    tile_columns: Tensor
    t_offsets: Tensor
    t_rows: Tensor
    t_order: Tensor
    lead: tuple[int, int] = (1, 1)
    entry: tuple[int, ...] = (0,)
    key: int = field(default_factory=next_key)

    @classmethod
    def from_tiles(cls, rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> TileLayout:
        """The layout that keeps the tiles named.

        Args:
            rows: int (tiles,), tile rows.
            columns: int (tiles,), tile columns; in row order, each tile once.
            shape: (n_out, n_in), need not be multiples of 16.

        Only what lies outside of the shape is refused here; ``validate`` looks at the order.

        Raises:
            LayoutError: a tile outside the shape, or rows that fall.
            DtypeError: no tensors of integers.
            ShapeError: a shape that cannot be, or two lengths.
        """
        op = "TileLayout.from_tiles"
        shape = as_shape(op, shape)
        tile_rows, tile_columns = (-(-n // SIZE) for n in shape)
        check_index(op, "rows", rows)
        check_index(op, "columns", columns)
        if rows.shape != columns.shape or rows.device != columns.device:
            raise ShapeError(
                f"{op}: rows {tuple(rows.shape)} on {rows.device}, columns {tuple(columns.shape)} "
                f"on {columns.device}; expected one of each for a tile, on one device"
            )
        check_inside(op, "rows", rows, 0, tile_rows)
        check_inside(op, "columns", columns, 0, tile_columns)
        rows, columns = rows.long(), columns.long()
        if bool((rows[1:] < rows[:-1]).any()):  # only their counts are kept
            at = int((rows[1:] < rows[:-1]).nonzero()[0]) + 1
            raise LayoutError(
                f"{op}: rows falls from {int(rows[at - 1])} to {int(rows[at])} at {at}; expected "
                "tiles in row order; sort rows and columns together"
            )
        offsets = torch.zeros(tile_rows + 1, dtype=torch.int32, device=rows.device)
        torch.cumsum(torch.bincount(rows, minlength=tile_rows), 0, out=offsets[1:])
        t_offsets, t_rows, t_order = transposed_order(offsets, columns, tile_rows, tile_columns, 1)
        return cls(
            shape=shape,
            nnz=_count_live(rows, columns, shape),
            entry_slots=(0, AREA * rows.numel()),
            tile_offsets=offsets,
            tile_columns=columns.int(),
            t_offsets=t_offsets.int(),
            t_rows=t_rows.int(),
            t_order=t_order.int(),
        )

    @classmethod
    def from_tile_mask(cls, kept: Tensor, shape: tuple[int, int]) -> TileLayout:
        """The layout that keeps tile (i, j) where ``kept`` (tile rows, tile columns) is True."""
        op = "TileLayout.from_tile_mask"
        shape = as_shape(op, shape)
        check_dense(op, "kept", kept)
        if kept.dtype != torch.bool:
            raise DtypeError(f"{op}: kept is {kept.dtype}; expected bool; write kept != 0")
        if kept.device.type == "meta":
            raise UnsupportedError(f"{op}: kept is on meta and says nothing; give it data")
        expected = tuple(-(-n // SIZE) for n in shape)
        if tuple(kept.shape) != expected:
            raise LayoutError(
                f"TileLayout.from_tile_mask: mask {tuple(kept.shape)} for a {shape[0]}×{shape[1]} "
                f"matrix; expected one bool per 16×16 tile, {expected}"
            )
        rows, columns = kept.nonzero(as_tuple=True)
        return cls.from_tiles(rows, columns, shape)

    @property
    def tiles(self) -> int:
        """Number of kept tiles."""
        return self.tile_columns.numel()

    def tile_rows(self) -> Tensor:
        """int64 (tiles,): tile row of each tile, in row order."""
        counts = self.tile_offsets.diff()
        rows = torch.arange(counts.numel(), device=self.device)
        return torch.repeat_interleave(rows, counts, output_size=self.tiles)

    def _positions(self) -> tuple[Tensor, Tensor]:
        """(row, column) of every slot, (tiles, 256) each; may lie beyond the shape."""
        inside = FRAGMENT.to(self.device)
        row = self.tile_rows()[:, None] * SIZE + inside // SIZE
        column = self.tile_columns.long()[:, None] * SIZE + inside % SIZE
        return row, column

    def live(self) -> Tensor | None:
        """Bool (slots,): inside the shape; None when every slot is."""
        if self.nnz == self.slots:
            return None
        row, column = self._positions()
        return ((row < self.shape[0]) & (column < self.shape[1])).flatten()

    def indices(self) -> tuple[Tensor, Tensor]:
        """(row, column) of every slot, int64 (slots,); dead ones are moved inside the shape."""
        row, column = self._positions()
        return (
            row.clamp_(max=self.shape[0] - 1).flatten(),
            column.clamp_(max=self.shape[1] - 1).flatten(),
        )

    @cached_property
    def T(self) -> TileLayout:
        """The transposed layout: the two orders change places; key negated."""
        order = torch.empty_like(self.t_order)
        order[self.t_order.long()] = torch.arange(self.tiles, device=self.device).int()
        return replace(
            self,
            shape=(self.shape[1], self.shape[0]),
            tile_offsets=self.t_offsets,
            tile_columns=self.t_rows,
            t_offsets=self.tile_offsets,
            t_rows=self.tile_columns,
            t_order=order,
            key=-self.key,
        )

    def transpose_slots(self) -> Tensor:
        """int64 (slots,): the slot each slot of ``T`` takes its value from."""
        slot_of = torch.empty_like(FRAGMENT)
        slot_of[FRAGMENT] = torch.arange(AREA)
        inside = slot_of[FRAGMENT % SIZE * SIZE + FRAGMENT // SIZE].to(self.device)
        return (self.t_order.long()[:, None] * AREA + inside).flatten()

    def validate(self) -> None:
        """Check every field against the others.

        Raises:
            LayoutError: the first field at fault, what it holds and what is expected.
        """
        if not same_numbers(self.lead, (1, 1)) or not same_numbers(self.entry, (0,)):
            raise fail(
                self, "lead", f"{self.lead}, {self.entry}", "(1, 1), (0,): tiles have no heads"
            )
        check_shape(self)
        tile_rows, tile_columns = (-(-n // SIZE) for n in self.shape)
        int32 = torch.int32
        offsets = check_tensor(self, "tile_offsets", (tile_rows + 1,), int32)
        columns = check_tensor(self, "tile_columns", (None,), int32)
        tiles = columns.numel()
        check_slots(self, [AREA * tiles])
        check_offsets(self, "tile_offsets", offsets, tiles)
        check_range(self, "tile_columns", columns, 0, tile_columns)
        check_rising(self, "tile_columns", offsets, columns, "tile row")
        what = ("tile row", "tile column", "tile")
        grid = (tile_rows, tile_columns, 1)
        check_transposed(self, offsets, columns, grid, (int32, int32, int32), what)
        check_nnz(self, _count_live(self.tile_rows(), columns, self.shape))
