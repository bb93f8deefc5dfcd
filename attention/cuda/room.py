"""Several arrays in one allocation, and structs of pointers, as the planning kernels take them."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Numbers to which each array's start is rounded up: 256 bytes, as of allocations of their own.
ALIGN = 64


class Room(NamedTuple):
    """Arrays of int32 in one allocation.

    Attributes:
        memory: all of them.
        first: where each of them begins, in numbers.
        at: its address.
    """

    memory: Tensor
    first: dict[str, int]
    at: dict[str, int]

    def part(self, name: str, *shape: int) -> Tensor:
        """One array as a tensor of its own."""
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        return self.memory.as_strided(shape, strides, self.first[name])


def room(sizes: Mapping[str, int], device: torch.device, zero: bool = False) -> Room:
    """Room for arrays of these sizes, each of which starts at a multiple of 256 bytes."""
    first, total = {}, 0
    for name, size in sizes.items():
        first[name] = total
        total += -(-size // ALIGN) * ALIGN
    make = torch.zeros if zero else torch.empty
    memory = make(total, dtype=torch.int32, device=device)
    base = memory.data_ptr()
    return Room(memory, first, {name: base + 4 * at for name, at in first.items()})


class Struct:
    """A struct of pointers, then of ints, that kernels take by value.

    Args:
        pointers: their names, in order.
        ints: likewise.
    """

    def __init__(self, pointers: Sequence[str], ints: Sequence[str]) -> None:
        self.pointers, self.ints = tuple(pointers), tuple(ints)
        # Its size is a multiple of a pointer's.
        self._packed = struct.Struct(f"={len(pointers)}q{len(ints)}i{len(ints) % 2 * 4}x")
        self._kind = np.dtype(f"V{self._packed.size}")

    def value(self, places: Mapping[str, int], ints: Sequence[int]) -> np.void:
        """The struct with these addresses, by name, and these ints."""
        packed = self._packed.pack(*(places[name] for name in self.pointers), *ints)
        made: np.void = np.frombuffer(packed, self._kind)[0]
        return made
