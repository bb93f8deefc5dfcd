"""BigBird's own block-sparse attention on mixgrain.

Rows of blocks 0 and last see everything. Every other row of blocks sees the first and the last
block, its own and its two neighbours, and random ones, drawn for each head. A list may name a block
more than once (in evaluation all random blocks are block 0), and then its keys count more than once
in the softmax: what is seen at least t times is attended for each t, and the parts are merged.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention
from transformers.models.bigbird_pegasus.modeling_bigbird_pegasus import (
    BigBirdPegasusBlockSparseAttention,
)

from mixgrain.formats import patterns as P
from mixgrain.formats.cache import LRU
from mixgrain.formats.errors import ShapeError
from mixgrain.formats.pattern import Pattern

from ..attend import attend
from ..merge import merge
from .forward import refuse

# Lengths for which the paper's own plan of random blocks is used.
OLD_PLANS = (1024, 3072, 4096)

# A pattern, and how often its keys count: patterns of one list are nested.
Level = tuple[Pattern, int]
_levels: LRU[list[Level]] = LRU(64)


class _BigBird:
    """The forward of both classes; everything else is theirs."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        band_mask: Tensor | None = None,
        from_mask: Tensor | None = None,
        to_mask: Tensor | None = None,
        from_blocked_mask: Tensor | None = None,
        to_blocked_mask: Tensor | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        """Block-sparse attention.

        Args:
            hidden_states: (B, N, E), N a multiple of the block size, at least four blocks.
            band_mask: not needed; what it says follows from the others.
            from_mask: (B, 1, N, 1), 0 = a query that is padding, whose output is 0.
            to_mask: (B, 1, 1, N), 0 = a key that is padding.
            from_blocked_mask: not needed.
            to_blocked_mask: not needed.
            rest: what transformers passes to other layers.

        Returns:
            (B, N, E) and None in place of the weights.

        Raises:
            ShapeError: N is no multiple of the block size, or less than four blocks.
            UnsupportedError: output_attentions.
        """
        refuse(self, 0.0, rest)
        size, n = self.block_size, hidden_states.shape[1]
        if n % size or n < 4 * size:
            raise ShapeError(
                f"{type(self).__name__}: {n} tokens given; a multiple of the block size {size}, at "
                "least four blocks, expected"
            )

        def heads(x: Tensor) -> Tensor:
            shape = (self.num_attention_heads, self.attention_head_size)
            split: Tensor = x.unflatten(-1, shape)
            return split.transpose(1, 2)

        q, k, v = (heads(f(hidden_states)) for f in (self.query, self.key, self.value))
        keys = None if to_mask is None else to_mask[:, 0, 0] != 0
        scale = 1.0 / math.sqrt(self.attention_head_size)
        (pattern, _), *more = self.levels(n)
        o, lse = attend(q, k, v, pattern, scale=scale, key_mask=keys, return_lse=True)
        for pattern, times in more:
            again, of = attend(q, k, v, pattern, scale=scale, key_mask=keys, return_lse=True)
            o, lse = merge(o, lse, again, of + math.log(times))
        if from_mask is not None:
            o = o * from_mask
        return o.to(q.dtype).transpose(1, 2).flatten(2), None

    def levels(self: Any, n: int) -> list[Level]:
        """The patterns for n tokens, from the widest in; remembered where they are fixed."""
        if self.training and self.seed is None:
            return nested(self.blocks(n), self.block_size)
        name: Hashable = (
            type(self), n, self.training, self.seed, self.num_attention_heads, self.block_size,
            self.num_random_blocks, self.max_seqlen,
        )  # fmt: skip
        return _levels.get(name, lambda: nested(self.blocks(n), self.block_size))

    def blocks(self: Any, n: int) -> Tensor:
        """How often each block is seen, int64 (heads, blocks, blocks)."""
        count = n // self.block_size
        seen = torch.zeros(self.num_attention_heads, count, count, dtype=torch.int64)
        seen[:, [0, -1]] = 1
        inner = torch.arange(1, count - 1)
        # The first and last block, the own and its neighbours; at the edge these meet.
        near = torch.stack((inner - 1, inner, inner + 1), 1)
        seen[:, inner[:, None], near] = 1
        seen[:, 1:-1, 0] = 1
        seen[:, 1:-1, -1] = 1
        drawn = torch.as_tensor(self.random_blocks(n))
        seen[:, 1:-1] = seen[:, 1:-1].scatter_add(2, drawn, torch.ones_like(drawn))
        return seen

    def random_blocks(self: Any, n: int) -> np.ndarray[Any, Any]:
        """The layer's own random blocks, int64 (heads, blocks − 2, random blocks).

        Drawn by the layer's own methods from numpy's global generator, as transformers does; with
        a seed, that generator is put back to where it stood.
        """
        size, drawn = self.block_size, self.num_random_blocks
        state = np.random.get_state()
        try:
            if self.training:
                np.random.seed(self.seed)
            if n in OLD_PLANS:
                whole = self.max_seqlen
                lists = [
                    self._bigbird_block_rand_mask(whole, whole, size, size, drawn, last_idx=1024)
                    for _ in range(self.num_attention_heads)
                ]
            else:
                ends, numbers = self._get_rand_attn_plan(n, size, drawn)
                lists = self._bigbird_block_rand_mask_with_head(
                    from_seq_length=n, to_seq_length=n, from_block_size=size, to_block_size=size,
                    num_heads=self.num_attention_heads, plan_from_length=ends,
                    plan_num_rand_blocks=numbers,
                )  # fmt: skip
        finally:
            if self.seed is not None:
                np.random.set_state(state)
        return np.stack([rows[: n // size - 2] for rows in lists]).astype(np.int64)


def nested(seen: Tensor, size: int) -> list[Level]:
    """Patterns of the blocks that are seen at least once, twice, …; equal ones counted together.

    Args:
        seen: int64 (heads, blocks, blocks), how often each block is seen.
        size: rows and columns of a block.
    """
    if bool((seen == seen[:1]).all()):
        seen = seen[0]
    levels: list[tuple[Tensor, int]] = []
    for t in range(1, int(seen.max()) + 1):
        mask = seen >= t
        if levels and t > 2 and torch.equal(mask, levels[-1][0]):
            levels[-1] = (mask, levels[-1][1] + 1)
        else:
            levels.append((mask, 1))
    return [(P.blocks(mask, size), times) for mask, times in levels]


class MixgrainBigBirdBlockSparseAttention(_BigBird, BigBirdBlockSparseAttention):
    """BigBirdBlockSparseAttention on mixgrain."""


class MixgrainBigBirdPegasusBlockSparseAttention(_BigBird, BigBirdPegasusBlockSparseAttention):
    """BigBirdPegasusBlockSparseAttention on mixgrain."""
