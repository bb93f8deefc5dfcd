"""Pruned weights of the benchmarks: each as a SparseTensor and dense."""

from __future__ import annotations

import torch
from torch import Tensor

import mixgrain as mg
from mixgrain import patterns as P

from .work import random

Weight = tuple[mg.SparseTensor, Tensor]


def block_weight(n: int, size: int, density: float) -> Weight:
    """Blocks kept at random, n² float16."""
    kept = torch.rand(n // size, n // size, generator=torch.Generator().manual_seed(0)) < density
    layout = P.blocks(kept, size).to_layout("block", n, n, size=size).to("cuda")
    dense = random(n, n, dtype=torch.float16)
    mask = kept.cuda().repeat_interleave(size, 0).repeat_interleave(size, 1)
    return mg.sparsify(dense, layout=layout), dense * mask


def tile_weight(rows: int, columns: int, density: float) -> Weight:
    """Tiles of 16 × 16 kept at random, float16."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(rows // 16, columns // 16, generator=generator) < density
    layout = mg.TileLayout.from_tile_mask(kept, (rows, columns)).to("cuda")
    dense = random(rows, columns, dtype=torch.float16)
    mask = kept.cuda().repeat_interleave(16, 0).repeat_interleave(16, 1)
    return mg.sparsify(dense, layout=layout), dense * mask


def row_weight(dtype: torch.dtype, n: int = 8192, density: float = 0.05) -> Weight:
    """Elements kept at random, n²."""
    generator = torch.Generator("cuda").manual_seed(0)
    kept = torch.rand(n, n, device="cuda", generator=generator) < density
    # torch.where, not a product with the mask: −0 is an element that sparsify keeps.
    dense = torch.where(kept, random(n, n, dtype=dtype), 0)
    return mg.sparsify(dense, "row"), dense


def nm_weight(rows: int, columns: int, dtype: torch.dtype) -> Weight:
    """The larger two of every four."""
    weight = mg.sparsify(random(rows, columns, dtype=dtype), "nm", n=2, m=4, prune=True)
    return weight, weight.to_dense()
