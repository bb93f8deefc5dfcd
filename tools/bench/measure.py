"""How the benchmarks measure: device time of CUDA-graph replays, caches flushed, medians.

Every engine alike, on a device that has rested.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable

import torch
import torch.profiler

from mixgrain.formats.cache import clear_caches

FLUSH_BYTES = 256 << 20  # several times the L2 of any device there is
# Seconds of rest, then milliseconds of the call itself before it is timed, and while it is: under
# load a device lowers its clock (an H200 from 1980 to 1590 MHz within 0.1 s of attention, for about
# as long), and no call is to pay for what ran before it. The times are those of Triton's do_bench.
REST, WARM_MS, TIMED_MS = 0.3, 25.0, 100.0


def device_ms(call: Callable[[], object], least: int = 30) -> float:
    """Median device time of one call, milliseconds.

    The call is captured in a CUDA graph; the device rests, then warms up with the call; before
    every replay a large buffer is overwritten, so that inputs come from device memory as they would
    in a model.

    Args:
        call: runs the work once.
        least: replays that are timed at least.
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

    def timed(repeats: int) -> tuple[list[float], float]:
        """Milliseconds of each replay, and of each with its flush."""
        events = []
        for _ in range(repeats):
            flush.fill_(1)
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            events.append((start, stop))
        torch.cuda.synchronize()
        whole = events[0][0].elapsed_time(events[-1][1])
        return [start.elapsed_time(stop) for start, stop in events], whole / repeats

    _, each = timed(5)
    time.sleep(REST)
    timed(max(1, round(WARM_MS / each)))
    times, _ = timed(max(least, round(TIMED_MS / each)))
    return statistics.median(times)


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


def plan_ms(call: Callable[[], object], host: float) -> float:
    """What planning adds to the first call on a layout when kernels are there, milliseconds.

    Args:
        call: runs mixgrain on layouts that exist; their plans are forgotten before.
        host: microseconds of a call that needs no planning.
    """
    times = []
    for _ in range(3):
        clear_caches()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
    return max(0.0, statistics.median(times) * 1e3 - host / 1e3)


def once_ms(call: Callable[[], object]) -> float:
    """Wall time of one call and the work it queues, milliseconds; median of three."""
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def intervals(call: Callable[[], object]) -> list[tuple[str, float, float]]:
    """Kernels of one call as the profiler sees them: name, start and end in microseconds."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    events = profile.events() or []
    found = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in events
        if event.device_type == torch.profiler.DeviceType.CUDA
    )
    return [(name, start - found[0][0], end - found[0][0]) for start, end, name in found]


def kernels(call: Callable[[], object]) -> str:
    """Names of the kernels that a call runs, in order, each once, without template arguments."""
    names = [re.split(r"[<(]", name.removeprefix("void "))[0] for name, *_ in intervals(call)]
    return " + ".join(dict.fromkeys(names))
