"""Patterns from and to the block-sparse tensors of FlashAttention-4 (flash_attn.cute)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import as_flag, shown
from ..errors import LayoutError, ShapeError
from ..pattern import Pattern
from .arrays import as_shape
from .block_lists import MaskMod, block_lists, check_lists, mask_function
from .sources import Positions, as_block_size, as_blocks, as_sides


class FlashBlocks(NamedTuple):
    """The first fields are those of flash_attn.cute's BlockSparseTensorsTorch, in its order.

    Make one of them with ``BlockSparseTensorsTorch(*blocks[:4], block_size=blocks.block_size)``.

    Attributes:
        mask_block_cnt: int32 (b, h, block rows), partial blocks of each block row.
        mask_block_idx: int32 (b, h, block rows, width), their block columns, rising.
        full_block_cnt: int32 (b, h, block rows), full blocks.
        full_block_idx: int32 (b, h, block rows, width).
        block_size: (rows, columns) of a block.
        mask_mod: mask_mod(b, h, q, k) of torch tensors: which elements partial blocks keep.
        aux_tensors: (entry, table, masks), what mask_mod reads. A mask_mod for the kernels is
            written in CuTe DSL; with these as its aux_tensors it is the two lines that
            block_lists.mask_function gives. None is needed where mask_block_cnt is 0 throughout.
    """

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor
    full_block_idx: Tensor
    block_size: tuple[int, int]
    mask_mod: MaskMod
    aux_tensors: tuple[Tensor, Tensor, Tensor]


def to_flash_blocks(
    source: Positions,
    nq: int | None = None,
    nk: int | None = None,
    block_size: int | tuple[int, int] = 128,
    compact: bool = False,
) -> FlashBlocks:
    """The block-sparse tensors of a pattern or layout for FlashAttention-4, exact to the element.

    Args:
        source: a static pattern, a layout or a SparseTensor.
        nq: number of queries, for a pattern.
        nk: number of keys, for a pattern.
        block_size: (rows, columns) of the kernel's blocks, multiples of 16: (128, 128) on Hopper,
            (256, 128) where a block of threads takes two query tiles.
        compact: index tensors as wide as the longest list; newer releases take them.

    Returns:
        FlashBlocks of batch and head sizes 1 where the pattern is the same for all. Blocks at the
        edge are partial. Lost: nothing, if partial blocks come with the mask_mod.

    Raises:
        LayoutError: P.nm, a key mask, a block size.
        ShapeError: a pattern without nq and nk.
    """
    high, wide, size = as_block_size(block_size, "to_flash_blocks")
    layout = as_blocks(source, nq, nk, size, "to_flash_blocks")
    lists = block_lists(layout, high, wide, as_flag("to_flash_blocks", "compact", compact))
    mask_mod, tables = mask_function(layout)
    return FlashBlocks(
        lists.partial_counts,
        lists.partial,
        lists.full_counts,
        lists.full,
        (high, wide),
        mask_mod,
        tables,
    )


def from_flash_blocks(
    blocks: Any,
    shape: tuple[int, int],
    block_size: int | tuple[int, int] | None = None,
    mask_mod: MaskMod | None = None,
) -> Pattern:
    """The pattern of FlashAttention-4 block-sparse tensors, exact to the element; shape fixed.

    Args:
        blocks: FlashBlocks, a BlockSparseTensorsTorch, or a tuple (mask_block_cnt, mask_block_idx)
            or (mask_block_cnt, mask_block_idx, full_block_cnt, full_block_idx): int (B, H, block
            rows) and (B, H, block rows, width), B and H broadcast.
        shape: (nq, nk).
        block_size: (rows, columns) of a block; that of ``blocks`` if None.
        mask_mod: mask_mod(b, h, q, k) of torch tensors, asked about the elements of partial blocks;
            that of ``blocks`` if None.

    Raises:
        LayoutError: partial blocks without a mask_mod, no block size, variable-length tensors, a
            column out of range or listed twice.
        ShapeError: shapes that do not fit.
    """
    from torch.nn.attention.flex_attention import BlockMask, noop_mask

    from ..pattern_flex import from_flex

    who = "from_flash_blocks"
    nq, nk = as_shape(shape, who)
    given = block_size if block_size is not None else getattr(blocks, "block_size", None)
    if given is None:
        raise LayoutError(f"{who}: no block_size; give (rows, columns) of a block")
    high, wide = as_sides(given, f"{who}(block_size)")
    if not isinstance(blocks, Sequence):
        raise LayoutError(
            f"{who}: blocks is {shown(blocks)}, FlashBlocks, a BlockSparseTensorsTorch or a tuple "
            "of tensors expected"
        )
    if getattr(blocks, "cu_total_m_blocks", None) is not None:
        raise LayoutError(
            f"{who}: variable-length tensors (cu_total_m_blocks) given; pass one sequence at a time"
        )
    lists = tuple(blocks[:4])
    if len(lists) == 2:
        lists = (*lists, None, None)
    if len(lists) != 4 or lists[0] is None or lists[1] is None:
        raise LayoutError(
            f"{who}: {len(lists)} tensors given, mask_block_cnt and mask_block_idx, and perhaps "
            "full_block_cnt and full_block_idx, expected"
        )
    rows, across = -(-nq // high), -(-nk // wide)
    partial = check_lists(f"{who}(mask_block)", lists[0], lists[1], rows, across)
    full = None
    if lists[2] is not None:
        full = check_lists(f"{who}(full_block)", lists[2], lists[3], rows, across)
        try:
            lead = torch.broadcast_shapes(partial[0].shape[:2], full[0].shape[:2])
        except RuntimeError as error:
            raise ShapeError(
                f"{who}: partial blocks of (B, H) = {tuple(partial[0].shape[:2])}, full ones of "
                f"{tuple(full[0].shape[:2])}; expected the same, or 1"
            ) from error
        partial, full = (
            (counts.expand(*lead, -1), columns.expand(*lead, -1, -1))
            for counts, columns in (partial, full)
        )
    if mask_mod is None:
        mask_mod = getattr(blocks, "mask_mod", None)
    if mask_mod is not None and not callable(mask_mod):
        raise TypeError(f"{who}: mask_mod is {shown(mask_mod)}; expected a function (b, h, q, k)")
    if mask_mod is None:
        if bool((partial[0] > 0).any()):
            raise LayoutError(
                f"{who}: partial blocks without a mask_mod, which alone says what they keep; give "
                "mask_mod=, a function (b, h, q, k) of torch tensors"
            )
        mask_mod = noop_mask
    counts, columns = full if full is not None else (None, None)
    mask = BlockMask(
        (nq, nk), *partial, counts, columns, None, None, None, None, (high, wide), mask_mod
    )
    return from_flex(mask)
