"""How the benchmarks measure: device time of CUDA-graph replays, caches flushed, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 of any device there is


def device_ms(call: Callable[[], object], repeats: int = 30) -> float:
    """Median device time of one call, milliseconds.

    The call is captured in a CUDA graph; before every replay a large buffer is overwritten, so that
    inputs come from device memory as they would in a model.
    """
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    graph.replay()
    times: list[float] = []
    for _ in range(repeats):
        flush.fill_(1)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return float(statistics.median(times))


def host_us(call: Callable[[], object], repeats: int = 200) -> float:
    """Median time the host spends in one call, microseconds; the device is kept from backing up."""
    for _ in range(10):
        call()
    times = []
    for n in range(repeats):
        if n % 20 == 0:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """‖out − reference‖ / ‖reference‖ in float64; NaN when anything is not finite."""
    difference = out.double() - reference.double()
    return float(difference.norm() / reference.double().norm().clamp(min=1e-300))
