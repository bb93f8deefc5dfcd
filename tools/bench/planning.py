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
REPEATS = 40
KERNELS = " + ".join(wanted.name for wanted in (*requests(), walk_request()))


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
        host_row("plan", f"a new pattern: {name}-{column}", spent * 1e6, floor, 1000, KERNELS)
        for (column, name), spent in ((work, statistics.median(times[work])) for work in works)
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
