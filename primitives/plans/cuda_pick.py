"""Row parts as the kernel that picks their values out of dense tiles takes them.

A tile is ``tall`` × ``wide`` elements, of which some are kept; its picks say which, in the order of
their slots. Of 2 × 3:

    4 × 6                                       tiles  (0, 0, 0, 2) (0, 3, 2, 3) (2, 3, 3, 5):
        a . . . . b                                    first row and column, first pick, end
        . c . . . .                             spots  0 4 2 0 4, 3 · row + column in the tile
        . . . d . .                             slots  0 2 1 3 4, of a c b d e
        . . . . e .
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cuda_expand import row_bounds


class Picks(NamedTuple):
    """What a row part keeps of each tile, of tiles of which it keeps something.

    Attributes:
        tiles: int32 (n, 4), first row and column, first pick and the end of its picks.
        spots: int16 (NNZ,), wide * row + column in the tile.
        slots: int32 (NNZ,), counted from the part's first.
    """

    tiles: Tensor
    spots: Tensor
    slots: Tensor


def picks(items: Tensor, indices: Tensor, rows: int, columns: int, tall: int, wide: int) -> Picks:
    """All entries of one matrix by tile and slot.

    Args:
        items: int32 (NI, 4), of ``cuda_row.part``.
        indices: int32 (NNZ,), columns of entries, in the order of slots.
        rows: of the matrix.
        columns: of the matrix.
        tall: rows of a tile.
        wide: columns of a tile; tall * wide is at most 2**16.
    """
    bounds, across = row_bounds(items, rows), -(-columns // wide)
    row = torch.repeat_interleave(
        torch.arange(rows, device=items.device), bounds.diff().long(), output_size=len(indices)
    )
    column = indices.long()
    key, slots = torch.sort(row // tall * across + column // wide, stable=True)
    found, counts = torch.unique_consecutive(key, return_counts=True)
    end = counts.cumsum(0)
    tiles = torch.stack([found // across * tall, found % across * wide, end - counts, end], 1)
    spots = (row % tall * wide + column % wide)[slots]
    return Picks(tiles.to(torch.int32), spots.to(torch.int16), slots.to(torch.int32))
