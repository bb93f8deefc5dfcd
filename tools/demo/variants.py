"""What the demo compares: ways to sparsify the attention, and ways to sparsify the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.attention.attend import Impl
from mixgrain.formats.pattern import Pattern
from mixgrain.formats.pattern_nm import NM

from .model import Attend, Block, ByteLM, causal

# The matrices of the blocks; the embedding, which is also the output matrix, stays dense.
PRUNED = "blocks."


@dataclass(frozen=True)
class Pruning:
    """How the weights of the blocks are made sparse.

    Attributes:
        kind: The layout, as in `mg.sparsify`.
        options: Its options, besides prune=True.
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    def apply(self, model: ByteLM) -> dict[str, mg.SparseTensor]:
        """The largest weights of every matrix of the blocks, by name in the state dict."""
        return {
            name: mg.sparsify(weight, self.kind, prune=True, **self.options)
            for name, weight in matrices(model).items()
        }


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Attributes:
        name: Short and unique, as in tables.
        words: What it is, in a few words.
        pattern: The attention's pattern; None is dense causal attention by torch.
        pruning: How the weights are pruned; None leaves them dense.
        demo: Whether `mixgrain demo` runs it, or the large evaluation alone.
    """

    name: str
    words: str
    pattern: Pattern | None = None
    pruning: Pruning | None = None
    demo: bool = True

    @property
    def dynamic(self) -> bool:
        """Whether the positions depend on the scores (N:M)."""
        return isinstance(self.pattern, NM)

    @property
    def dense(self) -> bool:
        """Whether this is the baseline."""
        return self.pattern is None and self.pruning is None

    def kept(self, n: int) -> tuple[float, float]:
        """Kept scores of n × n, as shares of the causal ones and of all."""
        if self.pattern is None:
            return 1.0, P.causal().density(n, n)
        return self.pattern.nnz(n, n) / P.causal().nnz(n, n), self.pattern.density(n, n)

    def attend(self, impl: Impl = "auto") -> Attend:
        """The attention to hand to the model; dense is torch's own, whatever impl says."""
        pattern = self.pattern
        if pattern is None:
            return causal

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return mg.attend(q, k, v, pattern, impl=impl)

        return attend


def matrices(model: ByteLM) -> dict[str, Tensor]:
    """The two-dimensional weights of the blocks that a product reads, by name."""
    names = {f"{PRUNED}{i}.{name}" for i in range(model.config.layers) for name in Block.STACKED}
    return {name: p.detach() for name, p in model.named_parameters() if name in names}


def windows(*sizes: int) -> list[Variant]:
    """Plain windows, for the curve of quality against cost."""
    return [
        Variant(
            f"window {size}",
            f"itself and the {size} bytes before",
            P.causal() & P.window(size),
            demo=size == 128,
        )
        for size in sizes
    ]


def tiles(*densities: float) -> list[Variant]:
    """Weights that keep a share of their 16 × 16 tiles."""
    return [
        Variant(
            f"tile weights {share:.0%}",
            f"{share:.0%} of the 16 × 16 tiles, the largest",
            pruning=Pruning("tile", {"density": share}),
            demo=share == TILES,
        )
        for share in densities
    ]


# The share of tiles that the demo keeps.
TILES = 0.9
# Scattered tokens that see everything before them, and are seen by everything after.
GLOBALS = range(0, 2048, 128)


def variants() -> list[Variant]:
    """All variants, the dense one first."""
    return [
        Variant("dense", "torch SDPA, is_causal=True"),
        *windows(32, 64, 128, 256, 512, 1024),
        Variant(
            "Longformer",
            "window 128, and every 128th byte global; mixed grain",
            P.causal() & P.longformer(128, GLOBALS),
        ),
        Variant(
            "BigBird",
            "blocks of 64: own and previous, 1 global, 2 random",
            P.causal() & P.bigbird(size=64, window=1, random=2, globals=1, seed=0),
        ),
        Variant(
            "2:4 scores", "of every 4 keys the 2 best, chosen as it runs", P.causal() & P.nm(2, 4)
        ),
        Variant(
            "1:2 scores", "of every 2 keys the better, chosen as it runs", P.causal() & P.nm(1, 2)
        ),
        Variant("2:4 weights", "of every 4 neighbours the 2 largest", pruning=Pruning("nm")),
        *tiles(0.9, 0.75, 0.5),
    ]


def sparse_linear(weights: dict[str, mg.SparseTensor]) -> Callable[[Tensor, str, Tensor], Tensor]:
    """Matrix products for the model: sparse for the named weights, dense for the others."""

    def linear(x: Tensor, name: str, weight: Tensor) -> Tensor:
        sparse = weights.get(name)
        return F.linear(x, weight) if sparse is None else mg.linear(x, sparse)

    return linear


def masked_linear(weights: dict[str, mg.SparseTensor]) -> Callable[[Tensor, str, Tensor], Tensor]:
    """The same products by torch, of dense matrices that hold zeros where weights were pruned."""
    dense = {name: sparse.to_dense() for name, sparse in weights.items()}

    def linear(x: Tensor, name: str, weight: Tensor) -> Tensor:
        return F.linear(x, dense.get(name, weight))

    return linear
