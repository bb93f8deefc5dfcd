"""Random patterns, drawn by position: the same on every device and for every number of queries."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .draw import distinct, uniform, words
from .pattern import Frame, Pattern
from .runs import Runs, from_sorted_pairs

COUNTS, KEYS = 0, 1  # streams of one seed


@dataclass(frozen=True, eq=False, repr=False)
class Random(Pattern):
    """In each row about density · nk keys, drawn without replacement."""

    rate: float
    seed: int

    def runs(self, frame: Frame, rows: Tensor) -> Runs:
        at = rows + frame.shift
        # nk · density keys on average: the fraction is the chance of one more.
        counts = (uniform(self.seed, at, COUNTS) + frame.nk * self.rate).floor_().long()
        sizes = torch.full_like(rows, frame.nk)
        row, col = distinct(words(self.seed, at, KEYS), counts.clamp_(max=frame.nk), sizes)
        return from_sorted_pairs(row, col, rows.numel())

    def runs_bound(self, frame: Frame) -> int:
        return math.ceil(frame.nk * self.rate) + 1

    def __repr__(self) -> str:
        return f"random({self.rate}, {self.seed})"


@dataclass(frozen=True, eq=False, repr=False)
class RandomBlocks(Pattern):
    """In each block row `per_row` blocks of size × size, drawn without replacement.

    Blocks within `window` blocks of the own one, and the first `globals` block rows and columns,
    are not drawn (window -1 and globals 0: every block may be drawn). Fewer are left: all of them
    are kept.
    """

    per_row: int
    size: int
    seed: int
    window: int = -1
    globals: int = 0

    def runs(self, frame: Frame, rows: Tensor) -> Runs:
        own, block = torch.unique_consecutive(
            (rows + frame.shift) // self.size, return_inverse=True
        )
        columns = -(-frame.nk // self.size)
        # Columns that may be drawn: [skipped, before) and [after, columns).
        skipped = min(self.globals, columns)
        window = min(self.window, (frame.nq + frame.nk) // self.size + 1)
        before = (own - window).clamp(skipped, columns)
        after = torch.maximum(before, (own + window + 1).clamp(max=columns))
        sizes = before - skipped + columns - after
        sizes[(own >= 0) & (own < self.globals)] = 0
        row, drawn = distinct(words(self.seed, own, KEYS), sizes.clamp(max=self.per_row), sizes)
        col = drawn + skipped
        col += torch.where(col >= before[row], (after - before)[row], 0)
        blocks = from_sorted_pairs(row, col, own.numel()).select(block)
        lo, hi = blocks.lo * self.size, (blocks.hi * self.size).clamp_(max=frame.nk)
        return Runs(blocks.offsets, lo, hi)

    def coarse(self, frame: Frame, size: int) -> bool:
        return self.size % size == 0 and frame.shift % self.size == 0

    def runs_bound(self, frame: Frame) -> int:
        return max(1, min(self.per_row, -(-frame.nk // self.size)))

    def __repr__(self) -> str:
        if self.window < 0 and not self.globals:
            return f"random_blocks({self.per_row}, {self.size}, {self.seed})"
        return (
            f"random_blocks({self.per_row}, {self.size}, {self.seed}, "
            f"window={self.window}, globals={self.globals})"
        )
