"""Where the queries and keys of a mask stand, and patterns put there."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from mixgrain.formats import patterns as P
from mixgrain.formats.cache import LRU
from mixgrain.formats.pattern import Pattern

from .placed import Placed


@dataclass(frozen=True)
class Scope:
    """Where a mask stands: query row i at position q_offset + i, key j at kv_offset + j."""

    batch: int
    nq: int
    nk: int
    q_offset: int
    kv_offset: int
    device: torch.device

    @property
    def first(self) -> int:
        """The key, counted from the first one at hand, at which query row 0 stands."""
        return self.q_offset - self.kv_offset

    @property
    def reach(self) -> int:
        """Keys that positions of queries and keys need together; at least nk."""
        return max(self.nk, self.first + self.nq)

    def place(self, pattern: Pattern) -> Pattern:
        """A flat pattern, its queries moved to where they stand."""
        natural = self.first == self.nk - self.nq
        return pattern if natural else Placed(pattern, self.first)

    def table(self, values: object) -> Tensor | None:
        """Entries of a (batch, positions) table for the keys from the first on, (B or 1, reach).

        One row if all are equal; None if `values` is no such table, or too short.
        """
        first, last = self.kv_offset, self.kv_offset + self.reach
        if not isinstance(values, Tensor) or values.ndim != 2 or values.shape[1] < last:
            return None
        if values.shape[0] != self.batch or self.first < 0 or values.is_floating_point():
            return None
        cut = values[:, first:last].cpu().long()
        return cut[:1] if bool((cut == cut[:1]).all()) else cut

    def documents(self, ids: Tensor) -> Pattern:
        """Positions with equal ids see each other, entry by entry of ids (B or 1, reach)."""
        flat = [self.place(_documents(row)) for row in ids]
        return flat[0] if len(flat) == 1 else P.per_batch(flat)


_known: LRU[Pattern] = LRU(64)


def _documents(ids: Tensor) -> Pattern:
    """P.documents of CPU ids; the same object for the same ids.

    Every forward makes its own tensor, and a long one is known to layouts by which tensor it is,
    not by what it holds.
    """

    def make() -> Pattern:
        with torch.inference_mode(False):  # tensors of inference mode have no version to know by
            return P.documents(ids.clone())

    digest = hashlib.blake2b(ids.contiguous().numpy().tobytes(), digest_size=16).digest()
    return _known.get((ids.numel(), digest), make)
