"""NMLayout on the CPU: groups are spread out to dense strips for products, packed for the rest."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mixgrain.formats.nm_metadata import ROWS, padded, unpack

from ..plans.nm import ENCODINGS
from ..plans.plan import PartPlan
from .block import BlockPart, BlockStrip
from .part import CHUNK, WORDS, Dropped, Part, Strip, blank


class NMStrip(Strip):
    """Some rows of an N:M matrix without a static pattern, their kept slots side by side."""

    def __init__(self, part: NMPart, begin: int, stop: int) -> None:
        self.part, self.begin, self.stop = part, begin, stop
        self.rows = slice(begin, stop)
        choice = part.choice(begin, stop)
        first = torch.arange(part.groups)[:, None] * part.m
        self.at = (choice.long() + first).view(stop - begin, -1)

    def _slots(self, values: Tensor) -> Tensor:
        return values.view(self.part.padded[0], -1)[self.begin : self.stop]

    def load(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return self._slots(values).to(dtype, copy=True)

    def store(self, values: Tensor, m: Tensor) -> None:
        self._slots(values).copy_(m)

    def kill_static(self, m: Tensor, fill: float) -> None:
        nq, nk = self.part.shape
        if self.stop > nq:
            m[max(nq - self.begin, 0) :] = fill
        # Only groups that reach the last column hold columns beyond it.
        tail = nk // self.part.m * self.part.n
        if tail < m.shape[1]:
            m[:, tail:].masked_fill_(self.at[:, tail:] >= nk, fill)

    def columns(self) -> Tensor:
        return self.at

    def dense(self, m: Tensor) -> Tensor:
        """(R, padded columns) with the kept slots where they belong, zeros elsewhere."""
        return m.new_zeros(m.shape[0], self.part.padded[1]).scatter_(1, self.at, m)


class NMPart(Part):
    """One entry of an NMLayout that stands alone."""

    def __init__(self, plan: PartPlan, shape: tuple[int, int], u: int) -> None:
        self.n, self.m, encoding = plan.scalars[:3]
        self.encoding = ENCODINGS[encoding]
        self.shape = shape
        rows, self.groups = padded(*shape, self.m, self.encoding)
        self.padded = (rows, self.groups * self.m)
        self.metadata = plan.tensors[0][u]

    def choice(self, begin: int, stop: int) -> Tensor:
        """uint8 (stop − begin, groups, n); bounds are multiples of 32 in the nibble encodings."""
        if self.encoding == "bytes":
            return self.metadata[begin:stop]
        # Hardware order has word columns outside rows, so pieces of 32 rows stand apart.
        split = self.metadata.view(-1, self.padded[0] // ROWS, 2 * ROWS)
        piece = split[:, begin // ROWS : stop // ROWS].reshape(1, stop - begin, -1)
        return unpack(piece, self.encoding)[0]

    def pieces(self, width: int) -> Iterator[tuple[int, int]]:
        """(first, last + 1) row of each strip, multiples of 32 wherever rows are padded to it."""
        rows, cols = self.padded
        if rows and cols:
            step = max(1, CHUNK // max(cols, width))
            step = max(step // ROWS, 1) * ROWS
            for begin in range(0, rows, step):
                yield begin, min(begin + step, rows)

    def strip(self, begin: int, stop: int) -> NMStrip:
        """One strip, read from the metadata as it is now."""
        return NMStrip(self, begin, stop)

    def nm_strips(self, width: int) -> Iterator[NMStrip]:
        """Strips with their own type."""
        for begin, stop in self.pieces(width):
            yield self.strip(begin, stop)

    def strips(self, width: int) -> Iterator[Strip]:
        return self.nm_strips(width)

    def sddmm(
        self, out: Tensor, q: Tensor, k: Tensor, scale: float, dropped: Dropped | None
    ) -> None:
        for strip in self.nm_strips(q.shape[1]):
            scores = (q[strip.rows] @ k.T).mul_(scale)
            m = scores.gather(1, strip.at)
            strip.kill(m, 0.0, dropped)
            strip.store(out, m)

    def spmm(self, acc: Tensor, values: Tensor, x: Tensor, dropped: Dropped | None) -> None:
        for strip in self.nm_strips(x.shape[1]):
            m = strip.load(values, acc.dtype)
            strip.kill(m, 0.0, dropped)
            acc[strip.rows] += strip.dense(m) @ x

    def spmm_t(self, acc: Tensor, values: Tensor, x: Tensor, dropped: Dropped | None) -> None:
        for strip in self.nm_strips(x.shape[1]):
            m = strip.load(values, acc.dtype)
            strip.kill(m, 0.0, dropped)
            acc += strip.dense(m).T @ x[strip.rows]


class NMWithinStrip(Strip):
    """Block rows of the static pattern with the kept slots of c blocks side by side."""

    def __init__(self, part: NMWithinPart, inner: BlockStrip) -> None:
        self.part, self.inner, self.rows = part, inner, inner.rows
        self.where = inner.span or inner.blocks
        self.choice = part.choice(self.where)  # int64 (blocks, size, G, n)

    def side_by_side(self, blocks: Tensor) -> Tensor:
        """(blocks, size, …) as (n * size, c * …)."""
        inner, size = self.inner, self.part.size
        split = blocks.view(inner.n, inner.count, size, -1).transpose(1, 2)
        return split.reshape(inner.n * size, -1)

    def apart(self, m: Tensor) -> Tensor:
        """The inverse: (n, c, size, slots a block row)."""
        inner, size = self.inner, self.part.size
        return m.view(inner.n, size, inner.count, -1).transpose(1, 2)

    def load(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        packed = self.part.packed(values)
        if isinstance(self.where, slice):
            return self.side_by_side(packed[self.where].to(dtype, copy=True))
        return self.side_by_side(packed.index_select(0, self.where).to(dtype))

    def store(self, values: Tensor, m: Tensor) -> None:
        packed, split = self.part.packed(values), self.apart(m)
        if isinstance(self.where, slice):
            packed[self.where].view(split.shape).copy_(split)
        else:
            packed.index_copy_(0, self.where, split.to(values.dtype).reshape(-1, *packed.shape[1:]))

    def kill_static(self, m: Tensor, fill: float) -> None:
        part = self.part
        if part.any_dead:
            live = part.live[part.mask_index[self.inner.blocks]]
            live = self.side_by_side(live.unflatten(-1, (-1, part.m)).gather(-1, self.choice))
            blank(m, live.bool() if m.dtype == torch.bool else live.to(WORDS[m.dtype]), fill)

    def columns(self) -> Tensor:
        part = self.part
        first = self.inner.block_columns[:, None, None, None] * part.size
        groups = torch.arange(part.size // part.m)[:, None] * part.m
        return self.side_by_side(self.choice + first + groups)


class NMWithinPart(BlockPart):
    """One entry of an NMLayout within a BlockLayout: its blocks, packed n of every m."""

    def __init__(self, plan: PartPlan, shape: tuple[int, int], u: int) -> None:
        self.n, self.m, encoding, _, size, *used = plan.scalars
        inner = plan._replace(tensors=plan.tensors[1:], scalars=[size])
        super().__init__(inner, shape, used[u])
        self.encoding = ENCODINGS[encoding]
        area = size * size // self.m * self.n
        first, last = plan.starts[u], plan.starts[u + 1]
        self.metadata = plan.tensors[0][first // area : last // area]

    def packed(self, values: Tensor) -> Tensor:
        """The slots as (blocks, size, slots a block row)."""
        return values.view(-1, self.size, self.size // self.m * self.n)

    def choice(self, which: slice | Tensor) -> Tensor:
        """Index within its group of every slot of some blocks, int64 (blocks, size, G, n)."""
        picked = self.metadata[which]
        return unpack(picked, self.encoding).long()

    def dense_blocks(self, values: Tensor, which: slice | Tensor) -> Tensor:
        choice = self.choice(which)
        packed = self.packed(values)[which].view(choice.shape)
        out = packed.new_zeros(*choice.shape[:-1], self.m)
        return out.scatter_(-1, choice, packed).view(-1, self.size, self.size)

    def within_strip(self, inner: BlockStrip) -> NMWithinStrip:
        """One packed strip, read from the metadata as it is now."""
        return NMWithinStrip(self, inner)

    def within_strips(self, width: int) -> Iterator[NMWithinStrip]:
        """Packed strips with their own type."""
        for inner in self.block_strips(width):
            yield self.within_strip(inner)

    def strips(self, width: int) -> Iterator[Strip]:
        return self.within_strips(width)

    def sddmm(
        self, out: Tensor, q: Tensor, k: Tensor, scale: float, dropped: Dropped | None
    ) -> None:
        for strip in self.within_strips(q.shape[1]):
            scores = strip.inner.scores(q, k, scale)
            split = strip.apart(scores).reshape(-1, self.size, self.size // self.m, self.m)
            m = strip.side_by_side(split.gather(-1, strip.choice))
            strip.kill(m, 0.0, dropped)
            strip.store(out, m)


class NMTransposed(Part):
    """The flagged view: the same slots, rows and columns exchanged. Has products, no strips."""

    def __init__(self, stored: Part) -> None:
        self.stored = stored
        self.padded = stored.padded[::-1]

    def strips(self, width: int) -> Iterator[Strip]:
        raise NotImplementedError("the rows of a transposed NMLayout are not stored together")

    def sddmm(
        self, out: Tensor, q: Tensor, k: Tensor, scale: float, dropped: Dropped | None
    ) -> None:
        self.stored.sddmm(out, k, q, scale, _turned(dropped))

    def spmm(self, acc: Tensor, values: Tensor, x: Tensor, dropped: Dropped | None) -> None:
        self.stored.spmm_t(acc, values, x, _turned(dropped))

    def spmm_t(self, acc: Tensor, values: Tensor, x: Tensor, dropped: Dropped | None) -> None:
        self.stored.spmm(acc, values, x, _turned(dropped))

    def add_nonfinite(
        self, acc: Tensor, values: Tensor, x: Tensor, dropped: Dropped | None, transposed: bool
    ) -> None:
        self.stored.add_nonfinite(acc, values, x, _turned(dropped), not transposed)


def _turned(dropped: Dropped | None) -> Dropped | None:
    return None if dropped is None else Dropped(dropped.mask, not dropped.over_rows)


def nm_part(plan: PartPlan, shape: tuple[int, int], u: int) -> Part:
    """One entry of an NMLayout."""
    return (NMWithinPart if plan.scalars[3] else NMPart)(plan, shape, u)


def nm_transposed(plan: PartPlan, shape: tuple[int, int], u: int) -> Part:
    """One entry of an NMLayout's transpose."""
    return NMTransposed(nm_part(plan, shape[::-1], u))
