"""A plan opened up: the parts of a sparse matrix and where their slots are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ..plans.plan import PartPlan, Plan, split
from .block import BlockPart
from .nm import nm_part, nm_transposed
from .panel import PanelPart
from .part import Dropped, Part
from .row import RowPart
from .tile import TilePart


class _Maker(Protocol):
    def __call__(self, plan: PartPlan, shape: tuple[int, int], u: int) -> Part: ...


_KINDS: dict[str, _Maker] = {
    "block": BlockPart,
    "panel": PanelPart,
    "row": RowPart,
    "tile": TilePart,
    "nm": nm_part,
    "nm_t": nm_transposed,
}


# Bytes: a cache line, what torch aligns its own allocations to.
ALIGNED = 64


class Matrix:
    """The entries of a layout, each a list of parts.

    Attributes:
        slots: length of the last axis of values.
        shape: (nq, nk).
        entries: number of (batch, head) entries.
    """

    def __init__(self, plan: Plan) -> None:
        self.slots, self.shape, self._entry, self._plans = split(plan)
        self.entries = len(self._entry)
        self._made: tuple[int, list[Part]] = (-1, [])

    def parts(self, e: int) -> list[tuple[Part, slice]]:
        """Parts of entry e and the range of the values' last axis that holds their slots."""
        u = self._entry[e]
        if self._made[0] != u:
            self._made = u, [_KINDS[p.kind](p, self.shape, u) for p in self._plans]
        return [
            (part, slice(plan.starts[e], plan.starts[e + 1]))
            for part, plan in zip(self._made[1], self._plans, strict=True)
        ]

    @cached_property
    def padded(self) -> tuple[int, int]:
        """(rows, columns) that every part is content with."""
        sizes = [part.padded for part, _ in self.parts(0)] if self.entries else []
        rows, cols = self.shape
        return max([rows, *(n for n, _ in sizes)]), max([cols, *(n for _, n in sizes)])

    def clear_gaps(self, values: Tensor) -> None:
        """Zero the slots of values (F, slots) that lie in no part."""
        at = 0
        for plan in self._plans:
            values[:, at : plan.starts[0]] = 0
            at = plan.starts[-1]
        values[:, at:] = 0
        for f, e in self.pairs(values.shape[0]):
            for part, span in self.parts(e):
                part.clear_gaps(values[f, span])

    def pairs(self, free: int) -> Iterator[tuple[int, int]]:
        """(free index, entry) of every matrix."""
        # Entries outside: their parts are opened once each.
        for e in range(self.entries):
            for f in range(free):
                yield f, e

    def dropped(self, keep: Tensor | None, over_rows: bool, f: int, e: int) -> Dropped | None:
        """One matrix's share of a run-time mask, bool (F, E, n), padded; None if all is kept."""
        if keep is None:
            return None
        gone = ~keep[f, e]
        if not bool(gone.any()):
            return None
        return Dropped(pad(gone, self.padded[0 if over_rows else 1]), over_rows)


def flat(values: Tensor) -> Tensor:
    """Values whose every row of slots is contiguous; rows may repeat, as expanded ones do."""
    return values if values.stride(-1) == 1 else values.contiguous()


def pad(t: Tensor, length: int) -> Tensor:
    """``t`` with zeros appended along its first dimension, itself if long enough."""
    if t.shape[0] == length:
        return t
    out = t.new_zeros(length, *t.shape[1:])
    out[: t.shape[0]] = t
    return out


def operand(x: Tensor, length: int, dtype: torch.dtype, gone: Tensor | None = None) -> Tensor:
    """A dense operand ready for the parts: contiguous, aligned, padded, converted.

    Products of one and the same matrix have other bits where it starts elsewhere in a cache line,
    as the matrices of a batch do when their sizes are odd; a result must not depend on its place.

    Args:
        x: (N, D).
        length: rows to pad to, with zeros.
        dtype: the accumulation dtype.
        gone: bool (length,), rows to zero whatever they hold (NaN times zero is NaN), or None.
    """
    x = pad(x.to(dtype), length).contiguous()
    if x.data_ptr() % ALIGNED:
        x = x.clone()
    return x if gone is None else x.masked_fill(gone[:, None], 0)
