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
from mixgrain.attention.cuda.planner import plan_pattern, requests
from mixgrain.attention.cuda.tables import tables, walk_request
from mixgrain.formats.pattern import Pattern

from .fused import COLUMNS, bigbird, documents, scattered
from .measure import host_us
from .work import host_row

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
#: Longformer over a million tokens: B, H, N, D, and other global tokens every time.
LONG = (1, 4, 1 << 20, 64)
NEW_LONG: dict[str, Callable[[int, int], Pattern]] = {
    "lfront": lambda n, i: P.longformer(256, range(64 * i, 64 * i + 64)),
    "lscatter": lambda n, i: P.longformer(256, _drawn(n, i)),
}
REPEATS = 40
# Microseconds asked for.
GOAL, LONG_GOAL = 1000, 50_000
KERNELS = " + ".join(wanted.name for wanted in (*requests(), walk_request()))


def plan() -> list[dict[str, Any]]:
    """Rows of patterns and columns of ``fused``; the floor is torch's own ``x.add_``."""
    x = torch.zeros(1024, device="cuda")
    floor = host_us(lambda: x.add_(0))
    works = [
        (f"{name}-{column}", COLUMNS[column].shape, make, GOAL)
        for column in ("A", "C")
        for name, make in NEW.items()
    ]
    works += [(f"{name}, 1,048,576", LONG, make, LONG_GOAL) for name, make in NEW_LONG.items()]
    times: dict[str, list[float]] = {name: [] for name, *_ in works}
    # In turn, so that a host that is busy for a while is so for all of them.
    for i in range(REPEATS):
        for name, shape, make, _ in works:
            times[name].append(_once(shape, make, i))
    return [
        host_row(
            "plan", f"a new pattern: {name}", statistics.median(times[name]) * 1e6, floor, goal,
            KERNELS,
        )
        for name, _, _, goal in works
    ]  # fmt: skip


def _drawn(n: int, i: int) -> list[int]:
    """64 tokens."""
    generator = torch.Generator().manual_seed(i)
    drawn: list[int] = torch.randint(0, n, (80,), generator=generator).unique()[:64].tolist()
    return drawn


def _once(shape: tuple[int, int, int, int], make: Callable[[int, int], Pattern], i: int) -> float:
    """Seconds until a new pattern has a plan, and tables for a batch, with the device's part."""
    batch, heads, n, d = shape
    device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    groups = choice.groups(device, dtype, d)
    walks = kernel.walks(dtype, d, device.index)
    pattern = make(n, i)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    made = plan_pattern(pattern, n, n, d, device, groups)
    assert made is not None, pattern
    tables(unpack(*made), (batch, heads, heads), n * d * 4, walks, kernel.groups(d))
    return time.perf_counter() - begin
