"""Masked units that may as well be whole: rows that nobody reads, and columns brought back.

A masked unit costs the kernel clearly more than a whole one. Scattered global tokens cut a row and
a column out of nearly every unit of a window, and two things undo that; the layout stays as it is.

Rows. The merge writes after the kernel of units, so that rows of gathered lines may hold anything
in their neighbours' lines: they are *free*, as long as no cell there keeps something of them.
So are those behind the last query. A cell whose other rows keep everything becomes whole.

Columns. If all that a cell lacks is kept, in all rows that are not free, by gathered key units of
the same line, the cell takes it back. A gathered cell that has nothing left is dropped.

Whole cells lie inside the matrix, as masks keep nothing behind its edges; and each of their columns
is kept by a row that is not free, so that nobody's values are read but by free rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cells import PACKED, UNIT, Cells
from .items import Lines
from .panels import Gathered


def bits(n: int, device: torch.device) -> Tensor:
    """int64 (n,): the first bits of a word."""
    one: Tensor = torch.ones((), dtype=torch.int64, device=device) << torch.arange(n, device=device)
    return one


def flag(
    lines: Lines, cells: Cells, counts: Tensor, gathered: Gathered | None, nq: int, nqu: int
) -> Tensor:
    """Lines of neighbours that keep something of a gathered row go to slots.

    Args:
        lines: all lines; ``to_slot`` is changed.
        cells: all cells.
        counts: int64 (L,), cells of each line.
        gathered: rows that gathered lines hold.
        nq: number of queries.
        nqu: units of them.

    Returns:
        int64 (L,), a word for each line: the rows of neighbours that are free.
    """
    device = counts.device
    free = torch.zeros_like(counts)
    neighbours = len(counts)
    if gathered is not None and gathered.query_rows.numel():
        neighbours -= len(gathered.query_pattern)
        row = gathered.query_rows
        line = gathered.query_pattern[:, None] * nqu + row.clamp(min=0) // UNIT
        # A line without cells has no slot, so that its rows are not merged.
        merged = (counts[neighbours:] > 0)[:, None].expand_as(row)[row >= 0]
        line, row = line[row >= 0], row[row >= 0] % UNIT
        touched = torch.zeros_like(lines.to_slot)
        touched[line] = True
        mine = touched[cells.line].nonzero()[:, 0]
        used = torch.cat([(cells.masks != 0).any(-1), cells.masks.new_ones(1, UNIT).bool()])
        number = touched.long().cumsum(0) - 1
        held = torch.zeros(len(line) + 1, UNIT, dtype=torch.int32, device=device)
        held.index_add_(0, number[cells.line[mine]], used[cells.mask[mine]].to(torch.int32))
        both = held[number[line], row] > 0
        lines.to_slot[line[both]] = True
        # Several gathered lines may list one row.
        own = torch.unique((line * UNIT + row)[merged & ~both])
        free.index_add_(0, own // UNIT, bits(UNIT, device)[own % UNIT])
    if nq % UNIT:
        free[nqu - 1 : neighbours : nqu] |= -(1 << nq % UNIT)
    return free


def filled(
    cells: Cells, lines: Lines, free: Tensor, key_rows: Tensor, neighbours: int, nku: int
) -> Cells:
    """The cells with those whole that may be.

    Args:
        cells: all cells.
        lines: all lines.
        free: int64 (L,), see ``flag``.
        key_rows: int32 (U, 64 · n), keys to gather for each pattern, −1 = none.
        neighbours: lines that are no gathered ones, which come first.
        nku: key units.
    """
    own = cells.line < neighbours
    at_unit = lines.pattern[cells.line] * nku + cells.key.clamp(max=nku)
    lost = free[cells.line]
    near = own & (cells.mask >= 0) & (cells.key < PACKED)
    open_, shared = near & (lost != 0), None
    if key_rows.numel():
        shared = _listed(key_rows, nku)
        open_ = near & ((lost != 0) | (shared[torch.where(near, at_unit, 0)] != 0))
    open_ = open_.nonzero()[:, 0]
    packed = (own & (cells.key >= PACKED)).nonzero()[:, 0]
    if not (len(open_) or len(packed)):
        return cells
    words = _Words(cells, torch.cat([open_, packed]), ~lost)
    kept, even = words.of(open_)
    whole = even & (kept == -1)
    less = torch.zeros_like(packed)
    if shared is not None:
        there, alike = words.of(packed)
        wanted = even & ~whole & (~kept & ~shared[at_unit[open_]] == 0)
        if bool(wanted.any()):
            some = wanted.nonzero()[:, 0]
            back, less = _moved(
                cells, lines, key_rows, nku, (open_[some], ~kept[some]),
                (packed[alike], there[alike]),
            )  # fmt: skip
            whole[some[back]] = True
            less = torch.zeros_like(packed).masked_scatter_(alike, less)
        # Free rows keep what the others do, so that lines share masks.
        changed = alike & ((lost[packed] != 0) | (less != 0))
        packed, there = packed[changed], (there & ~less)[changed]
    else:
        there = packed = packed[:0]
    mask = cells.mask.clone()
    mask[open_[whole]] = -1
    cut = (there != -1) & (there != 0)
    fresh, which = torch.unique(there[cut], return_inverse=True)
    mask[packed] = -1
    mask[packed[cut]] = len(cells.masks) + which
    masks = fresh[:, None].repeat(1, UNIT).view(torch.uint8).view(-1, UNIT, 8)
    masks = torch.cat([cells.masks, masks])
    left = torch.ones_like(own)
    left[packed[there == 0]] = False
    line, key, mask = cells.line[left], cells.key[left], mask[left]
    used = torch.zeros(len(masks) + 1, dtype=torch.bool, device=mask.device)
    used[mask] = True
    used = used[:-1]
    number = torch.cat([used.long().cumsum(0) - 1, mask.new_full((1,), -1)])
    return Cells(line, key, number[mask], masks[used])


def _listed(key_rows: Tensor, nku: int) -> Tensor:
    """int64 (U · nku,): the keys of each unit that are gathered."""
    found = torch.zeros(len(key_rows), nku * UNIT, dtype=torch.bool, device=key_rows.device)
    of, at = (key_rows >= 0).nonzero(as_tuple=True)
    found[of, key_rows[of, at].long()] = True
    return (found.view(-1, UNIT) * bits(UNIT, found.device)).sum(1)


class _Words:
    """What all rows of a cell keep that are not free, if they keep the same.

    A mask is alike in all rows that keep something, or it is not: that is looked up once for each
    mask, and only the rows that keep nothing are compared with the free ones of each line.
    """

    def __init__(self, cells: Cells, some: Tensor, needed: Tensor) -> None:
        device = needed.device
        self._mask, self._needed = cells.mask, needed
        used = torch.zeros(len(cells.masks) + 1, dtype=torch.bool, device=device)
        used[cells.mask[some]] = True
        which = used[:-1].nonzero()[:, 0]
        words = cells.masks[which].contiguous().view(torch.int64)[..., 0]
        joined = words
        while joined.shape[1] > 1:
            half = joined.shape[1] // 2
            joined = joined[:, :half] | joined[:, half:]
        keeps = words != 0
        # The last entry is the whole unit's, which index −1 finds.
        self._kept = torch.full((len(used),), -1, dtype=torch.int64, device=device)
        self._rows, self._alike = self._kept.clone(), torch.ones_like(used)
        self._kept[which] = joined[:, 0]
        self._rows[which] = (keeps * bits(UNIT, device)).sum(1)
        self._alike[which] = ((words == joined) | ~keeps).all(1)

    def of(self, some: Tensor) -> tuple[Tensor, Tensor]:
        """The word of some cells, and whether it is that of all needed rows, at least one."""
        mask, needed = self._mask[some], self._needed[some]
        alike = self._alike[mask] & (needed & ~self._rows[mask] == 0) & (needed != 0)
        return self._kept[mask], alike


def _moved(
    cells: Cells,
    lines: Lines,
    key_rows: Tensor,
    nku: int,
    wanting: tuple[Tensor, Tensor],
    giving: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Which cells get all that they want, and what gathered cells of the same line lose by it.

    Args:
        cells: all cells.
        lines: all lines.
        key_rows: int32 (U, 64 · n).
        nku: key units.
        wanting: some cells, and the words of the columns they lack.
        giving: some gathered cells, and the words that all their rows keep.

    Returns:
        bool, one for each cell that wants; int64, a word for each that gives.
    """
    (takers, lack), (givers, kept) = wanting, giving
    device = takers.device
    table = key_rows.view(len(key_rows), -1, UNIT)
    line, unit = cells.line[takers], cells.key[takers]
    # A line wants keys of a few units next to each other, a gathered unit holds some of them.
    first = torch.full((len(lines.unit),), nku, dtype=torch.int64, device=device)
    last = torch.full_like(first, -1)
    first.scatter_reduce_(0, line, unit, "amin")
    last.scatter_reduce_(0, line, unit, "amax")
    low = torch.where(table < 0, nku * UNIT, table).amin(2) // UNIT
    high = table.amax(2) // UNIT
    to, at = cells.line[givers], cells.key[givers] - PACKED
    of = lines.pattern[to]
    near = ((low[of, at] <= last[to]) & (high[of, at] >= first[to])).nonzero()[:, 0]
    keys = table[of[near], at[near]].long()
    one = bits(UNIT, device)
    place = to[near, None] * nku + keys // UNIT
    places, which = torch.unique(line * nku + unit, return_inverse=True)
    found = torch.searchsorted(places, place).clamp(max=len(places) - 1)
    given = (places[found] == place) & (keys >= 0) & (kept[near, None] & one != 0)
    # A line keeps a key once: adding is or-ing.
    column = torch.where(given, one[keys % UNIT], 0)
    offered = torch.zeros_like(places).index_add_(0, found.flatten(), column.flatten())
    gets = lack & ~offered[which] == 0
    taken = torch.zeros_like(places)
    taken[which[gets]] = lack[gets]
    loses = torch.zeros_like(kept)
    loses[near] = torch.where(taken[found] & column != 0, one, 0).sum(1)
    return gets, loses
