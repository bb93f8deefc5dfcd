"""Single entries as work items of the row kernel, and where their results go."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixgrain.formats.row import RowLayout

from .cells import UNIT
from .panels import Gathered

# An item of at most this many positions is one of several that a warp takes (fused_row.cu: kSteps).
SHORT = 8
# Kept positions of one item. Longer rows are cut, so that none holds up the end.
ITEM = 512


class Rows(NamedTuple):
    """Work items of the row kernel, of all distinct patterns, by pattern, longest first.

    Attributes:
        items: int32 (NI, 4): row, kept positions, partial row its result goes to (−1 = the output),
            first position counted from the row's first.
        counts: items of each pattern.
        longer: those of them with more than ``SHORT`` positions, which come first.
        partials: partial rows of each pattern.
        merged: int64 (n,), ``pattern * nq + row`` of each partial row.
        source: int64 (n,), its number; those of a pattern follow its slots.
    """

    items: Tensor
    counts: list[int]
    longer: list[int]
    partials: list[int]
    merged: Tensor
    source: Tensor


def row_items(
    rest: RowLayout | None,
    cells: Tensor,
    slots: list[int],
    gathered: Gathered | None,
    patterns: int,
    size: tuple[int, int],
    device: torch.device,
) -> Rows:
    """Cut long rows; a row without any cell is written straight, empty or not.

    Args:
        rest: the single entries.
        cells: int64 (L,), cells of each line; the first ``patterns * nqu`` lines are neighbours.
        slots: slots of each pattern, which come before the partial rows.
        gathered: rows that gathered lines hold.
        patterns: number of distinct patterns.
        size: (nq, nqu).
        device: of the result.
    """
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    if rest is None:
        zero = [0] * patterns
        return Rows(empty.to(torch.int32).view(0, 4), zero, zero, zero, empty, empty)
    nq, nqu = size
    counts = rest.row_offsets.diff()
    row = torch.arange(patterns * nq, device=device)
    lonely = cells[row // nq * nqu + row % nq // UNIT] == 0
    elsewhere = torch.zeros_like(lonely)
    if gathered is not None and gathered.query_rows.numel():
        listed = gathered.query_pattern[:, None] * nq + gathered.query_rows
        elsewhere[listed[gathered.query_rows >= 0]] = True
    wanted = (counts > 0) | (lonely & ~elsewhere)
    cuts = torch.where(wanted, ((counts + ITEM - 1) // ITEM).clamp(min=1), 0)
    # Even lengths, but whole rounds of 32.
    step = ((counts + cuts.clamp(min=1) - 1) // cuts.clamp(min=1) + 31) // 32 * 32
    step = step.clamp(min=1)
    cuts = torch.where(wanted, ((counts + step - 1) // step).clamp(min=1), 0)
    which = torch.repeat_interleave(row, cuts)
    begin = (torch.arange(len(which), device=device) - (cuts.cumsum(0) - cuts)[which]) * step[which]
    length = torch.minimum(step[which], counts[which] - begin)
    partial = (~lonely | elsewhere | (cuts > 1))[which]
    of = which // nq
    sizes = torch.stack([
        torch.bincount(of, minlength=patterns),
        torch.bincount(of[length > SHORT], minlength=patterns),
        torch.zeros(patterns, dtype=torch.int64, device=device).index_add_(0, of, partial.long()),
    ])  # fmt: skip
    items, longer, partials = sizes.tolist()
    ahead = sizes[2].cumsum(0) - sizes[2]
    base = torch.tensor(slots, device=device) * UNIT - ahead
    number = torch.where(partial, partial.long().cumsum(0) - 1 + base[of], -1)
    made = torch.stack([which % nq, length, number, begin], 1).to(torch.int32)
    # Stable: neighbouring rows of equal length stay neighbours.
    order = torch.argsort((of << 32) - length, stable=True)
    return Rows(made[order], items, longer, partials, which[partial], number[partial])
