"""What is measured: one entry an id, with our call, the peers' calls, an oracle and a floor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.cuda.device import hopper
from mixgrain.formats.errors import UnsupportedError
from mixgrain.formats.pattern import Pattern
from mixgrain.primitives.softmax import softmax_backward

from . import alone, launching, planning
from .dense import DENSE
from .fused import FUSED
from .graphs import GRAPHS
from .layers import LAYERS, linear_tile
from .measure import once_ms
from .pruned import PRUNED
from .weights import block_weight, row_weight, tile_weight
from .work import COPY_BYTES, L2_BYTES, TENSOR_FLOPS, TOLERANCE, Work, dots, random
from .works_nm import linear_nm


def spmm_block(size: int, density: float, n: int = 4096) -> Work:
    """Block weights times a dense matrix, n³ float16."""
    weight, dense = block_weight(n, size, density)
    x = random(n, n, dtype=torch.float16, seed=1)
    bsr = dense.to_sparse_bsr((size, size))
    flops = 2 * weight.nnz * n
    floor = max(flops / TENSOR_FLOPS, (2 * n * n + weight.nnz) * 2 / COPY_BYTES)
    peers = {"cuBLAS dense": lambda: dense @ x, "torch BSR": lambda: bsr @ x}
    oracles: dict[str, Callable[[], Tensor]] = {}
    if size >= 64 and hopper(x.device):
        # Large products are by pairs of lines, which move less than single ones.
        name = "moves of single lines"
        peers[name], oracles[name] = alone.moves(weight, x)
    return Work(
        id=f"spmm-block{size}-d{round(density * 100):02d}",
        ours=lambda: mg.spmm(weight, x),
        peers=peers,
        oracle=lambda: dense.double() @ x.double(),
        oracles=oracles,
        floor_ms=floor * 1e3,
        floor="max(2·nnz·n / 800 TFLOP/s, (values + x + out) bytes / 4.24 TB/s)",
        shape=f"{n}³ float16, {density:.0%} of {size}-blocks",
    )


def spmm_tile(density: float, n: int = 4096) -> Work:
    """Weights in tiles of 16 times a dense matrix, n³ float16."""
    weight, dense = tile_weight(n, n, density)
    x = random(n, n, dtype=torch.float16, seed=1)
    bsr = dense.to_sparse_bsr((16, 16))
    floor = max(2 * weight.nnz * n / TENSOR_FLOPS, (2 * n * n + weight.nnz) * 2 / COPY_BYTES)
    return Work(
        id=f"spmm-tile16-d{round(density * 100):02d}",
        ours=lambda: mg.spmm(weight, x),
        peers={"cuBLAS dense": lambda: dense @ x, "torch BSR": lambda: bsr @ x},
        oracle=lambda: dense.double() @ x.double(),
        floor_ms=floor * 1e3,
        floor="max(2·nnz·n / 800 TFLOP/s, (values + x + out) bytes / 4.24 TB/s)",
        shape=f"{n}³ float16, {density:.0%} of 16×16 tiles",
    )


def spmm_row(width: int, dtype: torch.dtype, name: str) -> Work:
    """Unstructured 8192² weights, 5 %, times `width` columns."""
    weight, dense = row_weight(dtype)
    x = random(dense.shape[1], width, dtype=dtype, seed=1)
    csr = dense.to_sparse_csr()
    floor = weight.nnz * width * dense.element_size() / L2_BYTES
    reason = "nnz · n elements gathered from L2 at 8.9 TB/s; hits in L1 can beat it"
    if width > 128:  # the gathered rows are more than a dense product is
        floor, reason = 2 * dense.numel() * width / TENSOR_FLOPS, "2·n²·columns / 800 TFLOP/s"
    return Work(
        id=f"spmm-row-n{width}-{name}",
        ours=lambda: mg.spmm(weight, x),
        peers={"cuSPARSE": lambda: csr @ x, "cuBLAS dense": lambda: dense @ x},
        oracle=lambda: dense.double() @ x.double(),
        floor_ms=floor * 1e3,
        floor=reason,
        shape=f"8192² {name}, 5 %, {width} columns",
        tolerance=TOLERANCE[dtype],
    )


def sddmm_row(width: int, dtype: torch.dtype, name: str) -> Work:
    """Scores at unstructured positions of 8192², 5 %, head dimension `width`."""
    weight, dense = row_weight(dtype)
    q, k = (random(8192, width, dtype=dtype, seed=s) for s in (1, 2))
    layout = weight.layout
    row, column = layout.indices()
    peers: dict[str, Callable[[], Tensor]] = {}
    if dtype == torch.float32:
        csr, kt = dense.to_sparse_csr(), k.T.contiguous()
        peers["cuSPARSE"] = lambda: torch.sparse.sampled_addmm(csr, q, kt, beta=0.0).values()
    gathered = layout.nnz * width * q.element_size()
    return Work(
        id=f"sddmm-row-n{width}-{name}",
        ours=lambda: mg.sddmm(q, k, layout).values,
        peers=peers,
        oracle=lambda: dots(q, k, row, column),
        floor_ms=gathered / L2_BYTES * 1e3,
        floor="nnz · D elements gathered from L2 at 8.9 TB/s; hits in L1 can beat it",
        shape=f"8192² {name}, 5 %, D {width}",
        tolerance=TOLERANCE[dtype],
    )


def _some_blocks(size: int) -> Pattern:
    """15 % of the blocks of 4096 queries and keys."""
    blocks = 4096 // size
    kept = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0)) < 0.15
    return P.blocks(kept, size)


def _queries_and_keys() -> tuple[Tensor, Tensor]:
    q, k = (random(4, 16, 4096, 128, dtype=torch.bfloat16, seed=s) for s in (1, 2))
    return q, k


def sddmm_block(size: int) -> Work:
    """Scores of 15 % of the blocks, B4 H16 N4096 D128 bfloat16."""
    layout = _some_blocks(size).to_layout("block", 4096, 4096, size=size).to("cuda")
    q, k = _queries_and_keys()
    moved = (q.numel() + k.numel() + 64 * layout.slots) * 2

    def oracle() -> Tensor:
        row, column = layout.indices()
        return dots(q[0, 0], k[0, 0], row, column)

    return Work(
        id=f"sddmm-block{size}",
        ours=lambda: mg.sddmm(q, k, layout).values,
        peers={},
        oracle=oracle,
        floor_ms=moved / COPY_BYTES * 1e3,
        floor="(Q + K + values) bytes / 4.24 TB/s",
        shape=f"B4 H16 N4096 D128 bfloat16, 15 % of {size}-blocks",
    )


def softmax_work(backward: bool, kind: str = "") -> Work:
    """Softmax, or its backward, over the scores of `sddmm-block64`, of a "window" or of "rows"."""
    pattern, sort, kept = {
        "": (_some_blocks(64), "block", "15 % of 64-blocks"),
        "window": (P.window(256), "block", "±256 in 64-blocks"),
        "rows": (P.random(0.005, 0), "row", "rows of some 20 entries"),
    }[kind]
    layout, (q, k) = pattern.to_layout(sort, 4096, 4096).to("cuda"), _queries_and_keys()
    scores = mg.sddmm(q, k, layout, scale=1 / math.sqrt(128))
    p = mg.softmax(scores)
    grad = p.with_values(torch.randn_like(p.values))
    dense = scores.with_values(scores.values[0, 0]).to_dense().double()
    mask = layout.mask()[0, 0]

    def oracle() -> Tensor:
        made = torch.softmax(dense.masked_fill(~mask, -torch.inf), -1).nan_to_num()
        if backward:
            g = grad.with_values(grad.values[0, 0]).to_dense().double()
            chosen = p.with_values(p.values[0, 0]).to_dense().double()
            made = chosen * (g - (chosen * g).sum(-1, keepdim=True))
        row, column = layout.indices()
        return made[row, column]

    values = scores.values.numel() * 2
    passes = 3 if backward else 2
    return Work(
        id="-".join(filter(None, ("softmax", kind, "bwd" if backward else "fwd"))),
        ours=(lambda: softmax_backward(p, grad).values)
        if backward
        else (lambda: mg.softmax(scores).values),
        peers={},
        oracle=oracle,
        floor_ms=passes * values / COPY_BYTES * 1e3,
        floor=f"{passes} × value bytes / 4.24 TB/s",
        shape=f"B4 H16 N4096, {kept}, bfloat16",
        tolerance=1e-2,
    )


def composed_longformer() -> Work:
    """Attention composed of the three primitives: ±256 and 64 scattered global tokens."""
    n = 4096
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:64]
    pattern = P.longformer(256, chosen)
    q, k, v = (random(4, 16, n, 64, dtype=torch.float16, seed=s) for s in (1, 2, 3))
    layout = pattern.to_layout("mixed", n, n, device="cuda")

    def flex() -> tuple[Callable[[], Tensor], Callable[[], float]]:
        from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

        marked = torch.zeros(n, dtype=torch.bool, device="cuda")
        marked[chosen.cuda()] = True

        def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return ((i - j).abs() <= 256) | marked[i] | marked[j]

        def plan() -> BlockMask:
            return create_block_mask(keep, None, None, n, n, device="cuda")

        mask = plan()
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda: compiled(q, k, v, block_mask=mask), lambda: once_ms(plan)

    values = layout.nnz * 64 * 2
    attention, plan = flex()
    return Work(
        id="composed-longformer",
        ours=lambda: mg.attend(q, k, v, layout, impl="composed"),
        peers={"FlexAttention": attention},
        plans={"FlexAttention": plan},
        oracle=lambda: mg.attend(
            q[:1, :1], k[:1, :1], v[:1, :1], pattern, impl="reference"
        ).double(),
        floor_ms=(4 * values + 4 * q.numel() * 2) / COPY_BYTES * 1e3,
        floor="scores written, read and written, read once; Q, K, V, out once; at 4.24 TB/s",
        shape="±256, 64 scattered globals, B4 H16 N4096 D64 float16",
        tolerance=1e-2,
    )


# What makes a work, or measures rows itself.
WORKS: dict[str, Callable[[], Work | list[dict[str, Any]]]] = {
    "spmm-block128-d20": lambda: spmm_block(128, 0.20),
    "spmm-block128-d05": lambda: spmm_block(128, 0.05),
    "spmm-block64-d20": lambda: spmm_block(64, 0.20),
    "spmm-block64-d05": lambda: spmm_block(64, 0.05),
    "spmm-block32-d20": lambda: spmm_block(32, 0.20),
    "spmm-nm24-8192": lambda: linear_nm("spmm-nm24-8192", 8192, 8192),
    "spmm-nm24-4096": lambda: linear_nm("spmm-nm24-4096", 4096, 4096),
    "nm24-decode-1": lambda: linear_nm("nm24-decode-1", 8192, 1),
    "nm24-decode-16": lambda: linear_nm("nm24-decode-16", 8192, 16),
    "spmm-tile16-d20": lambda: spmm_tile(0.20),
    "spmm-tile16-d10": lambda: spmm_tile(0.10),
    "spmm-et-768": lambda: linear_tile("spmm-et-768", 768, 768, 128),
    "spmm-et-3072": lambda: linear_tile("spmm-et-3072", 3072, 768, 128),
    "spmm-et-3072-down": lambda: linear_tile("spmm-et-3072-down", 768, 3072, 128),
    "tile-decode-1": lambda: linear_tile("tile-decode-1", 8192, 8192, 1),
    "tile-decode-16": lambda: linear_tile("tile-decode-16", 8192, 8192, 16),
    "tile-decode-64": lambda: linear_tile("tile-decode-64", 8192, 8192, 64),
    "spmm-row-n64-fp16": lambda: spmm_row(64, torch.float16, "fp16"),
    "spmm-row-n64-bf16": lambda: spmm_row(64, torch.bfloat16, "bf16"),
    "spmm-row-n64-fp32": lambda: spmm_row(64, torch.float32, "fp32"),
    "spmm-row-n512-fp16": lambda: spmm_row(512, torch.float16, "fp16"),
    "sddmm-row-n64-fp32": lambda: sddmm_row(64, torch.float32, "fp32"),
    "sddmm-row-n512-fp32": lambda: sddmm_row(512, torch.float32, "fp32"),
    "sddmm-row-n64-fp16": lambda: sddmm_row(64, torch.float16, "fp16"),
    "sddmm-block128": lambda: sddmm_block(128),
    "sddmm-block64": lambda: sddmm_block(64),
    "softmax-fwd": lambda: softmax_work(False),
    "softmax-bwd": lambda: softmax_work(True),
    "softmax-window-fwd": lambda: softmax_work(False, "window"),
    "softmax-window-bwd": lambda: softmax_work(True, "window"),
    "softmax-rows-fwd": lambda: softmax_work(False, "rows"),
    "softmax-rows-bwd": lambda: softmax_work(True, "rows"),
    "composed-longformer": composed_longformer,
    "composed-streams": launching.composed_streams,
    "launch": launching.launch,
    "plan": planning.plan,
    **FUSED,
    **DENSE,
    **GRAPHS,
    **PRUNED,
    **LAYERS,
}


def chosen(
    ids: list[str],
) -> Iterator[tuple[str, Callable[[], Work | list[dict[str, Any]]]]]:
    """The works asked for, all when none is; a name that ends in * takes all it begins.

    Raises:
        UnsupportedError: an id that does not exist.
    """
    for asked in ids or ["*"]:
        found = [
            i for i in WORKS if i == asked or (asked.endswith("*") and i.startswith(asked[:-1]))
        ]
        if not found:
            raise UnsupportedError(f"no benchmark {asked!r}; there are: {', '.join(WORKS)}")
        for name in found:
            yield name, WORKS[name]
