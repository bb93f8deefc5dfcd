"""What can be asked of a pattern: counts, rows, blocks and, for tests, the dense mask.

Works through chunks of rows so that no more than about RUNS_PER_CHUNK runs exist at a time.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import LayoutError
from .runs import Runs

if TYPE_CHECKING:
    from .pattern import Frame, Pattern

RUNS_PER_CHUNK = 1 << 22
ROWS_PER_CHUNK = 1 << 18
DENSE_PER_CHUNK = 1 << 24


def chunked_runs(
    pattern: "Pattern", frame: "Frame", rows: Tensor | None = None, budget: int = RUNS_PER_CHUNK
) -> Iterator[tuple[Tensor, Runs]]:
    """The runs of many rows, a chunk of rows at a time, so that memory stays bounded.

    Args:
        pattern: a flat pattern.
        frame: the rectangle.
        rows: (R) int64 query rows, rising; all rows if None.
        budget: about how many runs a chunk may have; one row is never split.

    Yields:
        (rows of the chunk, their runs).
    """
    total = frame.nq if rows is None else rows.numel()
    step = max(1, min(ROWS_PER_CHUNK, budget // max(1, pattern.runs_bound(frame))))
    start = 0
    while start < total:
        stop = min(total, start + step)
        chunk = _part(rows, start, stop, frame)
        runs = pattern.runs(frame, chunk)
        yield chunk, runs
        # The bound is for the worst row; what this chunk held is a better guess for the next, but
        # later rows may be heavier, so growth is gradual.
        fitting = budget * (stop - start) // max(1, runs.num_runs)
        step = max(1, min(ROWS_PER_CHUNK, 8 * step, fitting))
        start = stop


def _part(rows: Tensor | None, start: int, stop: int, frame: "Frame") -> Tensor:
    if rows is None:  # all of them, never listed at once
        return torch.arange(start, stop, device=frame.device)
    return rows[start:stop]


def nnz(pattern: "Pattern", frame: "Frame") -> int:
    """Kept pairs over all leading entries."""
    counts = [_nnz(flat, frame) for flat in pattern.distinct]
    return sum(counts[k] for k in pattern.entry)


def _nnz(flat: "Pattern", frame: "Frame") -> int:
    factored = flat.factor(frame)
    core, queries, keys = factored.core, factored.queries, factored.keys
    narrow = frame.nq - queries.numel()
    if core is None:
        return queries.numel() * frame.nk + narrow * keys.numel()
    # Counting all rows and taking the full ones off again is cheaper than leaving them out.
    kept = _kept(core, keys, frame, None) - (
        _kept(core, keys, frame, queries) if len(queries) else 0
    )
    return queries.numel() * frame.nk + kept


def _kept(core: "Pattern", keys: Tensor, frame: "Frame", rows: Tensor | None) -> int:
    """Pairs of core ∪ (rows × keys) within the given rows."""
    total = frame.nq if rows is None else rows.numel()
    kept = 0
    for start in range(0, total, ROWS_PER_CHUNK):
        stop = min(total, start + ROWS_PER_CHUNK)
        chunk = _part(rows, start, stop, frame)
        found = core.interval(frame, chunk)
        if found is not None:
            lo, hi = found
            kept += int((hi - lo).sum())
            if len(keys):
                kept += chunk.numel() * len(keys)
                kept -= int((torch.searchsorted(keys, hi) - torch.searchsorted(keys, lo)).sum())
            continue
        for part, runs in chunked_runs(core, frame, chunk):
            kept += runs.nnz()
            if len(keys):
                kept += part.numel() * len(keys) - int(runs.among(keys).sum())
    return kept


def dense(pattern: "Pattern", frame: "Frame") -> Tensor:
    """The whole mask, bool (nq, nk), (H, nq, nk) or (B, 1 or H, nq, nk)."""
    masks = [_dense(flat, frame) for flat in pattern.distinct]
    if not pattern.leading_dims:
        return masks[0]
    stacked = torch.stack([masks[k] for k in pattern.entry])
    shape = pattern.lead if pattern.leading_dims == 2 else pattern.lead[1:]
    return stacked.reshape(*shape, frame.nq, frame.nk)


def _dense(flat: "Pattern", frame: "Frame") -> Tensor:
    flat.check(frame)
    mask = torch.empty(frame.nq, frame.nk, dtype=torch.bool, device=frame.device)
    for chunk, runs in chunked_runs(flat, frame, budget=max(1, DENSE_PER_CHUNK // (frame.nk + 1))):
        edges = torch.zeros(chunk.numel(), frame.nk + 1, dtype=torch.int8, device=frame.device)
        row = runs.row_of_run()
        # No run of a row ends where another one starts, so plain stores do.
        edges[row, runs.lo] = 1
        edges[row, runs.hi] = -1
        mask[chunk] = edges.cumsum(1, dtype=torch.int8)[:, :-1].bool()
    return mask


def row(pattern: "Pattern", i: int, frame: "Frame") -> Tensor:
    """The kept keys of row i, rising, int64."""
    if not 0 <= i < frame.nq:
        raise LayoutError(f"row {i} given, 0 <= row < {frame.nq} expected")
    return pattern.runs(frame, torch.tensor([i], device=frame.device)).expand()[1]


def block(pattern: "Pattern", i: int, j: int, size: int, frame: "Frame") -> str:
    """Whether block (i, j) is "empty", "full" or "partial"."""
    top, left = i * size, j * size
    if size < 1 or i < 0 or j < 0 or top >= frame.nq or left >= frame.nk:
        raise LayoutError(
            f"block ({i}, {j}) of size {size} given, but the blocks of {frame.nq} × {frame.nk} are "
            f"(0, 0) to ({-(-frame.nq // max(size, 1)) - 1}, {-(-frame.nk // max(size, 1)) - 1})"
        )
    rows = torch.arange(top, min(top + size, frame.nq), device=frame.device)
    right = min(left + size, frame.nk)
    area = rows.numel() * (right - left)
    kept = {int(p.runs(frame, rows).inside(left, right).sum()) for p in pattern.distinct}
    return "empty" if kept == {0} else "full" if kept == {area} else "partial"
