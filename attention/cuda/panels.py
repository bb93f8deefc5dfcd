"""Panels as cells: which rows and columns are gathered, and the masks of what overhangs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixgrain.formats.panel import PanelLayout
from mixgrain.formats.panel_tools import look_up
from mixgrain.formats.words import interval_words

from .cells import PACKED, UNIT, Cells

# What a gathered line costs besides its cells, in cells: a partial result, and its merge.
LINE = 6
# What a gathered key unit costs, in cells.
COPY = 2
# What a cell costs that has to be masked, over one that has not: an eighth more, twice. Rows of
# gathered panels over all keys are no reason to mask.
MASKED = 4


class Pieces(NamedTuple):
    """One axis of all panels, in units.

    Attributes:
        panel: int64 (n,), rising.
        unit: int64 (n,), the unit of neighbours, or the index of the gathered unit.
        first: int64 (n,), the first member of the panel in a gathered or whole piece.
        bits: int64 (n,), members present; −1 = all 64.
        gathered: bool (n,).
    """

    panel: Tensor
    unit: Tensor
    first: Tensor
    bits: Tensor
    gathered: Tensor


class Gathered(NamedTuple):
    """Cells of panels, and what they gather.

    Attributes:
        cells: lines of neighbours ``u * nqu + unit``, gathered ones behind those of all patterns.
        query_rows: int64 (n, 64), the rows of each gathered line, −1 = none.
        query_pattern: int64 (n,), its distinct pattern, rising.
        key_rows: int64 (m, 64), likewise for key units, whose ids count from 0 in each pattern.
        key_pattern: int64 (m,).
    """

    cells: Cells
    query_rows: Tensor
    query_pattern: Tensor
    key_rows: Tensor
    key_pattern: Tensor


def panel_cells(layout: PanelLayout) -> Gathered:
    """The panels as cells.

    Rows are gathered where they lie scattered over many units (global queries), columns likewise
    (global keys, private panels); a range that starts with a unit is left where it is.
    """
    (nq, nk), masked = layout.shape, layout.mask_offset >= 0
    rows = (layout.row_start, layout.row_count, layout.row_list_offset, layout.row_list)
    cols = (layout.col_start, layout.col_count, layout.col_list_offset, layout.col_list)
    pattern = layout.panel_entry.long()
    row_lists, col_lists = _listed(*rows), _listed(*cols)
    row_units, col_units = -(-rows[1] // UNIT), -(-cols[1] // UNIT)
    touched, cut = _touched(*rows[:2], row_lists, nq)
    across = torch.minimum(col_units, _touched(*cols[:2], col_lists, nk)[0])
    gather = row_units * (across + LINE) < (touched + cut / MASKED) * across
    wide = gather & ~masked & (layout.col_count == nk)
    if bool((wide & (row_units > 0)).any()):
        cut = torch.where(wide, cut, _cut_beside(layout, row_lists, wide))
        gather = row_units * (across + LINE) < (touched + cut / MASKED) * across
    unaligned = (layout.row_start < 0) | (layout.row_start % UNIT != 0)
    gather_rows = torch.where(masked, unaligned, gather)
    down = torch.where(gather_rows, row_units, touched)
    touched, _ = _touched(*cols[:2], col_lists, nk)
    unaligned = (layout.col_start < 0) | (layout.col_start % UNIT != 0)
    gather_cols = torch.where(masked, unaligned, col_units * (down + COPY) < touched * down)

    q = _pieces(*rows[:2], row_lists, gather_rows)
    k = _pieces(*cols[:2], col_lists, gather_cols)
    # Rows behind the last one and behind a gathered unit's last are nobody's: no mask for them.
    ends = ~q.gathered & (q.unit == nq // UNIT)
    behind = -(1 << (nq % UNIT)) if nq % UNIT else 0
    q = q._replace(bits=torch.where(q.gathered, -1, torch.where(ends, q.bits | behind, q.bits)))

    a, b = _cross(q.panel, k.panel, layout.panels)
    panel, device = q.panel[a], layout.device
    nqu, u = -(-nq // UNIT), layout.distinct
    line = torch.where(q.gathered[a], u * nqu + q.unit[a], pattern[panel] * nqu + q.unit[a])
    key_pattern = pattern[k.panel[k.gathered]]
    before = torch.searchsorted(key_pattern, torch.arange(u, device=device))
    key = torch.where(k.gathered[b], PACKED + k.unit[b] - before[pattern[panel]], k.unit[b])
    mask, masks = _masks(layout, masked[panel], panel, q.first[a], k.first[b], q.bits[a], k.bits[b])
    return Gathered(
        Cells(line, key, mask, masks),
        _members(layout, "row", q), pattern[q.panel[q.gathered]],
        _members(layout, "col", k), key_pattern,
    )  # fmt: skip


class _Lists(NamedTuple):
    """Listed members of an axis by unit: panel, unit and bits of each, rising."""

    panel: Tensor
    unit: Tensor
    bits: Tensor


def _listed(start: Tensor, count: Tensor, offset: Tensor, listed: Tensor) -> _Lists:
    if not listed.numel():
        none = torch.zeros(0, dtype=torch.int64, device=start.device)
        return _Lists(none, none, none)
    length = torch.where(start < 0, count, 0)
    panel = torch.repeat_interleave(torch.arange(len(start), device=start.device), length)
    at = torch.arange(len(panel), device=start.device) - (length.cumsum(0) - length)[panel]
    member = listed[offset[panel] + at].long()
    key = panel * PACKED + member // UNIT
    found, which = torch.unique_consecutive(key, return_inverse=True)
    one = torch.ones_like(member)
    # Distinct bits: adding is or-ing.
    bits = torch.zeros_like(found).index_add_(0, which, one << member % UNIT)
    return _Lists(found // PACKED, found % PACKED, bits)


def _touched(start: Tensor, count: Tensor, lists: _Lists, extent: int) -> tuple[Tensor, Tensor]:
    """Units each panel touches where it lies, and how many of them it does not fill."""
    end = start + count
    first, last = start // UNIT, (end - 1) // UNIT
    units = torch.where(count > 0, last - first + 1, 0)
    low = start % UNIT != 0
    high = (end % UNIT != 0) & (end != extent)
    cut = (low.long() + (high & ~(low & (first == last))).long()) * (count > 0)
    if not lists.panel.numel():
        return units, cut
    whole = lists.bits == -1
    if extent % UNIT:
        tail = (1 << extent % UNIT) - 1
        whole |= (lists.unit == extent // UNIT) & (lists.bits == tail)
    listed = torch.bincount(lists.panel, minlength=len(start))
    partial = torch.zeros_like(listed).index_add_(0, lists.panel, (~whole).long())
    return torch.where(start < 0, listed, units), torch.where(start < 0, partial, cut)


def _cut_beside(layout: PanelLayout, row_lists: _Lists, wide: Tensor) -> Tensor:
    """Units of rows that each panel does not fill, but for rows of gathered panels over all keys.

    Those are free in the lines of their neighbours, and cost no mask; see ``fill``.
    """
    nq = layout.shape[0]
    nqu = -(-nq // UNIT)
    p = _pieces(layout.row_start, layout.row_count, row_lists, torch.zeros_like(wide))
    place = layout.panel_entry.long()[p.panel] * nqu + p.unit
    free = torch.zeros(layout.distinct * nqu, dtype=torch.int64, device=place.device)
    # Panels are disjoint: adding is or-ing.
    free.index_add_(0, place, torch.where(wide[p.panel], p.bits, 0))
    if nq % UNIT:
        free[nqu - 1 :: nqu] |= -(1 << nq % UNIT)
    cut = (p.bits | free[place]) != -1
    return torch.zeros_like(layout.row_count.long()).index_add_(0, p.panel, cut.long())


def _pieces(start: Tensor, count: Tensor, lists: _Lists, gather: Tensor) -> Pieces:
    """Every panel's axis in units; see ``Pieces``."""
    end = start + count
    ranged = (start >= 0) & ~gather
    units = torch.where(count > 0, (end - 1) // UNIT - start // UNIT + 1, 0)
    units = torch.where(gather, -(-count // UNIT), torch.where(ranged, units, 0))
    panel = torch.repeat_interleave(torch.arange(len(start), device=start.device), units)
    at = torch.arange(len(panel), device=start.device) - (units.cumsum(0) - units)[panel]
    gathered = gather[panel]
    unit = torch.where(gathered, gathered.long().cumsum(0) - 1, start[panel] // UNIT + at)
    low = torch.where(gathered, 0, start[panel] - unit * UNIT)
    high = torch.where(gathered, count[panel] - at * UNIT, end[panel] - unit * UNIT)
    bits = interval_words(low, high, UNIT)[..., 0]
    listed = ~gather[lists.panel]
    if not lists.panel.numel():
        return Pieces(panel, unit, at * UNIT, bits, gathered)
    mine = [x[listed] for x in lists]
    panel = torch.cat([panel, mine[0]])
    # By panel; the pieces of one panel are all of one kind and stay in order.
    order = torch.argsort(panel, stable=True)
    zero = torch.zeros_like(mine[0])
    joined = (
        torch.cat([unit, mine[1]]), torch.cat([at * UNIT, zero]), torch.cat([bits, mine[2]]),
        torch.cat([gathered, zero.bool()]),
    )  # fmt: skip
    return Pieces(panel[order], *(x[order] for x in joined))


def _cross(a: Tensor, b: Tensor, panels: int) -> tuple[Tensor, Tensor]:
    """Indices of all pairs of pieces of the same panel."""
    several = torch.bincount(b, minlength=panels)
    first = several.cumsum(0) - several
    times = several[a]
    left = torch.repeat_interleave(torch.arange(len(a), device=a.device), times)
    at = torch.arange(len(left), device=a.device) - (times.cumsum(0) - times)[left]
    return left, first[a[left]] + at


def _masks(
    layout: PanelLayout,
    masked: Tensor,
    panel: Tensor,
    row: Tensor,
    col: Tensor,
    row_bits: Tensor,
    col_bits: Tensor,
) -> tuple[Tensor, Tensor]:
    """The mask of each cell, and the masks: distinct ones where no panel brings its own."""
    device = panel.device
    index = torch.full_like(panel, -1)
    cut = (((row_bits != -1) | (col_bits != -1)) & ~masked).nonzero()[:, 0]
    masks = torch.zeros(0, UNIT, 8, dtype=torch.uint8, device=device)
    if cut.numel():
        left, i = torch.unique(row_bits[cut], return_inverse=True)
        right, j = torch.unique(col_bits[cut], return_inverse=True)
        pair, index[cut] = torch.unique(i * len(right) + j, return_inverse=True)
        kept = (left[pair // len(right), None] >> torch.arange(UNIT, device=device)) & 1
        words = torch.where(kept > 0, right[pair % len(right), None], 0)
        masks = words.view(torch.uint8).view(-1, UNIT, 8)
    if layout.mask_bits.numel():
        own = masked.nonzero()[:, 0]
        panel, row, col = panel[own], row[own], col[own]
        height, pitch = layout.row_count[panel], layout.pitch[panel] // 8
        r = row[:, None, None] + torch.arange(UNIT, device=device)[:, None]
        c = col[:, None, None] // 8 + torch.arange(8, device=device)
        inside = (r < height[:, None, None]) & (c < pitch[:, None, None])
        at = layout.mask_offset[panel, None, None] + r * pitch[:, None, None] + c
        bits = torch.where(inside, layout.mask_bits[torch.where(inside, at, 0)], 0)
        index[own] = torch.arange(len(own), device=device) + len(masks)
        masks = torch.cat([masks, bits.to(torch.uint8)])
    return index, masks


def _members(layout: PanelLayout, axis: str, of: Pieces) -> Tensor:
    """int64 (n, 64): the rows or columns of the gathered units, −1 behind the last."""
    panel, first = of.panel[of.gathered, None], of.first[of.gathered, None]
    at = first + torch.arange(UNIT, device=panel.device)
    if axis == "row":
        start, count = layout.row_start, layout.row_count
        offset, listed = layout.row_list_offset, layout.row_list
    else:
        start, count = layout.col_start, layout.col_count
        offset, listed = layout.col_list_offset, layout.col_list
    inside = at < count[panel]
    found = look_up(
        panel.expand_as(at), torch.where(inside, at, 0), start, offset, listed
    )  # fmt: skip
    return torch.where(inside, found, -1)
