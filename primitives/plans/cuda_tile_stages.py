"""Tiles in stages of 64 inner positions, as the kernel on wgmma takes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixgrain.formats.tile import SIZE

from .cuda_block import longest_first, records, running
from .cuda_tile import lines_of

# Lines of tiles that one warpgroup multiplies at once.
FOUR = 4
# Numbers of tiles that a stage has room for.
CAPACITIES = (16, 32, 64)
# Bits of what is noted of a line at 16 inner positions; from bit 9 on its place among the tiles.
MULTIPLY, OVER, NONE, PLACE = 1, 2, 4, 9


class Stages(NamedTuple):
    """What CTAs meet that take some lines.

    Attributes:
        table: int32 (stages, ints), by group of lines and inner position. Of each line two that
            are four shorts, one for each 16 inner positions: ``MULTIPLY`` if its warpgroup
            multiplies by those, and ``OVER`` if they hang over the edge; the place of its tile
            among the stage's, or ``NONE``. Then inner position / 64, number of tiles, 0, 0; and
            numbers in memory of the tiles, by line, 0 behind the last.
        spans: int32 (groups, 3) of ``cuda_block.records``.
        capacity: tiles that there is room for in each.
    """

    table: Tensor
    spans: Tensor
    capacity: int


def stages(bounds: Tensor, cells: Tensor, groups: int, inner: int) -> Stages:
    """The tiles of one matrix in stages.

    Args:
        bounds: int32 (lines + 1,), of ``cuda_tile.part``.
        cells: int32 (tiles, 2), of ``cuda_tile.part``.
        groups: warpgroups of a CTA, up to 4.
        inner: inner positions of the matrix.
    """
    device, per = bounds.device, FOUR * groups
    line, column = lines_of(bounds), cells[:, 0].long()
    count, deep = -(-(bounds.numel() - 1) // per), max(-(-inner // (4 * SIZE)), 1)
    found, which = torch.unique(line // per * deep + column // 4, return_inverse=True)
    spans = torch.bincount(found // deep, minlength=count)
    tiles = torch.bincount(which, minlength=len(found))
    order = torch.argsort(which, stable=True)
    place = torch.empty_like(which)
    place[order] = torch.arange(len(which), device=device) - (tiles.cumsum(0) - tiles)[which[order]]
    most = int(tiles.max()) if len(found) else 0
    capacity = next(n for n in CAPACITIES if n >= most)

    at, quarter = line % per, column % 4
    notes = torch.full((len(found), groups, FOUR, 4), NONE, dtype=torch.int32, device=device)
    notes[which, at // FOUR, at % FOUR, quarter] = place.int() << PLACE
    there = ((notes & NONE) == 0).any(2, keepdim=True)
    last = (4 * (found % deep)[:, None] + torch.arange(1, 5, device=device)) * SIZE > inner
    notes |= there * (MULTIPLY + OVER * last[:, None, None])
    # Four shorts as two ints.
    notes = notes.view(len(found), 2 * per, 2)
    notes = (notes[..., 0] | notes[..., 1] << 16).int()
    head = torch.stack([found % deep, tiles, tiles * 0, tiles * 0], 1).int()
    items = torch.zeros(len(found), capacity, dtype=torch.int32, device=device)
    items[which, place] = cells[:, 1]
    table = torch.cat([notes, head, items], 1).contiguous()
    return Stages(table, records(running(spans), longest_first(spans)).contiguous(), capacity)
