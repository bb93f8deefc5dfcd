"""BlockLayout: kept square blocks, each full or partial.

Blocks of 16 (drawn as 2 × 2) of a 4 × 6 matrix; x kept, · not kept, blank: no block stored.

          0 1 2 3 4 5
        0 x x     x ·        block_offsets  [0, 2, 3]        block row 0 has blocks 0 and 1
        1 x x     x x        block_columns  [0, 2, 1]
        2     x ·            mask_index     [-1, 0, 0]       block 0 is full, 1 and 2 look alike
        3     x x            masks          [[10, 11]]       one distinct mask, rows "x ·", "x x"

    column-major order   t_offsets [0, 1, 2, 3]   t_rows [0, 1, 0]   t_order [0, 2, 1]
    slots                block by block in row order, row-major inside a block:
                         (0,0) (0,1) (1,0) (1,1) | (0,4) dead (1,4) (1,5) | (2,2) dead (3,2) (3,3)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from .arguments import as_shape, check_csr, check_dense, check_index, check_inside
from .checks import (
    check_common,
    check_nnz,
    check_offsets,
    check_range,
    check_rising,
    check_slots,
    check_tensor,
    check_transposed,
    fail,
)
from .entries import (
    count_bits,
    default_entry,
    over_entries,
    pack_bits,
    transposed_order,
    unpack_bits,
)
from .errors import DtypeError, LayoutError, ShapeError
from .layout import Layout, entry_slots_of, next_key, register_layout

SIZES = (16, 32, 64, 128)


def _check_masks(
    op: str, mask_index: Tensor, masks: Tensor, block_columns: Tensor, size: int
) -> None:
    """Every block's mask is there."""
    check_index(op, "mask_index", mask_index)
    check_dense(op, "masks", masks)
    if masks.dtype != torch.uint8:
        raise DtypeError(f"{op}: masks is {masks.dtype}; expected uint8, a bit for each column")
    if tuple(masks.shape[1:]) != (size, size // 8) or masks.dim() != 3:
        raise ShapeError(
            f"{op}: masks has shape {tuple(masks.shape)}; expected (M, {size}, {size // 8})"
        )
    if mask_index.shape != block_columns.shape:
        raise ShapeError(
            f"{op}: mask_index of {mask_index.numel()} for {block_columns.numel()} blocks"
        )
    if not mask_index.device == masks.device == block_columns.device:
        raise ShapeError(
            f"{op}: mask_index on {mask_index.device}, masks on {masks.device}, block_columns on "
            f"{block_columns.device}; move them to one device"
        )
    check_inside(op, "mask_index", mask_index, -1, masks.shape[0])


@register_layout
@dataclass(frozen=True, eq=False, repr=False)
class BlockLayout(Layout):
    """Square blocks in block-row order, each full or cut by one of a few distinct bit masks.

    ``nqb = ceil(nq / size)``, ``nkb = ceil(nk / size)``, U distinct patterns, NB blocks of all
    distinct patterns together, M distinct masks. Entry e holds the blocks of pattern
    ``entry[e]`` in row order; the element (r, c) of its local block n lies in slot
    ``entry_slots[e] + n * size**2 + r * size + c``.

    Attributes:
        size: side of a block: 16, 32, 64 or 128.
        block_offsets: int32 (U * nqb + 1,), where block row ``u * nqb + r`` starts.
        block_columns: int32 (NB,), rising inside a block row.
        mask_index: int32 (NB,), −1 = every element kept and inside the shape, else a row of masks.
        masks: uint8 (M, size, size // 8); bit c % 8 of byte c // 8 says that column c is kept.
        t_offsets: int32 (U * nkb + 1,), where each block column starts in column-major order.
        t_rows: int32 (NB,), block row (within its pattern) of each block in column-major order.
        t_order: int32 (NB,), its index in row order.
    """

    shape: tuple[int, int]
    lead: tuple[int, int]
    entry: tuple[int, ...]
    entry_slots: tuple[int, ...]
    nnz: int
    size: int
    block_offsets: Tensor
    block_columns: Tensor
    mask_index: Tensor
    masks: Tensor
    t_offsets: Tensor
    t_rows: Tensor
    t_order: Tensor
    key: int = field(default_factory=next_key)
    kind: ClassVar[str] = "block"

    @classmethod
    def from_blocks(
        cls,
        shape: tuple[int, int],
        size: int,
        block_offsets: Tensor,
        block_columns: Tensor,
        mask_index: Tensor | None = None,
        masks: Tensor | None = None,
        lead: tuple[int, int] = (1, 1),
        entry: Sequence[int] | None = None,
    ) -> BlockLayout:
        """A layout from its blocks in row order; checks nothing expensive (see ``validate``).

        Arrays are copied.

        Args:
            shape: (nq, nk) of one entry.
            size: side of a block: 16, 32, 64 or 128.
            block_offsets: int (U * nqb + 1,), where each block row starts.
            block_columns: int (NB,), rising inside a block row.
            mask_index: int (NB,), −1 = full, else a row of masks; None = all full, which needs
                nq and nk to be multiples of size wherever a block touches the edge.
            masks: uint8 (M, size, size // 8); bit c % 8 of byte c // 8 is column c.
            lead: (b, h).
            entry: the distinct pattern of each of the b * h entries; None = one for all.

        Raises:
            LayoutError: a size that is none of 16, 32, 64, 128; offsets that do not run up to the
                number of blocks, a column or mask that there is not.
            DtypeError: no tensors of integers.
            ShapeError: a shape, lead or length that cannot be.
        """
        op = "BlockLayout.from_blocks"
        if not isinstance(size, int) or size not in SIZES:
            raise LayoutError(f"{op}: size {size!r:.80}; choose one of {SIZES}")
        shape = as_shape(op, shape)
        lead, entry, distinct = default_entry(op, lead, entry)
        rows, cols = -(-shape[0] // size), -(-shape[1] // size)
        arrays = (block_offsets, block_columns)
        check_csr(op, ("block_offsets", "block_columns"), arrays, distinct * rows, cols)
        device = block_columns.device
        if mask_index is None:
            mask_index = torch.full(block_columns.shape, -1, dtype=torch.int32, device=device)
        if masks is None:
            masks = torch.empty(0, size, size // 8, dtype=torch.uint8, device=device)
        _check_masks(op, mask_index, masks, block_columns, size)
        t_offsets, t_rows, t_order = transposed_order(
            block_offsets, block_columns, rows, cols, distinct
        )
        made = cls(
            shape=shape,
            lead=lead,
            entry=entry,
            entry_slots=(0,),
            nnz=0,
            size=size,
            # Copies: what becomes of the caller's arrays must not reach what was checked.
            block_offsets=block_offsets.to(torch.int32, copy=True).contiguous(),
            block_columns=block_columns.to(torch.int32, copy=True).contiguous(),
            mask_index=mask_index.to(torch.int32, copy=True).contiguous(),
            masks=masks.clone(memory_format=torch.contiguous_format),
            t_offsets=t_offsets.to(torch.int32),
            t_rows=t_rows,
            t_order=t_order.to(torch.int32),
        )
        blocks, live = made._counts()
        slots = entry_slots_of(entry, [n * size * size for n in blocks])
        object.__setattr__(made, "entry_slots", slots)
        object.__setattr__(made, "nnz", sum(live[u] for u in entry))
        return made

    @property
    def block_shape(self) -> tuple[int, int]:
        """(nqb, nkb): block rows and block columns of one entry."""
        return -(-self.shape[0] // self.size), -(-self.shape[1] // self.size)

    @property
    def distinct(self) -> int:
        """U, the number of distinct patterns stored."""
        return max(self.entry) + 1

    def _counts(self) -> tuple[list[int], list[int]]:
        """Blocks and live slots of each distinct pattern."""
        rows, distinct = self.block_shape[0], self.distinct
        if not rows:
            return [0] * distinct, [0] * distinct
        ends = self.block_offsets[::rows].long()
        partial = count_bits(self.masks).sum(-1)
        table = torch.cat([partial, partial.new_full((1,), self.size**2)])
        running = torch.zeros(self.block_columns.numel() + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(table[self.mask_index.long()], 0, out=running[1:])
        return ends.diff().tolist(), running[ends].diff().tolist()

    def block_rows(self) -> Tensor:
        """int64 (NB,): the block row of every distinct block, within its pattern."""
        rows = self.block_shape[0]
        return torch.repeat_interleave(
            torch.arange(rows, device=self.device).repeat(self.distinct),
            self.block_offsets.diff().long(),
        )

    def live(self) -> Tensor | None:
        """Bool (slots,): kept positions; None when every slot is one."""
        if self.nnz == self.slots:
            return None
        table = unpack_bits(self.masks).reshape(-1, self.size * self.size)
        # A last row of ones, which index −1 finds.
        table = torch.cat([table, table.new_ones(1, self.size * self.size)])
        return over_entries(table[self.mask_index.long()].flatten(), self.entry, self.entry_slots)

    def indices(self) -> tuple[Tensor, Tensor]:
        """(row, column) of every slot within its entry, int64 (slots,); clamped to the shape."""
        inside = torch.arange(self.size, device=self.device)
        count = self.block_columns.numel()
        shape = (count, self.size, self.size)
        row = self.block_rows()[:, None] * self.size + inside
        column = self.block_columns.long()[:, None] * self.size + inside
        row = row.clamp(max=max(self.shape[0] - 1, 0))
        column = column.clamp(max=max(self.shape[1] - 1, 0))
        return (
            over_entries(row[:, :, None].expand(shape).flatten(), self.entry, self.entry_slots),
            over_entries(column[:, None, :].expand(shape).flatten(), self.entry, self.entry_slots),
        )

    @cached_property
    def T(self) -> BlockLayout:
        """The transposed layout: blocks in column-major order, each transposed; key negated."""
        order = self.t_order.long()
        columns = torch.empty_like(self.t_rows)
        columns[order] = torch.repeat_interleave(
            torch.arange(self.block_shape[1], dtype=torch.int32, device=self.device).repeat(
                self.distinct
            ),
            self.t_offsets.diff().long(),
        )
        # Row order as the transposed layout sees it: the inverse permutation.
        back = torch.empty_like(self.t_order)
        back[order] = torch.arange(order.numel(), dtype=torch.int32, device=self.device)
        return BlockLayout(
            shape=(self.shape[1], self.shape[0]),
            lead=self.lead,
            entry=self.entry,
            entry_slots=self.entry_slots,
            nnz=self.nnz,
            size=self.size,
            block_offsets=self.t_offsets,
            block_columns=self.t_rows,
            mask_index=self.mask_index[order],
            masks=pack_bits(unpack_bits(self.masks).transpose(-1, -2)),
            t_offsets=self.block_offsets,
            t_rows=columns,
            t_order=back,
            key=-self.key,
        )

    def transpose_slots(self) -> Tensor:
        """int64 (slots,): the slot of this layout each slot of ``T`` takes its value from."""
        area = self.size * self.size
        inside = torch.arange(area, device=self.device).view(self.size, self.size).T.reshape(-1)
        flat = (self.t_order.long()[:, None] * area + inside).flatten()
        return over_entries(flat, self.entry, self.entry_slots, shift=True)

    def validate(self) -> None:
        """Check every field against the others.

        Raises:
            LayoutError: the first field at fault, what it holds and what is expected.
        """
        check_common(self)
        if not isinstance(self.size, int) or self.size not in SIZES:
            raise fail(self, "size", f"{self.size}", f"one of {SIZES}")
        nqb, nkb = self.block_shape
        u, int32 = self.distinct, torch.int32
        offsets = check_tensor(self, "block_offsets", (u * nqb + 1,), int32)
        columns = check_tensor(self, "block_columns", (None,), int32)
        count = columns.numel()
        mask_index = check_tensor(self, "mask_index", (count,), int32)
        masks = check_tensor(self, "masks", (None, self.size, self.size // 8), torch.uint8)
        check_offsets(self, "block_offsets", offsets, count)
        check_range(self, "block_columns", columns, 0, nkb)
        check_rising(self, "block_columns", offsets, columns, "block row")
        check_range(self, "mask_index", mask_index, -1, masks.shape[0])
        self._check_edges()
        what = ("block row", "block column", "block")
        check_transposed(self, offsets, columns, (nqb, nkb, u), (int32, int32, int32), what)
        blocks, live = self._counts()
        check_slots(self, [n * self.size**2 for n in blocks])
        check_nnz(self, sum(live[i] for i in self.entry))

    def _check_edges(self) -> None:
        """No block keeps an element outside the shape."""
        (nq, nk), size = self.shape, self.size
        bits = unpack_bits(self.masks)
        bits = torch.cat([bits, bits.new_ones(1, size, size)])
        for axis, position, extent in (
            ("rows", self.block_rows(), nq),
            ("columns", self.block_columns.long(), nk),
        ):
            left = extent % size
            if not left:
                continue
            edge = (position == extent // size).nonzero().flatten()
            index = self.mask_index[edge].long()
            out = bits[:, left:] if axis == "rows" else bits[:, :, left:]
            bad = out.flatten(1).any(1)[index]
            if bool(bad.any()):
                at = int(edge[bad][0])
                raise fail(
                    self, "mask_index", f"block {at} keeps {axis} beyond {extent}",
                    f"a mask without {axis} beyond the shape {self.shape}",
                )  # fmt: skip
