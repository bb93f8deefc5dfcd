"""What a recorded call consists of: launches and torch's work, with places for addresses.

recording.py notes such steps, prepared.py fills in the addresses and runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .launch import Kernel


@dataclass(frozen=True, slots=True)
class Address:
    """A place in a tensor that is only known when a call runs.

    Attributes:
        slot: which tensor.
        offset: bytes from its first element.
        residue: address of the first element modulo 16; the signature of the call fixes it.
    """

    slot: int
    offset: int
    residue: int

    def __add__(self, more: int) -> Address:
        return Address(self.slot, self.offset + more, self.residue)

    def __mod__(self, unit: int) -> int:
        assert 16 % unit == 0
        return (self.residue + self.offset) % unit


class Map(NamedTuple):
    """A TMA descriptor to be encoded when the address is known; see `tma.descriptor`."""

    address: Address
    dtype: torch.dtype
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


class Fields(NamedTuple):
    """A struct to be passed by value when the addresses in it are known.

    Attributes:
        memory: its bytes.
        places: offset in bytes of each address, and the address.
    """

    memory: bytes
    places: tuple[tuple[int, Address], ...]


def by_value(fields: np.ndarray, places: Sequence[tuple[int, int | Address]]) -> Any:
    """A struct as an argument of a launch.

    Args:
        fields: one element of the struct's dtype; 0 where addresses belong.
        places: offset in bytes of each address, and the address.

    Returns:
        A numpy scalar to pass by value; for symbols `Fields`.
    """
    known = fields.reshape(1).view(np.uint8)
    unknown = []
    for offset, address in places:
        if isinstance(address, Address):
            unknown.append((offset, address))
        else:
            known[offset : offset + 8].view(np.int64)[0] = address
    if unknown:
        return Fields(known.tobytes(), tuple(unknown))
    return known.view(f"V{known.size}")[0]


def addresses(argument: Any) -> Iterator[Address]:
    """The addresses in an argument of a launch."""
    if isinstance(argument, Address):
        yield argument
    elif isinstance(argument, Map):
        yield argument.address
    elif isinstance(argument, Fields):
        for _, address in argument.places:
            yield address


class Launch(NamedTuple):
    """One kernel launch.

    Attributes:
        kernel: what to launch.
        grid: CTAs in x, y, z.
        threads: of a CTA.
        arguments: ints, numpy scalars, addresses, maps and fields.
        shared: dynamic shared memory, bytes.
        side: on the side stream.
        early: it may begin while the kernel before it ends; see early.py.
    """

    kernel: Kernel
    grid: tuple[int, ...]
    threads: int
    arguments: tuple[Any, ...]
    shared: int
    side: bool
    early: bool = False


class View(NamedTuple):
    """Part of a slot: offset in elements from its first element, shape and strides."""

    slot: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, held: list[Tensor]) -> Tensor:
        """The view, of real tensors."""
        base = held[self.slot]
        # Nothing else shares its memory: autograd need not know, and lets it be changed in place.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return base.as_strided(self.shape, self.strides, base.storage_offset() + self.offset)


class Work(NamedTuple):
    """A step that torch does: its result, if it has a slot, is a new tensor."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    slot: int | None


FORK, JOIN = "fork", "join"
Step = Launch | Work | str
