"""RowLayout: the kept columns of each row (CSR), with the transposed order beside it.

A 3 × 6 matrix; x kept:

          0 1 2 3 4 5
        0 x · · · x ·        row_offsets  [0, 2, 2, 5]
        1 · · · · · ·        columns      [0, 4, 1, 2, 4]
        2 · x x · x ·

    column-major order   t_offsets [0, 1, 2, 3, 3, 5, 5]   t_rows [0, 2, 2, 0, 2]
                         t_order   [0, 2, 3, 1, 4]
    slots                one per kept position, in row order; none is dead
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from .arguments import as_shape, check_csr
from .checks import (
    check_common,
    check_nnz,
    check_offsets,
    check_range,
    check_rising,
    check_slots,
    check_tensor,
    check_transposed,
)
from .entries import INT32_LIMIT, default_entry, over_entries, transposed_order
from .layout import Layout, entry_slots_of, next_key, register_layout


@register_layout
@dataclass(frozen=True, eq=False, repr=False)
class RowLayout(Layout):
    """Kept columns row by row. U distinct patterns, NNZ kept positions of all of them together.

    Entry e holds the positions of pattern ``entry[e]`` in row order: slot
    ``entry_slots[e] + n`` is its n-th. All slots are live.

    Attributes:
        row_offsets: int64 (U * nq + 1,), where row ``u * nq + i`` starts.
        columns: int32 (NNZ,), rising inside a row.
        t_offsets: int64 (U * nk + 1,), where each column starts in column-major order.
        t_rows: int32 (NNZ,), row of each position in column-major order.
        t_order: int32 (NNZ,), its index in row order; int64 when NNZ >= 2**31.
    """

    shape: tuple[int, int]
    lead: tuple[int, int]
    entry: tuple[int, ...]
    entry_slots: tuple[int, ...]
    nnz: int
    row_offsets: Tensor
    columns: Tensor
    t_offsets: Tensor
    t_rows: Tensor
    t_order: Tensor
    key: int = field(default_factory=next_key)
    kind: ClassVar[str] = "row"

    @classmethod
    def from_csr(
        cls,
        shape: tuple[int, int],
        row_offsets: Tensor,
        columns: Tensor,
        lead: tuple[int, int] = (1, 1),
        entry: Sequence[int] | None = None,
    ) -> RowLayout:
        """A layout from CSR arrays; checks nothing expensive (see ``validate``).

        Args:
            shape: (nq, nk) of one entry.
            row_offsets: int (U * nq + 1,), where each row starts; the distinct patterns follow
                each other. Copied, and so are the columns: what becomes of the caller's arrays
                afterwards does not reach the layout.
            columns: int (NNZ,), rising inside a row.
            lead: (b, h).
            entry: the distinct pattern of each of the b * h entries; None = one for all.

        Raises:
            LayoutError: offsets that do not run up to the number of columns, or a column outside
                the shape. That columns rise is for ``validate``.
            DtypeError: no tensors of integers.
            ShapeError: a shape, lead or length that cannot be.
        """
        op = "RowLayout.from_csr"
        nq, nk = as_shape(op, shape)
        lead, entry, distinct = default_entry(op, lead, entry)
        arrays = (row_offsets, columns)
        check_csr(op, ("row_offsets", "columns"), arrays, distinct * nq, nk)
        t_offsets, t_rows, t_order = transposed_order(row_offsets, columns, nq, nk, distinct)
        counts = row_offsets[::nq].long().diff().tolist() if nq else [0] * distinct
        slots = entry_slots_of(entry, counts)
        return cls(
            shape=(nq, nk),
            lead=lead,
            entry=entry,
            entry_slots=slots,
            nnz=slots[-1],
            # Copies: the order above is checked and sorted once, and costs far more.
            row_offsets=row_offsets.to(torch.int64, copy=True).contiguous(),
            columns=columns.to(torch.int32, copy=True).contiguous(),
            t_offsets=t_offsets,
            t_rows=t_rows,
            t_order=t_order,
        )

    @property
    def distinct(self) -> int:
        """U, the number of distinct patterns stored."""
        return max(self.entry) + 1

    def live(self) -> Tensor | None:
        """None: every slot is a kept position."""
        return None

    def rows(self) -> Tensor:
        """int64 (NNZ,): the row of every distinct position, within its pattern."""
        return torch.repeat_interleave(
            torch.arange(self.shape[0], device=self.device).repeat(self.distinct),
            self.row_offsets.diff(),
        )

    def indices(self) -> tuple[Tensor, Tensor]:
        """(row, column) of every slot within its entry, int64 (slots,)."""
        return (
            over_entries(self.rows(), self.entry, self.entry_slots),
            over_entries(self.columns.long(), self.entry, self.entry_slots),
        )

    @cached_property
    def T(self) -> RowLayout:
        """The transposed layout, positions in column-major order; key negated."""
        count = self.columns.numel()
        order = self.t_order.long()
        columns = torch.empty_like(self.columns)
        columns[order] = torch.repeat_interleave(
            torch.arange(self.shape[1], dtype=torch.int32, device=self.device).repeat(
                self.distinct
            ),
            self.t_offsets.diff(),
        )
        back = torch.empty_like(self.t_order)
        back[order] = torch.arange(count, dtype=back.dtype, device=self.device)
        return RowLayout(
            shape=(self.shape[1], self.shape[0]),
            lead=self.lead,
            entry=self.entry,
            entry_slots=self.entry_slots,
            nnz=self.nnz,
            row_offsets=self.t_offsets,
            columns=self.t_rows,
            t_offsets=self.row_offsets,
            t_rows=columns,
            t_order=back,
            key=-self.key,
        )

    def transpose_slots(self) -> Tensor:
        """int64 (slots,): the slot of this layout each slot of ``T`` takes its value from."""
        return over_entries(self.t_order.long(), self.entry, self.entry_slots, shift=True)

    def validate(self) -> None:
        """Check every field against the others.

        Raises:
            LayoutError: the first field at fault, what it holds and what is expected.
        """
        check_common(self)
        (nq, nk), u = self.shape, self.distinct
        int32, int64 = torch.int32, torch.int64
        offsets = check_tensor(self, "row_offsets", (u * nq + 1,), int64)
        columns = check_tensor(self, "columns", (None,), int32)
        count = columns.numel()
        check_offsets(self, "row_offsets", offsets, count)
        check_range(self, "columns", columns, 0, nk)
        check_rising(self, "columns", offsets, columns, "row")
        types = (int64, int32, int32 if count < INT32_LIMIT else int64)
        check_transposed(self, offsets, columns, (nq, nk, u), types, ("row", "column", "position"))
        counts = offsets[::nq].diff().tolist() if nq else [0] * u
        check_slots(self, counts)
        check_nnz(self, self.entry_slots[-1])
