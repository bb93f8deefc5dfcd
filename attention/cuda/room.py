"""Several arrays in one allocation, and structs of pointers, as the planning kernels take them."""

from __future__ import annotations

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
        sizes: of each, in numbers.
        at: its address.
    """

    memory: Tensor
    sizes: Mapping[str, int]
    at: dict[str, int]

    def part(self, name: str, count: int) -> Tensor:
        """The first numbers of an array."""
        return self.memory.narrow(0, (self.at[name] - self.memory.data_ptr()) // 4, count)

    def parts(self) -> dict[str, Tensor]:
        """All arrays as tensors of their own; at once, as each alone takes three microseconds."""
        cuts: list[int] = []
        for size in self.sizes.values():
            cuts += (size, -size % ALIGN)
        return dict(zip(self.sizes, self.memory.split_with_sizes(cuts)[::2], strict=True))


def room(sizes: Mapping[str, int], device: torch.device, zero: bool = False) -> Room:
    """Room for arrays of these sizes, each of which starts at a multiple of 256 bytes."""
    total = sum(size + -size % ALIGN for size in sizes.values())
    make = torch.zeros if zero else torch.empty
    memory = make(total, dtype=torch.int32, device=device)
    places, at = {}, memory.data_ptr()
    for name, size in sizes.items():
        places[name] = at
        at += 4 * (size + -size % ALIGN)
    return Room(memory, sizes, places)


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
