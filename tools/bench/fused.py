"""Fused attention over the patterns people use, against the dense rate of the fastest kernel."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import mixgrain as mg
from mixgrain.formats import patterns as P
from mixgrain.formats.pattern import Pattern

from .measure import device_ms
from .work import COPY_BYTES, TENSOR_FLOPS, Work, random


class Column(NamedTuple):
    """Sizes of a column of the table.

    Attributes:
        shape: batch entries, heads, tokens, head dimension.
        over_cudnn: how much faster dense FlashAttention-4 is than cuDNN on an H200.
    """

    shape: tuple[int, int, int, int]
    over_cudnn: float


COLUMNS = {
    "A": Column((4, 16, 4096, 128), 1.06),
    "C": Column((1, 16, 16384, 128), 1.11),
    "B": Column((1, 12, 16384, 64), 1.18),
}


def scattered(n: int) -> list[int]:
    """64 tokens drawn from n."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(n, generator=generator)[:64].tolist()


def documents(n: int) -> Tensor:
    """(n,), ids of documents of about 1024 tokens."""
    generator = torch.Generator().manual_seed(0)
    # The draw of the scattered tokens comes first.
    torch.randperm(n, generator=generator)
    return torch.sort(torch.randint(0, n // 1024, (n,), generator=generator)).values


def bigbird(n: int) -> Tensor:
    """Bool (n / 64, n / 64): three around the own block, two global ones, three drawn."""
    generator = torch.Generator().manual_seed(0)
    torch.randperm(n, generator=generator)
    torch.randint(0, n // 1024, (n,), generator=generator)
    units = n // 64
    i = torch.arange(units)
    kept = (i[:, None] - i).abs() <= 1
    kept[:2] = kept[:, :2] = True
    for row in range(units):
        kept[row, torch.randperm(units, generator=generator)[:3]] = True
    return kept


PATTERNS: dict[str, Callable[[int], Pattern]] = {
    "full": lambda n: P.full(),
    "causal": lambda n: P.causal(),
    "window": lambda n: P.window(256),
    "lfront": lambda n: P.longformer(256, range(64)),
    "lscatter": lambda n: P.longformer(256, scattered(n)),
    "bigbird64": lambda n: P.blocks(bigbird(n), 64),
    "sink": lambda n: P.causal() & (P.window(1023, 0) | P.sinks(4)),
    "document": lambda n: P.documents(documents(n)) & P.causal(),
}


def _inputs(column: str) -> list[Tensor]:
    return [random(*COLUMNS[column].shape, dtype=torch.bfloat16, seed=s) for s in range(3)]


# One measurement of a dense kernel meets the device's clock at 1980 MHz or at 1600.
DENSE_REPEATS = 5


def _dense_ms(call: Callable[[], object]) -> float:
    return statistics.median(device_ms(call) for _ in range(DENSE_REPEATS))


@functools.cache
def dense_rate(column: str) -> tuple[str, float]:
    """FLOP/s of dense attention in this run, and whose: FlashAttention-4's where it is there."""
    batch, heads, n, d = COLUMNS[column].shape
    q, k, v = _inputs(column)
    flops = 4 * n * n * d * batch * heads
    try:
        from flash_attn.cute.interface import flash_attn_func
    except ImportError:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            ms = _dense_ms(lambda: scaled_dot_product_attention(q, k, v))
        factor = COLUMNS[column].over_cudnn
        return f"cuDNN × {factor}", flops / ms * 1e3 * factor
    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    return "FlashAttention-4", flops / _dense_ms(lambda: flash_attn_func(q, k, v)) * 1e3


def _torch(backend: SDPBackend, column: str, causal: bool) -> Callable[[], Tensor]:
    """Torch's dense attention by one of its kernels."""
    q, k, v = _inputs(column)

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal)

    return call


# Torch's kernels for what they compute without a mask in memory.
TORCH = {"SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA, flash": SDPBackend.FLASH_ATTENTION}


def fused(name: str, column: str) -> Work:
    """One pattern in one column."""
    batch, heads, n, d = COLUMNS[column].shape
    pattern = PATTERNS[name](n)
    q, k, v = _inputs(column)
    flops = 4 * pattern.nnz(n, n) * d * batch * heads
    floor = max(flops / TENSOR_FLOPS, 4 * q.numel() * 2 / COPY_BYTES)
    return Work(
        id=f"fused-{name}-{column}",
        ours=lambda: mg.attend(q, k, v, pattern, impl="fused"),
        peers={
            engine: _torch(backend, column, name == "causal")
            for engine, backend in TORCH.items()
            if name in ("full", "causal")
        },
        oracle=lambda: mg.attend(
            q[:1, :1], k[:1, :1], v[:1, :1], pattern, impl="reference"
        ).double(),
        floor_ms=floor * 1e3,
        floor="products of kept positions at 800 TFLOP/s; Q, K, V, out once at 4.24 TB/s",
        shape=f"B{batch} H{heads} N{n} D{d} bfloat16",
        tolerance=2e-2,
        flops=flops,
        rate=lambda: dense_rate(column),
    )


def clustered() -> Work:
    """Aligned clusters of 16 × 16 at random, 5 % of them, against compiled FlexAttention."""
    n, heads, d = 16384, 8, 64
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(n // 16, n // 16, generator=generator) < 0.05
    pattern = P.blocks(kept, 16)
    q, k, v = (random(1, heads, n, d, dtype=torch.bfloat16, seed=s) for s in range(3))

    @functools.cache
    def peer() -> Callable[[], Any]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        there = kept.cuda()
        mask = create_block_mask(lambda b, h, i, j: there[i // 16, j // 16], None, None, n, n)
        attention = torch.compile(flex_attention, dynamic=False)
        return lambda: attention(q, k, v, block_mask=mask)

    flops = 4 * pattern.nnz(n, n) * d * heads
    return Work(
        id="fused-csr-clustered",
        ours=lambda: mg.attend(q, k, v, pattern, impl="fused"),
        peers={"FlexAttention": lambda: peer()()},
        oracle=lambda: mg.attend(
            q[:1, :1], k[:1, :1], v[:1, :1], pattern, impl="reference"
        ).double(),
        floor_ms=max(flops / TENSOR_FLOPS, 4 * q.numel() * 2 / COPY_BYTES) * 1e3,
        floor="products of kept positions at 800 TFLOP/s; Q, K, V, out once at 4.24 TB/s",
        shape="5 % of 16 × 16 clusters, B1 H8 N16384 D64 bfloat16",
        tolerance=2e-2,
    )


FUSED: dict[str, Callable[[], Work]] = {
    f"fused-{name}-{column}": functools.partial(fused, name, column)
    for column in COLUMNS
    for name in PATTERNS
} | {"fused-csr-clustered": clustered}
