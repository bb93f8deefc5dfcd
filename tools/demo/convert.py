"""Takes the model's real weights through every layout and back, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mixgrain as mg

from .model import ByteLM
from .variants import matrices

# Layout and the options that name it fully.
LAYOUTS: dict[str, dict[str, Any]] = {
    "tile": {},
    "nm": {"n": 2, "m": 4},
    "block": {"size": 16},
    "row": {},
    "mixed": {"size": 16},
}


@dataclass(frozen=True)
class Conversion:
    """One layout's round trips.

    Attributes:
        kind: The layout.
        done: Conversions made.
        exact: How many of them gave every bit back.
    """

    kind: str
    done: int
    exact: int

    @property
    def passed(self) -> bool:
        """Whether every round trip was exact."""
        return self.exact == self.done


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two float32 tensors agree in every bit, signs of zeros and NaNs included."""
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def sources(model: ByteLM) -> Iterator[tuple[str, Tensor]]:
    """The blocks' matrices: as they are, pruned to 2:4, pruned to three quarters of their tiles."""
    for weight in matrices(model).values():
        yield "dense", weight
        yield "2:4", mg.sparsify(weight, "nm", n=2, m=4, prune=True).to_dense()
        yield "tile", mg.sparsify(weight, "tile", prune=True, density=0.75).to_dense()


def convert(model: ByteLM) -> Iterator[Conversion]:
    """Converts every matrix to each layout that can hold it, and back.

    A 2:4 layout holds only what has two values in every four, so it gets the matrices pruned to
    that; the others get all.
    """
    given = list(sources(model))
    for kind, options in LAYOUTS.items():
        weights = [weight for name, weight in given if kind != "nm" or name == "2:4"]
        exact = sum(
            same_bits(mg.sparsify(weight, kind, **options).to_dense(), weight) for weight in weights
        )
        yield Conversion(kind, len(weights), exact)
