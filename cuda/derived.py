"""What kernels derive from the tensors of a plan when a call first needs it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import CudaError
from .recording import recorded

V = TypeVar("V")
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class _Thread(threading.local):
    """Of each thread: another one that makes things for it, once it has asked; or that it is one.

    One for all would be one queue: what is made waits for the caller's stream, which may wait for a
    device whose thread waits in that queue. To begin a thread for every call takes longer than most
    of what it is to make.
    """

    worker: ThreadPoolExecutor | None = None
    makes = False


_thread = _Thread()


def derived(source: Tensor, key: Hashable, make: Callable[[], V]) -> V:
    """What ``make`` makes, made once and kept as long as the tensor it is made from.

    Args:
        source: a tensor of a plan that no other plan has: a layout and its transpose share some.
        key: tells what is derived from one tensor apart.
        make: may allocate, copy and read back; on CUDA it is called in a thread of its own, but
            on the default stream.

    Raises:
        CudaError: first use while a CUDA graph is being captured.
    """
    kept: dict[Hashable, Any] = _kept.setdefault(source, {})
    if key not in kept:
        made = _apart(source, make) if source.is_cuda else make()
        kept.setdefault(key, made)  # another thread may have been faster
    found: V = kept[key]
    return found


def known(source: Tensor, key: Hashable, value: object) -> None:
    """What ``derived`` would make of a tensor is at hand already."""
    _kept.setdefault(source, {}).setdefault(key, value)


def at_hand(source: Tensor, key: Hashable) -> Any:
    """What has been derived of a tensor, or was ``known`` of it; None if nothing."""
    return _kept.get(source, {}).get(key)


def _apart(source: Tensor, make: Callable[[], V]) -> V:
    """Make something that outlives the call.

    Where torch.compile warms up a CUDA graph, what the calling thread allocates goes to the graph's
    memory pool, which is torch's to reuse. Other threads allocate where memory always comes from.
    That never happens on the default stream, whose work no graph captures.
    """
    if torch.cuda.is_current_stream_capturing():
        raise CudaError(
            "a call would be planned while a CUDA graph is captured; plan first: run the same call "
            "once before the capture"
        )
    stream = torch.cuda.current_stream(source.device)
    if _thread.makes or not stream.cuda_stream:
        with recorded(None):  # it is for now and for later calls, no step of the one at hand
            return make()
    if _thread.worker is None:
        _thread.worker = ThreadPoolExecutor(1, "mixgrain derives")

    def run() -> V:
        _thread.makes = True
        with torch.cuda.stream(stream):
            return make()

    return _thread.worker.submit(run).result()
