"""What the CPU kernels ask of one part of a layout, and what follows from the answers.

A part hands out *strips*: some of its matrix rows with all the slots it has there, as a dense
(R, W) matrix in the accumulation dtype. Strips are cut by the layout and the operand width alone,
never by batch or heads, so a result does not depend on what is computed beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of the widest operand of one strip: 2 MiB of float32, the L2 caches of two cores. Larger
# pieces fall out of cache between the passes over them, smaller ones pay for more calls.
CHUNK = 1 << 19

Rows = slice | Tensor


class Dropped(NamedTuple):
    """Positions that a run-time mask takes away: bool (padded rows or columns,), True = dropped."""

    mask: Tensor
    over_rows: bool


class Strip(ABC):
    """R rows of a part and the W slots that each of them has there.

    Attributes:
        rows: the R matrix rows, no row twice; may reach into the padding of row vectors.
    """

    rows: Rows

    @abstractmethod
    def load(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """(R, W), a writable copy of the strip's slots; dead ones hold whatever is there."""

    @abstractmethod
    def store(self, values: Tensor, m: Tensor) -> None:
        """Write (R, W) to the strip's slots, rounding to their dtype."""

    @abstractmethod
    def kill_static(self, m: Tensor, fill: float) -> None:
        """Set the dead slots of (R, W) to ``fill``, in place."""

    @abstractmethod
    def columns(self) -> Tensor:
        """int64, broadcastable to (R, W): column of every slot; dead ones name some column."""

    def kill(self, m: Tensor, fill: float, dropped: Dropped | None) -> None:
        """Set to ``fill`` what is dead or dropped, in place."""
        self.kill_static(m, fill)
        if dropped is not None:
            if dropped.over_rows:
                gone = take(dropped.mask, self.rows)[:, None]
            else:
                gone = dropped.mask[self.columns()]
            blank(m, bits_of(gone, m), fill)


class Part(ABC):
    """One distinct pattern of one part, bound to its plan.

    Attributes:
        padded: (rows, columns) that operands must be padded to (with anything finite).
        rows_once: every matrix row is in at most one strip, so a row's softmax needs no second
            look.
        exact: products touch live slots only, so that non-finite operands cannot spread.
    """

    padded: tuple[int, int]
    rows_once: bool = True
    exact: bool = False

    @abstractmethod
    def strips(self, width: int) -> Iterator[Strip]:
        """The strips of this part, in a fixed order, for operands of this many columns."""

    def clear_gaps(self, values: Tensor) -> None:  # noqa: B027  # most parts have none
        """Zero the slots that no strip covers."""

    @abstractmethod
    def sddmm(
        self, out: Tensor, q: Tensor, k: Tensor, scale: float, dropped: Dropped | None
    ) -> None:
        """Write every slot of this part: scale · q kᵀ, dead and dropped ones zero."""

    @abstractmethod
    def spmm(self, acc: Tensor, values: Tensor, x: Tensor, dropped: Dropped | None) -> None:
        """Add this part times x (padded columns, D) to acc (padded rows, D)."""

    @abstractmethod
    def spmm_t(self, acc: Tensor, values: Tensor, x: Tensor, dropped: Dropped | None) -> None:
        """Add the transpose of this part times x (padded rows, D) to acc (padded columns, D)."""

    def unpack(self, values: Tensor) -> Tensor:
        """The slots of this part in the order that strips expect; mostly as they are."""
        return values

    def add_nonfinite(
        self, acc: Tensor, values: Tensor, x: Tensor, dropped: Dropped | None, transposed: bool
    ) -> None:
        """Add what the non-finite elements of x contribute, slot by slot.

        The dense products are run with zeros in their place: 0 · NaN in a dead slot of a tile
        would otherwise reach rows that do not keep that key. Costs one look at every strip, and
        work for the slots that meet a non-finite row of x.

        Args:
            acc: (padded rows, D), or (padded columns, D) when transposed.
            values: slots of this part, unpacked.
            x: (padded columns, D), or (padded rows, D) when transposed, not all finite.
            dropped: run-time mask.
            transposed: multiply by the transpose.
        """
        finite = torch.isfinite(x)
        bad = ~finite.all(-1)
        width = max(x.shape[-1], 1)
        row_ids = torch.arange(self.padded[0])
        for strip in self.strips(width):
            m = strip.load(values, acc.dtype)
            live = torch.ones(m.shape, dtype=torch.bool)
            strip.kill(live, False, dropped)
            rows, columns = take(row_ids, strip.rows), strip.columns()
            live &= take(bad, strip.rows)[:, None] if transposed else bad[columns]
            hit = live.flatten().nonzero()[:, 0]
            for piece in hit.split(max(1, CHUNK // width)):
                i = rows[piece // m.shape[1]]
                j = columns.expand(m.shape).flatten()[piece]
                source, target = (i, j) if transposed else (j, i)
                more = m.flatten()[piece, None] * x[source]
                more.masked_fill_(finite[source], 0)
                acc.index_add_(0, target, more)


WORDS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bool: torch.bool}
_MINUS_INFINITY = {torch.int32: -(1 << 23), torch.int64: -(1 << 52)}


def bits_of(gone: Tensor, m: Tensor) -> Tensor:
    """A bool mask, True = dead, as the word mask that ``blank`` takes for m."""
    if m.dtype == torch.bool:
        return ~gone
    return gone.to(WORDS[m.dtype]).sub_(1)


def blank(m: Tensor, live: Tensor, fill: float) -> None:
    """Set the dead elements of m to 0 or −inf, in place, whatever they hold.

    Bit by bit, because that is vectorised: several times faster than masked_fill_ and where, and
    unlike a product with zero it swallows NaN.

    Args:
        m: float32, float64 or bool, of any strides.
        live: words of m's size, broadcastable to m: all ones where live, zero where dead.
        fill: 0 (False) or −inf.
    """
    words = m.view(WORDS[m.dtype])
    words.bitwise_and_(live)
    if fill:
        words.bitwise_or_(~live & _MINUS_INFINITY[words.dtype])


def take(t: Tensor, rows: Rows) -> Tensor:
    """``t[rows]``; a view for slices."""
    return t[rows] if isinstance(rows, slice) else t.index_select(0, rows)


def put(t: Tensor, rows: Rows, new: Tensor) -> None:
    """``t[rows] = new``."""
    if isinstance(rows, slice):
        t[rows] = new
    else:
        t.index_copy_(0, rows, new)


def add(t: Tensor, rows: Rows, more: Tensor) -> None:
    """``t[rows] += more`` for rows that hold no index twice."""
    if isinstance(rows, slice):
        t[rows] += more
    else:
        t.index_copy_(0, rows, t.index_select(0, rows).add_(more))
