"""Attention over every position, ours beside torch's: what ``impl="auto"`` chooses by."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import mixgrain as mg
from mixgrain.formats import patterns as P

from .work import COPY_BYTES, TENSOR_FLOPS, TOLERANCE, Work, random

# FMAs in float32, of an H200 at 1.98 GHz.
FMA_FLOPS = 6.7e13


class Shape(NamedTuple):
    """A call.

    Attributes:
        dtype: of q, k and v.
        lead: batch entries, query heads, key heads.
        nq: queries.
        nk: keys.
        d: head dimension.
    """

    dtype: torch.dtype
    lead: tuple[int, int, int]
    nq: int
    nk: int
    d: int


_HALF, _SINGLE = torch.bfloat16, torch.float32
SHAPES = {
    "dense-256-D64": Shape(_HALF, (8, 16, 16), 256, 256, 64),
    "dense-4096-D32": Shape(_HALF, (1, 16, 16), 4096, 4096, 32),
    "dense-4096-D64": Shape(_HALF, (1, 16, 16), 4096, 4096, 64),
    "dense-4096x77-D64": Shape(_HALF, (2, 10, 10), 4096, 77, 64),
    "dense-16x8192-D128": Shape(_HALF, (4, 32, 8), 16, 8192, 128),
    "dense-1024-D128": Shape(_HALF, (4, 16, 16), 1024, 1024, 128),
    "dense-4096-D192": Shape(_HALF, (1, 16, 16), 4096, 4096, 192),
    "dense-2048-D256": Shape(_HALF, (2, 16, 16), 2048, 2048, 256),
    "dense-8192-D256": Shape(_HALF, (1, 16, 16), 8192, 8192, 256),
    "dense-1x32768-D128": Shape(_HALF, (4, 32, 32), 1, 32768, 128),
    "dense-1x8192-D128-many": Shape(_HALF, (16, 32, 32), 1, 8192, 128),
    "dense-1x32768-D64-grouped": Shape(_HALF, (16, 32, 8), 1, 32768, 64),
    "dense-1x32768-D128-grouped": Shape(_HALF, (16, 32, 8), 1, 32768, 128),
    "dense-2048-D64-fp32": Shape(_SINGLE, (2, 16, 16), 2048, 2048, 64),
    "dense-512-D128-fp32": Shape(_SINGLE, (4, 16, 16), 512, 512, 128),
    "dense-4096-D128-fp32": Shape(_SINGLE, (1, 16, 16), 4096, 4096, 128),
    "dense-1x4096-D128-fp32": Shape(_SINGLE, (16, 32, 32), 1, 4096, 128),
}
# Torch's kernels: those for half precision, the one that takes float32.
TORCH = {
    _HALF: {"SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA, flash": SDPBackend.FLASH_ATTENTION},
    _SINGLE: {"SDPA, efficient": SDPBackend.EFFICIENT_ATTENTION},
}


def dense(name: str) -> Work:
    """One shape of ``SHAPES``."""
    dtype, (batch, hq, hk), nq, nk, d = SHAPES[name]
    q = random(batch, hq, nq, d, dtype=dtype)
    k, v = (random(batch, hk, nk, d, dtype=dtype, seed=s) for s in (1, 2))
    grouped = hq != hk

    def of(backend: SDPBackend) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, enable_gqa=grouped)

        return call

    flops = 4 * batch * hq * nq * nk * d / (TENSOR_FLOPS if dtype == _HALF else FMA_FLOPS)
    moved = 2 * (q.numel() + k.numel()) * q.element_size() / COPY_BYTES
    rate = "800 TFLOP/s" if dtype == _HALF else "67 TFLOP/s of FMAs"
    return Work(
        id=name,
        ours=lambda: mg.attend(q, k, v, P.full(), enable_gqa=grouped, impl="fused"),
        peers={engine: of(backend) for engine, backend in TORCH[dtype].items()},
        oracle=lambda: mg.attend(
            q[:1, :1], k[:1, :1], v[:1, :1], P.full(), impl="reference"
        ).double(),
        floor_ms=max(flops, moved) * 1e3,
        floor=f"products at {rate}; Q, K, V, out once at 4.24 TB/s",
        shape=f"full(), B{batch} H{hq}{f'/{hk}' if grouped else ''} "
        f"{nq} × {nk} D{d} {str(dtype).removeprefix('torch.')}",
        tolerance=TOLERANCE[dtype],
    )


DENSE: dict[str, Callable[[], Work]] = {name: functools.partial(dense, name) for name in SHAPES}
