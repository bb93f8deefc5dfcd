"""BlockLayout on the CPU: batched dense products over block rows with equally many blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..plans.plan import PartPlan
from .part import CHUNK, WORDS, Dropped, Part, Rows, Strip, add, bits_of, blank, take

# Above this many partly dead columns of blocks, masks are applied block by block in one go.
MOST_MASKED_COLUMNS = 16


def _inside(rows: Tensor, start: int, size: int) -> Rows:
    """Matrix rows of block rows."""
    if start >= 0:
        return slice(start * size, (start + len(rows)) * size)
    return (rows[:, None] * size + torch.arange(size)).flatten()


class Cuts:
    """Which of n × c blocks are partly dead, and how.

    Found once per strip, since a strip serves all heads. Masks are looked up block by block only
    where they differ: neighbouring block rows of a window cut their blocks alike.
    """

    def __init__(self, mask_index: Tensor, live: Tensor) -> None:
        self.live = live
        partial = mask_index >= 0
        self.columns: list[tuple[int, Tensor]] = []
        self.pairs: tuple[Tensor, Tensor, Tensor] | None = None
        where = partial.any(0).nonzero()[:, 0].tolist()
        if len(where) > MOST_MASKED_COLUMNS:
            n, c = partial.nonzero(as_tuple=True)
            self.pairs = n, c, mask_index[n, c]
            return
        for c in where:
            index = mask_index[:, c]
            alike = bool((index == index[0]).all())
            self.columns.append((c, index[:1] if alike else index))

    def apply(self, m: Tensor, fill: float) -> None:
        """Fill the dead elements of m (n, c, size, size), whatever its strides."""
        for c, index in self.columns:
            blank(m[:, c], self._words(index, m), fill)
        if self.pairs is not None:
            rows, columns, index = self.pairs
            picked = m[rows, columns]
            blank(picked, self._words(index, m), fill)
            m[rows, columns] = picked

    def _words(self, index: Tensor, m: Tensor) -> Tensor:
        words = self.live[index]
        return words.bool() if m.dtype == torch.bool else words.to(WORDS[m.dtype])


class BlockStrip(Strip):
    """n block rows of c blocks each, as the matrix (n * size, c * size)."""

    def __init__(self, part: BlockPart, rows: Tensor, count: int, start: int) -> None:
        self.part, self.count, self.n, self.start = part, count, len(rows), start
        self.block_rows = rows
        self.rows = _inside(rows, start, part.size)
        first = part.offsets[rows]
        self.span: slice | None = None
        if start >= 0:
            begin = int(first[0])
            self.span = slice(begin, begin + self.n * count)
            self.blocks = torch.arange(begin, self.span.stop)
        else:
            self.blocks = (first[:, None] + torch.arange(count)).flatten()
        self.block_columns = part.block_columns[self.blocks]
        index = part.mask_index[self.blocks].view(self.n, count)
        self.cuts = Cuts(index, part.live) if part.any_dead else None

    def _split(self, m: Tensor) -> Tensor:
        """(n * size, c * size) seen as (n, c, size, size)."""
        size = self.part.size
        return m.view(self.n, size, self.count, size).transpose(1, 2)

    def load(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        size = self.part.size
        picked = self.part.dense_blocks(values, self.span or self.blocks)
        out = torch.empty(self.n, size, self.count, size, dtype=dtype)
        out.copy_(picked.view(self.n, self.count, size, size).transpose(1, 2))
        return out.view(self.n * size, self.count * size)

    def store(self, values: Tensor, m: Tensor) -> None:
        size = self.part.size
        blocks, split = values.view(-1, size, size), self._split(m)
        if self.span:
            blocks[self.span].view(self.n, self.count, size, size).copy_(split)
        else:
            blocks.index_copy_(0, self.blocks, split.to(values.dtype).reshape(-1, size, size))

    def kill_static(self, m: Tensor, fill: float) -> None:
        if self.cuts is not None:
            self.cuts.apply(self._split(m), fill)

    def kill(self, m: Tensor, fill: float, dropped: Dropped | None) -> None:
        self.kill_static(m, fill)
        if dropped is not None:
            size = self.part.size
            mask = dropped.mask[: self.part.padded[0 if dropped.over_rows else 1]].view(-1, size)
            if dropped.over_rows:
                gone = mask[self.block_rows].view(self.n, 1, size, 1)
            else:
                gone = mask[self.block_columns].view(self.n, self.count, 1, size)
            blank(self._split(m), bits_of(gone, m), fill)

    def columns(self) -> Tensor:
        size = self.part.size
        inside = self.block_columns[:, None] * size + torch.arange(size)
        inside.clamp_(max=max(self.part.shape[1] - 1, 0))
        wide = inside.view(self.n, 1, self.count * size)
        return wide.expand(self.n, size, -1).reshape(self.n * size, -1)

    def neighbours(self, x: Tensor) -> Tensor:
        """The rows of x that each block row meets: (n, c * size, D)."""
        size, width = self.part.size, x.shape[1]
        cols = self.part.padded[1]
        blocks = x[:cols].view(cols // size, size * width)
        return blocks.index_select(0, self.block_columns).view(self.n, self.count * size, width)

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Scale · q kᵀ of the strip, (R, W)."""
        size = self.part.size
        left = take(q, self.rows)
        out = torch.empty(self.n, size, self.count * size, dtype=q.dtype)
        right = self.neighbours(k).transpose(1, 2)
        torch.baddbmm(out, left.view(self.n, size, q.shape[1]), right, beta=0, alpha=scale, out=out)
        return out.view(self.n * size, self.count * size)


class ColumnStrip:
    """n block columns of c blocks each, on top of each other."""

    def __init__(self, part: BlockPart, columns: Tensor, count: int, start: int) -> None:
        self.block_columns, self.count, self.n = columns, count, len(columns)
        self.columns = _inside(columns, start, part.size)
        order = (part.t_offsets[columns, None] + torch.arange(count)).flatten()
        self.block_rows = part.t_rows[order]
        self.blocks = part.t_order[order]
        index = part.mask_index[self.blocks].view(self.n, count)
        self.cuts = Cuts(index, part.live) if part.any_dead else None


class BlockPart(Part):
    """One distinct pattern of a BlockLayout."""

    def __init__(self, plan: PartPlan, shape: tuple[int, int], u: int) -> None:
        (self.size,) = plan.scalars
        self.shape = shape
        size = self.size
        nqb, nkb = -(-shape[0] // size), -(-shape[1] // size)
        self.padded = (nqb * size, nkb * size)
        offsets, columns, mask_index, self.live, self.table, self.members = plan.tensors[:6]
        t_offsets, t_rows, t_order, self.t_table, self.t_members = plan.tensors[6:]
        self.u = u
        # Index tensors run over all distinct patterns; from here on they start at this one.
        begin, end = int(offsets[u * nqb]), int(offsets[(u + 1) * nqb])
        self.offsets = offsets[u * nqb : (u + 1) * nqb] - begin
        self.block_columns = columns[begin:end]
        self.mask_index = mask_index[begin:end]
        self.any_dead = self.live.shape[0] > 1
        self.t_offsets = t_offsets[u * nkb : (u + 1) * nkb] - begin
        self.t_rows = t_rows[begin:end]
        self.t_order = t_order[begin:end] - begin
        # Strips by operand width; small, and used again for every head and batch.
        self._row_strips: dict[int, list[BlockStrip]] = {}
        self._column_strips: dict[int, list[ColumnStrip]] = {}

    def _pieces(
        self, table: Tensor, members: Tensor, width: int
    ) -> Iterator[tuple[Tensor, int, int]]:
        """(block rows, blocks in each, first if consecutive) of one strip after the other."""
        at = 0
        for u, count, n, start in table.tolist():
            if u == self.u:
                step = max(1, CHUNK // (count * self.size * max(self.size, width)))
                for begin in range(0, n, step):
                    stop = min(begin + step, n)
                    first = start + begin if start >= 0 else -1
                    yield members[at + begin : at + stop], count, first
            at += n

    def dense_blocks(self, values: Tensor, which: slice | Tensor) -> Tensor:
        """Blocks picked from the values, (n, size, size); a view for slices."""
        blocks = values.view(-1, self.size, self.size)
        return blocks[which] if isinstance(which, slice) else blocks.index_select(0, which)

    def strips(self, width: int) -> Iterator[Strip]:
        return iter(self.block_strips(width))

    def block_strips(self, width: int) -> list[BlockStrip]:
        """Strips whose columns are whole blocks."""
        if width not in self._row_strips:
            self._row_strips[width] = [
                BlockStrip(self, *piece) for piece in self._pieces(self.table, self.members, width)
            ]
        return self._row_strips[width]

    def column_strips(self, width: int) -> list[ColumnStrip]:
        """Strips of the transposed matrix."""
        if width not in self._column_strips:
            self._column_strips[width] = [
                ColumnStrip(self, *piece)
                for piece in self._pieces(self.t_table, self.t_members, width)
            ]
        return self._column_strips[width]

    def sddmm(
        self, out: Tensor, q: Tensor, k: Tensor, scale: float, dropped: Dropped | None
    ) -> None:
        for strip in self.block_strips(q.shape[1]):
            m = strip.scores(q, k, scale)
            strip.kill(m, 0.0, dropped)
            strip.store(out, m)

    def spmm(self, acc: Tensor, values: Tensor, x: Tensor, dropped: Dropped | None) -> None:
        for strip in self.block_strips(x.shape[1]):
            m = strip.load(values, acc.dtype)
            strip.kill(m, 0.0, dropped)
            product = torch.bmm(m.view(strip.n, self.size, -1), strip.neighbours(x))
            add(acc, strip.rows, product.view(-1, x.shape[1]))

    def spmm_t(self, acc: Tensor, values: Tensor, x: Tensor, dropped: Dropped | None) -> None:
        size, width = self.size, x.shape[1]
        operand = x[: self.padded[0]].view(-1, size * width)
        for strip in self.column_strips(width):
            n, count = strip.n, strip.count
            m = self.dense_blocks(values, strip.blocks).to(acc.dtype, copy=True)
            split = m.view(n, count, size, size)
            if strip.cuts is not None:
                strip.cuts.apply(split, 0.0)
            if dropped is not None:
                if dropped.over_rows:
                    gone = dropped.mask[: self.padded[0]].view(-1, size)[strip.block_rows]
                    blank(split, bits_of(gone.view(n, count, size, 1), m), 0.0)
                else:
                    gone = dropped.mask[: self.padded[1]].view(-1, size)[strip.block_columns]
                    blank(split, bits_of(gone.view(n, 1, 1, size), m), 0.0)
            gathered = operand.index_select(0, strip.block_rows).view(n, count * size, width)
            # Blocks on top of each other are already the transposed operand.
            product = torch.bmm(m.view(n, count * size, size).transpose(1, 2), gathered)
            add(acc, strip.columns, product.view(-1, width))
