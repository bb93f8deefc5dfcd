"""Works of dynamic N:M attention, after the protocol of its paper: bfloat16, 4 heads, D 64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.formats.pattern import Pattern

from . import alone
from .work import COPY_BYTES, Work, dots, random

HEADS, WIDTH = 4, 64
SCALE = WIDTH**-0.5
LENGTHS = (256, 512, 1024, 2048, 4096)


def _operands(length: int) -> tuple[list[Tensor], str]:
    batch = 24 if length > 2048 else 48
    made = [random(batch, HEADS, length, WIDTH, dtype=torch.bfloat16, seed=s) for s in (1, 2, 3)]
    return made, f"B{batch} H{HEADS} N{length} D{WIDTH} bfloat16, 2:4 of the scores"


def _bytes(q: Tensor) -> tuple[int, int, int]:
    """Of the packed values, of the metadata, and of one of Q, K, V and the result."""
    batch, heads, length, _ = q.shape
    values = batch * heads * length * length // 2 * 2
    return values, values // 8, q.numel() * 2


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Torch's baddbmm, softmax and bmm."""
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    bias = q.new_zeros(1, 1, 1)

    def call() -> Tensor:
        s = torch.baddbmm(bias, flat[0], flat[1].mT, beta=0, alpha=SCALE)
        return torch.bmm(torch.softmax(s, -1), flat[2]).view(q.shape)

    return call


def composed(length: int) -> Work:
    """Prune, softmax, sparse product, against the three dense steps."""
    (q, k, v), shape = _operands(length)
    values, metadata, operand = _bytes(q)

    def one(pattern: Pattern) -> Callable[[], Tensor]:
        return lambda: mg.attend(
            q[:1, :1], k[:1, :1], v[:1, :1], pattern, impl="reference"
        ).double()

    return Work(
        id=f"composed-nm24-L{length}",
        ours=lambda: mg.attend(q, k, v, P.nm(2, 4), impl="composed"),
        peers={"torch dense": _dense(q, k, v)},
        oracle=one(P.nm(2, 4)),
        oracles={"torch dense": one(P.full())},
        floor_ms=(4 * values + 2 * metadata + 4 * operand) / COPY_BYTES * 1e3,
        floor="values written, read, written, read; metadata twice; Q, K, V, out once; 4.24 TB/s",
        shape=shape,
        tolerance=2e-2,
    )


def step(name: str, length: int) -> Work:
    """One of the three kernels."""
    (q, k, v), shape = _operands(length)
    values, metadata, operand = _bytes(q)
    s = mg.sddmm(q, k, P.nm(2, 4), scale=SCALE)
    p = mg.softmax(s)
    first = s.layout.slots // s.layout.entries
    row, column = (t[:first] for t in s.layout.indices())
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    dense_s = torch.bmm(flat[0], flat[1].mT)
    dense_p = torch.softmax(dense_s, -1)

    def one(t: mg.SparseTensor) -> Tensor:
        """The first matrix, dense."""
        made = torch.zeros(length, length, dtype=torch.float64, device="cuda")
        made[row, column] = t.values[..., :first].flatten().double()
        return made

    def soft() -> Tensor:
        kept = torch.full((length, length), -torch.inf, dtype=torch.float64, device="cuda")
        kept[row, column] = s.values[..., :first].flatten().double()
        made: Tensor = torch.softmax(kept, -1)[row, column]
        return made

    def whole(t: Tensor) -> Tensor:
        return t.view(*q.shape[:2], *t.shape[1:])

    chosen: dict[str, tuple[Any, ...]] = {
        "sddmm": (
            lambda: mg.sddmm(q, k, P.nm(2, 4), scale=SCALE).values[..., :first].flatten(),
            lambda: dots(q[0, 0], k[0, 0], row, column) * SCALE,
            lambda: whole(torch.bmm(flat[0], flat[1].mT)),
            lambda: flat[0][0].double() @ flat[1][0].double().mT,
            values + metadata + 2 * operand,
            "Q, K, values and metadata once",
        ),
        "softmax": (
            lambda: mg.softmax(s).values[..., :first].flatten(),
            soft,
            lambda: whole(torch.softmax(dense_s, -1)),
            lambda: torch.softmax(dense_s[0].double(), -1),
            2 * values,
            "values read and written",
        ),
        "spmm": (
            lambda: mg.spmm(p, v),
            lambda: one(p) @ v[0, 0].double(),
            lambda: whole(torch.bmm(dense_p, flat[2])),
            lambda: dense_p[0].double() @ flat[2][0].double(),
            values + metadata + 2 * operand,
            "values, metadata, V and out once",
        ),
    }
    ours, oracle, peer, dense, moved, words = chosen[name]
    peers, oracles = {"torch dense": peer}, {"torch dense": dense}
    if name == "sddmm":  # which writes nearly all that it moves
        peers["fill of as many bytes"], oracles["fill of as many bytes"] = alone.fill(moved)
    return Work(
        id=f"nm24-{name}-L{length}",
        ours=ours,
        peers=peers,
        oracle=oracle,
        oracles=oracles,
        floor_ms=moved / COPY_BYTES * 1e3,
        floor=f"{words}, at 4.24 TB/s",
        shape=shape,
        tolerance=2e-2,
    )


#: What makes each work.
PRUNED: dict[str, Callable[[], Work]] = {
    **{f"composed-nm24-L{n}": partial(composed, n) for n in LENGTHS},
    **{
        f"nm24-{name}-L{n}": partial(step, name, n)
        for name in ("sddmm", "softmax", "spmm")
        for n in LENGTHS[-2:]
    },
}
