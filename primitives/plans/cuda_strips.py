"""Blocks of a layer in strips of 64 rows, as the kernel of their gradient takes them.

A strip is 64 rows, one line of blocks or several; its panels are as wide as a block, up to 64
columns, and lie where any of its lines keeps a block. Of blocks of 32, two lines to a strip:

    A . B .          strip 0   panels  0: A C   2: B −   3: − D
    C . . D          strip 1   panels  1: E F
    . E . .
    . F . .
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cuda_block import chunks_of, running

# Rows of a strip, columns that a CTA takes of it.
ROWS, COLUMNS = 64, 512


class Strips(NamedTuple):
    """The work of CTAs.

    Attributes:
        table: int32 (CTAs, ints), the longest first: first row, number of panels, which 64 rows of
            their blocks these are, 0; first column of each of ``most_of`` panels, 0 behind the
            last; of each panel and line two, the first slot / 64 of what of the block is in the
            panel and its mask: −1 where there is no block, and for the mask of a whole one.
        panels: of all CTAs.
    """

    table: Tensor
    panels: int


def most_of(size: int) -> int:
    """Panels of a CTA."""
    return COLUMNS // min(size, ROWS)


def strips(items: Tensor, size: int) -> Strips:
    """Blocks of one entry in strips.

    Args:
        items: int32 (n, 4), of ``cuda_block.part``.
        size: side of a block: 16, 32, 64 or 128.
    """
    device = items.device
    wide, lines, parts = min(size, ROWS), max(ROWS // size, 1), max(size // ROWS, 1)
    # Each block in parts × parts pieces of at most 64 × 64.
    item = torch.arange(len(items), device=device).repeat_interleave(parts * parts)
    down = torch.arange(len(item), device=device) // parts % parts
    across = torch.arange(len(item), device=device) % parts
    row, column, mask = (items[item, c].long() for c in (1, 2, 3))
    line, column = row * parts + down, column * parts + across
    key = (line // lines << 32) + column
    found, which = torch.unique(key, return_inverse=True)
    places = torch.full((len(found), lines, 2), -1, device=device)
    first = item * (size * size // 64) + down * size + across
    places[which, line % lines] = torch.stack([first, mask], 1)
    strip = found >> 32
    runs = chunks_of(running(torch.bincount(strip)), most_of(size)).long()
    begin, count = runs[:, 0], runs[:, 1]
    place = torch.arange(most_of(size), device=device)
    mine = (begin[:, None] + place).clamp(max=max(len(found) - 1, 0))
    there = place < count[:, None]
    columns = torch.where(there, (found[mine] & 0xFFFFFFFF) * wide, 0)
    kept = torch.where(there[..., None, None], places[mine], -1)
    at = strip[begin]
    head = torch.stack([at * ROWS, count, at % parts, count * 0], 1)
    table = torch.cat([head, columns, kept.flatten(1)], 1).to(torch.int32)
    return Strips(table.contiguous(), len(found))
