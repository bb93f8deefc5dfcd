"""Benchmarks of one pruned layer, y = x Wᵀ, in every format and from one token to many."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import mixgrain as mg

from . import alone
from .weights import Weight, block_weight, row_weight, tile_weight
from .work import COPY_BYTES, TENSOR_FLOPS, Work, random
from .works_nm import linear_nm

SIZE = 4096
TOKENS = (1, 16, 64, 256, 1024, 4096)


def _linear(name: str, kept: str, made: Callable[[], Weight], tokens: int) -> Work:
    """A pruned linear layer, against the dense one."""
    weight, dense = made()
    rows, columns = weight.layout.shape
    x = random(tokens, columns, dtype=torch.float16, seed=1)
    moved = (weight.nnz + tokens * (rows + columns)) * 2
    copied, right = alone.copy(moved)
    return Work(
        id=name,
        ours=lambda: mg.linear(x, weight),
        peers={
            "F.linear": lambda: torch.nn.functional.linear(x, dense),
            "copy of as many bytes": copied,
        },
        oracle=lambda: x.double() @ dense.double().T,
        oracles={"copy of as many bytes": right},
        floor_ms=max(moved / COPY_BYTES, 2 * weight.nnz * tokens / TENSOR_FLOPS) * 1e3,
        floor="max((values + x + out) bytes / 4.24 TB/s, 2·nnz·tokens / 800 TFLOP/s)",
        shape=f"{columns} -> {rows} float16, {kept}, {tokens} tokens",
    )


def linear_tile(name: str, rows: int, columns: int, tokens: int) -> Work:
    """A layer with 80 % of its tiles dropped."""
    made = partial(tile_weight, rows, columns, 0.2)
    return _linear(name, "20 % of 16×16 tiles", made, tokens)


def layer(kind: str, tokens: int) -> Work:
    """A layer of SIZE × SIZE: "block64", "block32", "tile", "row" or "nm24"."""
    name = f"layer-{kind}-{tokens}"
    if kind == "tile":
        return linear_tile(name, SIZE, SIZE, tokens)
    if kind == "nm24":
        return linear_nm(name, SIZE, tokens)
    if kind == "row":
        made = partial(row_weight, torch.float16, SIZE, 0.1)
        return _linear(name, "10 % of the elements", made, tokens)
    size = int(kind.removeprefix("block"))
    return _linear(name, f"20 % of {size}-blocks", partial(block_weight, SIZE, size, 0.2), tokens)


LAYERS: dict[str, Callable[[], Work]] = {
    f"layer-{kind}-{tokens}": partial(layer, kind, tokens)
    for kind in ("block64", "block32", "tile", "row", "nm24")
    for tokens in TOKENS
}
