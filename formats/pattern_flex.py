"""Patterns from a BlockMask of torch's FlexAttention, exact to the element."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from .arguments import as_shape, check_index, check_pair, kind_of
from .cache import Reference
from .errors import DtypeError, LayoutError, ShapeError
from .pattern import Frame, Pattern
from .pattern_algebra import table
from .pattern_fixed import require_shape
from .runs import Runs, from_intervals, from_mask, from_sorted_pairs
from .source import Source

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Elements of partial blocks that are evaluated at a time.
ELEMENTS_PER_CHUNK = 1 << 22


@dataclass(frozen=True)
class MaskFunction:
    """A mask_mod and the (batch entry, head) it is called with."""

    call: MaskMod
    b: int
    h: int


@dataclass(frozen=True, eq=False, repr=False)
class FlexBlocks(Pattern):
    """One (batch entry, head) of a BlockMask: full blocks, and partial ones masked by `function`.

    A block list is (counts, columns): int32 (block rows) and (block rows, at most so many).
    """

    partial: tuple[Source, Source]
    full: tuple[Source, Source] | None
    function: MaskFunction
    size: tuple[int, int]
    shape: tuple[int, int]

    def expression_key(self) -> Hashable:
        # The function itself would be kept alive by the key, with all that its closure holds.
        lists = self._lists()
        name, b, h = Reference(self.function.call), self.function.b, self.function.h
        return (type(self), tuple(s.key() for s in lists), name, b, h, self.size, self.shape)

    def check(self, frame: Frame) -> None:
        require_shape("from_block_mask", self.shape, frame)

    def runs(self, frame: Frame, rows: Tensor) -> Runs:
        self.check(frame)
        first, *others = self._lists()
        return first.derive("runs", frame.device, self._all, *others).select(rows)

    def runs_bound(self, frame: Frame) -> int:
        return max(1, (frame.nk + 1) // 2)

    def _lists(self) -> list[Source]:
        return [*self.partial] if self.full is None else [*self.partial, *self.full]

    def _all(self, *lists: Tensor) -> Runs:
        device = lists[0].device
        nq, nk = self.shape
        high, wide = self.size
        none = torch.empty(0, dtype=torch.int64, device=device)
        parts = [(none, none, none)]
        partial = self._pairs(lists[0], lists[1])
        if len(lists) == 4:
            row, col = self._pairs(lists[2], lists[3])
            across = -(-nk // wide)
            if bool(torch.isin(row * across + col, partial[0] * across + partial[1]).any()):
                raise LayoutError(
                    "from_block_mask: a block is listed both as full and as partial, so a kernel "
                    "would count it twice; list it in one of the two"
                )
            spans = from_sorted_pairs(row, col, lists[2].numel())
            # Neighbouring full blocks are one run before they are repeated for each of their rows.
            tall = spans.select(torch.arange(nq, device=device) // high)
            parts.append((tall.row_of_run(), tall.lo * wide, (tall.hi * wide).clamp_(max=nk)))
        row, col = partial
        step = max(1, ELEMENTS_PER_CHUNK // (high * wide))
        for first in range(0, row.numel(), step):
            top, left = row[first : first + step] * high, col[first : first + step] * wide
            inside = from_mask(self._evaluate(top, left).reshape(-1, wide))
            line = inside.row_of_run()
            block = line // high
            parts.append(
                (top[block] + line % high, left[block] + inside.lo, left[block] + inside.hi)
            )
        rows, lo, hi = (torch.cat(ends) for ends in zip(*parts, strict=True))
        return from_intervals(rows, lo, hi, nq, nk)

    def _pairs(self, counts: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """(block row, block column) of a block list in C order."""
        counts = counts.long()  # 8-bit numbers would be compared with a wrapped limit
        slot = torch.arange(columns.shape[1], device=columns.device)
        if bool(((counts < 0) | (counts > columns.shape[1])).any()):
            raise LayoutError(
                f"from_block_mask: counts from {int(counts.min())} to {int(counts.max())} for "
                f"lists of {columns.shape[1]}; a count says how many of its list are blocks"
            )
        row, at = torch.nonzero(slot < counts[:, None], as_tuple=True)
        col = columns[row, at].long()
        width = -(-self.shape[1] // self.size[1])
        if bool(((col < 0) | (col >= width)).any()):
            raise LayoutError(f"from_block_mask: block columns must lie within [0, {width})")
        line = (row * width + col).sort()[0]
        if bool((line[1:] == line[:-1]).any()):
            raise LayoutError(
                "from_block_mask: a block column is listed twice in a block row, which a kernel "
                "would count twice; list it once"
            )
        return line // max(width, 1), line % max(width, 1)

    def _evaluate(self, top: Tensor, left: Tensor) -> Tensor:
        """The masks of blocks with the given first rows and columns, bool (blocks, high, wide)."""
        nq, nk = self.shape
        high, wide = self.size
        call = self.function.call
        b, h = (torch.tensor(k, device=top.device) for k in (self.function.b, self.function.h))

        def of_block(block: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
            # Blocks may hang over the edge, where a table that the function reads has no entry.
            q, k = top[block] + i, left[block] + j
            kept = call(b, h, q.clamp(max=nq - 1), k.clamp(max=nk - 1))
            if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
                given = kept.dtype if isinstance(kept, Tensor) else f"a {kind_of(kept)}"
                raise DtypeError(
                    f"from_block_mask: mask_mod gives {given}; expected a bool tensor, as "
                    "FlexAttention does: compare the numbers"
                )
            return kept & (q < nq) & (k < nk)

        # create_mask maps a function over all (batch, head, query, key); here a block is a batch
        # entry.
        mask: Tensor = create_mask(of_block, top.numel(), 1, high, wide, str(top.device))
        return mask[:, 0]


def _check_lists(who: str, name: str, counts: object, columns: object, like: object) -> None:
    """Integers (B, H, rows) and (B, H, rows, width), with batch, heads and rows of `like`."""
    check_index(who, f"{name}_num_blocks", counts, 3)
    check_index(who, f"{name}_indices", columns, 4)
    check_index(who, "kv_indices", like, 4)
    assert isinstance(counts, Tensor) and isinstance(columns, Tensor) and isinstance(like, Tensor)
    fits = counts.shape == columns.shape[:3] == like.shape[:3]
    if not fits or not counts.device == columns.device == like.device:
        raise ShapeError(
            f"{who}: {name}_num_blocks {tuple(counts.shape)} on {counts.device}, {name}_indices "
            f"{tuple(columns.shape)} on {columns.device}; expected {tuple(like.shape[:3])} and "
            f"one dimension more, on {like.device}"
        )
    if not counts.shape[0] * counts.shape[1]:
        raise LayoutError(f"{who}: {name}_indices {tuple(columns.shape)} has no entry to keep")


def from_flex(mask: BlockMask) -> Pattern:
    """The pattern of a BlockMask; see patterns.from_block_mask."""
    counts, columns = mask.kv_num_blocks, mask.kv_indices
    who = "from_block_mask"
    shape = as_shape(who, mask.seq_lengths)
    size = check_pair(who, "BLOCK_SIZE", mask.BLOCK_SIZE)
    if min(size) < 1:
        raise LayoutError(f"{who}: BLOCK_SIZE {size} given, both at least 1 expected")
    _check_lists(who, "kv", counts, columns, columns)
    block_rows = -(-shape[0] // size[0])
    if columns.ndim != 4 or columns.shape[2] != block_rows:
        raise ShapeError(
            f"from_block_mask: kv_indices of shape {tuple(columns.shape)} given, "
            f"(B, H, {block_rows} block rows, block columns) expected; pass the whole BlockMask, "
            "not a slice of its rows"
        )
    partial = (Source(counts), Source(columns))
    full = None
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        full = (Source(mask.full_kv_num_blocks), Source(mask.full_kv_indices))
        _check_lists(who, "full_kv", full[0].base, full[1].base, columns)

    def at(b: int, h: int) -> Pattern:
        function = MaskFunction(mask.mask_mod, b, h)
        entries = (partial[0].entry(b, h), partial[1].entry(b, h))
        full_entries = None if full is None else (full[0].entry(b, h), full[1].entry(b, h))
        return FlexBlocks(entries, full_entries, function, size, shape)

    batch, heads = int(columns.shape[0]), int(columns.shape[1])
    if (batch, heads) == (1, 1):
        return at(0, 0)
    items = [at(b, h) for b in range(batch) for h in range(heads)]
    return table((batch, heads), items, over_batch=batch > 1)
