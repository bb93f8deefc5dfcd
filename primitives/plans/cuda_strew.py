"""Row parts as the kernel that strews their entries over dense tiles takes them.

A line of tiles is 64 or 128 (``tall``) rows of the result, a step 64 or 128 (``deep``) inner
positions at which some row of a line keeps something. Entries come in bundles of 8, which a thread
takes; 32 bundles are dealt theirs in turn, so that what a warp looks up at once lies side by side.
What is missing at the end of a step is its last entry once more. The steps of a line are cut into
``parts``, of which two teams take every other step in pieces of at most ``piece`` bundles. In
bundles of 2:

    4 × 6, in lines of 2 and steps of 3         slots   (a c) (b b) (d e)
        a . . . . b                             pieces  (0, 1, 0, 3) (1, 1, 1, 3) (2, 1, 1, 3):
        c . . . . .                                     first bundle, number, place along the inner
        . . . d . .                                     side, opens and closes its step
        . . . . e .                             heads   (0, 1, 1, 2) (2, 1, 0, 1): first piece,
                                                        pieces of each team, steps
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cuda_block import running
from .cuda_expand import row_bounds

BUNDLE, DEALT, TEAMS = 8, 32, 2


class Table(NamedTuple):
    """What a row part, or its transpose, keeps.

    Attributes:
        heads: int32 (lines * parts, 4), first piece, pieces of the first team and of the second,
            which follow, steps.
        pieces: int32 (n, 4), first bundle, number of bundles, inner positions / deep; 1 if it opens
            its step + 2 if it closes it.
        spots: int16 (bundles, BUNDLE), byte of an entry in its swizzled tile.
        slots: int32 (bundles, BUNDLE), of its value, counted from the part's first.
        bounds: int32 (rows + 1,), first position of each row.
    """

    heads: Tensor
    pieces: Tensor
    spots: Tensor
    slots: Tensor
    bounds: Tensor


def table(
    items: Tensor,
    indices: Tensor,
    order: Tensor | None,
    rows: int,
    inner: int,
    tall: int,
    deep: int,
    parts: int,
    piece: int,
) -> Table:
    """All entries of one matrix by line, step and slot.

    Args:
        items: int32 (NI, 4), of ``cuda_row.part``, those of columns for the transpose.
        indices: int32 (NNZ,), inner positions, likewise.
        order: slot of each position; None = positions are in the order of slots.
        rows: of the result.
        inner: positions that are summed over.
        tall: rows of a line.
        deep: inner positions of a step.
        parts: that share the steps of a line.
        piece: bundles of a piece, at most.
    """
    bounds = row_bounds(items, rows)
    lines, across = -(-rows // tall), -(-inner // deep)
    row = torch.repeat_interleave(
        torch.arange(rows, device=items.device), bounds.diff().long(), output_size=len(indices)
    )
    slot = torch.arange(len(indices), device=items.device) if order is None else order.long()
    if order is not None:
        by_slot = torch.argsort(slot)
        slot, row, indices = slot[by_slot], row[by_slot], indices[by_slot]
    place, line = indices.long() % deep, row // tall
    key, sorting = torch.sort(line * across + indices.long() // deep, stable=True)
    row = row % tall
    # Panels of 64 inner positions; 16-byte pieces are exchanged within each row of 128 bytes.
    spot = (place // 64 * tall + row) * 128 + ((place % 64 * 2) ^ (row % 8 * 16))
    found, counts = torch.unique_consecutive(key, return_counts=True)
    bundles = (counts + BUNDLE - 1) // BUNDLE
    first, begin = running(bundles)[:-1].long(), counts.cumsum(0) - counts
    # Entry of each place of each bundle.
    step = torch.repeat_interleave(torch.arange(len(found), device=key.device), bundles * BUNDLE)
    number = torch.arange(len(step), device=key.device) - first[step] * BUNDLE
    # Of several bundles at once the first entries come first, then the second ones.
    block, within = number // (BUNDLE * DEALT), number % (BUNDLE * DEALT)
    together = (bundles[step] - block * DEALT).clamp(max=DEALT)
    number = block * (BUNDLE * DEALT) + within % BUNDLE * together + within // BUNDLE
    entry = sorting[begin[step] + torch.minimum(number, counts[step] - 1)]
    heads, pieces = _dealt(found // across, found % across, first, bundles, lines, parts, piece)
    return Table(
        heads,
        pieces,
        spot[entry].to(torch.int16).view(-1, BUNDLE),
        slot[entry].to(torch.int32).view(-1, BUNDLE),
        bounds,
    )


def _dealt(
    line: Tensor,
    place: Tensor,
    first: Tensor,
    bundles: Tensor,
    lines: int,
    parts: int,
    piece: int,
) -> tuple[Tensor, Tensor]:
    """``heads`` and ``pieces`` of steps, given by line, place, first bundle and number of them."""
    of_line = torch.bincount(line, minlength=lines)
    number = torch.arange(len(line), device=line.device) - (of_line.cumsum(0) - of_line)[line]
    part = ((number + 1) * parts - 1) // of_line[line]
    number = number - of_line[line] * part // parts
    team, sorting = torch.sort((line * parts + part) * TEAMS + number % TEAMS, stable=True)
    place, first, bundles = place[sorting], first[sorting], bundles[sorting]
    cuts = (bundles + piece - 1) // piece
    step = torch.repeat_interleave(torch.arange(len(cuts), device=cuts.device), cuts)
    cut = torch.arange(len(step), device=cuts.device) - (cuts.cumsum(0) - cuts)[step]
    begin = cut * piece
    ends = (cut == 0).long() + 2 * (cut == cuts[step] - 1).long()
    length = torch.clamp(bundles[step] - begin, max=piece)
    pieces = torch.stack([first[step] + begin, length, place[step], ends], 1)
    groups = lines * parts * TEAMS
    number = torch.bincount(team[step], minlength=groups)
    steps = torch.bincount(team, minlength=groups).view(-1, TEAMS).sum(1)
    start = (number.cumsum(0) - number).view(-1, TEAMS)[:, 0]
    heads = torch.stack([start, *number.view(-1, TEAMS).unbind(1), steps], 1)
    return heads.to(torch.int32).contiguous(), pieces.to(torch.int32).contiguous()
