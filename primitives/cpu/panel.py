"""PanelLayout on the CPU: one dense product per panel, in pieces of whole rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mixgrain.formats.entries import unpack_bits

from ..plans.plan import PartPlan
from .part import CHUNK, Dropped, Part, Rows, Strip, add, bits_of, blank, take


class PanelStrip(Strip):
    """Some rows of one panel.

    Attributes:
        cols: columns of the panel.
        first: slot of the strip's first element.
        bits: packed masks of the strip's rows, uint8 (R, pitch / 8), or None.
    """

    def __init__(self, rows: Rows, cols: Rows, shape: tuple[int, int], first: int) -> None:
        self.rows, self.cols, self.first = rows, cols, first
        self.height, self.width = shape
        self.pitch = -(-self.width // 8) * 8
        self.bits: Tensor | None = None

    def _slots(self, values: Tensor) -> Tensor:
        size = self.height * self.pitch
        return values[self.first : self.first + size].view(self.height, self.pitch)

    def load(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return self._slots(values).to(dtype, copy=True)

    def store(self, values: Tensor, m: Tensor) -> None:
        self._slots(values).copy_(m)

    def kill_static(self, m: Tensor, fill: float) -> None:
        if self.width < self.pitch:
            m[:, self.width :] = fill
        if self.bits is not None:
            blank(m, bits_of(~unpack_bits(self.bits), m), fill)

    def columns(self) -> Tensor:
        if isinstance(self.cols, slice):
            ids = torch.arange(self.cols.start, self.cols.stop)
        else:
            ids = self.cols
        # Padding repeats the last column, which is inside the shape.
        return torch.nn.functional.pad(ids, (0, self.pitch - self.width), value=int(ids[-1]))


class PanelPart(Part):
    """One distinct pattern of a PanelLayout. Panels may share rows, so softmax looks twice."""

    rows_once = False

    def __init__(self, plan: PartPlan, shape: tuple[int, int], u: int) -> None:
        table, self.row_list, self.col_list, self.mask_bits = plan.tensors
        self.padded = shape
        self.panels = [row for row in table.tolist() if row[0] == u]

    def strips(self, width: int) -> Iterator[PanelStrip]:
        for _, row, height, row_at, col, breadth, col_at, mask, slot in self.panels:
            if not height or not breadth:
                continue
            pitch = -(-breadth // 8) * 8
            cols: Rows = slice(col, col + breadth)
            if col < 0:
                cols = self.col_list[col_at : col_at + breadth]
            step = max(1, CHUNK // max(pitch, width))
            for begin in range(0, height, step):
                stop = min(begin + step, height)
                rows: Rows = slice(row + begin, row + stop)
                if row < 0:
                    rows = self.row_list[row_at + begin : row_at + stop]
                strip = PanelStrip(rows, cols, (stop - begin, breadth), slot + begin * pitch)
                if mask >= 0:
                    line = pitch // 8
                    bits = self.mask_bits[mask + begin * line : mask + stop * line]
                    strip.bits = bits.view(-1, line)
                yield strip

    def clear_gaps(self, values: Tensor) -> None:
        """Zero the slots between the panels, which start at multiples of 128."""
        at = 0
        for _, _, height, _, _, breadth, _, _, slot in self.panels:
            values[at:slot] = 0
            at = slot + height * (-(-breadth // 8) * 8)
        values[at:] = 0

    def sddmm(
        self, out: Tensor, q: Tensor, k: Tensor, scale: float, dropped: Dropped | None
    ) -> None:
        for strip in self.strips(q.shape[1]):
            left, right = take(q, strip.rows), take(k, strip.cols)
            m = q.new_empty(strip.height, strip.pitch)
            if strip.width == strip.pitch and left.shape[1]:
                torch.addmm(m, left, right.T, beta=0, alpha=scale, out=m)
            else:
                m[:, : strip.width] = (left @ right.T).mul_(scale)
            strip.kill(m, 0.0, dropped)
            strip.store(out, m)

    def spmm(self, acc: Tensor, values: Tensor, x: Tensor, dropped: Dropped | None) -> None:
        for strip in self.strips(x.shape[1]):
            m = strip.load(values, acc.dtype)
            strip.kill(m, 0.0, dropped)
            add(acc, strip.rows, m[:, : strip.width] @ take(x, strip.cols))

    def spmm_t(self, acc: Tensor, values: Tensor, x: Tensor, dropped: Dropped | None) -> None:
        for strip in self.strips(x.shape[1]):
            m = strip.load(values, acc.dtype)
            strip.kill(m, 0.0, dropped)
            add(acc, strip.cols, m[:, : strip.width].T @ take(x, strip.rows))
