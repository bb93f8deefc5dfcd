"""PanelLayout: dense rectangles whose rows and columns are ranges or lists, part of MixedLayout.

Three panels of a 6 × 8 matrix: row 4 is a global query (all columns), columns 1 and 6 are global
keys (all other rows), rows 0 … 1 gather columns 0, 3 and 5 for themselves under a bit mask.

          0 1 2 3 4 5 6 7
        0 c b · c · · b ·    a: rows [4]          × columns 0 … 7    no mask   pitch 8
        1 · b · c · c b ·    b: rows [0,1,2,3,5]  × columns [1,6]    no mask   pitch 8 (6 dead)
        2 · b · · · · b ·    c: rows 0 … 1        × columns [0,3,5]  mask      pitch 8 (5 dead)
        3 · b · · · · b ·
        4 a a a a a a a a    row_start       [-1, -1, 0]   row_count [1, 5, 2]
        5 · b · · · · b ·    row_list_offset [0, 1, 0]     row_list  [4 | 0, 1, 2, 3, 5]
                             col_start       [0, -1, -1]   col_count [8, 2, 3]
                             col_list_offset [0, 0, 2]     col_list  [1, 6 | 0, 3, 5]
                             mask_offset     [-1, -1, 0]   mask_bits [0b011, 0b110]
    slots                    panel by panel, row-major with the pitch; each panel starts at a
                             multiple of 128: slot_offsets [0, 128, 256, 384]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from .arguments import as_device, as_shape, check_sequence
from .entries import default_entry, distinct_starts, over_entries
from .errors import LayoutError
from .layout import Layout, entry_slots_of, next_key, register_layout
from .panel_arguments import check_arrays, check_written
from .panel_tools import (
    PITCH,
    PanelSlots,
    arrays_of,
    count_live,
    locate_slots,
    look_up,
    panel_live,
    slot_table,
    transposed_masks,
)


@register_layout
@dataclass(frozen=True, eq=False, repr=False)
class PanelLayout(Layout):
    """P dense rectangles (rows × columns, each a range or a list), disjoint inside one pattern.

    The element (r, c) of panel p of entry e, r < row_count[p], c < col_count[p], lies in slot
    ``entry_slots[e] + slot_offsets[p] + r * pitch[p] + c``.

    Attributes:
        panel_entry: int32 (P,), the distinct pattern each panel belongs to, rising.
        row_start: int64 (P,), >= 0: rows row_start … row_start + row_count − 1; −1: a list.
        row_count: int64 (P,).
        row_list_offset: int64 (P,), where a list starts in row_list; 0 for ranges.
        row_list: int32, rising inside a list.
        col_start: int64 (P,), the same five for columns.
        col_count: int64 (P,).
        col_list_offset: int64 (P,).
        col_list: int32, rising inside a list.
        mask_offset: int64 (P,), −1 = every element kept, else a byte of mask_bits.
        mask_bits: uint8; a masked panel has row_count rows of pitch / 8 bytes, bit c % 8 of byte
            c // 8 is column c.
        slot_offsets: int64 (P + 1,), where each panel starts inside its pattern's slots, multiples
            of 128; the last element is the end of the last panel, rounded up likewise.
    """

    shape: tuple[int, int]
    lead: tuple[int, int]
    entry: tuple[int, ...]
    entry_slots: tuple[int, ...]
    nnz: int
    panel_entry: Tensor
    row_start: Tensor
    row_count: Tensor
    row_list_offset: Tensor
    row_list: Tensor
    col_start: Tensor
    col_count: Tensor
    col_list_offset: Tensor
    col_list: Tensor
    mask_offset: Tensor
    mask_bits: Tensor
    slot_offsets: Tensor
    key: int = field(default_factory=next_key)
    kind: ClassVar[str] = "panel"

    @classmethod
    def from_arrays(
        cls,
        shape: tuple[int, int],
        panel_entry: Tensor,
        rows: tuple[Tensor, Tensor, Tensor, Tensor],
        cols: tuple[Tensor, Tensor, Tensor, Tensor],
        mask_offset: Tensor,
        mask_bits: Tensor,
        lead: tuple[int, int] = (1, 1),
        entry: Sequence[int] | None = None,
    ) -> PanelLayout:
        """A layout from panel arrays; checks nothing expensive (see ``validate``).

        Args:
            shape: (nq, nk) of one entry.
            panel_entry: int (P,), distinct pattern of each panel, rising.
            rows: (start, count, list_offset, list) as in the attributes.
            cols: the same for columns.
            mask_offset: int (P,), −1 or a byte of mask_bits.
            mask_bits: uint8.
            lead: (b, h).
            entry: the distinct pattern of each of the b * h entries; None = one for all.
        """
        op = "PanelLayout.from_arrays"
        shape = as_shape(op, shape)
        lead, entry, distinct = default_entry(op, lead, entry)
        check_arrays(op, panel_entry, rows, cols, mask_offset, mask_bits, distinct)
        panel_entry = panel_entry.to(torch.int32)
        slot_offsets, slots = slot_table(panel_entry, rows[1], cols[1], distinct)
        made = cls(
            shape=shape,
            lead=lead,
            entry=entry,
            entry_slots=entry_slots_of(entry, slots),
            nnz=0,
            panel_entry=panel_entry,
            row_start=rows[0].long(),
            row_count=rows[1].long(),
            row_list_offset=rows[2].long(),
            row_list=rows[3].to(torch.int32),
            col_start=cols[0].long(),
            col_count=cols[1].long(),
            col_list_offset=cols[2].long(),
            col_list=cols[3].to(torch.int32),
            mask_offset=mask_offset.long(),
            mask_bits=mask_bits,
            slot_offsets=slot_offsets,
        )
        live = count_live(made)
        object.__setattr__(made, "nnz", sum(live[u] for u in entry))
        return made

    @classmethod
    def from_panels(
        cls,
        shape: tuple[int, int],
        panels: Sequence[tuple[range | Tensor, range | Tensor, Tensor | None]],
        lead: tuple[int, int] = (1, 1),
        entry: Sequence[int] | None = None,
        panel_entry: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> PanelLayout:
        """A layout from a few panels written out.

        Args:
            shape: (nq, nk) of one entry.
            panels: (rows, columns, mask) each; rows and columns a range of step 1 or an int tensor
                of rising indices, mask None or bool (rows, columns).
            lead: (b, h).
            entry: the distinct pattern of each of the b * h entries; None = one for all.
            panel_entry: the distinct pattern of each panel, rising; None = pattern 0.
            device: where the index tensors go.
        """
        op = "PanelLayout.from_panels"
        device = as_device(op, device, data=True)
        check_written(op, panels)
        given = [0] * len(panels)
        if panel_entry is not None:
            given = list(check_sequence(op, "panel_entry", panel_entry))
        if len(given) != len(panels) or not all(isinstance(u, int) for u in given):
            raise LayoutError(
                f"{op}: panel_entry {given!r:.80} for {len(panels)} panels; expected an int for "
                "each of them"
            )
        rows, cols, mask_offset, mask_bits = arrays_of(panels, device)
        of = torch.tensor(given, dtype=torch.int32, device=device)
        return cls.from_arrays(shape, of, rows, cols, mask_offset, mask_bits, lead, entry)

    @property
    def distinct(self) -> int:
        """U, the number of distinct patterns stored."""
        return max(self.entry) + 1

    @property
    def panels(self) -> int:
        """P, the number of panels of all distinct patterns together."""
        return self.panel_entry.numel()

    @property
    def pitch(self) -> Tensor:
        """int64 (P,): slots from one row of a panel to the next, its columns rounded up to 8."""
        return (self.col_count + (PITCH - 1)) // PITCH * PITCH

    def rows_of(self, p: int) -> Tensor:
        """int64 (row_count[p],): the rows of panel p."""
        return _members(p, self.row_start, self.row_count, self.row_list_offset, self.row_list)

    def cols_of(self, p: int) -> Tensor:
        """int64 (col_count[p],): the columns of panel p."""
        return _members(p, self.col_start, self.col_count, self.col_list_offset, self.col_list)

    def members(self, axis: str, panel: Tensor, at: Tensor) -> Tensor:
        """The matrix rows or columns that are member ``at`` of each panel.

        Args:
            axis: "row" or "col".
            panel: int64 (n,), panels.
            at: int64 (n,), members of their row or column axis, counted from 0.

        Returns:
            int64 (n,).
        """
        if axis == "row":
            return look_up(panel, at, self.row_start, self.row_list_offset, self.row_list)
        return look_up(panel, at, self.col_start, self.col_list_offset, self.col_list)

    def _located(self) -> PanelSlots:
        return locate_slots(self)

    def live(self) -> Tensor | None:
        """Bool (slots,): kept positions, not padding; None when every slot is one."""
        if self.nnz == self.slots:
            return None
        return over_entries(panel_live(self, self._located()), self.entry, self.entry_slots)

    def indices(self) -> tuple[Tensor, Tensor]:
        """(row, column) of every slot within its entry, int64 (slots,).

        Padding names some position of its panel, the gaps between panels name (0, 0).
        """
        row, column = self._located().positions(self)
        return (
            over_entries(row, self.entry, self.entry_slots),
            over_entries(column, self.entry, self.entry_slots),
        )

    @cached_property
    def T(self) -> PanelLayout:
        """The transposed layout: rows and columns of every panel swapped; key negated."""
        mask_offset, mask_bits = transposed_masks(self)
        slot_offsets, slots = slot_table(
            self.panel_entry, self.col_count, self.row_count, self.distinct
        )
        return PanelLayout(
            shape=(self.shape[1], self.shape[0]),
            lead=self.lead,
            entry=self.entry,
            entry_slots=entry_slots_of(self.entry, slots),
            nnz=self.nnz,
            panel_entry=self.panel_entry,
            row_start=self.col_start,
            row_count=self.col_count,
            row_list_offset=self.col_list_offset,
            row_list=self.col_list,
            col_start=self.row_start,
            col_count=self.row_count,
            col_list_offset=self.row_list_offset,
            col_list=self.row_list,
            mask_offset=mask_offset,
            mask_bits=mask_bits,
            slot_offsets=slot_offsets,
            key=-self.key,
        )

    def transpose_slots(self) -> Tensor:
        """Where each slot of ``T`` takes its value from: int64 (slots of ``T``,), −1 = padding."""
        turned = self.T
        at = turned._located()
        inside = (at.panel >= 0) & (at.c < turned.col_count[at.panel])
        starts = torch.tensor(distinct_starts(self.entry, self.entry_slots), device=self.device)
        panel = at.panel.clamp(min=0)
        source = starts[self.panel_entry[panel].long()] + self.slot_offsets[panel]
        source = source + at.c * self.pitch[panel] + at.r
        flat = torch.where(inside, source, -1)
        if tuple(self.entry) == tuple(range(len(self.entry))):
            return flat
        pieces = []
        there = distinct_starts(turned.entry, turned.entry_slots)
        here = starts.tolist()
        for u, to in zip(self.entry, self.entry_slots[:-1], strict=True):
            piece = flat[there[u] : there[u + 1]]
            pieces.append(torch.where(piece < 0, piece, piece + (to - here[u])))
        return torch.cat(pieces)

    def validate(self) -> None:
        """Check every field against the others, and that no two panels of a pattern overlap.

        Raises:
            LayoutError: the first field at fault, what it holds and what is expected.
        """
        from .panel_checks import validate_panels

        validate_panels(self)


def _members(p: int, start: Tensor, count: Tensor, offset: Tensor, listed: Tensor) -> Tensor:
    first, n = int(start[p]), int(count[p])
    if first >= 0:
        return torch.arange(first, first + n, device=start.device)
    return listed[int(offset[p]) : int(offset[p]) + n].long()
