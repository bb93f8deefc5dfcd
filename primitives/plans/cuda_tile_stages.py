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


class Stages(NamedTuple):
    """What CTAs meet that take some lines.

    Attributes:
        table: int32 (records, ints), by cluster, CTA of it and inner position; those of a cluster
            meet the same inner positions. Of each line two: in bytes, which of the record's tiles
            it has at each 16 inner positions, 255 = none; and the positions that its warpgroup
            multiplies by, in bits from 0 on, and in bits from 4 on those that hang over the edge.
            Then inner position / 64, number of tiles, 0, 0; and numbers in memory of the tiles, by
            line, 0 behind the last.
        spans: int32 (clusters, 3) of ``cuda_block.records``, in stages: records of one CTA.
        capacity: tiles that there is room for in each.
    """

    table: Tensor
    spans: Tensor
    capacity: int


def stages(bounds: Tensor, cells: Tensor, groups: int, cluster: int, inner: int) -> Stages:
    """The tiles of one matrix in stages.

    Args:
        bounds: int32 (lines + 1,), of ``cuda_tile.part``.
        cells: int32 (tiles, 2), of ``cuda_tile.part``.
        groups: warpgroups of a CTA, up to 4.
        cluster: CTAs, one below the other, that meet the same inner positions.
        inner: inner positions of the matrix.
    """
    device, per = bounds.device, FOUR * groups
    line, column = lines_of(bounds), cells[:, 0].long()
    lines, deep = bounds.numel() - 1, max(-(-inner // (4 * SIZE)), 1)
    found, stage = torch.unique(line // (per * cluster) * deep + column // 4, return_inverse=True)
    spans = torch.bincount(found // deep, minlength=-(-lines // (per * cluster)))
    ends = running(spans)
    # Of a record: its cluster's first, those of the CTAs before, and of its own.
    owner, total = found // deep, cluster * len(found)
    first, count = ends[owner].long(), spans[owner]
    starts = first * (cluster - 1) + torch.arange(len(found), device=device)
    which = starts[stage] + line // per % cluster * count[stage]
    position = torch.empty(total, dtype=torch.int64, device=device)
    for rank in range(cluster):
        position[starts + rank * count] = found % deep

    tiles = torch.bincount(which, minlength=total)
    order = torch.argsort(which, stable=True)
    place = torch.empty_like(which)
    place[order] = torch.arange(len(which), device=device) - (tiles.cumsum(0) - tiles)[which[order]]
    most = int(tiles.max()) if total else 0
    capacity = next(n for n in CAPACITIES if n >= most)

    at, quarter = line % per, column % 4
    slots = torch.full((total, per, 4), 255, dtype=torch.uint8, device=device)
    slots[which, at, quarter] = place.to(torch.uint8)
    used = torch.zeros(2, total, groups, 4, dtype=torch.int32, device=device)
    used[0, which, at // FOUR, quarter] = 1
    used[1, which, at // FOUR, quarter] = ((column + 1) * SIZE > inner).int()
    bits = 1 << torch.arange(8, dtype=torch.int32, device=device).view(2, 1, 1, 4)
    words = (used * bits).sum((0, 3)).int().repeat_interleave(FOUR, 1)
    notes = torch.stack([slots.view(torch.int32)[..., 0], words], -1).flatten(1)
    head = torch.stack([position, tiles, tiles * 0, tiles * 0], 1).int()
    items = torch.zeros(total, capacity, dtype=torch.int32, device=device)
    items[which, place] = cells[:, 1]
    table = torch.cat([notes, head, items], 1).contiguous()
    return Stages(table, records(ends, longest_first(spans)).contiguous(), capacity)
