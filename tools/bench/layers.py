"""Benchmarks of one pruned layer, y = x Wᵀ, in every format and from one token to many."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import mixgrain as mg

from .weights import Weight, block_weight, nm_weight, row_weight, tile_weight
from .work import COPY_BYTES, TENSOR_FLOPS, Work, random

SIZE = 4096
TOKENS = (1, 16, 64, 256, 1024)
#: What is kept, and the weight.
FORMATS: dict[str, tuple[str, Callable[[], Weight]]] = {
    "block64": ("20 % of 64-blocks", partial(block_weight, SIZE, 64, 0.2)),
    "block32": ("20 % of 32-blocks", partial(block_weight, SIZE, 32, 0.2)),
    "tile": ("20 % of 16×16 tiles", partial(tile_weight, SIZE, SIZE, 0.2)),
    "row": ("10 % of the elements", partial(row_weight, torch.float16, SIZE, 0.1)),
    "nm24": ("2:4", partial(nm_weight, SIZE, SIZE, torch.float16)),
}


def layer(kind: str, tokens: int) -> Work:
    """A pruned linear layer of ``FORMATS`` on some tokens, against the dense one."""
    kept, made = FORMATS[kind]
    weight, dense = made()
    x = random(tokens, SIZE, dtype=torch.float16, seed=1)
    moved = (weight.nnz + 2 * tokens * SIZE) * 2
    return Work(
        id=f"layer-{kind}-{tokens}",
        ours=lambda: mg.linear(x, weight),
        peers={"F.linear": lambda: torch.nn.functional.linear(x, dense)},
        oracle=lambda: x.double() @ dense.double().T,
        floor_ms=max(moved / COPY_BYTES, 2 * weight.nnz * tokens / TENSOR_FLOPS) * 1e3,
        floor="max((values + x + out) bytes / 4.24 TB/s, 2·nnz·tokens / 800 TFLOP/s)",
        shape=f"{SIZE}² float16, {kept}, {tokens} tokens",
    )


LAYERS: dict[str, Callable[[], Work]] = {
    f"layer-{kind}-{tokens}": partial(layer, kind, tokens) for kind in FORMATS for tokens in TOKENS
}
