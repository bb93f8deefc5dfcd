"""Which blocks a pattern touches: full ones, partial ones with their masks, sparse ones as entries.

Two ways to the same answer, both in chunks of block rows:

    intervals   no row has more than one interval: the blocks strictly inside every row's interval
                are full, the few at its ends get masks made from the ends; nothing per key
    runs        any pattern: runs cut at block boundaries, counted per block

Keys that all rows share and queries that see all keys are added to, or taken out of, the blocks
here (``Extra``), so that they never have to pass through runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .pattern import Frame, Pattern
from .pattern_queries import chunked_runs
from .runs import Runs, ragged_arange
from .words import count, interval_words, words_per_row

ROWS_PER_CHUNK = 1 << 18
CELLS_PER_CHUNK = 1 << 20
WORDS_PER_CHUNK = 1 << 20
RUNS_PER_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class Extra:
    """What is joined to the blocks, or left out of them because panels hold it.

    Attributes:
        full_rows: int64, query rows that see all keys.
        dropped_rows: int64, query rows that are left out.
        full_cols: int64 words (nkb, W) or None, keys that all rows see.
        dropped_cols: int64 words (nkb, W) or None, keys that are left out.
    """

    full_rows: Tensor
    dropped_rows: Tensor
    full_cols: Tensor | None
    dropped_cols: Tensor | None


@dataclass(frozen=True, eq=False)
class Cells:
    """Touched blocks of the block rows first … last − 1, by row and column.

    Attributes:
        first: first block row.
        last: one past the last.
        row: int64 (n,) block rows.
        col: int64 (n,) block columns, rising inside a row.
        index: int64 (n,), −1 = full, else a row of words.
        words: int64 (p, size, W), masks of the partial ones.
        entry_row: int64 (e,), query rows of the positions in sparse blocks, which are not listed.
        entry_col: int64 (e,), their keys.
    """

    first: int
    last: int
    row: Tensor
    col: Tensor
    index: Tensor
    words: Tensor
    entry_row: Tensor
    entry_col: Tensor


def cells_of(
    core: Pattern | None, frame: Frame, size: int, extra: Extra, sparse: int = 0
) -> Iterator[Cells]:
    """The touched blocks, chunk by chunk of block rows.

    Args:
        core: a flat pattern, or None for nothing.
        frame: the rectangle.
        size: side of a block.
        extra: rows and columns added or left out.
        sparse: blocks with at most this many positions may come as entries instead.
    """
    nqb, nkb = -(-frame.nq // size), -(-frame.nk // size)
    if not nqb or not nkb:
        return
    step = max(1, ROWS_PER_CHUNK // size)
    for first in range(0, nqb, step):
        last = min(nqb, first + step)
        rows = torch.arange(first * size, min(last * size, frame.nq), device=frame.device)
        if core is None:
            found: tuple[Tensor, Tensor] | None = (torch.zeros_like(rows), torch.zeros_like(rows))
        else:
            found = core.interval(frame, rows)
        cut = None if found is None else _by_intervals(*found, first, last, frame, size, extra)
        if cut is not None:
            yield from cut
            continue
        assert core is not None
        yield from _by_runs(core, frame, size, extra, sparse, first, last)


def _row_words(first: int, last: int, frame: Frame, size: int, dropped: Tensor) -> Tensor:
    """All-ones or zero int64 (last − first, size, 1): the rows there are and that stay."""
    inside = torch.zeros((last - first) * size, dtype=torch.int64, device=frame.device)
    inside[: max(0, frame.nq - first * size)] = -1
    inside[_local(dropped, first * size, last * size)] = 0
    return inside.view(last - first, size, 1)


def _local(rows: Tensor, start: int, stop: int) -> Tensor:
    """Those of some rising rows that lie in [start, stop), counted from start."""
    edges = torch.searchsorted(rows, torch.tensor([start, stop], device=rows.device)).tolist()
    return rows[edges[0] : edges[1]] - start


def _by_intervals(
    lo: Tensor, hi: Tensor, first: int, last: int, frame: Frame, size: int, extra: Extra
) -> Iterator[Cells] | None:
    """Blocks of rows with one interval each; None if too many blocks would come out empty."""
    blocks = last - first
    pad = blocks * size - lo.numel()
    if pad:
        lo, hi = torch.nn.functional.pad(lo, (0, pad)), torch.nn.functional.pad(hi, (0, pad))
    elif extra.full_rows.numel() or extra.dropped_rows.numel():
        lo, hi = lo.clone(), hi.clone()
    listed = _local(extra.full_rows, first * size, last * size)
    lo[listed], hi[listed] = 0, frame.nk
    dropped = _local(extra.dropped_rows, first * size, last * size)
    lo[dropped], hi[dropped] = 0, 0
    lo, hi = lo.view(blocks, size), hi.view(blocks, size)
    low = torch.where(lo < hi, lo, frame.nk).amin(1) // size
    high = -(-hi.amax(1) // size)
    counts = (high - low).clamp_(min=0)
    inner_lo = -(-lo.amax(1) // size)
    inner_hi = hi.amin(1) // size
    partial = counts - (inner_hi - inner_lo).clamp(min=0)
    # Rows whose intervals lie far apart leave holes between them; runs step over those.
    touched = (-(-hi // size) - lo // size).clamp_(min=0).sum(1)
    if bool((partial > 64 + 4 * touched).any()) or int(counts.amax()) > 4 * CELLS_PER_CHUNK:
        return None
    return _interval_chunks(
        lo, hi, low, counts, inner_lo, inner_hi, partial, first, frame, size, extra
    )


def _interval_chunks(
    lo: Tensor, hi: Tensor, low: Tensor, counts: Tensor, inner_lo: Tensor, inner_hi: Tensor,
    partial: Tensor, first: int, frame: Frame, size: int, extra: Extra,
) -> Iterator[Cells]:  # fmt: skip
    joined = _joined_columns(extra)
    weight = counts + partial * (CELLS_PER_CHUNK * size // WORDS_PER_CHUNK) + joined.numel() * size
    group = torch.cumsum(weight, 0) // CELLS_PER_CHUNK
    edges = [0, *(group.diff().nonzero().flatten() + 1).tolist(), counts.numel()]
    for start, stop in itertools.pairwise(edges):
        row, step = ragged_arange(counts[start:stop])
        row += start
        col = low[row] + step
        row, col = _with_joined(row, col, joined, start, stop, frame, size)
        whole = (inner_lo[row] <= col) & (col < inner_hi[row])
        whole = _without(whole, col, extra)
        some = (~whole).nonzero().flatten()
        base = col[some, None] * size
        words = interval_words(lo[row[some]] - base, hi[row[some]] - base, size)
        yield _finish(row, col, some, words, first, start, stop, frame, size, extra)


def _joined_columns(extra: Extra) -> Tensor:
    """Block columns of the keys that all rows see."""
    if extra.full_cols is None:
        return extra.full_rows[:0]
    return (extra.full_cols != 0).any(1).nonzero().flatten()


def _with_joined(
    row: Tensor, col: Tensor, joined: Tensor, start: int, stop: int, frame: Frame, size: int
) -> tuple[Tensor, Tensor]:
    """Add blocks that only joined keys touch."""
    if not joined.numel():
        return row, col
    nkb = -(-frame.nk // size)
    rows = torch.arange(start, stop, device=row.device)
    more = (rows[:, None] * nkb + joined).flatten()
    key = torch.unique(torch.cat([row * nkb + col, more]))
    return key // nkb, key % nkb


def _without(whole: Tensor, col: Tensor, extra: Extra) -> Tensor:
    """Blocks that lose keys are not full."""
    if extra.dropped_cols is None:
        return whole
    return whole & ~(extra.dropped_cols != 0).any(1)[col]


def _finish(
    row: Tensor, col: Tensor, some: Tensor, words: Tensor, first: int, start: int, stop: int,
    frame: Frame, size: int, extra: Extra, entries: tuple[Tensor, Tensor] | None = None,
) -> Cells:  # fmt: skip
    """Apply added and dropped columns to the masks, drop the empty, recognise the full."""
    if extra.dropped_cols is not None:
        words &= ~extra.dropped_cols[col[some]][:, None]
    if extra.full_cols is not None:
        stay = _row_words(first + start, first + stop, frame, size, extra.dropped_rows)
        words |= extra.full_cols[col[some]][:, None] & stay[row[some] - start]
    index = torch.full_like(row, -1)
    alive = torch.ones_like(row, dtype=torch.bool)
    if some.numel():
        kept = (words != 0).flatten(1).any(1)
        partial = kept
        if extra.full_cols is not None:
            partial = kept & (count(words) < size * size)
        number = torch.cumsum(partial, 0) - 1
        index[some] = torch.where(partial, number, -1)
        alive[some] = kept
        if not bool(partial.all()):
            words = words[partial]
    if not bool(alive.all()):
        row, col, index = row[alive], col[alive], index[alive]
    none = row[:0]
    pair = entries if entries is not None else (none, none)
    return Cells(first + start, first + stop, row + first, col, index, words, *pair)


def _by_runs(
    core: Pattern, frame: Frame, size: int, extra: Extra, sparse: int, first: int, last: int
) -> Iterator[Cells]:
    """Blocks of any pattern, from its runs; as many block rows at a time as memory allows."""
    step, nkb = 1, -(-frame.nk // size)
    position = first
    while position < last:
        stop = min(last, position + step)
        runs = _whole_runs(core, frame, size, extra, position, stop)
        pieces = int(((runs.hi - 1) // size - runs.lo // size + 1).sum())
        yield _cells_of_runs(runs, frame, size, extra, sparse, position, stop)
        each = max(1, pieces // (stop - position))
        # Masks of blocks that are neither sparse nor full take memory as well.
        masks = 8 * WORDS_PER_CHUNK // (size * words_per_row(size)) // min(nkb, each)
        step = max(1, min(4 * step, RUNS_PER_CHUNK // each, masks, ROWS_PER_CHUNK // size))
        position = stop


def _whole_runs(
    core: Pattern, frame: Frame, size: int, extra: Extra, first: int, last: int
) -> Runs:
    """Runs of all rows of some block rows, listed and dropped rows put right."""
    start, stop = first * size, min(last * size, frame.nq)
    rows = torch.arange(start, stop, device=frame.device)
    usual = torch.ones_like(rows, dtype=torch.bool)
    listed = _local(extra.full_rows, start, stop)
    dropped = _local(extra.dropped_rows, start, stop)
    usual[listed] = False
    usual[dropped] = False
    offsets, los, his = [torch.zeros(1, dtype=torch.int64, device=frame.device)], [], []
    total = 0
    for _, runs in chunked_runs(core, frame, rows[usual]):
        offsets.append(runs.offsets[1:] + total)
        los.append(runs.lo)
        his.append(runs.hi)
        total += runs.num_runs
    runs = Runs(torch.cat(offsets), torch.cat([*los, rows[:0]]), torch.cat([*his, rows[:0]]))
    if bool(usual.all()):
        return runs
    # One more run, the whole row, which listed rows share; dropped rows have none.
    counts = torch.zeros_like(rows)
    counts[usual] = runs.counts()
    counts[listed] = 1
    counts[dropped] = 0
    row, step = ragged_arange(counts)
    begin = torch.zeros_like(rows)
    begin[usual] = runs.offsets[:-1]
    begin[listed] = total
    source = begin[row] + step
    whole = torch.tensor([0, frame.nk], device=frame.device)
    ends = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=frame.device)
    torch.cumsum(counts, 0, out=ends[1:])
    return Runs(
        ends, torch.cat([runs.lo, whole[:1]])[source], torch.cat([runs.hi, whole[1:]])[source]
    )


def _cells_of_runs(
    runs: Runs, frame: Frame, size: int, extra: Extra, sparse: int, first: int, last: int
) -> Cells:
    nkb = -(-frame.nk // size)
    blocks = last - first
    begin = runs.lo // size
    run, step = ragged_arange((runs.hi - 1) // size - begin + 1)
    col = begin[run] + step
    row = runs.row_of_run()[run]
    lo = (runs.lo[run] - col * size).clamp_(min=0)
    hi = (runs.hi[run] - col * size).clamp_(max=size)
    key = row // size * nkb + col
    cells, where, kept = _counted(key, hi - lo, blocks * nkb)
    touched = cells
    joined = _joined_columns(extra)
    if joined.numel():
        more = torch.arange(blocks, device=key.device)[:, None] * nkb + joined
        touched = torch.unique(torch.cat([cells, more.flatten()]))
        where = torch.searchsorted(touched, cells)[where]
        kept = torch.zeros_like(touched).index_add_(0, torch.searchsorted(touched, cells), kept)
    cell_row, cell_col = touched // nkb, touched % nkb
    whole = _without(kept == size * size, cell_col, extra)
    few = ~whole & (kept <= sparse)
    for columns in (extra.dropped_cols, extra.full_cols):
        if columns is not None:
            few &= ~(columns != 0).any(1)[cell_col]
    entries = None
    if sparse and bool(few.any()):
        chosen = few[where].nonzero().flatten()
        piece, at = ragged_arange((hi - lo)[chosen])
        source = chosen[piece]
        entries = (
            row[source] + first * size,
            col[source] * size + lo[source] + at,
        )
    listed = (~few).nonzero().flatten()
    place = torch.cumsum(~few, 0) - 1
    masked = (~whole & ~few).nonzero().flatten()
    slot = torch.full_like(touched, -1)
    slot[masked] = torch.arange(masked.numel(), device=key.device)
    need = (slot[where] >= 0).nonzero().flatten()
    per_row = words_per_row(size)
    words = torch.zeros(masked.numel() * size, per_row, dtype=torch.int64, device=key.device)
    at = slot[where[need]] * size + row[need] % size
    # Runs of a row are disjoint: adding is or-ing.
    words.index_add_(0, at, interval_words(lo[need], hi[need], size))
    return _finish(
        cell_row[listed], cell_col[listed], place[masked], words.view(-1, size, per_row),
        first, 0, blocks, frame, size, extra, entries,
    )  # fmt: skip


def _counted(key: Tensor, weight: Tensor, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct keys, rising; which of them each key is; the sum of weights of each."""
    if cells > 4 * key.numel() + 65536:
        found, where = torch.unique(key, return_inverse=True)
        return found, where, torch.zeros_like(found).index_add_(0, where, weight)
    sums = torch.zeros(cells, dtype=torch.int64, device=key.device).index_add_(0, key, weight)
    found = sums.nonzero().flatten()
    place = torch.cumsum(sums > 0, 0) - 1
    return found, place[key], sums[found]
