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

from .cells import PACKED, UNIT, Cells, columns_of
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
        listed = (gathered.query_pattern[:, None] * nqu + row // UNIT) * UNIT + row % UNIT
        # Several gathered lines may list one row; one without cells has no slot, and merges none.
        listed, which = torch.unique(listed[row >= 0], return_inverse=True)
        merged = torch.zeros_like(listed, dtype=torch.bool)
        merged[which[(counts[neighbours:] > 0)[:, None].expand_as(row)[row >= 0]]] = True
        line, row = listed // UNIT, listed % UNIT
        # Each cell beside each listed row of its line.
        several = torch.bincount(line, minlength=len(counts))
        mine = (several[cells.line] > 0).nonzero()[:, 0]
        times = several[cells.line[mine]]
        cell = torch.repeat_interleave(mine, times)
        at = torch.arange(len(cell), device=device)
        at += torch.repeat_interleave(
            (several.cumsum(0) - several)[cells.line[mine]] - (times.cumsum(0) - times), times
        )
        used = torch.cat([(cells.masks != 0).any(-1), cells.masks.new_ones(1, UNIT).bool()])
        held = torch.zeros_like(merged)
        held[at[used[cells.mask[cell], row[at]]]] = True
        lines.to_slot[line[held]] = True
        own = merged & ~held
        free.index_add_(0, line[own], bits(UNIT, device)[row[own]])
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
    first = lines.pattern * nku
    open_ = (cells.mask >= 0).nonzero()[:, 0]
    line, key = cells.line[open_], cells.key[open_]
    # Cells that may change: a free row, or a column that is gathered.
    near = (line < neighbours) & (key < PACKED)
    shared, at = None, torch.where(near, first[line] + key, 0)
    wanted = free[line] != 0
    if key_rows.numel():
        shared = _listed(key_rows, nku)
        wanted |= shared[at] != 0
    wanted &= near
    open_, line, at = open_[wanted], line[wanted], at[wanted]
    kept, even = _words(cells, open_, ~free)
    whole = even & (kept == -1)
    mask, fresh, dropped = cells.mask.clone(), cells.masks[:0], open_[:0]
    if shared is not None:
        some = (even & ~whole & (~kept & ~shared[at] == 0)).nonzero()[:, 0]
        packed = (cells.key >= PACKED).nonzero()[:, 0]
        reach = _reach(line[some], cells.key[open_[some]], len(free), nku)
        asked = _asked(cells, lines, key_rows, reach, packed)
        of = cells.line[packed]
        busy = (asked | (free[of] != 0)) & (of < neighbours)
        packed, asked = packed[busy], asked[busy]
        there, alike = _words(cells, packed, ~free)
        packed, there, asked = packed[alike], there[alike], asked[alike]
        less = torch.zeros_like(there)
        if len(some):
            wants, gives = (open_[some], ~kept[some]), (packed[asked], there[asked])
            back, less[asked] = _moved(cells, lines, key_rows, reach, wants, gives)
            whole[some[back]] = True
        changed = (free[cells.line[packed]] != 0) | (less != 0)
        packed, there = packed[changed], (there & ~less)[changed]
        # Free rows keep what the others do, so that lines share masks.
        mask[packed] = -1
        cut = ((there != -1) & (there != 0)).nonzero()[:, 0]
        words, which = torch.unique(there[cut], return_inverse=True)
        mask[packed[cut]] = len(cells.masks) + which
        fresh = words[:, None].repeat(1, UNIT).view(torch.uint8).view(-1, UNIT, 8)
        dropped = packed[there == 0]
    mask[open_[whole]] = -1
    return _compact(cells, mask, torch.cat([cells.masks, fresh]), dropped)


def _compact(cells: Cells, mask: Tensor, masks: Tensor, dropped: Tensor) -> Cells:
    """Cells under other masks, some of them dropped; masks without those that nothing uses."""
    line, key = cells.line, cells.key
    if len(dropped):
        left = torch.ones_like(mask, dtype=torch.bool)
        left[dropped] = False
        line, key, mask = line[left], key[left], mask[left]
    used = torch.zeros(len(masks), dtype=torch.bool, device=mask.device)
    open_ = (mask >= 0).nonzero()[:, 0]
    number = mask[open_]
    used[number] = True
    mask[open_] = (used.long().cumsum(0) - 1)[number]
    return Cells(line, key, mask, masks[used])


def _listed(key_rows: Tensor, nku: int) -> Tensor:
    """int64 (U · nku,): the keys of each unit that are gathered."""
    found = torch.zeros(len(key_rows), nku * UNIT, dtype=torch.bool, device=key_rows.device)
    of, at = (key_rows >= 0).nonzero(as_tuple=True)
    found[of, key_rows[of, at].long()] = True
    return (found.view(-1, UNIT) * bits(UNIT, found.device)).sum(1)


def _words(cells: Cells, some: Tensor, needed: Tensor) -> tuple[Tensor, Tensor]:
    """The word of some cells, and whether it is that of all needed rows, at least one.

    A mask is alike in all rows that keep something, or it is not: that is looked up once for each
    mask, and only the rows that keep nothing are compared with the free ones of each line.

    Args:
        cells: all cells.
        some: numbers of those that are asked about.
        needed: int64 (L,), the rows of each line that are not free.
    """
    device = some.device
    mask, needed = cells.mask[some], needed[cells.line[some]]
    used = torch.zeros(len(cells.masks) + 1, dtype=torch.bool, device=device)
    used[mask] = True
    which = used[:-1].nonzero()[:, 0]
    words = cells.masks[which].contiguous().view(torch.int64)[..., 0]
    joined = columns_of(words)[:, None]
    keeps = words != 0
    # The last entry is the whole unit's, which index −1 finds.
    kept = torch.full((len(used),), -1, dtype=torch.int64, device=device)
    rows, alike = kept.clone(), torch.ones_like(used)
    kept[which] = joined[:, 0]
    rows[which] = (keeps * bits(UNIT, device)).sum(1)
    alike[which] = ((words == joined) | ~keeps).all(1)
    return kept[mask], alike[mask] & (needed & ~rows[mask] == 0) & (needed != 0)


def _reach(line: Tensor, unit: Tensor, lines: int, nku: int) -> tuple[Tensor, Tensor]:
    """int32 (L,) each: the first and the last of some units of each line; none = nku, −1."""
    first = torch.full((lines,), nku, dtype=torch.int32, device=line.device)
    last = torch.full_like(first, -1)
    unit = unit.to(torch.int32)
    return (
        first.scatter_reduce_(0, line, unit, "amin"), last.scatter_reduce_(0, line, unit, "amax")
    )  # fmt: skip


def _asked(
    cells: Cells, lines: Lines, key_rows: Tensor, reach: tuple[Tensor, Tensor], packed: Tensor
) -> Tensor:
    """Which gathered cells may hold what cells of their lines want.

    A line wants keys of a few units next to each other, and a gathered unit holds keys that rise:
    with many gathered units, most of them lie elsewhere.
    """
    table = key_rows.view(len(key_rows), -1, UNIT)
    high = table.amax(2)
    low = torch.where(table < 0, high[..., None], table).amin(2)
    of = cells.line[packed]
    at = lines.pattern[of] * table.shape[1] + cells.key[packed] - PACKED
    first, last = reach
    return ((low // UNIT).flatten()[at] <= last[of]) & ((high // UNIT).flatten()[at] >= first[of])


def _moved(
    cells: Cells,
    lines: Lines,
    key_rows: Tensor,
    reach: tuple[Tensor, Tensor],
    wanting: tuple[Tensor, Tensor],
    giving: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Which cells get all that they want, and what gathered cells of the same line lose by it.

    Args:
        cells: all cells.
        lines: all lines.
        key_rows: int32 (U, 64 · n).
        reach: the units of each line that want something lie between these.
        wanting: some cells, and the words of the columns they lack.
        giving: some gathered cells, and the words that all their rows keep.

    Returns:
        bool, one for each cell that wants; int64, a word for each that gives.
    """
    (takers, lack), (givers, kept) = wanting, giving
    table = key_rows.view(len(key_rows), -1, UNIT)
    to = cells.line[givers]
    keys = table[lines.pattern[to], cells.key[givers] - PACKED]
    first, last = (end[to, None] for end in reach)
    one = bits(UNIT, keys.device)
    # Units between the ends of a line's reach, which no key of −1 is.
    inside = (keys >= first * UNIT) & (keys < (last + 1) * UNIT)
    giver, at = inside.nonzero(as_tuple=True)
    key = keys[giver, at].long()
    # All keys of one line are far below this many units.
    places = cells.line[takers] * PACKED + cells.key[takers]
    places, which = torch.unique(places, return_inverse=True)
    place = to[giver] * PACKED + key // UNIT
    found = torch.searchsorted(places, place).clamp(max=len(places) - 1)
    given = (places[found] == place) & (kept[giver] & one[at] != 0)
    # A line keeps a key once: adding is or-ing.
    column = torch.where(given, one[key % UNIT], 0)
    offered = torch.zeros_like(places).index_add_(0, found, column)
    gets = lack & ~offered[which] == 0
    taken = torch.zeros_like(places)
    taken[which[gets]] = lack[gets]
    gone = torch.where(taken[found] & column != 0, one[at], 0)
    return gets, torch.zeros_like(kept).index_add_(0, giver, gone)
