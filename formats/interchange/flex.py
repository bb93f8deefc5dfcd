"""Patterns from and to FlexAttention's BlockMask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arguments import as_device
from ..patterns_given import from_block_mask
from .block_lists import block_states, listed, mask_function
from .sources import Positions, as_block_size, as_blocks, entry_table

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["from_block_mask", "to_block_mask"]


def to_block_mask(
    source: Positions,
    nq: int | None = None,
    nk: int | None = None,
    block_size: int | tuple[int, int] = 128,
    device: torch.device | str | None = None,
) -> BlockMask:
    """The BlockMask of a pattern or layout, exact to the element.

    Its ``mask_mod`` reads bit masks of the pattern, so that FlexAttention keeps the same elements
    eager (which ignores block lists and asks the mask_mod about everything) and compiled (which
    asks it in partial blocks only). No mask of elements is built; the lists have one place for
    each block of the matrix, as FlexAttention wants them.

    Args:
        source: a static pattern, a layout or a SparseTensor.
        nq: number of queries, for a pattern.
        nk: number of keys, for a pattern.
        block_size: rows and columns of a block, multiples of 16. Kernels on a GPU take multiples of
            their own tiles; 128 suits all.
        device: where the tensors go; those of the source if None.

    Returns:
        A BlockMask of batch and head sizes (1, 1), (1, H), (B, 1) or (B, H). Lost: what the pattern
        would be for another nq and nk.

    Raises:
        LayoutError: P.nm, a key mask, a block size.
        ShapeError: a pattern without nq and nk.
    """
    from torch.nn.attention.flex_attention import BlockMask

    high, wide, size = as_block_size(block_size, "to_block_mask")
    layout = as_blocks(source, nq, nk, size, "to_block_mask")
    if device is not None:
        as_device("to_block_mask", device, data=True)
        layout = layout.to(device)
    states, entry = block_states(layout, high, wide), entry_table(layout)

    def lists(grid: Tensor, kind: int) -> tuple[Tensor, Tensor]:
        counts, columns = listed(grid == kind, max(grid.shape[2], 1))
        return counts[entry], columns[entry]

    columns = states.transpose(1, 2)
    return BlockMask(
        layout.shape,
        *lists(states, 1),
        *lists(states, 2),
        *lists(columns, 1),
        *lists(columns, 2),
        (high, wide),
        mask_function(layout)[0],
    )
