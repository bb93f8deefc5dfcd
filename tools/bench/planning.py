"""What planning a pattern that was never seen costs: host time until the kernels can run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from mixgrain import patterns as P
from mixgrain.attention.cuda import choice, kernel
from mixgrain.attention.cuda.plan import unpack
from mixgrain.attention.cuda.planner import plan_pattern
from mixgrain.attention.cuda.tables import tables
from mixgrain.formats.pattern import Pattern

from .fused import COLUMNS, bigbird, documents, scattered
from .measure import host_us

#: The patterns of the ``fused`` works, each a little different every time.
NEW: dict[str, Callable[[int, int], Pattern]] = {
    "causal": lambda n, i: P.causal() & P.window(n + i, 0),
    "window": lambda n, i: P.window(256 + i),
    "lfront": lambda n, i: P.longformer(256 + i, range(64)),
    "lscatter": lambda n, i: P.longformer(256 + i, scattered(n)),
    "bigbird64": lambda n, i: P.blocks(bigbird(n).roll(i, 1), 64),
    "sink": lambda n, i: P.causal() & (P.window(1023 + i, 0) | P.sinks(4)),
    "document": lambda n, i: P.documents(documents(n + i)[:n]) & P.causal(),
}
REPEATS = 40


def plan() -> list[dict[str, Any]]:
    """Rows of patterns and columns of ``fused``; the floor is torch's own ``x.add_``."""
    x = torch.zeros(1024, device="cuda")
    floor = host_us(lambda: x.add_(0))
    works = [(column, name) for column in ("A", "C") for name in NEW]
    times: dict[tuple[str, str], list[float]] = {work: [] for work in works}
    # In turn, so that a host that is busy for a while is so for all of them.
    for i in range(REPEATS):
        for work in works:
            times[work].append(_once(*work, i))
    return [
        _row(f"{name}-{column}", statistics.median(times[column, name]) * 1e3, floor)
        for column, name in works
    ]


def _once(column: str, name: str, i: int) -> float:
    """Seconds until a new pattern has a plan, and tables for a batch, with the device's part."""
    batch, heads, n, d = COLUMNS[column].shape
    device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    groups = choice.groups(device, dtype, d)
    walks = kernel.walks(dtype, d, device.index)
    pattern = NEW[name](n, i)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    made = plan_pattern(pattern, n, n, d, device, groups)
    assert made is not None, pattern
    tables(unpack(*made), (batch, heads, heads), n * d * 4, walks, kernel.groups(d))
    return time.perf_counter() - begin


def _row(shape: str, spent: float, floor: float) -> dict[str, Any]:
    return {
        "work": "plan",
        "engine": "mixgrain",
        "shape": f"a new pattern: {shape}",
        "ms": round(spent, 4),
        "floor_ms": round(floor / 1e3, 5),
        "floor": "host time of torch's x.add_(0) in the same run",
        "host_us": round(spent * 1e3, 1),
        "plan_ms": round(spent, 4),
        "error": 0.0,
        "ok": True,
        "goal_us": 1000,
        "impl": "plan_cells + plan_lines + plan_lengths + plan_items + plan_write + plan_walk",
    }
