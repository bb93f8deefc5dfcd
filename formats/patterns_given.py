"""Constructors of patterns whose pairs or blocks are given one by one; see patterns.py."""

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from .arguments import kind_of
from .errors import LayoutError, ShapeError
from .pattern import Pattern
from .pattern_algebra import table
from .pattern_arguments import as_integer
from .pattern_fixed import Blocks, Csr, Dense
from .source import Source, booleans, integers

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from .layout import Layout


# What is read of a BlockMask.
_BLOCK_MASK = (
    "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "seq_lengths",
    "BLOCK_SIZE", "mask_mod",
)  # fmt: skip


def blocks(block_mask: Any, size: int) -> Pattern:
    """The blocks of size × size pairs that a mask of blocks keeps, counted from row 0 and key 0.

    Args:
        block_mask: bool (ceil(nq / size), ceil(nk / size)), or with leading (H) or (B, 1 or H).
        size: rows and columns of a block.

    Raises:
        DtypeError: not bool.
        ShapeError: not 2-D to 4-D.
        LayoutError: size < 1; later, a shape (nq, nk) that has other blocks.
    """
    side = as_integer(size, "blocks(size)", 1)
    return _by_lead(booleans(block_mask, "blocks"), lambda mask: Blocks(mask, side))


def from_dense(mask: Any) -> Pattern:
    """What a dense mask keeps (True = kept); its shape is fixed.

    Args:
        mask: bool (nq, nk), (H, nq, nk) or (B, 1 or H, nq, nk).

    Raises:
        DtypeError: not bool.
        ShapeError: not 2-D to 4-D.
    """
    return _by_lead(booleans(mask, "from_dense"), Dense)


def from_csr(indptr: Any, indices: Any, shape: tuple[int, int]) -> Pattern:
    """The pairs that the indices of a CSR matrix name; its shape is fixed.

    Args:
        indptr: integers (nq + 1); row i has the columns indices[indptr[i] : indptr[i + 1]].
        indices: integers (nnz), in any order within a row, each once.
        shape: (nq, nk).

    Raises:
        LayoutError: indices that break a rule; says which, and where (for tensors on a device: when
            they are first used).
        DtypeError: not integers.
        ShapeError: not 1-D.
    """
    if not isinstance(shape, Sequence) or len(shape) != 2:
        raise ShapeError(f"from_csr(shape): {shape!r:.80} given, (nq, nk) expected")
    nq, nk = (as_integer(side, "from_csr(shape)", 0) for side in shape)
    pointers, columns = integers(indptr, "from_csr(indptr)"), integers(indices, "from_csr(indices)")
    pattern = Csr(pointers, columns, (nq, nk))
    if pattern.device.type == "cpu":
        pattern.all_runs(pattern.device)
    return pattern


def from_block_mask(bm: "BlockMask") -> Pattern:
    """The pattern of a FlexAttention BlockMask, exact to the element; its shape is fixed.

    Full blocks are kept whole; in partial ones mask_mod is asked about every pair. Memoised layouts
    are found again by the identity of the mask_mod: one whose closure changes is not noticed.

    Args:
        bm: a BlockMask with batch and head dimensions; (1, 1) gives a pattern for all heads.

    Raises:
        ShapeError: a slice of a BlockMask.
        TypeError: no BlockMask.
    """
    if isinstance(bm, type) or not all(hasattr(bm, name) for name in _BLOCK_MASK):
        raise TypeError(
            f"from_block_mask: a {kind_of(bm)} given, a FlexAttention BlockMask expected; for a "
            "bool tensor use from_dense, for blocks of one size use blocks"
        )
    # Imported here: FlexAttention loads much of torch's compiler.
    from .pattern_flex import from_flex

    return from_flex(bm)


def from_layout(layout: "Layout") -> Pattern:
    """The pattern of the positions that a layout keeps; its shape is fixed.

    Args:
        layout: any layout; one that differs between heads or batch entries gives a pattern that
            does, with equal entries stored once.

    Raises:
        LayoutError: no layout.
    """
    from . import pattern_ragged  # layouts are not needed by patterns otherwise

    return pattern_ragged.from_layout(layout)


def _by_lead(source: Source, make: Callable[[Source], Pattern]) -> Pattern:
    """make(mask) for each leading entry of a (…, rows, columns) source."""
    lead = tuple(source.base.shape[:-2])
    if not lead:
        return make(source)
    if not math.prod(lead):
        raise LayoutError(
            f"mask of shape {tuple(source.base.shape)} given; it has no entry to keep"
        )
    items = [make(source.entry(*index)) for index in product(*map(range, lead))]
    return table((1, lead[0]) if len(lead) == 1 else (lead[0], lead[1]), items, len(lead) == 2)
