"""Benchmarks of 2:4 weights through ``linear``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import mixgrain as mg

from .weights import nm_weight
from .work import COPY_BYTES, Work, random

# wgmma.sp with the sparse operand in registers and no traffic, logical FLOPs.
SPARSE_FLOPS = 1.72e15


def _cusparselt(dense: Tensor, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Torch's own 2:4 weight, where cuSPARSELt is there and takes so many tokens."""
    from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

    if not torch.backends.cusparselt.is_available():
        return {}
    SparseSemiStructuredTensor._FORCE_CUTLASS = False
    theirs = to_sparse_semi_structured(dense)
    return {"cuSPARSELt": lambda: torch.nn.functional.linear(x, theirs)}


def linear_nm(name: str, size: int, tokens: int, dtype: torch.dtype = torch.float16) -> Work:
    """2:4 weights, size × size, and some tokens."""
    weight, dense = nm_weight(size, size, dtype)
    assert isinstance(weight.layout, mg.NMLayout)
    x = random(tokens, size, dtype=dtype, seed=1)
    stored = weight.values.numel() * dense.element_size() + weight.layout.metadata.numel() * 2
    moved = stored + 2 * tokens * size * dense.element_size()
    flops = 2 * size * size * tokens
    return Work(
        id=name,
        ours=lambda: mg.linear(x, weight),
        peers={
            "cuBLAS dense": lambda: torch.nn.functional.linear(x, dense),
            **_cusparselt(dense, x),
        },
        oracle=lambda: x.double() @ dense.double().T,
        floor_ms=max(moved / COPY_BYTES, flops / SPARSE_FLOPS) * 1e3,
        floor="max((values + metadata + x + out) bytes / 4.24 TB/s, 2·size²·tokens / 1720 TFLOP/s)",
        shape=f"{tokens} tokens, {size}² {str(dtype).removeprefix('torch.')}, 2:4",
    )
