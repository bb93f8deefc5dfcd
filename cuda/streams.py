"""Running two kinds of work at once: fork from torch's current stream, join back into it."""

from __future__ import annotations

import functools
from typing import Any

from .launch import cupy

# The highest there is (the runtime clamps it): CTAs of the side stream are placed first.
PRIORITY = -100


@functools.lru_cache(maxsize=256)
def _side(device: int, stream: int) -> Any:
    """The side stream of a stream.

    Each has its own: work beside a stream that is being captured must not touch another's. They are
    not of torch's pool, whose streams a user may hold under another name.
    """
    with cupy().cuda.Device(device):
        return cupy().cuda.Stream(non_blocking=True, priority=PRIORITY)


class Fork:
    """The events of one fork and join, in use by one call at a time.

    Works while a CUDA graph is captured, since every fork is joined. What the side stream reads and
    writes is allocated on the current stream and outlives the join, so torch's allocator need not
    know of the side stream.
    """

    __slots__ = ("_record", "_split", "_together", "_wait")

    def __init__(self) -> None:
        cuda = cupy().cuda
        self._split, self._together = (cuda.Event(disable_timing=True) for _ in range(2))
        self._record, self._wait = cuda.runtime.eventRecord, cuda.runtime.streamWaitEvent

    def split(self, device: int, stream: int) -> int:
        """Let the side stream go on from where a stream is; its raw pointer."""
        side: int = _side(device, stream).ptr
        self._record(self._split.ptr, stream)
        self._wait(side, self._split.ptr)
        return side

    def join(self, stream: int, side: int) -> None:
        """Let a stream wait for what the side stream has been given."""
        self._record(self._together.ptr, side)
        self._wait(stream, self._together.ptr)
