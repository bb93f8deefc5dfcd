"""What every pattern constructor means, literally: one pair at a time, in Python integers.

A predicate is keep(i, j, nq, nk) for 0 <= i < nq and 0 <= j < nk. Nothing here knows how the
library computes a pattern; the tests compare its masks with these.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Keep = Callable[[int, int, int, int], bool]

SIDES = (0, 1, 2, 7, 33, 64, 70)


def mask_of(keep: Keep, nq: int, nk: int) -> torch.Tensor:
    """The mask of a predicate, bool (nq, nk), pair by pair."""
    mask = torch.zeros(nq, nk, dtype=torch.bool)
    for i in range(nq):
        for j in range(nk):
            mask[i, j] = bool(keep(i, j, nq, nk))
    return mask


def position(i: int, nq: int, nk: int) -> int:
    """Where query i stands among the keys: the last query at the last key."""
    return i + nk - nq


def full() -> Keep:
    return lambda i, j, nq, nk: True


def causal() -> Keep:
    return lambda i, j, nq, nk: j <= position(i, nq, nk)


def window(left: float, right: float | None = None) -> Keep:
    after = left if right is None else right
    return lambda i, j, nq, nk: -left <= j - position(i, nq, nk) <= after


def dilated(radius: float, step: int) -> Keep:
    def keep(i: int, j: int, nq: int, nk: int) -> bool:
        distance = abs(position(i, nq, nk) - j)
        return distance % step == 0 and distance <= radius * step

    return keep


def global_keys(idx: list[int]) -> Keep:
    return lambda i, j, nq, nk: j in idx


def global_queries(idx: list[int]) -> Keep:
    return lambda i, j, nq, nk: position(i, nq, nk) in idx


def global_tokens(idx: list[int]) -> Keep:
    return either(global_keys(idx), global_queries(idx))


def sinks(n: int) -> Keep:
    return lambda i, j, nq, nk: j < n


def documents(ids_of: Callable[[int], list[int]]) -> Keep:
    """ids_of(nk) are the ids; a query that stands before the first key is in no document."""

    def keep(i: int, j: int, nq: int, nk: int) -> bool:
        ids, p = ids_of(nk), position(i, nq, nk)
        return 0 <= p < nk and ids[p] == ids[j]

    return keep


def blocks(mask_of_blocks: Callable[[int, int], list[list[bool]]], size: int) -> Keep:
    """mask_of_blocks(nq, nk) is the list of block rows."""
    return lambda i, j, nq, nk: mask_of_blocks(nq, nk)[i // size][j // size]


def block_of(p: int, size: int) -> int:
    return math.floor(p / size)


def block_window(size: int, radius: int) -> Keep:
    return lambda i, j, nq, nk: (
        abs(block_of(position(i, nq, nk), size) - block_of(j, size)) <= radius
    )


def longformer(radius: int, idx: list[int]) -> Keep:
    return either(window(radius), global_tokens(idx))


def bigbird_fixed(size: int, radius: int, first: int) -> Keep:
    """What BigBird keeps besides its random blocks."""

    def is_global(p: int) -> bool:
        return 0 <= block_of(p, size) < first

    def keep(i: int, j: int, nq: int, nk: int) -> bool:
        return is_global(position(i, nq, nk)) or is_global(j)

    return either(keep, block_window(size, radius))


def either(a: Keep, b: Keep) -> Keep:
    return lambda i, j, nq, nk: a(i, j, nq, nk) or b(i, j, nq, nk)


def count_nm(mask: torch.Tensor, n: int, m: int) -> int:
    """Kept pairs of n:m within a mask: min(n, live) of each group of m neighbouring keys."""
    total = 0
    for row in mask.tolist():
        for first in range(0, len(row), m):
            total += min(n, sum(row[first : first + m]))
    return total
