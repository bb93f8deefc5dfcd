"""Running a recorded call: allocate, fill in the addresses, launch.

The steps of a recording become argument storage that the driver reads directly: constants are
written once, addresses at every run. Launches go through CuPy's binding of cuLaunchKernel, which
takes that storage as it is; RawKernel's own call would make an object of every argument each time.

Storage is in use by one run at a time: runs take it from a list of spares and put it back, so
threads never share it, nor the events of a fork.
"""

from __future__ import annotations

import copy
import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import tma
from .device import using
from .launch import cupy
from .recording import FORK, Address, Launch, Map, Operand, Recording, View, Work
from .streams import Fork

_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)
# Descriptors kept per operand; an allocator hands out the same few addresses again and again.
_MAPS = 64


class _Thread(threading.local):
    """Devices whose context this thread has had current: torch switches back to it by itself."""

    devices: frozenset[int] = frozenset()


_thread = _Thread()


class _Maps:
    """Descriptors of one operand by its address."""

    __slots__ = ("_made", "_wanted")

    def __init__(self, wanted: Map) -> None:
        self._wanted = wanted
        self._made: dict[int, tuple[int, Any]] = {}

    def at(self, pointer: int) -> tuple[int, Any]:
        """Where the encoded descriptor lies, and what to keep alive while it is used."""
        found = self._made.get(pointer)
        if found is None:
            if len(self._made) >= _MAPS:
                self._made = {}
            w = self._wanted
            made: Any = tma.descriptor(pointer, w.dtype, w.dims, w.strides, w.box, w.swizzle)
            found = self._made[pointer] = (made.ctypes.data, made)
        return found


class _Launch:
    """A launch without its storage.

    Attributes:
        handle: the driver's function.
        sizes: grid and block.
        shared: dynamic shared memory, bytes.
        side: on the side stream.
        holes: (slot, bytes into it) of the addresses among the arguments.
        maps: place among the arguments, slot, bytes into it, descriptors.
        order: for each argument its hole, −1 − the place of its constant, or None for a descriptor.
        constants: the others, as bytes.
    """

    def __init__(self, step: Launch, slots: list[int], known: dict[Map, _Maps]) -> None:
        self.handle = step.kernel.function(step.shared)
        grid = (*step.grid, 1, 1)[:3]
        self.sizes, self.shared, self.side = (*grid, step.threads, 1, 1), step.shared, step.side
        self.holes: list[tuple[int, int]] = []
        self.maps: list[tuple[int, int, int, _Maps]] = []
        self.order: list[int | None] = []
        self.constants: list[bytes] = []
        for place, given in enumerate(step.arguments):
            if isinstance(given, Address):
                hole = (slots[given.slot], given.offset)
                if hole not in self.holes:
                    self.holes.append(hole)
                self.order.append(self.holes.index(hole))
            elif isinstance(given, Map):
                slot, offset = slots[given.address.slot], given.address.offset
                found = known.setdefault(given, _Maps(given))
                self.maps.append((place, slot, offset, found))
                self.order.append(None)
            else:
                value = np.int64(given) if isinstance(given, int) else given
                self.order.append(-1 - len(self.constants))
                self.constants.append(value.tobytes())


class _Storage:
    """Arguments of one run of a call.

    Attributes:
        launches: for each launch (pack, memory, holes, table, maps, kept, the driver's arguments).
        fork: events of a fork, if there is one.
    """

    __slots__ = ("_keep", "fork", "launches")

    def __init__(self, launches: list[_Launch], forks: bool) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self._keep: list[Any] = []
        self.fork = Fork() if forks else None
        for launch in launches:
            holes = len(launch.holes)
            offsets, end = [], 8 * holes
            for constant in launch.constants:
                offsets.append(end)
                end += -(-len(constant) // 16) * 16
            memory = bytearray(max(end, 8))
            for at, constant in zip(offsets, launch.constants, strict=True):
                memory[at : at + len(constant)] = constant
            # Exported for good, so that it never moves.
            view = (ctypes.c_char * len(memory)).from_buffer(memory)
            base = ctypes.addressof(view)
            table = (ctypes.c_uint64 * max(len(launch.order), 1))()
            for n, where in enumerate(launch.order):
                if where is not None:
                    table[n] = base + (8 * where if where >= 0 else offsets[-1 - where])
            pack = struct.Struct(f"{holes}Q").pack_into
            self._keep.append((view, table))
            self.launches.append(
                (
                    pack,
                    memory,
                    launch.holes,
                    table,
                    launch.maps,
                    [None] * len(launch.maps),
                    (launch.handle, *launch.sizes, launch.shared),
                    ctypes.addressof(table),
                    launch.side,
                )
            )


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
        given = _given(recording)
        used = _used(recording) | {r.slot for r in _several(result)}
        empties = [n for n, s in enumerate(recording.slots) if s is not None and n in used]
        works = [s.slot for s in recording.steps if isinstance(s, Work) and s.slot is not None]
        # Tensors are held in this order: given, allocated, then made by torch as the steps go.
        order = [*range(given), *empties, *works]
        slots = [0] * len(recording.slots)
        for place, slot in enumerate(order):
            slots[slot] = place
        self._given = given
        self._empties = [recording.slots[n] for n in empties]
        known: dict[Map, _Maps] = {}
        self._launches: list[_Launch] = []
        self._steps: list[Any] = []
        for step in recording.steps:
            if isinstance(step, Launch):
                self._steps.append(len(self._launches))
                self._launches.append(_Launch(step, slots, known))
            elif isinstance(step, Work):
                views = tuple(
                    a._replace(slot=slots[a.slot]) if isinstance(a, View) else a
                    for a in step.arguments
                )
                self._steps.append(step._replace(arguments=views))
            else:
                self._steps.append(step)
        self._plain = all(isinstance(step, int) for step in self._steps)
        self._forks = FORK in self._steps
        results = _several(result)
        self._single = not isinstance(result, tuple)
        self._whole = tuple(r.whole() for r in results)
        self._results = [
            (
                slots[r.slot],
                None if r.whole() else r.view_of()._replace(slot=slots[r.slot]),
                r.shape,
            )
            for r in results
        ]
        for place, view, shape in self._results:
            if view is None:
                self._empties[place - given] = (shape, self._empties[place - given][1])  # type: ignore[index]
        self._first = self._results[0][0] if self._single and self._whole[0] else None
        self._spare: list[_Storage] = []
        self._launch: Any = None

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the results."""
        return [shape for _, _, shape in self._results]

    def shaped(self, shapes: Sequence[tuple[int, ...]]) -> Prepared | None:
        """The same call with results of other shapes of as many elements.

        None when a result is no tensor of its own, which only a view could reshape.
        """
        if not all(self._whole):
            return None
        made = copy.copy(self)
        made._empties, made._spare = list(self._empties), []
        for (place, _, _), shape in zip(self._results, shapes, strict=True):
            old = made._empties[place - self._given]
            assert old is not None
            made._empties[place - self._given] = (tuple(shape), old[1])
        return made

    def __call__(self, given: Sequence[Tensor], pointers: list[int]) -> Any:
        """Queue the call on torch's current stream.

        Args:
            given: tensors of the signature.
            pointers: their addresses; the list is used up.
        """
        device = self.device
        if device in _thread.devices and _current_device() == device:
            return self._run(given, pointers)
        with using(device):
            _thread.devices |= {device}
            return self._run(given, pointers)

    def _run(self, given: Sequence[Tensor], pointers: list[int]) -> Any:
        like, held = given[0], [*given]
        for shape, dtype in self._empties:  # type: ignore[misc]
            made = like.new_empty(shape, dtype=dtype)
            held.append(made)
            pointers.append(made.data_ptr())
        try:
            storage = self._spare.pop()
        except IndexError:
            storage = self._storage()
        stream, launch = _raw_stream(self.device), self._launch
        if self._plain:
            for pack, memory, holes, table, maps, kept, how, where, _ in storage.launches:
                pack(memory, 0, *[pointers[slot] + offset for slot, offset in holes])
                if maps:
                    _fill(maps, kept, table, pointers)
                launch(*how, stream, where, 0)
        else:
            self._walk(storage, held, pointers, stream)
        self._spare.append(storage)
        if self._first is not None:
            return held[self._first]
        results = tuple(
            held[place] if view is None else view.of(held) for place, view, _ in self._results
        )
        return results[0] if self._single else results

    def _walk(
        self, storage: _Storage, held: list[Tensor], pointers: list[int], stream: int
    ) -> None:
        """Steps of all kinds, one after the other."""
        launch, side = self._launch, stream
        for step in self._steps:
            if isinstance(step, int):
                pack, memory, holes, table, maps, kept, how, where, aside = storage.launches[step]
                pack(memory, 0, *[pointers[slot] + offset for slot, offset in holes])
                if maps:
                    _fill(maps, kept, table, pointers)
                launch(*how, side if aside else stream, where, 0)
            elif isinstance(step, Work):
                views = [a.of(held) if isinstance(a, View) else a for a in step.arguments]
                made = step.function(*views, **step.keywords)
                if step.slot is not None:
                    held.append(made)
                    pointers.append(made.data_ptr())
            elif step is FORK:
                assert storage.fork is not None
                side = storage.fork.split(self.device, stream)
            else:
                assert storage.fork is not None
                storage.fork.join(stream, side)

    def _storage(self) -> _Storage:
        if self._launch is None:
            self._launch = cupy().cuda.driver.launchKernel
        return _Storage(self._launches, self._forks)


def _fill(maps: Any, kept: list[Any], table: Any, pointers: list[int]) -> None:
    """Put the descriptors of these addresses among the arguments, and keep them alive."""
    for n, (place, slot, offset, found) in enumerate(maps):
        made = kept[n] = found.at(pointers[slot] + offset)
        table[place] = made[0]


def _several(result: Operand | tuple[Operand, ...]) -> tuple[Operand, ...]:
    return result if isinstance(result, tuple) else (result,)


def _used(recording: Recording) -> set[int]:
    """Slots that some step reads or writes."""
    found: set[int] = set()
    for step in recording.steps:
        if not isinstance(step, str):
            for a in step.arguments:
                at = a.address if isinstance(a, Map) else a
                if isinstance(at, Address | View):
                    found.add(at.slot)
    return found


def _given(recording: Recording) -> int:
    """How many tensors a call is given: its first slots."""
    made = {s.slot for s in recording.steps if isinstance(s, Work)}
    n = 0
    while n < len(recording.slots) and recording.slots[n] is None and n not in made:
        n += 1
    return n
