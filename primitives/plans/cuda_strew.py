"""Row parts as the kernel that strews their entries over dense tiles takes them.

A line of tiles is 64 or 128 (``tall``) rows of the result, a step 64 or 128 (``deep``) inner
positions at which some row of a line keeps something. Entries come in bundles of 8, which a thread
takes; 32 bundles are dealt theirs in turn, so that what a warp looks up at once lies side by side.
The steps of a line are cut into ``parts``, of which ``teams`` take steps in turn, in pieces of at
most ``piece`` bundles. Slots count in 16 bits from the first of a run, which is a step or what is
left of one too far on; what is missing at the end of a run is its last entry once more. In bundles
of 2, with two teams:

    4 × 6, in lines of 2 and steps of 3         slots   (0 2) (0 0) (0 1), of values a b c d e
        a . . . . b                             pieces  (0, 1, 3, 0) (1, 1, 7, 1) (2, 1, 7, 3):
        c . . . . .                                     first bundle, number, 4 · place along the
        . . . d . .                                     inner side + 1: opens + 2: closes its step,
        . . . . e .                                     slot from which its slots count
                                                heads   (0, 1, 2, 0) (1, 1, 2, 0); (2, 1, 1, 0)
                                                        (3, 0, 1, 0): a team's first piece and
                                                        number of them, steps of its part; then its
                                                        first two pieces
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cuda_block import running
from .cuda_expand import row_bounds

BUNDLE, DEALT = 8, 32
# Slots that 16 bits count.
FAR = 1 << 16


class Strewn(NamedTuple):
    """What a row part, or its transpose, keeps, by line, step and slot.

    Attributes:
        spots: int16 (bundles, BUNDLE), byte of an entry in its swizzled tile.
        slots: int16 (bundles, BUNDLE), of its value, 0 … 65535 after that of its run.
        bounds: int32 (rows + 1,), first position of each row.
        lines: number of them, with those that keep nothing.
        line: int64, of each step that keeps something, ascending; its
        place: along the inner side.
        step: int64, of each run; its
        first: bundle, its number of
        bundles: and its first
        slot: counted from the part's first.
    """

    spots: Tensor
    slots: Tensor
    bounds: Tensor
    lines: int
    line: Tensor
    place: Tensor
    step: Tensor
    first: Tensor
    bundles: Tensor
    slot: Tensor


class Dealt(NamedTuple):
    """Who strews what of it.

    Attributes:
        heads: int32 (lines * parts, teams, 3, 4), a team's first piece and number of them, steps of
            its part; then its first two pieces.
        pieces: int32 (n, 4), first bundle; number of bundles; 4 * (inner positions / deep) + 1 if
            it opens its step + 2 if it closes it; slot from which its slots count.
    """

    heads: Tensor
    pieces: Tensor


def strewn(
    items: Tensor,
    indices: Tensor,
    order: Tensor | None,
    rows: int,
    inner: int,
    tall: int,
    deep: int,
) -> Strewn:
    """All entries of one matrix.

    Args:
        items: int32 (NI, 4), of ``cuda_row.part``, those of columns for the transpose.
        indices: int32 (NNZ,), inner positions, likewise.
        order: slot of each position; None = positions are in the order of slots.
        rows: of the result.
        inner: positions that are summed over.
        tall: rows of a line.
        deep: inner positions of a step.
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
    row, slot = row % tall, slot[sorting]
    # Panels of 64 inner positions; 16-byte pieces are exchanged within each row of 128 bytes.
    spot = ((place // 64 * tall + row) * 128 + ((place % 64 * 2) ^ (row % 8 * 16)))[sorting]
    # Slots too far from the first of their step to count in 16 bits make runs of their own.
    found, of_step, counts = torch.unique_consecutive(key, True, True)
    far = (slot - slot[(counts.cumsum(0) - counts)[of_step]]) // FAR
    runs, counts = torch.unique_consecutive(key * (len(slot) // FAR + 1) + far, return_counts=True)
    step = of_step[(begin := counts.cumsum(0) - counts)]
    bundles = (counts + BUNDLE - 1) // BUNDLE
    first = running(bundles)[:-1].long()
    # Entry of each place of each bundle.
    run = torch.repeat_interleave(torch.arange(len(runs), device=key.device), bundles * BUNDLE)
    number = torch.arange(len(run), device=key.device) - first[run] * BUNDLE
    # Of several bundles at once the first entries come first, then the second ones.
    block, within = number // (BUNDLE * DEALT), number % (BUNDLE * DEALT)
    together = (bundles[run] - block * DEALT).clamp(max=DEALT)
    number = block * (BUNDLE * DEALT) + within % BUNDLE * together + within // BUNDLE
    entry = begin[run] + torch.minimum(number, counts[run] - 1)
    del number, block, within, together  # of entries, 8 bytes each
    return Strewn(
        spot[entry].to(torch.int16).view(-1, BUNDLE),
        (slot[entry] - slot[begin][run]).to(torch.int16).view(-1, BUNDLE),
        bounds,
        lines,
        found // across,
        found % across,
        step,
        first,
        bundles,
        slot[begin],
    )


def dealt(of: Strewn, parts: int, teams: int, piece: int) -> Dealt:
    """The steps of each line dealt to CTAs and their teams.

    Args:
        of: what is dealt.
        parts: CTAs that share the steps of a line.
        teams: that share the steps of a part.
        piece: bundles of a piece, at most.
    """
    lines, line, step, bundles = of.lines, of.line, of.step, of.bundles
    device = line.device
    of_line = torch.bincount(line, minlength=lines)
    number = torch.arange(len(line), device=device) - (of_line.cumsum(0) - of_line)[line]
    part = ((number + 1) * parts - 1) // of_line[line]
    number = number - of_line[line] * part // parts
    team = (line * parts + part) * teams + number % teams
    groups = lines * parts * teams
    steps = torch.bincount(team, minlength=groups).view(-1, teams).sum(1)
    # Pieces in the order of steps, then of teams.
    cuts = (bundles + piece - 1) // piece
    run = torch.repeat_interleave(torch.arange(len(cuts), device=device), cuts)
    begin = (torch.arange(len(run), device=device) - (cuts.cumsum(0) - cuts)[run]) * piece
    length = torch.clamp(bundles[run] - begin, max=piece)
    of_step = step[run]
    opens = torch.ones_like(of_step)
    opens[1:] = of_step[1:] != of_step[:-1]
    ends = opens + 2 * opens.roll(-1)
    place = 4 * of.place[of_step] + ends
    pieces = torch.stack([of.first[run] + begin, length, place, of.slot[run]], 1)
    team, sorting = torch.sort(team[of_step], stable=True)
    pieces = pieces[sorting]
    number = torch.bincount(team, minlength=groups)
    start = number.cumsum(0) - number
    heads = torch.zeros(groups, 3, 4, dtype=torch.int64, device=device)
    heads[:, 0, 0], heads[:, 0, 1], heads[:, 0, 2] = start, number, steps.repeat_interleave(teams)
    for n in range(2 if len(pieces) else 0):
        early = pieces[(start + n).clamp(max=len(pieces) - 1)]
        heads[:, 1 + n] = torch.where((n < number)[:, None], early, 0)
    return Dealt(heads.view(-1, teams, 3, 4).to(torch.int32), pieces.to(torch.int32).contiguous())
