"""Plans for RowLayout: CSR arrays, and rows grouped by how many entries they keep."""

from __future__ import annotations

import torch
from torch import Tensor

from mixgrain.formats.row import RowLayout

from .block import consecutive
from .plan import PartPlan, Plan, cached, join

# More distinct row lengths than this and lengths are rounded up, so that irregular graphs do not
# fall into thousands of small pieces.
MOST_WIDTHS = 48


def widths(counts: Tensor) -> Tensor:
    """Padded width of each row: its length, rounded up by up to 1/8 where lengths vary much."""
    if torch.unique(counts).numel() <= MOST_WIDTHS:
        return counts
    # Eight steps an octave: keep the four leading bits of the length.
    exponent = torch.floor(torch.log2(counts.clamp(min=1).double())).long()
    step = 2 ** (exponent - 3).clamp(min=0)
    return (counts + step - 1) // step * step


def width_table(offsets: Tensor, rows: int, distinct: int) -> tuple[Tensor, Tensor]:
    """Rows of equal padded width, over all distinct patterns.

    Returns:
        int64 (groups, 4): distinct pattern, width, number of rows, first row when the rows are
        consecutive and none is padded (else −1); and int64, the rows of all groups in turn.
    """
    table: list[list[int]] = []
    members: list[Tensor] = []
    for u in range(distinct):
        counts = offsets[u * rows : (u + 1) * rows + 1].diff()
        padded = widths(counts)
        order = torch.argsort(padded, stable=True)
        sizes = torch.unique_consecutive(padded[order], return_counts=True)
        begin = 0
        for width, size in zip(sizes[0].tolist(), sizes[1].tolist(), strict=True):
            group = order[begin : begin + size]
            begin += size
            if width:
                plain = bool((counts[group] == width).all())
                table.append([u, width, size, consecutive(group) if plain else -1])
                members.append(group)
    return (
        torch.tensor(table, dtype=torch.int64).reshape(-1, 4),
        torch.cat(members) if members else torch.zeros(0, dtype=torch.int64),
    )


def part(layout: RowLayout, shift: int = 0) -> PartPlan:
    """What the CPU needs of a RowLayout whose slots start ``shift`` into the values."""
    rows, cols = layout.shape
    distinct = layout.distinct
    ends = torch.arange(distinct + 1) * rows
    first = layout.row_offsets[ends[:-1]] if rows else torch.zeros(distinct, dtype=torch.int64)
    # Offsets of each pattern counted from its own start, in the dtype of the indices: the bag
    # kernels want both alike, and then neither is converted on a call.
    index = layout.columns.dtype if layout.columns.numel() < 2**31 else torch.int64

    def local(offsets: Tensor, lines: int) -> Tensor:
        pieces = [offsets[u * lines : (u + 1) * lines + 1] for u in range(distinct)]
        return torch.cat([piece - piece[:1] for piece in pieces]).to(index)

    tensors = [
        local(layout.row_offsets, rows),
        layout.columns.to(index),
        local(layout.t_offsets, cols),
        layout.t_rows.to(index),
        layout.t_order.to(index),
        *width_table(layout.row_offsets, rows, distinct),
    ]
    bounds = [*first.tolist(), layout.columns.numel()]
    return PartPlan("row", tensors, bounds, [shift + start for start in layout.entry_slots])


def cpu(layout: RowLayout) -> Plan:
    """The CPU plan of a RowLayout, for every operation."""
    return cached(layout, lambda: join(layout, [part(layout)]))
