"""Finds a position that two parts of a layout hold both, without looking at most positions.

The matrix is cut into square units. A block is one unit, single entries name theirs, a panel names
those its rows and columns run through. Only units that are named twice are looked into.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .entries import unpack_bits
from .runs import ragged_arange

if TYPE_CHECKING:
    from .block import BlockLayout
    from .mixed import MixedLayout
    from .panel import PanelLayout
    from .row import RowLayout

UNITS_PER_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class _Grid:
    """Units of size × size; unit (u, r, c) has the number (u * rows + r) * cols + c."""

    size: int
    rows: int
    cols: int


@dataclass(frozen=True, eq=False)
class _Segments:
    """Runs of a panel's members inside one unit: panel, unit, first member, number of members."""

    panel: Tensor
    unit: Tensor
    first: Tensor
    count: Tensor


def find_overlap(layout: MixedLayout | PanelLayout) -> tuple[str, str] | None:
    """A part at fault and a position it shares with another, or None.

    Args:
        layout: parts that are valid each for itself; panels may overlap each other.
    """
    blocks: BlockLayout | None = getattr(layout, "blocks", None)
    rest: RowLayout | None = getattr(layout, "rest", None)
    panels: PanelLayout | None = layout if layout.kind == "panel" else layout.panels  # type: ignore[assignment]
    if panels is None and (blocks is None or rest is None):
        return None
    size = 64 if blocks is None else blocks.size
    grid = _Grid(size, -(-layout.shape[0] // size), -(-layout.shape[1] // size))
    of_blocks = None if blocks is None else _block_units(blocks, grid)
    of_rest = None if rest is None else _rest_units(rest, grid)
    of_panels = None if panels is None else _panel_units(panels, grid)
    named = [of_blocks] if of_blocks is not None else []
    named += [torch.unique(of_rest)] if of_rest is not None else []
    named += [of_panels[0]] if of_panels is not None else []
    units, counts = torch.unique(torch.cat(named), return_counts=True)
    contested = units[counts > 1]
    for start in range(0, contested.numel(), UNITS_PER_CHUNK):
        chunk = contested[start : start + UNITS_PER_CHUNK]
        held = torch.zeros(chunk.numel(), size * size, dtype=torch.uint8, device=chunk.device)
        if blocks is not None and of_blocks is not None:
            _mark_blocks(blocks, of_blocks, chunk, held)
        if panels is not None and of_panels is not None:
            _mark_panels(panels, of_panels, chunk, held, grid)
            if bool((held > 1).any()):
                return "panels", _position(held, chunk, grid)
        if rest is not None and of_rest is not None:
            _mark_rest(rest, of_rest, chunk, held, grid)
            if bool((held > 1).any()):
                return "rest", _position(held, chunk, grid)
    return None


def _position(held: Tensor, chunk: Tensor, grid: _Grid) -> str:
    where, inside = (held > 1).nonzero()[0].tolist()
    unit = int(chunk[where])
    row = unit // grid.cols % grid.rows * grid.size + inside // grid.size
    col = unit % grid.cols * grid.size + inside % grid.size
    return f"position ({row}, {col}) of pattern {unit // (grid.cols * grid.rows)} is held twice"


def _among(units: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the units that are in a rising chunk, and their places there."""
    place = torch.searchsorted(chunk, units).clamp_(max=chunk.numel() - 1)
    at = (chunk[place] == units).nonzero().flatten()
    return at, place[at]


def _block_units(blocks: BlockLayout, grid: _Grid) -> Tensor:
    rows = torch.arange(blocks.block_offsets.numel() - 1, device=blocks.device)
    row = torch.repeat_interleave(rows, blocks.block_offsets.diff().long())
    return row * grid.cols + blocks.block_columns


def _mark_blocks(blocks: BlockLayout, units: Tensor, chunk: Tensor, held: Tensor) -> None:
    at, place = _among(units, chunk)
    table = unpack_bits(blocks.masks).flatten(1).to(torch.uint8)
    table = torch.cat([table, table.new_ones(1, held.shape[1])])
    held.index_add_(0, place, table[blocks.mask_index[at].long()])


def _rest_units(rest: RowLayout, grid: _Grid) -> Tensor:
    pattern = torch.repeat_interleave(
        torch.arange(rest.distinct, device=rest.device),
        rest.row_offsets[:: rest.shape[0]].diff() if rest.shape[0] else rest.row_offsets[:0],
    )
    unit_row = pattern * grid.rows + rest.rows() // grid.size
    return unit_row * grid.cols + rest.columns // grid.size


def _mark_rest(rest: RowLayout, units: Tensor, chunk: Tensor, held: Tensor, grid: _Grid) -> None:
    at, place = _among(units, chunk)
    inside = rest.rows()[at] % grid.size * grid.size + rest.columns[at].long() % grid.size
    flat = held.view(-1)
    flat.index_add_(0, place * held.shape[1] + inside, flat.new_ones(at.numel()))


def _segments(panels: PanelLayout, axis: str, size: int) -> _Segments:
    count = getattr(panels, f"{axis}_count")
    panel, step = ragged_arange(count)
    members = panels.members(axis, panel, step)
    unit = members // size
    fresh = torch.ones_like(unit, dtype=torch.bool)
    fresh[1:] = (unit[1:] != unit[:-1]) | (panel[1:] != panel[:-1])
    begin = fresh.nonzero().flatten()
    ends = torch.cat([begin[1:], begin.new_tensor([unit.numel()])])
    return _Segments(panel[begin], unit[begin], step[begin], ends - begin)


_PanelUnits = tuple[Tensor, _Segments, _Segments, Tensor, Tensor]


def _panel_units(panels: PanelLayout, grid: _Grid) -> _PanelUnits:
    """Units of all panels, and the row and column segments each of them is made of."""
    rows = _segments(panels, "row", grid.size)
    cols = _segments(panels, "col", grid.size)
    per_panel = torch.bincount(cols.panel, minlength=panels.panels)
    first = torch.cumsum(per_panel, 0) - per_panel
    of_row, step = ragged_arange(per_panel[rows.panel])
    of_col = first[rows.panel[of_row]] + step
    unit_row = panels.panel_entry[rows.panel[of_row]].long() * grid.rows + rows.unit[of_row]
    return unit_row * grid.cols + cols.unit[of_col], rows, cols, of_row, of_col


def _mark_panels(
    panels: PanelLayout, found: _PanelUnits, chunk: Tensor, held: Tensor, grid: _Grid
) -> None:
    units, rows, cols, of_row, of_col = found
    at, place = _among(units, chunk)
    of_row, of_col = of_row[at], of_col[at]
    height, width = rows.count[of_row], cols.count[of_col]
    unit, step = ragged_arange(height * width)
    down = step // width[unit]
    r = rows.first[of_row][unit] + down
    c = cols.first[of_col][unit] + step - down * width[unit]
    panel = rows.panel[of_row][unit]
    offset = panels.mask_offset[panel]
    kept = offset < 0
    if panels.mask_bits.numel():
        byte = torch.where(kept, 0, offset + (r * panels.pitch[panel] + c) // 8)
        kept = kept | ((panels.mask_bits[byte].long() >> (c % 8)) & 1 > 0)
    row = panels.members("row", panel, r) % grid.size
    col = panels.members("col", panel, c) % grid.size
    flat = held.view(-1)
    target = (place[unit] * held.shape[1] + row * grid.size + col)[kept]
    flat.index_add_(0, target, flat.new_ones(target.numel()))
