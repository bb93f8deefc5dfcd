"""Running two kinds of work at once: fork from torch's current stream, join back into it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch


@functools.lru_cache(maxsize=64)
def _side(device: int, index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def concurrently(device: int, work: Sequence[Callable[[], None]]) -> None:
    """Queue the first item on the current stream and each other on a side stream; join them.

    Args:
        device: torch's index of the device.
        work: functions that only queue kernels. Their outputs are allocated before the call, on the
            current stream: nothing then has to outlive the join, and no record_stream is needed,
            which would hold memory back while a graph is captured.

    Works while a CUDA graph is captured: every fork is joined before this returns.
    """
    if len(work) < 2:
        for item in work:
            item()
        return
    current = torch.cuda.current_stream(device)
    sides = [_side(device, n) for n in range(len(work) - 1)]
    # Fork all before the first kernel, so that a side stream does not wait for it.
    for side in sides:
        side.wait_stream(current)
    for side, item in zip(sides, work[1:], strict=True):
        with torch.cuda.stream(side):
            item()
    work[0]()
    for side in sides:
        current.wait_stream(side)
