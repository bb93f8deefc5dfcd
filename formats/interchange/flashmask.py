"""Patterns from and to FlashMask's startend_row_indices (PaddlePaddle).

FlashMask says for each key which queries do not see it: rows r1 … r2 − 1 in the lower part, r3 …
r4 − 1 in the upper part. Queries and keys are aligned at the first (square) or, with fewer queries
than keys, at the last.

    columns  causal       masked rows of key j
    1        yes          [r1, nq)         and every row before the diagonal
    2        yes          [r1, r2)         and every row before the diagonal
    2        no           [r1, nq)         and [0, r2)
    4        no           [r1, r2)         and [r3, r4)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import among, as_flag, as_size, shown
from ..errors import LayoutError, ShapeError
from ..layout_runs import part_of
from ..pattern import Frame, Pattern
from ..pattern_ragged import Columns, ragged, runs_over_rows
from ..runs import Runs, complement, from_intervals
from .arrays import as_shape, check_within, indices
from .sources import Positions, as_pattern

_FORMS = {(1, True): "r1", (2, True): "r1, r2", (2, False): "r1, r2", (4, False): "r1 … r4"}


class FlashMask(NamedTuple):
    """What flashmask_attention takes besides query, key and value.

    Attributes:
        startend_row_indices: int32 (B, H, nk, 1, 2 or 4); B and H are 1 where the pattern is the
            same for all.
        causal: whether rows before the diagonal are masked besides.
    """

    startend_row_indices: Tensor
    causal: bool


def from_flashmask(
    startend_row_indices: Tensor,
    shape: tuple[int, int],
    causal: bool,
    heads: int | None = None,
) -> Pattern:
    """The pattern of a FlashMask, exact to the element; its shape is fixed.

    Args:
        startend_row_indices: int (B, Hkv or 1, nk, columns), columns as in the table above.
        shape: (nq, nk).
        causal: whether rows before the diagonal are masked besides.
        heads: query heads; the mask of each key head is repeated for the query heads that share it.
            None = as many as key heads.

    Returns:
        A pattern for all heads if B = H = 1, else one for each batch entry and head.

    Raises:
        LayoutError: a row out of 0 … nq, or a number of columns that does not go with causal.
        ShapeError: shapes that do not fit.
        DtypeError: not integers.
    """
    who = "from_flashmask"
    nq, nk = as_shape(shape, who)
    ends = indices(startend_row_indices, who, 4)
    b, h, keys, columns = (int(n) for n in ends.shape)
    if keys != nk or not b * h:
        raise ShapeError(
            f"{who}: startend_row_indices {tuple(ends.shape)}, (B, H, {nk}, 1, 2 or 4) expected"
        )
    causal = as_flag(who, "causal", causal)
    if (columns, causal) not in _FORMS:
        raise LayoutError(
            f"{who}: {columns} columns with causal={causal}; 1 or 2 go with causal=True, 2 or 4 "
            "with causal=False"
        )
    check_within(ends, 0, nq + 1, who, "row")
    repeat = 1
    if heads is not None:
        count = as_size(who, "heads", heads, 1)
        if count % h:
            raise ShapeError(f"{who}: {count} query heads for {h} key heads; a multiple expected")
        repeat = count // h if h > 1 else 1
    zero = torch.zeros_like(ends[..., 0]).long()
    r1, r2 = ends[..., 0].long(), ends[..., 1].long() if columns > 1 else zero + nq
    if causal:
        upper = (zero, _diagonal(nq, nk, ends.device).expand(b, h, nk))
    elif columns == 2:
        r2, upper = zero + nq, (zero, ends[..., 1].long())
    else:
        upper = (ends[..., 2].long(), ends[..., 3].long())
    lo = torch.stack((r1, upper[0]), -1).reshape(-1)
    hi = torch.stack((r2, upper[1]), -1).reshape(-1)
    line = torch.arange(b * h * nk, device=ends.device).repeat_interleave(2)
    some = lo < hi
    masked = from_intervals(line[some], lo[some], hi[some], b * h * nk, nq)
    kept = complement(masked, nq)
    entries = []
    for e in range(b * h):
        entries += [part_of(kept, e * nk, nk)] * repeat
    lead = None if b * h * repeat == 1 else (b, h * repeat)
    return ragged(entries, lead, (nq, nk), who, Columns)


def _diagonal(nq: int, nk: int, device: torch.device) -> Tensor:
    """int64 (nk,): the first row that stands at or after each key."""
    return (torch.arange(nk, device=device) - (nk - nq)).clamp(0, nq)


def to_flashmask(
    source: Positions,
    nq: int | None = None,
    nk: int | None = None,
    causal: bool | None = None,
    columns: int | None = None,
) -> FlashMask:
    """The FlashMask of a pattern or layout, if it has one.

    Args:
        source: a static pattern, a layout or a SparseTensor.
        nq: number of queries, for a pattern.
        nk: number of keys, for a pattern.
        causal: the form wanted; None = causal if that holds the pattern.
        columns: 1, 2 or 4; None = the fewest that hold the pattern.

    Returns:
        FlashMask. Nothing is lost.

    Raises:
        LayoutError: a key that more rows mask than the form can say (two intervals, or one besides
            the causal triangle); P.nm; a key mask.
        ShapeError: a pattern without nq and nk.
    """
    who = "to_flashmask"
    if causal is not None:
        causal = as_flag(who, "causal", causal)
    if columns is not None and not among(columns, (1, 2, 4)):
        raise LayoutError(f"{who}: columns={shown(columns)}; choose 1, 2, 4 or None")
    pattern, frame = as_pattern(source, nq, nk, who)
    kept = []
    for flat in pattern.distinct:
        # Two masked intervals leave at most three kept ones.
        runs = runs_over_rows(flat, frame, 3 * frame.nk)
        if runs is None:
            raise LayoutError(
                f"{who}: the rows that keep a key fall into more than three runs for some keys; "
                "FlashMask masks two intervals of rows for each key; use to_block_mask or "
                "to_intervals"
            )
        kept.append(runs)
    diagonal = _diagonal(frame.nq, frame.nk, frame.device)
    before = [_first(runs, frame) >= diagonal for runs in kept]
    lower = all(bool(one.all()) for one in before)
    if causal and not lower:
        key = int((~before[[bool(one.all()) for one in before].index(False)]).nonzero()[0])
        raise LayoutError(
            f"{who}: causal=True, but key {key} is kept before the diagonal; pass causal=False"
        )
    if causal is None:
        causal = lower and all(
            bool((_masked(runs, frame, diagonal).counts() <= 1).all()) for runs in kept
        )
    masked = [_masked(runs, frame, diagonal if causal else None) for runs in kept]
    most = 1 if causal else 2
    for one in masked:
        if bool((one.counts() > most).any()):
            key = int((one.counts() > most).nonzero()[0])
            raise LayoutError(
                f"{who}: {int(one.counts()[key])} intervals of rows do not see key {key}"
                f"{' behind the diagonal' if causal else ''}; FlashMask holds {most}; use "
                "to_block_mask or to_intervals"
            )
    found = [_ends(one, frame, causal) for one in masked]
    short = all(_is_short(ends, frame.nq, causal) for ends in found)
    least = (1 if causal else 2) if short else (2 if causal else 4)
    columns = least if columns is None else columns
    if (columns, causal) not in _FORMS or columns < least:
        raise LayoutError(
            f"{who}: columns={columns} with causal={causal}; this pattern needs {least}"
            f"{f' or {2 * least}' if short else ''}"
        )
    if causal:
        made = [ends[:, :columns] for ends in found]
    else:
        made = [ends[:, [0, 3]] if columns == 2 else ends for ends in found]
    entry = torch.tensor(pattern.entry, device=frame.device).reshape(pattern.lead)
    return FlashMask(torch.stack(made)[entry].int(), bool(causal))


def _first(runs: Runs, frame: Frame) -> Tensor:
    """int64 (nk,): the first row that keeps each key, nq where none does."""
    first = torch.full((frame.nk,), frame.nq, dtype=torch.int64, device=frame.device)
    some = runs.counts() > 0
    first[some] = runs.lo[runs.offsets[:-1][some]]
    return first


def _masked(runs: Runs, frame: Frame, diagonal: Tensor | None) -> Runs:
    """The rows that do not see each key, as runs; those from the diagonal on if it is given."""
    masked = complement(runs, frame.nq)
    if diagonal is None:
        return masked
    key = masked.row_of_run()
    lo = torch.maximum(masked.lo, diagonal[key])
    some = lo < masked.hi
    return from_intervals(key[some], lo[some], masked.hi[some], frame.nk, frame.nq)


def _ends(masked: Runs, frame: Frame, causal: bool) -> Tensor:
    """int64 (nk, 4): r1 … r4 of every key; the two upper ones unused if causal."""
    nq, nk, counts = frame.nq, frame.nk, masked.counts()
    ends = torch.tensor([nq, nq, 0, 0], device=frame.device).repeat(nk, 1)
    key = masked.row_of_run()
    last = torch.zeros_like(masked.lo, dtype=torch.bool)
    last[(masked.offsets[1:] - 1)[counts > 0]] = True
    # An interval from the first row on belongs to the upper part, if it is the only one.
    upper = ~last | ((masked.lo == 0) & (masked.hi < nq) & (not causal))
    ends[key[~upper], 0], ends[key[~upper], 1] = masked.lo[~upper], masked.hi[~upper]
    ends[key[upper], 2], ends[key[upper], 3] = masked.lo[upper], masked.hi[upper]
    return ends


def _is_short(ends: Tensor, nq: int, causal: bool) -> bool:
    """Whether the lower intervals reach the last row and the upper ones start at the first."""
    return bool((ends[:, 1] == nq).all()) and (causal or bool((ends[:, 2] == 0).all()))
