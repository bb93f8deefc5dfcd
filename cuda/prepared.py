"""Running a recorded call: allocate, fill in the addresses, launch.

The arguments of a launch lie in one piece of memory that the driver reads as it is: constants,
addresses, and the table of where each argument is. Such blocks are made for the addresses of a run
and kept by them, since an allocator hands out the same few again and again; they never change, so
threads may share them. What is kept is the driver's function with all it takes. Launches go through
CuPy's binding of cuLaunchKernel: RawKernel's own call makes an object of every argument each time,
three times the cost.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import math
import struct
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from . import tma
from .device import using
from .early import early
from .launch import cupy
from .recording import Operand, Recording, strides_of
from .steps import FORK, Address, Fields, Launch, Map, View, Work, addresses
from .streams import Fork

_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)
# Sets of addresses whose argument blocks are kept, and addresses whose descriptors are.
_BLOCKS = 512
# Scratch tensors of a call lie in one allocation, each at a multiple of this many bytes.
_ALIGNMENT = 256
_POINTER = struct.Struct("Q")

Empty = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]


def _empty_strided(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


# What torch's own compiled code allocates with, on the current device: past the dispatcher, in a
# third of the time of torch.empty. Bound here so that tests can poison what is allocated.
_empty: Empty = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", _empty_strided)

V = TypeVar("V")


class _Thread(threading.local):
    """Devices whose context this thread has had current: torch switches back to it by itself."""

    devices: frozenset[int] = frozenset()


_thread = _Thread()


class _Recent(dict[Hashable, V], Generic[V]):
    """The last values made; safe to use from several threads."""

    def keep(self, key: Hashable, value: V) -> V:
        """Store a value, dropping the oldest when there are too many."""
        while len(self) >= _BLOCKS:
            try:
                del self[next(iter(self))]
            except (KeyError, RuntimeError):  # another thread changed it meanwhile
                break
        self[key] = value
        return value


class _Maps:
    """Descriptors of one operand by its address."""

    __slots__ = ("_made", "_wanted")

    def __init__(self, wanted: Map) -> None:
        self._wanted = wanted
        self._made: _Recent[tuple[int, Any]] = _Recent()

    def at(self, pointer: int) -> tuple[int, Any]:
        """Where the encoded descriptor lies, and what to keep alive while it is used."""
        found = self._made.get(pointer)
        if found is None:
            w = self._wanted
            made: Any = tma.descriptor(pointer, w.dtype, w.dims, w.strides, w.box, w.swizzle)
            found = self._made.keep(pointer, (made.ctypes.data, made))
        return found


class _Place(NamedTuple):
    """Where a slot of a recording is when a call runs.

    Attributes:
        tensor: which of the tensors that are held: given, allocated, made by torch as steps go.
        offset: bytes from its first element.
    """

    tensor: int
    offset: int


class _Launch:
    """A launch whose addresses are not known yet."""

    __slots__ = (
        "_early", "_holes", "_inside", "_maps", "_memory", "_offsets", "_pack", "_size", "how",
        "side",
    )  # fmt: skip

    def __init__(self, step: Launch, places: dict[int, _Place], known: dict[Map, _Maps]) -> None:
        grid = (*step.grid, 1, 1)[:3]
        handle = step.kernel.function(step.shared)
        self.how = (handle, *grid, step.threads, 1, 1, step.shared)
        self.side, self._early = step.side, step.early
        self._holes: list[_Place] = []
        self._maps: list[tuple[int, _Place, _Maps]] = []
        self._inside: list[tuple[int, _Place]] = []  # of structs: where in memory, what
        # For each argument: its hole, or where its constant lies in memory, or nothing.
        order: list[tuple[str, int]] = []
        constants = bytearray()
        for argument, given in enumerate(step.arguments):
            if isinstance(given, Address):
                hole = _at(given, places)
                if hole not in self._holes:
                    self._holes.append(hole)
                order.append(("hole", self._holes.index(hole)))
            elif isinstance(given, Map):
                found = known.setdefault(given, _Maps(given))
                self._maps.append((argument, _at(given.address, places), found))
                order.append(("map", 0))
            elif isinstance(given, Fields):
                order.append(("constant", len(constants)))
                for offset, address in given.places:
                    self._inside.append((len(constants) + offset, _at(address, places)))
                constants += given.memory + bytes(-len(given.memory) % 16)
            else:
                value = np.int64(given) if isinstance(given, int) else given
                order.append(("constant", len(constants)))
                constants += value.tobytes() + bytes(-value.nbytes % 16)
        # Memory: holes, constants, table.
        first = 8 * len(self._holes)
        self._memory = bytes(first) + bytes(constants) + bytes(8 * max(len(order), 1))
        self._size = first + len(constants)
        self._inside = [(first + at, place) for at, place in self._inside]
        self._offsets = [8 * n if kind == "hole" else first + n for kind, n in order]
        self._pack = struct.Struct(f"{len(self._holes)}Q"), struct.Struct(f"{len(order)}Q")

    def block(self, pointers: Sequence[int]) -> tuple[int, Any]:
        """The table of the arguments for these addresses, and the memory it lies in."""
        memory = bytearray(self._memory)
        view = (ctypes.c_char * len(memory)).from_buffer(memory)  # never moves from now on
        base = ctypes.addressof(view)
        table = [base + offset for offset in self._offsets]
        maps = []
        for argument, (tensor, offset), found in self._maps:
            made = found.at(pointers[tensor] + offset)
            table[argument] = made[0]
            maps.append(made)
        holes, arguments = self._pack
        holes.pack_into(memory, 0, *[pointers[tensor] + offset for tensor, offset in self._holes])
        arguments.pack_into(memory, self._size, *table)
        for at, (tensor, offset) in self._inside:
            _POINTER.pack_into(memory, at, pointers[tensor] + offset)
        return base + self._size, (view, maps)

    def ready(self, pointers: Sequence[int], stream: int) -> tuple[Callable[[], Any], Any]:
        """The launch for these addresses on a stream, and what has to live as long as it."""
        table, memory = self.block(pointers)
        if self._early:
            return early(self.how, stream, table), memory
        launch = cupy().cuda.driver.launchKernel
        return functools.partial(launch, *self.how, stream, table, 0), memory


def _at(address: Address, places: dict[int, _Place]) -> _Place:
    tensor, offset = places[address.slot]
    return _Place(tensor, offset + address.offset)


class Prepared:
    """A call of one signature, ready to run on any tensors of that signature.

    Attributes:
        device: torch's index.
        alive: whatever the constants point to.
    """

    def __init__(
        self, recording: Recording, result: Operand | tuple[Operand, ...], alive: Sequence[Any] = ()
    ) -> None:
        self.device, self.alive = recording.device, tuple(alive)
        results = result if isinstance(result, tuple) else (result,)
        self._single = not isinstance(result, tuple)
        self._whole = all(r.whole() for r in results)
        places, self._empties = _placed(recording, results)
        known: dict[Map, _Maps] = {}
        self._launches: list[_Launch] = []
        self._steps: list[Any] = []
        for step in recording.steps:
            if isinstance(step, Launch):
                self._steps.append(len(self._launches))
                self._launches.append(_Launch(step, places, known))
            elif isinstance(step, Work):
                views = tuple(
                    a._replace(slot=places[a.slot].tensor) if isinstance(a, View) else a
                    for a in step.arguments
                )
                self._steps.append(step._replace(arguments=views))
            else:
                self._steps.append(step)
        self._given = _given(recording)
        self._results = [
            (
                places[r.slot].tensor,
                None if r.whole() else r.view_of()._replace(slot=places[r.slot].tensor),
                r.shape,
            )
            for r in results
        ]
        for tensor, view, shape in self._results:
            if view is None:
                self._resize(tensor, shape)
        self._plain = self._whole and all(isinstance(step, int) for step in self._steps)
        self._order = [tensor - self._given for tensor, _, _ in self._results]
        self._ready: _Recent[Any] = _Recent()
        self._spare: list[Fork] = []

    def _resize(self, tensor: int, shape: tuple[int, ...]) -> None:
        n = tensor - self._given
        self._empties[n] = (shape, strides_of(shape), self._empties[n][2])

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the results."""
        return [shape for _, _, shape in self._results]

    def shaped(self, shapes: Sequence[tuple[int, ...]]) -> Prepared | None:
        """The same call with results of other shapes of as many elements.

        None when a result is no tensor of its own, which only a view could reshape.
        """
        if not self._whole:
            return None
        made = copy.copy(self)
        made._empties, made._ready, made._spare = list(self._empties), _Recent(), []
        for (tensor, _, _), shape in zip(self._results, shapes, strict=True):
            made._resize(tensor, tuple(shape))
        return made

    def __call__(self, given: Sequence[Tensor], pointers: list[int]) -> Any:
        """Queue the call on torch's current stream.

        Args:
            given: tensors of the signature.
            pointers: their addresses; the list is used up.
        """
        device = self.device
        if device not in _thread.devices or _current_device() != device:
            with using(device):
                _thread.devices |= {device}
                return self(given, pointers)
        made: list[Tensor] = []
        for shape, strides, dtype in self._empties:
            t = _empty(shape, strides, dtype)
            made.append(t)
            pointers.append(t.data_ptr())
        stream = _raw_stream(device)
        if not self._plain:
            return self._walk([*given, *made], pointers, stream)
        pointers.append(stream)
        key = tuple(pointers)
        ready = self._ready.get(key)
        if ready is None:
            launches = [launch.ready(pointers, stream) for launch in self._launches]
            ready = self._ready.keep(key, tuple(zip(*launches, strict=True)) or ((), ()))
        for launch in ready[0]:
            launch()
        if self._single:
            return made[self._order[0]]
        return tuple([made[n] for n in self._order])

    def _walk(self, held: list[Tensor], pointers: list[int], stream: int) -> Any:
        """Steps of all kinds, one after the other."""
        side, fork = 0, None
        key = tuple(pointers)
        for step in self._steps:
            if isinstance(step, int):
                launch = self._launches[step]
                on = side if launch.side else stream
                ready = self._ready.get((step, on, key))
                if ready is None:
                    ready = self._ready.keep((step, on, key), launch.ready(pointers, on))
                ready[0]()
            elif isinstance(step, Work):
                views = [a.of(held) if isinstance(a, View) else a for a in step.arguments]
                made = step.function(*views, **step.keywords)
                if step.slot is not None:
                    held.append(made)
                    pointers.append(made.data_ptr())
                    key = tuple(pointers)
            elif step is FORK:
                try:
                    fork = self._spare.pop()
                except IndexError:  # none, or another thread was faster
                    fork = Fork()
                side = fork.split(self.device, stream)
            else:
                assert fork is not None
                fork.join(stream, side)
                self._spare.append(fork)
        results = tuple(
            held[tensor] if view is None else view.of(held) for tensor, view, _ in self._results
        )
        return results[0] if self._single else results


_Empties = list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]


def _placed(
    recording: Recording, results: tuple[Operand, ...]
) -> tuple[dict[int, _Place], _Empties]:
    """Where every slot that is used will be, and what a run allocates.

    Tensors are held in this order: given, allocated, then made by torch as the steps go. What only
    kernels see of the allocated ones shares one tensor, the last.
    """
    works = [step for step in recording.steps if isinstance(step, Work)]
    seen = {a.slot for work in works for a in work.arguments if isinstance(a, View)}
    seen |= {r.slot for r in results}
    launched = {a.slot for a in _addresses(recording)}
    given = _given(recording)
    places = {n: _Place(n, 0) for n in range(given)}
    empties: _Empties = []
    scratch: dict[int, int] = {}
    size = 0
    for slot, made in enumerate(recording.slots):
        if made is None:
            continue
        shape, dtype = made
        if slot in seen:
            places[slot] = _Place(given + len(empties), 0)
            empties.append((shape, strides_of(shape), dtype))
        elif slot in launched:
            scratch[slot] = size
            size += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    places |= {slot: _Place(given + len(empties), offset) for slot, offset in scratch.items()}
    if scratch:
        empties.append(((size,), (1,), torch.uint8))
    made_later = [work.slot for work in works if work.slot is not None]
    first = given + len(empties)
    places |= {slot: _Place(first + n, 0) for n, slot in enumerate(made_later)}
    return places, empties


def _addresses(recording: Recording) -> Iterator[Address]:
    """Addresses that kernels are given."""
    for step in recording.steps:
        if isinstance(step, Launch):
            for argument in step.arguments:
                yield from addresses(argument)


def _given(recording: Recording) -> int:
    """How many tensors a call is given: its first slots."""
    made = {s.slot for s in recording.steps if isinstance(s, Work)}
    n = 0
    while n < len(recording.slots) and recording.slots[n] is None and n not in made:
        n += 1
    return n
