"""What holds for every flat pattern: its forms agree with each other and with its mask."""

from __future__ import annotations

import torch

from mixgrain.formats.pattern import Frame, Pattern
from mixgrain.formats.runs import from_interval

CPU = torch.device("cpu")


def runs_mask(runs, nk: int) -> torch.Tensor:
    """The mask of Runs, which must keep the promises of the class."""
    runs.validate(nk)
    mask = torch.zeros(runs.num_rows, nk, dtype=torch.bool)
    mask[runs.pairs()] = True
    return mask


def check_forms(pattern: Pattern, mask: torch.Tensor) -> None:
    """runs, interval, factor, nnz, row, block and any subset of rows say what `mask` says."""
    nq, nk = mask.shape
    frame = Frame(nq, nk, CPU)
    everything = frame.rows()
    for rows in (everything, everything[::3], everything[-1:], everything[:0]):
        assert torch.equal(runs_mask(pattern.runs(frame, rows), nk), mask[rows])
        found = pattern.interval(frame, rows)
        if found is not None:
            lo, hi = found
            assert lo.dtype == hi.dtype == torch.int64
            assert lo.shape == hi.shape == rows.shape
            assert bool(((lo >= 0) & (lo <= hi) & (hi <= nk)).all())
            assert torch.equal(runs_mask(from_interval(lo, hi), nk), mask[rows])
    check_factor(pattern, mask, frame)
    assert pattern.nnz(nq, nk) == int(mask.sum())
    assert pattern.density(nq, nk) == (int(mask.sum()) / mask.numel() if mask.numel() else 0)
    if nq and nk:
        for i in {0, nq // 2, nq - 1}:
            assert torch.equal(pattern.row(i, nq, nk), mask[i].nonzero().flatten())
        check_blocks(pattern, mask, 16)


def check_factor(pattern: Pattern, mask: torch.Tensor, frame: Frame) -> None:
    factored = pattern.factor(frame)
    united = torch.zeros_like(mask)
    if factored.core is not None:
        united |= runs_mask(factored.core.runs(frame, frame.rows()), frame.nk)
    for listed, end in ((factored.queries, frame.nq), (factored.keys, frame.nk)):
        assert listed.dtype == torch.int64
        assert torch.equal(listed, torch.unique(listed))
        assert bool(((listed >= 0) & (listed < end)).all())
    united[factored.queries] = True
    united[:, factored.keys] = True
    assert torch.equal(united, mask)


def check_blocks(pattern: Pattern, mask: torch.Tensor, size: int) -> None:
    nq, nk = mask.shape
    for i in range(-(-nq // size)):
        for j in range(-(-nk // size)):
            part = mask[i * size : (i + 1) * size, j * size : (j + 1) * size]
            expected = "full" if part.all() else "partial" if part.any() else "empty"
            assert pattern.block(i, j, size, nq, nk) == expected


def check_suffix(pattern: Pattern, nk: int) -> None:
    """Fewer queries are the last rows of the square mask."""
    square = pattern.dense(nk, nk)
    for nq in {0, min(1, nk), nk // 2, nk}:
        assert torch.equal(pattern.dense(nq, nk), square[nk - nq :])
