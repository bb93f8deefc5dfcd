"""Matrices of elements or square blocks as SparseTensors, and the arrays of a SparseTensor's rows.

What scipy, torch, CuPy and edge lists have in common: index arrays in, checked, sorted; index
arrays out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import kind_of
from ..block import SIZES, BlockLayout
from ..errors import LayoutError, ShapeError
from ..relayout import to_layout
from ..row import RowLayout
from ..sparse import SparseTensor
from .arrays import in_row_order


def from_positions(
    who: str,
    shape: tuple[int, int],
    row: Tensor,
    col: Tensor,
    values: Tensor,
    lead: tuple[int, int] = (1, 1),
) -> SparseTensor:
    """The SparseTensor of elements in any order, each once.

    Args:
        who: names the caller in errors.
        shape: (nq, nk) of one entry.
        row: int (n,), entry · nq + row.
        col: int (n,).
        values: (n,).
        lead: (b, h); every entry has positions of its own.
    """
    _check_place(who, col, values)
    entries = lead[0] * lead[1]
    offsets, columns, order = in_row_order(row, col, (entries * shape[0], shape[1]), who)
    layout = RowLayout.from_csr(shape, offsets, columns, lead, range(entries))
    return SparseTensor(layout, values if order is None else values[order])


def from_blocks(
    who: str,
    shape: tuple[int, int],
    row: Tensor,
    col: Tensor,
    values: Tensor,
    lead: tuple[int, int] = (1, 1),
) -> SparseTensor:
    """As ``from_positions``, of square blocks; rows and columns of blocks, values (n, s, s)."""
    _check_place(who, col, values)
    high, wide = values.shape[1:]
    if high != wide or high not in SIZES:
        raise LayoutError(
            f"{who}: blocks of {high}×{wide}, expected square ones of {SIZES}; convert the "
            "matrix to such blocks, or to csr"
        )
    if shape[0] % high or shape[1] % high:
        raise LayoutError(f"{who}: blocks of {high} do not divide the shape {shape}")
    entries = lead[0] * lead[1]
    grid = (entries * shape[0] // high, shape[1] // high)
    offsets, columns, order = in_row_order(row, col, grid, who, "block")
    layout = BlockLayout.from_blocks(shape, high, offsets, columns, lead=lead, entry=range(entries))
    return SparseTensor(layout, (values if order is None else values[order]).reshape(-1))


def _check_place(who: str, indices: Tensor, values: Tensor) -> None:
    if indices.device != values.device:
        raise ShapeError(
            f"{who}: indices on {indices.device}, values on {values.device}; expected one device"
        )


class Rows(NamedTuple):
    """The elements of one matrix in row order, or its blocks.

    Attributes:
        offsets: int (rows + 1,).
        columns: int (n,), rising within a row.
        values: (n,), or (n, size, size) for blocks; zeros at dead slots.
    """

    offsets: Tensor
    columns: Tensor
    values: Tensor

    def rows(self) -> Tensor:
        """int64 (n,): the row of each column."""
        lines = torch.arange(self.offsets.numel() - 1, device=self.columns.device)
        return torch.repeat_interleave(lines, self.offsets.diff().long())


def check_sparse(who: str, s: object, matrix: bool = True) -> SparseTensor:
    """`s` if it is a SparseTensor, and one matrix unless told otherwise.

    Raises:
        LayoutError: it is not.
    """
    if not isinstance(s, SparseTensor):
        raise LayoutError(
            f"{who}: {kind_of(s)} given, a SparseTensor expected; make one with sparsify(x, 'row')"
        )
    if matrix and s.lead_shape:
        raise LayoutError(
            f"{who}: given shape {s.shape}, expected one 2-D matrix; convert the entries one by one"
        )
    return s


def live_values(s: SparseTensor) -> Tensor:
    """Values with exact zeros at dead slots."""
    live = s.live()
    return s.values if live is None else torch.where(live, s.values, s.values.new_zeros(()))


def by_element(s: SparseTensor) -> SparseTensor:
    """The same matrices with a RowLayout and zeros where a run-time mask drops a position."""
    made = s if isinstance(s.layout, RowLayout) else to_layout(s, "row")
    return SparseTensor(made.layout, live_values(made))


def by_block(who: str, s: SparseTensor) -> SparseTensor:
    """The same matrices with their BlockLayout and zeros at dead slots.

    Raises:
        LayoutError: another layout, or blocks that hang over the shape.
    """
    if not isinstance(s.layout, BlockLayout):
        raise LayoutError(
            f"{who}: {type(s.layout).__name__} given, a BlockLayout expected for bsr; convert "
            "with s.to_layout('block', size=…), or ask for csr"
        )
    size = s.layout.size
    if any(side % size for side in s.layout.shape):
        raise LayoutError(
            f"{who}: bsr cannot hold blocks of {size} that hang over the shape "
            f"{s.layout.shape}; pad the matrix, or ask for csr"
        )
    return SparseTensor(s.layout, live_values(s))


def elements(who: str, s: object) -> Rows:
    """The kept elements of one matrix of any layout, in row order."""
    made = by_element(check_sparse(who, s))
    assert isinstance(made.layout, RowLayout)
    return Rows(made.layout.row_offsets, made.layout.columns, made.values)


def blocks(who: str, s: object) -> Rows:
    """The blocks of one matrix with a BlockLayout, masked positions as stored zeros.

    Raises:
        LayoutError: another layout, or blocks that hang over the shape.
    """
    made = by_block(who, check_sparse(who, s))
    assert isinstance(made.layout, BlockLayout)
    size = made.layout.size
    values = made.values.unflatten(0, (-1, size, size))
    return Rows(made.layout.block_offsets, made.layout.block_columns, values)
