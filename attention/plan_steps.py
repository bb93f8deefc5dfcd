"""Plans of the fused CPU kernel: a layout cut into steps that each fit the cache.

A step is a batch of equal tiles, ``tiles`` × (rows × cols), computed by batched products. Rows and
columns of a tile are named by *units*: ``unit`` neighbouring elements that start at a multiple of
``unit`` (a block's size; 1 for lists), so that one step serves

    blocks        tiles = block rows with equally many blocks, units of one block
    shared panel  one tile; rows or columns a plain range (no ids) or a list (units of 1)
    private ones  tiles = panels of one shape, ranges of rows, lists of columns
    rest          tiles = single rows of about equal length, lists of columns

A tile's columns may be filled up with the index nk: keys are stored with zero rows behind the last
one, and such *pads* get −inf. No row occurs twice in a step, so that results can be stored by index
without atomics; a row that occurs in several steps is merged online, in the order of the steps,
which depends on the layout alone.

A plan is tensors and a few ints, so that it can cross the operator boundary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mixgrain.formats.entries import pack_bits

# Scores of one step: 2 MiB in float32, about the second-level caches of two cores. Measured on
# a window of ±128 at N = 8192: 2**17 costs 40 % more, 2**20 the same.
BUDGET = 1 << 19

# Keys and queries are padded with zero rows to a multiple of this, the largest block ...
ALIGN = 128
# ... and with at least this many, the longest N:M group: index nk is a zero row.
SPARE = 16


class Step(NamedTuple):
    """One batch of equal tiles; a row of ``Plan.steps``.

    Attributes:
        pattern: the distinct pattern it belongs to.
        tiles: number of tiles.
        rows: rows of a tile.
        cols: columns of a tile, pads included.
        row_unit: elements of one row id.
        row_at: where its tiles * rows / row_unit ids start; the first row itself if row_range.
        row_range: rows are consecutive, over all tiles, from row_at.
        col_unit: elements of one column id.
        col_at: where its tiles * cols / col_unit ids start; the first column if col_range.
        col_range: columns are consecutive from col_at (one tile).
        fresh: no earlier step of the pattern touches these rows.
        pads: some columns are >= nk.
        mask: 0 none; 1 ids into the block masks, from mask_at; 2 packed bits, bytes from mask_at.
        mask_at: see mask.
        mask_tiles: masks stored: tiles, or 1 if all tiles have the same.
    """

    pattern: int
    tiles: int
    rows: int
    cols: int
    row_unit: int
    row_at: int
    row_range: int
    col_unit: int
    col_at: int
    col_range: int
    fresh: int
    pads: int
    mask: int
    mask_at: int
    mask_tiles: int


@dataclass(frozen=True)
class Plan:
    """Steps in order of execution, pattern by pattern.

    Attributes:
        steps: int64 (n, 15), one ``Step`` a row.
        ids: int32, the unit ids of all steps, and the mask ids of blocks.
        bits: uint8, packed masks of panels; bit c % 8 of byte c // 8 says that column c is kept.
        masks: uint8 (M + 1, size, size // 8), the distinct masks of blocks and a full one.
        ints: nq, nk, b, h, n and m of an N:M choice or 0 and 0, then the entries.
    """

    steps: Tensor
    ids: Tensor
    bits: Tensor
    masks: Tensor
    ints: tuple[int, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """The four tensors, as the operator takes them."""
        return [self.steps, self.ids, self.bits, self.masks]

    def unpack(self) -> list[Step]:
        """The steps as tuples."""
        return unpack_steps(self.steps)


def unpack_steps(steps: Tensor) -> list[Step]:
    """Rows of ``Plan.steps`` as tuples."""
    return [Step(*row) for row in steps.tolist()]


class Builder:
    """Collects steps, ids and masks of a plan."""

    def __init__(
        self,
        shape: tuple[int, int],
        lead: tuple[int, int],
        entry: Sequence[int],
        nm: tuple[int, int],
    ) -> None:
        self.shape = shape
        self.nm = nm
        self.distinct = max(entry, default=0) + 1
        self._ints = (*shape, *lead, *nm, *entry)
        self._steps: list[Step] = []
        self._ids: list[Tensor] = []
        self._bits: list[Tensor] = []
        self._lengths = {"ids": 0, "bits": 0}
        self._masks: Tensor | None = None
        # Per distinct pattern, the rows some step has touched; a row more than a tile can overhang.
        self._touched = torch.zeros(self.distinct, shape[0] + ALIGN, dtype=torch.bool)

    def add_ids(self, ids: Tensor) -> int:
        """Store ids; where they start."""
        at = self._lengths["ids"]
        self._ids.append(ids.reshape(-1).to(torch.int32))
        self._lengths["ids"] += ids.numel()
        return at

    def add_bits(self, bits: Tensor) -> int:
        """Store packed masks; where they start."""
        at = self._lengths["bits"]
        self._bits.append(bits.reshape(-1))
        self._lengths["bits"] += bits.numel()
        return at

    def set_masks(self, masks: Tensor) -> None:
        """The distinct masks of the block part; a full one follows the last."""
        self._masks = torch.cat([masks, masks.new_full((1, *masks.shape[1:]), 255)])

    def add_step(
        self,
        pattern: int,
        tiles: int,
        rows: tuple[int, Tensor | int],
        cols: tuple[int, Tensor | int],
        size: tuple[int, int],
        pads: bool = False,
        mask: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        """Append one step.

        Args:
            pattern: the distinct pattern.
            tiles: number of tiles.
            rows: (unit, ids), or (1, first row) of a range.
            cols: the same for columns.
            size: rows and columns of a tile.
            pads: some columns are >= nk.
            mask: kind, where it starts, masks stored.
        """
        row_unit, row_ids = rows
        if isinstance(row_ids, Tensor):
            flat = row_ids.reshape(-1).long()
            first = int(flat[0]) * row_unit
            if _consecutive(flat):
                row_ids = first
            whole = flat[:, None] * row_unit + torch.arange(row_unit)
        else:
            first = row_ids
            whole = torch.arange(first, first + tiles * size[0])
        touched = self._touched[pattern]
        fresh = not bool(touched[whole].any())
        touched[whole] = True
        col_unit, col_ids = cols
        row_at = (row_unit, *self._place(row_ids))
        col_at = (col_unit, *self._place(col_ids))
        self._steps.append(
            Step(pattern, tiles, *size, *row_at, *col_at, int(fresh), int(pads), *mask)
        )

    def _place(self, ids: Tensor | int) -> tuple[int, int]:
        """Where ids are stored and 0, or the start of a range and 1."""
        return (ids, 1) if isinstance(ids, int) else (self.add_ids(ids), 0)

    def finish(self) -> Plan:
        """The plan; steps sorted by pattern, in the order they came."""
        steps = sorted(self._steps, key=lambda step: step.pattern)
        table = torch.tensor(steps, dtype=torch.int64).reshape(-1, len(Step._fields))
        none = torch.zeros(0, dtype=torch.int32)
        return Plan(
            steps=table,
            ids=torch.cat(self._ids) if self._ids else none,
            bits=torch.cat(self._bits) if self._bits else none.to(torch.uint8),
            masks=torch.zeros(0, 1, 1, dtype=torch.uint8) if self._masks is None else self._masks,
            ints=self._ints,
        )


def _consecutive(ids: Tensor) -> bool:
    return bool((ids[1:] - ids[:-1] == 1).all())


def pack_columns(mask: Tensor) -> Tensor:
    """Bool (..., cols) to uint8 (..., ceil(cols / 8)), the missing columns dropped."""
    spare = -mask.shape[-1] % 8
    return pack_bits(torch.nn.functional.pad(mask, (0, spare)))
