"""Bit masks of blocks as int64 words: built from intervals, counted, deduplicated.

A mask of size × size is (size, W) words of min(size, 64) bits, W = max(1, size // 64); bit c of
word w says that column 64 · w + c is kept. Blocks of 16 and 32 leave the upper bits zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def words_per_row(size: int) -> int:
    """W, the words of one row of a block."""
    return max(1, size // 64)


def interval_words(lo: Tensor, hi: Tensor, size: int) -> Tensor:
    """Words with the bits lo … hi − 1 set.

    Args:
        lo: int64 (…), relative to the block's first column; may lie outside the block.
        hi: int64 (…), one past the last.
        size: side of the block.

    Returns:
        int64 (…, W).
    """
    bits = min(size, 64)
    table = torch.tensor([signed((1 << n) - 1) for n in range(bits + 1)], device=lo.device)
    words = []
    for w in range(words_per_row(size)):
        first = (lo - 64 * w if w else lo).clamp(0, bits)
        last = (hi - 64 * w if w else hi).clamp(0, bits)
        last = torch.maximum(first, last)
        words.append(table[last].bitwise_xor_(table[first]))
    return torch.stack(words, -1)


def bit_words(columns: Tensor, blocks: int, size: int) -> Tensor:
    """Words (blocks, W) with one bit per listed column of a row of blocks.

    Args:
        columns: int64 (n,), distinct columns in [0, blocks * size).
        blocks: number of blocks side by side.
        size: side of a block.
    """
    words = torch.zeros(blocks * words_per_row(size), dtype=torch.int64, device=columns.device)
    bits = min(size, 64)
    return words.index_add_(0, columns // bits, _bit(columns % bits)).view(blocks, -1)


def pair_words(block: Tensor, row: Tensor, col: Tensor, blocks: int, size: int) -> Tensor:
    """Words (blocks, size, W) of single positions.

    Args:
        block: int64 (n,), the block of each position.
        row: int64 (n,), its row inside the block.
        col: int64 (n,), its column inside the block; positions are distinct.
        blocks: number of blocks.
        size: side of a block.
    """
    per_row = words_per_row(size)
    words = torch.zeros(blocks * size * per_row, dtype=torch.int64, device=block.device)
    at = (block * size + row) * per_row
    if per_row > 1:
        at = at + col // 64
    # Distinct bits: adding is or-ing.
    words.index_add_(0, at, _bit(col % min(size, 64)))
    return words.view(blocks, size, per_row)


def _bit(column: Tensor) -> Tensor:
    return torch.bitwise_left_shift(torch.ones_like(column), column)


def to_masks(words: Tensor, size: int) -> Tensor:
    """uint8 (p, size, size // 8), the masks of BlockLayout, from words (p, size, W)."""
    count, bits = words.shape[0], min(size, 64)
    if not count:
        return torch.zeros(0, size, size // 8, dtype=torch.uint8, device=words.device)
    as_bytes = words.contiguous().view(torch.uint8).view(count, size, words.shape[-1], 8)
    return as_bytes[..., : bits // 8].reshape(count, size, size // 8)


def positions(words: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(block, row, column) of every set bit, int64, in C order."""
    shifts = torch.arange(min(size, 64), device=words.device)
    bits = (words[..., None] >> shifts) & 1
    block, row, column = bits.reshape(words.shape[0], size, size).nonzero(as_tuple=True)
    return block, row, column


def count(words: Tensor) -> Tensor:
    """int64 (p,): set bits of each mask (p, size, W)."""
    x = words.flatten(1)
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((x * 0x0101010101010101) >> 56).sum(1)


def used_columns(words: Tensor) -> Tensor:
    """int64 (p,): columns of each mask with at least one set bit."""
    while words.shape[1] > 1:
        half = words.shape[1] // 2
        words = words[:, :half] | words[:, half:]
    return count(words)


def distinct(words: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct masks in order of appearance, and which of them each mask is.

    Masks are told apart by a 64-bit hash; that equal hashes mean equal masks is then verified.

    Args:
        words: int64 (p, size, W).

    Returns:
        (first, index): int64 (m,) a mask of each kind, int64 (p,) the kind of each mask.
    """
    flat = words.flatten(1)
    total = flat.shape[0]
    if not total:
        none = torch.zeros(0, dtype=torch.int64, device=words.device)
        return none, none
    factors = torch.tensor(
        [signed(_MIX[0] * (2 * i + 1) ^ _MIX[1] * i) | 1 for i in range(flat.shape[1])],
        device=words.device,
    )
    # Without the shift, a difference in the topmost bit would survive every odd factor alike.
    mixed = (flat ^ ((flat >> 29) & (2**35 - 1))) * factors
    mixed ^= (mixed >> 32) & (2**32 - 1)
    digest = (mixed * signed(_MIX[2])).sum(1)
    _, kind = torch.unique(digest, return_inverse=True)
    first = _first_of(kind)
    if not torch.equal(flat[first][kind], flat):
        _, kind = torch.unique(flat, dim=0, return_inverse=True)
        first = _first_of(kind)
    order = torch.argsort(first)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device)
    return first[order], rank[kind]


def _first_of(kind: Tensor) -> Tensor:
    index = torch.arange(kind.numel(), device=kind.device)
    first = torch.full((int(kind.max()) + 1,), kind.numel(), device=kind.device)
    return first.scatter_reduce_(0, kind, index, "amin")
