"""Arrays made on the host, brought to a device at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Numbers to which each array's start is rounded up: 256 bytes, as of allocations of their own.
ALIGN = 64


def upload(arrays: Sequence[np.typing.NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Integers as int32 tensors that share one allocation, in one copy.

    A device pays more for each copy than for its bytes. Returns when the copy is done: other
    streams may read the tensors at once.
    """
    starts, total = [], 0
    for array in arrays:
        starts.append(total)
        total += -(-array.size // ALIGN) * ALIGN
    buffer = torch.empty(total, dtype=torch.int32, pin_memory=device.type == "cuda")
    flat = buffer.numpy()
    for start, array in zip(starts, arrays, strict=True):
        flat[start : start + array.size] = array.reshape(-1)
    there = buffer.to(device, non_blocking=True)
    made = [
        there[start : start + array.size].view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return made
