"""Where the tiles of a matrix lie among dense tiles, for kernels that pick them out of those."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixgrain.formats.tile import SIZE


class Numbers(NamedTuple):
    """Tiles by their place.

    Attributes:
        tiles: int32 (n, 2): row and column of each dense tile that keeps something; neighbours in a
            column of them follow each other, which share what they read.
        numbers: int32 (n, lines, columns), in tiles: of each of them the numbers in memory of the
            tiles there, −1 = none.
    """

    tiles: Tensor
    numbers: Tensor


def numbers(
    rows: Tensor, columns: Tensor, number: Tensor, lines: int, across: int, tall: int, wide: int
) -> Numbers:
    """The tiles of one matrix.

    Args:
        rows: int (n,), tile rows.
        columns: int (n,), tile columns.
        number: int (n,), numbers in memory.
        lines: tile rows of the matrix.
        across: tile columns of the matrix.
        tall: rows of a dense tile, whole tiles.
        wide: columns of a dense tile, whole tiles.
    """
    down, over = tall // SIZE, wide // SIZE
    shape = -(-lines // down) * down, -(-across // over) * over
    table = torch.full(shape, -1, dtype=torch.int32, device=rows.device)
    table[rows.long(), columns.long()] = number.int()
    dense = table.view(shape[0] // down, down, shape[1] // over, over).transpose(1, 2)
    column, row = (dense >= 0).flatten(2).any(2).mT.nonzero().unbind(1)
    return Numbers(torch.stack([row, column], 1).int(), dense[row, column].contiguous())
