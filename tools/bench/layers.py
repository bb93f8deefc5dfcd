"""Benchmarks of one pruned layer, y = x Wᵀ, in every format: forward, and backward too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import mixgrain as mg

from . import alone
from .weights import Weight, block_weight, nm_weight, row_weight, tile_weight
from .work import COPY_BYTES, TENSOR_FLOPS, Work, random
from .works_nm import linear_nm

SIZE = 4096
TOKENS = (1, 16, 64, 256, 1024, 4096)
TRAINED = (256, 1024, 4096)


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
    if kind == "nm24":
        return linear_nm(name, SIZE, tokens)
    return _linear(name, *WEIGHTS[kind], tokens)


def training(kind: str, tokens: int) -> Work:
    """The same, with the gradients of what goes in and of what is kept of the weight."""
    kept, made = WEIGHTS[kind]
    weight, dense = made()
    x, grad = (random(tokens, SIZE, dtype=torch.float16, seed=n) for n in (1, 2))
    sides = x.requires_grad_(), weight.values.requires_grad_()
    whole = x, dense.requires_grad_()
    sparse = mg.SparseTensor(weight.layout, weight.values)

    def gradients(y: Tensor, given: tuple[Tensor, ...]) -> Tensor:
        return torch.autograd.grad(y, given, grad)[1]

    def right() -> Tensor:
        return grad.double().T @ x.detach().double()

    def of_kept() -> Tensor:
        slots = torch.arange(1.0, weight.layout.slots + 1, dtype=torch.float64, device=x.device)
        slot = mg.SparseTensor(weight.layout, slots).to_dense()
        found = slots.new_zeros(weight.layout.slots)
        found[slot[slot > 0].long() - 1] = right()[slot > 0]
        return found

    moved = (2 * weight.nnz + 4 * tokens * SIZE) * 2
    return Work(
        id=f"training-{kind}-{tokens}",
        ours=lambda: gradients(mg.linear(x, sparse), sides),
        peers={"F.linear": lambda: gradients(torch.nn.functional.linear(*whole), whole)},
        oracle=of_kept,
        oracles={"F.linear": right},
        floor_ms=max(moved / COPY_BYTES, 6 * weight.nnz * tokens / TENSOR_FLOPS) * 1e3,
        floor="max((values + their gradient + x + out + grad + its gradient) bytes / 4.24 TB/s,"
        " 6·nnz·tokens / 800 TFLOP/s)",
        shape=f"{SIZE} -> {SIZE} float16, {kept}, {tokens} tokens, forward and backward",
    )


# What is kept of a weight, in words, and one such weight.
WEIGHTS: dict[str, tuple[str, Callable[[], Weight]]] = {
    "block64": ("20 % of 64-blocks", partial(block_weight, SIZE, 64, 0.2)),
    "block32": ("20 % of 32-blocks", partial(block_weight, SIZE, 32, 0.2)),
    "tile": ("20 % of 16×16 tiles", partial(tile_weight, SIZE, SIZE, 0.2)),
    "row": ("10 % of the elements", partial(row_weight, torch.float16, SIZE, 0.1)),
    "nm24": ("2:4", partial(nm_weight, SIZE, SIZE, torch.float16)),
}

LAYERS: dict[str, Callable[[], Work]] = {
    **{f"layer-{kind}-{n}": partial(layer, kind, n) for kind in WEIGHTS for n in TOKENS},
    **{f"training-{kind}-{n}": partial(training, kind, n) for kind in WEIGHTS for n in TRAINED},
}
