"""What a benchmark is: our call, the peers' calls, an oracle and a floor; and what works share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Ceilings of the device the floors are for: one H200, a 1 GiB copy and 4096³ cuBLAS products.
COPY_BYTES = 4.24e12
TENSOR_FLOPS = 8.0e14
L2_BYTES = 8.9e12
# Largest relative error accepted of a product: a few roundings of the result.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


@dataclass
class Work:
    """One work of the table.

    Attributes:
        id: its name.
        ours: runs mixgrain once.
        peers: name to a call of the same work.
        oracle: what `ours` should return, float64.
        floor_ms: time that the limit named allows, milliseconds.
        floor: how the floor was reckoned.
        tolerance: largest relative error accepted.
        shape: sizes and dtype, in words.
        plans: engine to a function that measures its planning, milliseconds.
        flops: operations that the result needs, if `rate` is given.
        rate: whose dense FLOP/s the row's `eta` is a share of, and how many they are.
        oracles: what a peer should return that computes something else.
    """

    id: str
    ours: Callable[[], Tensor]
    peers: dict[str, Callable[[], Tensor]]
    oracle: Callable[[], Tensor]
    floor_ms: float
    floor: str
    tolerance: float = 5e-3
    shape: str = ""
    plans: dict[str, Callable[[], float]] = field(default_factory=dict)
    flops: float = 0.0
    rate: Callable[[], tuple[str, float]] | None = None
    oracles: dict[str, Callable[[], Tensor]] = field(default_factory=dict)


def host_row(
    work: str, shape: str, spent: float, floor: float, goal: float, impl: str
) -> dict[str, Any]:
    """A row of host time, beside that of torch's own ``x.add_``; microseconds."""
    return {
        "work": work,
        "engine": "mixgrain",
        "shape": shape,
        "ms": round(spent / 1e3, 5),
        "floor_ms": round(floor / 1e3, 5),
        "floor": "host time of torch's x.add_(0) in the same run",
        "host_us": round(spent, 1),
        "plan_ms": None,
        "error": 0.0,
        "ok": True,
        "goal_us": goal,
        "impl": impl,
    }


def launched(
    kernel: Any, grid: tuple[int, ...], block: int, arguments: Any, shared: int = 0
) -> None:
    """Run a CuPy kernel on torch's current stream."""
    import cupy

    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        kernel(grid, (block,), arguments, shared_mem=shared)


def wrapped(total: Tensor) -> Tensor:
    """Sums as 32 bits hold them, signed."""
    return (total + (1 << 31)) % (1 << 32) - (1 << 31)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers on the device."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", dtype=dtype, generator=generator)


def dots(q: Tensor, k: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Products of chosen rows of q and k, float64."""
    pieces = [
        (q[i].double() * k[j].double()).sum(-1)
        for i, j in zip(row.split(1 << 20), column.split(1 << 20), strict=True)
    ]
    return torch.cat(pieces)
