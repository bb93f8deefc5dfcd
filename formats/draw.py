"""Counter-based draws: a word for every (seed, counter), and samples without replacement.

All of it is 64-bit integer arithmetic that wraps around, so CPU and GPU agree bit for bit and there
is no generator state. A sample of the first c images of a keyed bijection on [0, n) is c distinct
numbers.
"""

import torch
from torch import Tensor

from .runs import prefix_sum, ragged_arange

ROUNDS = 4


def _signed(word: int) -> int:
    """A 64-bit word as the int64 of the same bits."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


# The increment and multipliers of splitmix64.
GOLDEN = _signed(0x9E3779B97F4A7C15)
MULTIPLY_1 = _signed(0xBF58476D1CE4E5B9)
MULTIPLY_2 = _signed(0x94D049BB133111EB)


def _shifted(x: Tensor, by: int) -> Tensor:
    # int64 shifts keep the sign; the mask makes the shift logical.
    return (x >> by) & ((1 << (64 - by)) - 1)


def mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, a bijection on 64-bit words; int64 of any shape.

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    x = (x ^ _shifted(x, 30)) * MULTIPLY_1
    x = (x ^ _shifted(x, 27)) * MULTIPLY_2
    return x ^ _shifted(x, 31)


def words(seed: int, counter: Tensor, stream: int) -> Tensor:
    """A random 64-bit word for each counter; streams of one seed are independent.

    Args:
        seed: any integer; equal modulo 2**64 is equal.
        counter: int64 of any shape, negative ones included.
        stream: which of several uses of the same seed and counter.
    """
    start = torch.tensor(_signed(seed), device=counter.device)
    return mix(mix(mix(start) ^ counter) + _signed(GOLDEN * (stream + 1)))


def uniform(seed: int, counter: Tensor, stream: int) -> Tensor:
    """A float64 in [0, 1) for each counter, with 53 random bits."""
    return _shifted(words(seed, counter, stream), 11).double() * 2.0**-53


def distinct(keys: Tensor, counts: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """counts[r] distinct numbers of [0, sizes[r]) for every r, sorted within each row.

    Args:
        keys: (R) int64, a random word per row.
        counts: (R) int64, 0 <= counts <= sizes.
        sizes: (R) int64, below 2**40.

    Returns:
        row and number, both (counts.sum()) int64, in C order.
    """
    row, x = ragged_arange(counts)
    if not row.numel():
        return row, x
    # float64 holds sizes exactly, and frexp gives their bit length.
    bits = torch.frexp((sizes - 1).clamp(min=0).double())[1].long()
    round_keys = torch.stack([words(r, keys, ROUNDS) for r in range(2 * ROUNDS)])
    limit = sizes[row]
    x = _permute(x, row, round_keys, bits)
    # Cycle walking: applying the bijection on [0, 2**bits) until the image lies in [0, size) is a
    # bijection on [0, size). At least half of the images do, so few passes are needed.
    out = torch.nonzero(x >= limit).flatten()
    while out.numel():
        x[out] = _permute(x[out], row[out], round_keys, bits)
        out = out[x[out] >= limit[out]]
    base = prefix_sum(sizes)[:-1]
    line = (base[row] + x).sort()[0]
    # Rows keep their places in the sort, as row r owns base[r] .. base[r] + sizes[r].
    return row, line - base[row]


def _permute(x: Tensor, row: Tensor, round_keys: Tensor, bits: Tensor) -> Tensor:
    """A bijection on [0, 2**bits[row]): rounds of multiply (odd), add, fold the upper half down."""
    width = bits[row]
    mask = (1 << width) - 1
    fold = (width + 1) // 2
    # A fold by 0 would clear the number; with no bits there is nothing to permute anyway.
    fold.clamp_(min=1)
    for k in range(ROUNDS):
        x = (x * (round_keys[2 * k][row] | 1) + round_keys[2 * k + 1][row]) & mask
        x = x ^ (x >> fold)
    return x
