"""Plans of the operations that look along rows, on CUDA: softmax, its backward, sums and copies.

They need less of a layout than products do, and of panels something else: which pieces make up a
row. So they have plans of their own.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mixgrain.formats.block import BlockLayout
from mixgrain.formats.entries import over_entries
from mixgrain.formats.layout import Layout
from mixgrain.formats.panel import PanelLayout
from mixgrain.formats.row import RowLayout

from . import cuda_block, cuda_panel
from .cuda_row import expand_offsets, gap
from .plan import PartPlan, Plan, cached, join

# Rows of at most this many blocks, or entries, are a warp's; longer ones a team's of warps.
SHORT_BLOCKS, SHORT_ENTRIES = 32, 512
# Slots of one item of a panel: wide enough to stream, short enough to balance.
ITEM = 2048


def row_classes(counts: Tensor, short: int) -> list[int]:
    """How long the rows are.

    Args:
        counts: int (R,), length of each row.
        short: the longest row that one warp takes.

    Returns:
        The number of rows longer than ``short``, and the length of the longest of the others.
    """
    long = counts > short
    rest = torch.where(long, 0, counts)
    return [int(long.sum()), int(rest.max()) if rest.numel() else 0]


def _block(layout: BlockLayout, shift: int) -> PartPlan:
    """Tensors items, row_ptr, row_order, masks of ``cuda_block``; scalars size and row classes."""
    items, row_ptr, row_order = cuda_block.lines_of(layout)
    scalars = [layout.size, *row_classes(row_ptr.diff(), SHORT_BLOCKS)]
    tensors = [items, row_ptr, row_order, layout.masks.contiguous()]
    return PartPlan("cblock", tensors, scalars, [shift + start for start in layout.entry_slots])


def _row(layout: RowLayout, shift: int, end: int) -> PartPlan:
    """Tensors row_offsets, columns, row_order; scalars row classes, slots to clear behind."""
    slots = layout.entry_slots
    offsets = expand_offsets(layout.row_offsets, layout.shape[0], layout.entry, slots)
    counts = offsets.diff()
    columns = over_entries(layout.columns, layout.entry, slots)
    tensors = [offsets, columns, cuda_block.longest_first(counts)]
    starts = [shift + start for start in slots]
    scalars = [*row_classes(counts, SHORT_ENTRIES), gap(layout, shift, end)]
    return PartPlan("crow", tensors, scalars, starts)


def panel_items(table: Tensor) -> Tensor:
    """Panels cut into rectangles of about ITEM slots.

    Args:
        table: int64 (P, 9) of ``cuda_panel``.

    Returns:
        int64 (NI, 8): slot of the first element; byte of its mask (−1 = all kept); pitch; rows +
        columns << 32; first place of its row statistics; first row and first column, each the
        number itself (rows counted within the entry) or −1 − its place in the list; entry + slots
        to clear behind its last row << 32.
    """
    rows, cols = table[:, 2], table[:, 5]
    pitch = (cols + 7) // 8 * 8
    wide, width = -(-cols // ITEM), pitch.clamp(min=1, max=ITEM)
    height = (ITEM // width).clamp(min=1)
    tall = torch.where(cols > 0, -(-rows // height), 0)
    which = torch.repeat_interleave(torch.arange(len(table), device=table.device), tall * wide)
    first = (tall * wide).cumsum(0) - tall * wide
    at = torch.arange(len(which), device=table.device) - first[which]
    r = at // wide[which] * height[which]
    c = at % wide[which] * ITEM
    mine = table[which]
    n_rows = torch.minimum(height[which], mine[:, 2] - r)
    n_cols = (mine[:, 5] - c).clamp(max=ITEM)
    offset = r * pitch[which] + c
    mask = torch.where(mine[:, 7] >= 0, mine[:, 7] + offset // 8, -1)
    last = (r + n_rows == mine[:, 2]) & (c + n_cols == mine[:, 5])
    used = mine[:, 2] * pitch[which]
    gap = torch.where(last, -used % 128, 0)
    return torch.stack(
        [
            mine[:, 8] + offset,
            mask,
            pitch[which],
            n_rows + (n_cols << 32),
            n_rows.cumsum(0) - n_rows,
            torch.where(mine[:, 1] >= 0, mine[:, 1] + r, -1 - mine[:, 3] - r),
            torch.where(mine[:, 4] >= 0, mine[:, 4] + c, -1 - mine[:, 6] - c),
            mine[:, 0] + (gap << 32),
        ],
        dim=1,
    ).contiguous()


def panel_places(
    items: Tensor, row_list: Tensor, lines: int, entries: int
) -> tuple[Tensor, Tensor]:
    """Which statistics belong to each matrix row.

    Args:
        items: from ``panel_items``.
        row_list: int32, of the layout.
        lines: rows of one entry.
        entries: their number.

    Returns:
        int32 (entries * lines + 1,) into int32 (places,), the places of each row in rising order.
    """
    counts = items[:, 3] & 0xFFFFFFFF
    which = torch.repeat_interleave(torch.arange(len(items), device=items.device), counts)
    at = torch.arange(len(which), device=items.device) - items[which, 4]
    start = items[which, 5]
    row = start + at
    if row_list.numel():
        listed = row_list[torch.where(start >= 0, 0, -1 - start + at)].long()
        row = torch.where(start >= 0, row, listed)
    row = row + (items[which, 7] & 0xFFFFFFFF) * lines
    order = torch.argsort(row, stable=True)
    bounds = cuda_block.running(torch.bincount(row, minlength=entries * lines))
    return bounds, order.to(torch.int32)


def _panel(layout: PanelLayout, shift: int) -> PartPlan:
    """Tensors items, row_list, col_list, mask_bits, piece_ptr, piece_list."""
    made = cuda_panel.part(layout, shift)
    table, row_list, col_list, mask_bits = made.tensors[:4]
    items = panel_items(table)
    places = panel_places(items, row_list, layout.shape[0], layout.entries)
    tensors = [items, row_list, col_list, mask_bits, *places]
    return PartPlan("cpanel", tensors, [], made.starts)


def _part(layout: Layout, shift: int, end: int) -> PartPlan:
    if isinstance(layout, BlockLayout):
        return _block(layout, shift)
    if isinstance(layout, PanelLayout):
        return _panel(layout, shift)
    assert isinstance(layout, RowLayout)
    return _row(layout, shift, end)


def cuda(layout: Layout) -> Plan:
    """The CUDA plan of a block, row, panel or mixed layout, for all operations along rows."""

    def make() -> Plan:
        spans = zip(layout.parts, pairwise(layout.part_offsets), strict=True)
        return join(layout, [_part(part, *span) for part, span in spans])

    # Beside the plan of the products, which is another plan of the same layout.
    return cached(layout, make, "rowwise")
