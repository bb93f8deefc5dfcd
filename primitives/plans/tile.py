"""Plans for TileLayout: tiles are blocks of 16 whose slots stand in fragment order."""

from __future__ import annotations

import torch

from mixgrain.formats.tile import SIZE, TileLayout

from .block import bucket_table
from .plan import PartPlan, Plan, cached, join


def part(layout: TileLayout) -> PartPlan:
    """What the CPU needs of a TileLayout: the tensors of a block part of the same tiles."""
    rows, cols = (-(-n // SIZE) for n in layout.shape)
    offsets, t_offsets = layout.tile_offsets.long(), layout.t_offsets.long()
    columns, tile_rows = layout.tile_columns.long(), layout.tile_rows().long()
    # Tiles overhang the shape below, to the right, or both: three masks.
    inside = torch.arange(SIZE)
    below = inside >= layout.shape[0] - SIZE * (rows - 1)
    right = inside >= layout.shape[1] - SIZE * (cols - 1)
    kind = (tile_rows == rows - 1).long() * bool(below.any())
    kind += (columns == cols - 1).long() * (2 * bool(right.any()))
    height, width = below[:, None].expand(SIZE, SIZE), right.expand(SIZE, SIZE)
    none = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    tensors = [
        offsets,
        columns,
        kind - 1,
        torch.stack([height, width, height | width, none]).int() - 1,
        *bucket_table(offsets, rows, 1),
        t_offsets,
        layout.t_rows.long(),
        layout.t_order.long(),
        *bucket_table(t_offsets, cols, 1),
    ]
    return PartPlan("tile", tensors, [SIZE], list(layout.entry_slots))


def cpu(layout: TileLayout) -> Plan:
    """The CPU plan of a TileLayout, for every operation."""
    return cached(layout, lambda: join(layout, [part(layout)]))
