"""What the layouts share: entries over distinct patterns, transposed orders, bits, checks.

Equal (batch, head) entries of a layout are stored once. Index arrays therefore run over the
*distinct* patterns, one after the other, and these helpers spread them over the entries:

    entry        (0, 1, 0)          entries 0 and 2 share their positions
    distinct     [a a a | b b]      what is stored
    entries      [a a a | b b | a a a]     entry_slots (0, 3, 5, 8)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from .arguments import as_entry, as_lead

INT32_LIMIT = 2**31


def distinct_starts(entry: Sequence[int], entry_slots: Sequence[int]) -> list[int]:
    """Where each distinct pattern's slots start when all are laid end to end; the last is the end.

    Args:
        entry: the distinct pattern of each entry.
        entry_slots: where each entry's slots start, and the end.
    """
    sizes = [0] * (max(entry) + 1)
    for u, (start, stop) in zip(entry, itertools.pairwise(entry_slots), strict=True):
        sizes[u] = stop - start
    return [0, *itertools.accumulate(sizes)]


def over_entries(
    flat: Tensor, entry: Sequence[int], entry_slots: Sequence[int], shift: bool = False
) -> Tensor:
    """Spread a per-slot tensor of the distinct patterns over all entries.

    Args:
        flat: (slots of the distinct patterns,).
        entry: the distinct pattern of each entry.
        entry_slots: where each entry's slots start, and the end.
        shift: ``flat`` holds slots (−1 = none) counted over the distinct patterns; make them
            slots counted over the entries.

    Returns:
        (slots,), ``flat`` itself where every entry is distinct and in order.
    """
    if tuple(entry) == tuple(range(len(entry))):
        return flat
    starts = distinct_starts(entry, entry_slots)
    pieces = []
    for u, to in zip(entry, entry_slots[:-1], strict=True):
        piece = flat[starts[u] : starts[u + 1]]
        if shift:
            piece = torch.where(piece < 0, piece, piece + (to - starts[u]))
        pieces.append(piece)
    return torch.cat(pieces)


def transposed_order(
    offsets: Tensor, columns: Tensor, rows: int, cols: int, distinct: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The column-major order of CSR elements.

    Args:
        offsets: (distinct * rows + 1,) int, where each row starts.
        columns: (n,) int, the column of each element, rising in a row.
        rows: rows of one distinct pattern.
        cols: columns of one distinct pattern.
        distinct: number of distinct patterns.

    Returns:
        int64 (distinct * cols + 1,) where each column starts; int32 (n,) row of each element in
        column-major order; (n,) its index in row-major order, int32 where that fits.
    """
    count = columns.numel()
    index = torch.int32 if count < INT32_LIMIT else torch.int64
    wide = columns.long()
    if distinct > 1:
        per_pattern = offsets[::rows].diff() if rows else offsets.new_zeros(distinct)
        wide = wide + torch.repeat_interleave(
            torch.arange(distinct, device=columns.device) * cols, per_pattern.long()
        )
    if columns.device.type == "cpu":
        # A counting sort is linear and several times faster than torch.sort.
        narrow = np.int32 if max(count, distinct * max(cols, rows)) < INT32_LIMIT else np.int64
        from scipy.sparse import csr_array  # a sixth of a second, only when a layout is made

        matrix = csr_array(
            (
                np.arange(count, dtype=narrow),
                wide.numpy().astype(narrow),
                offsets.numpy().astype(narrow),
            ),
            shape=(distinct * rows, distinct * cols),
        ).tocsc()
        order = torch.from_numpy(np.asarray(matrix.data)).to(index)
        row = torch.from_numpy(np.asarray(matrix.indices)).long()
        t_offsets = torch.from_numpy(np.asarray(matrix.indptr)).long()
    else:
        order = torch.argsort(wide, stable=True)
        all_rows = torch.arange(distinct * rows, device=columns.device)
        row = torch.repeat_interleave(all_rows, offsets.diff().long())[order]
        t_offsets = wide.new_zeros(distinct * cols + 1)
        torch.cumsum(torch.bincount(wide, minlength=distinct * cols), 0, out=t_offsets[1:])
        order = order.to(index)
    if distinct > 1 and rows:
        row = row % rows
    return t_offsets, row.to(torch.int32), order


def unpack_bits(packed: Tensor) -> Tensor:
    """Bool (…, 8 * n) from little-endian uint8 (…, n): bit c % 8 of byte c // 8 is element c."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[..., None] >> shifts) & 1
    return bits.flatten(-2).bool() if packed.dim() > 0 else bits.bool()


def pack_bits(bits: Tensor) -> Tensor:
    """Little-endian uint8 (…, n) from bool (…, 8 * n); the inverse of ``unpack_bits``."""
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    grouped = (
        bits.unflatten(-1, (-1, 8))
        if bits.numel()
        else bits.reshape(*bits.shape[:-1], bits.shape[-1] // 8, 8)
    )
    return cast(Tensor, (grouped.to(torch.uint8) * weights).sum(-1, dtype=torch.uint8))


def count_bits(packed: Tensor) -> Tensor:
    """int64 (…): set bits along the last dimension of a uint8 tensor."""
    table = torch.tensor([i.bit_count() for i in range(256)], device=packed.device)
    return table[packed.long()].sum(-1)


def default_entry(
    op: str, lead: tuple[int, int], entry: Sequence[int] | None
) -> tuple[tuple[int, int], tuple[int, ...], int]:
    """Lead, entry and the number of distinct patterns; entry None = one pattern for all.

    Raises:
        ShapeError: lead is no pair of ints >= 1.
        LayoutError: entry does not say which pattern each of the b * h entries uses.
    """
    lead = as_lead(op, lead)
    made = as_entry(op, lead, entry)
    return lead, made, max(made) + 1
