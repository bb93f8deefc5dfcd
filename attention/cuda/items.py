"""Cells as work items: lines by twos or threes, long ones cut, results to the output or slots."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cells import PACKED, Cells

# Key units of an item that is never cut: a partial result costs about two units.
SHORTEST, SHORTEST_WIDE = 32, 16
# A line is long if it has this many halves of the mean line's units ...
LONG = 5
# ... unless the pattern has fewer lines than this.
FEW = 32
# Steps that one warpgroup takes before the next when all of them work on one line.
TURN = 2
# What items cost, measured on an H200, in hundreds of cycles: for each unit that warpgroups compute
# and again if it is masked, divided among them; for each step; for an item.
COST_UNIT, COST_STEP, COST_ITEM = 10, 7, 17
# Steps of an item of which a window may take another than the first one first.
MOST_TURNED = 32
# Bits of key units in sort keys: neighbours and gathered ones.
KEY_BITS = 26


class Lines(NamedTuple):
    """Units of 64 queries of all distinct patterns; those of neighbours first, by pattern.

    Attributes:
        pattern: int64 (L,), the distinct pattern of each line.
        unit: int64 (L,), its query unit; gathered ones from ``PACKED`` on.
        to_slot: bool (L,), results have to be merged with others.
        left_out: bool (L,) lines without an item, or None.
    """

    pattern: Tensor
    unit: Tensor
    to_slot: Tensor
    left_out: Tensor | None


class Items(NamedTuple):
    """Work items of all distinct patterns, by pattern.

    Attributes:
        items: int32 (I, 8): query unit of each of three warpgroups (−1 = none), first step; steps,
            slot of each warpgroup's result (−1 = the output).
        steps: int32 (S, 4): key unit, mask for each warpgroup (−1 = all kept, −2 = not its).
        costs: int32 (I,), what an item costs, in hundreds of cycles.
        item_counts: items of each pattern.
        slot_counts: slots of each pattern.
        slot_line: int64 (slots,), the line each slot belongs to, by pattern and slot.
        slot_pattern: int64 (slots,).
    """

    items: Tensor
    steps: Tensor
    costs: Tensor
    item_counts: list[int]
    slot_counts: list[int]
    slot_line: Tensor
    slot_pattern: Tensor


def _starts(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


def limits(counts: Tensor, pattern: Tensor, patterns: int, D: int) -> Tensor:
    """int64 (patterns,): units beyond which a line is long, a multiple of 4.

    Depends on the layout and D alone, never on batch or heads.
    """
    total = torch.zeros(patterns, dtype=torch.int64, device=counts.device)
    lines = total.clone()
    total.index_add_(0, pattern, counts)
    lines.index_add_(0, pattern, (counts > 0).long())
    share = torch.minimum(LONG * total // (2 * lines.clamp(min=1)), total // FEW)
    return (share.clamp(min=SHORTEST if D <= 128 else SHORTEST_WIDE) + 3) // 4 * 4


def make_items(
    cells: Cells, lines: Lines, counts: Tensor, patterns: int, D: int, groups: int
) -> Items:
    """Neighbouring lines together, long ones with long ones; what is long is cut.

    Args:
        cells: all cells.
        lines: all lines.
        counts: int64 (L,), cells of each line.
        patterns: number of distinct patterns.
        D: head dimension.
        groups: lines of an item, 2 or 3: one for each warpgroup.
    """
    device = counts.device
    limit = limits(counts, lines.pattern, patterns, D)
    kind = 2 * lines.pattern + (counts > limit[lines.pattern])
    kept = torch.arange(len(counts), device=device)
    if lines.left_out is not None:
        kept = (~lines.left_out).nonzero()[:, 0]
    kept = kept[torch.argsort(kind[kept], stable=True)]
    kind = kind[kept]
    members = torch.bincount(kind, minlength=2 * patterns)
    rank = torch.arange(len(kept), device=device) - _starts(members)[kind]
    sets = (members + groups - 1) // groups
    at = _starts(sets)[kind] + rank // groups
    group = rank % groups
    count = int(sets.sum())
    line = torch.full((count, groups), -1, dtype=torch.int64, device=device)
    line[at, group] = kept
    kind_of = torch.repeat_interleave(
        torch.arange(2 * patterns, device=device), sets, output_size=count
    )
    pattern, long = kind_of // 2, kind_of % 2 > 0
    # A long line without a partner: all warpgroups work on it.
    alone = long & (line[:, 1] < 0)
    line = torch.where(alone[:, None], line[:, :1], line)

    place = torch.full((len(counts),), -1, dtype=torch.int64, device=device)
    place[kept] = groups * at + group
    steps, step_item = _steps(cells, place, alone, groups)
    length = torch.bincount(step_item, minlength=count)
    return _cut(steps, length, line, lines, pattern, long, alone, limit, patterns)


def _steps(cells: Cells, place: Tensor, alone: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """int32 (S, 4) steps by item and key unit, and the item of each."""
    to = place[cells.line]
    item, group = to // groups, to % groups
    key, order = torch.sort((((item << KEY_BITS) + cells.key) << 2) + group)
    mask, item, group = cells.mask[order], key >> (KEY_BITS + 2), key & 3
    unit = (key >> 2) & ((1 << KEY_BITS) - 1)
    fresh = torch.ones_like(key, dtype=torch.bool)
    # A warpgroup joins the step of those before it with the same key unit.
    fresh[1:] = (key[1:] >> 2 != key[:-1] >> 2) | (group[1:] == group[:-1])
    step = fresh.long().cumsum(0) - 1
    total = int(step[-1]) + 1 if len(step) else 0
    first = _starts(torch.bincount(item, minlength=len(alone)))
    turn = (torch.arange(len(item), device=item.device) - first[item]) // TURN % groups
    group = torch.where(alone[item], turn, group)
    steps = torch.full((total, 4), -2, dtype=torch.int32, device=item.device)
    steps[step, 0] = unit.to(torch.int32)
    steps.view(-1)[step * 4 + 1 + group] = mask.to(torch.int32)
    step_item = torch.empty(total, dtype=torch.int64, device=item.device)
    step_item[step] = item
    return steps, step_item


def _cut(
    steps: Tensor,
    length: Tensor,
    line: Tensor,
    lines: Lines,
    pattern: Tensor,
    long: Tensor,
    alone: Tensor,
    limit: Tensor,
    patterns: int,
) -> Items:
    """Even pieces of the long items, and where results go."""
    device = steps.device
    most = torch.where(long, limit[pattern], length.clamp(min=1))
    cuts = ((length + most - 1) // most).clamp(min=1)
    groups = line.shape[1]
    turns = groups * TURN  # whole turns of all warpgroups
    size = ((length + cuts - 1) // cuts + turns - 1) // turns * turns
    size = torch.where(long, size, length.clamp(min=1))
    cuts = ((length + size - 1) // size).clamp(min=1)
    item = torch.repeat_interleave(torch.arange(len(cuts), device=device), cuts)
    begin = (torch.arange(len(item), device=device) - _starts(cuts)[item]) * size[item]
    n = torch.minimum(size[item], length[item] - begin)
    begin = begin + _starts(length)[item]
    running = torch.zeros(len(steps) + 1, groups, dtype=torch.int64, device=device)
    torch.cumsum((steps[:, 1 : 1 + groups] != -2).long(), 0, out=running[1:])
    own = running[begin + n] - running[begin]

    line, pattern = line[item], pattern[item]
    there = line >= 0
    unit = torch.where(there, lines.unit[line], -1)
    slot = there & (lines.to_slot[line] | ((cuts > 1) | alone)[item, None])
    # Nothing to do and nothing to say.
    unit = torch.where(slot & (own == 0), -1, unit)
    slot &= own > 0
    slot_item, slot_group = slot.nonzero(as_tuple=True)
    slot_pattern = pattern[slot_item]
    slots = torch.bincount(slot_pattern, minlength=patterns)
    number = slot.flatten().long().cumsum(0).view(-1, groups) - 1 - _starts(slots)[pattern, None]
    number = torch.where(slot, number, -1)
    items = torch.full((len(n), 8), -1, dtype=torch.int32, device=device)
    items[:, :groups], items[:, 3], items[:, 4] = unit.int(), begin.int(), n.int()
    items[:, 5 : 5 + groups] = number.int()
    counts = torch.stack([torch.bincount(pattern, minlength=patterns), slots]).tolist()
    masked = torch.zeros(len(steps) + 1, dtype=torch.int64, device=device)
    torch.cumsum((steps[:, 1:] >= 0).sum(1), 0, out=masked[1:])
    done = own.sum(1) + masked[begin + n] - masked[begin]
    costs = COST_UNIT * done // groups + COST_STEP * n + COST_ITEM
    whole = (cuts[item] == 1) & ~alone[item] & (n <= MOST_TURNED)
    return Items(
        items, _turned(steps, begin, n, whole, groups), costs.to(torch.int32), counts[0], counts[1],
        line[slot_item, slot_group], slot_pattern,
    )  # fmt: skip


def _turned(steps: Tensor, begin: Tensor, n: Tensor, whole: Tensor, groups: int) -> Tensor:
    """Steps of windows that move along in the order of their key unit modulo their number.

    Items side by side are computed at the same time. In rising order each would be the first to ask
    for keys that the others come to later; so all meet the same keys at the same time, and device
    memory is asked for as much at the end of an item as at its beginning. A window moves along if
    lines of one item do not all begin at the same unit, but within as many as there are lines.

    Args:
        steps: int32 (S, 4), rising within an item, gathered units last.
        begin: int64 (I,), first step of each item.
        n: int64 (I,), steps of each item.
        whole: bool (I,), items that may be turned.
        groups: lines of an item.
    """
    item = torch.repeat_interleave(torch.arange(len(n), device=n.device), n, output_size=len(steps))
    place = torch.arange(len(steps), device=n.device) - begin[item]
    near = steps[:, 0] < PACKED
    units = torch.zeros_like(n).index_add_(0, item, near.long())
    ends = torch.stack([begin, begin + units - 1]).clamp(0, max(len(steps) - 1, 0))
    low, high = steps[:, 0][ends] if len(steps) else torch.zeros_like(ends)
    # Where each line begins; lines without a step do not count.
    none = len(steps)
    own = steps[:, 1:] != -2
    at = torch.full((len(n), 3), none, device=n.device)
    at.scatter_reduce_(
        0, item[:, None].expand(-1, 3), torch.where(own, place[:, None], none), "amin"
    )
    apart = torch.where(at == none, -1, at).amax(1) - at.amin(1)
    moves = (apart > 0) & (apart < groups)
    turned = (whole & moves & (units > 1) & (high - low == units - 1))[item] & near
    to = begin[item] + steps[:, 0] % units[item].clamp(min=1)
    made = steps.clone()
    made[to[turned]] = steps[turned]
    return made
