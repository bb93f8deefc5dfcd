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
        table: int32 (lines, columns), both padded to whole dense tiles: the number in memory of the
            tile there, −1 = none.
    """

    tiles: Tensor
    table: Tensor


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
    kept = (table.view(shape[0] // down, down, shape[1] // over, over) >= 0).any(3).any(1)
    found = kept.mT.nonzero().flip(1).int().contiguous()
    return Numbers(found, table)
