"""Running a recorded call: allocate, fill in the addresses, launch.

The arguments of a launch lie in one piece of memory that the driver reads as it is: constants,
addresses, and the table of where each argument is. Such blocks are made for the addresses of a run
and kept by them, since an allocator hands out the same few again and again; they never change, so
threads may share them. Launches go through CuPy's binding of cuLaunchKernel: RawKernel's own call
makes an object of every argument each time, three times the cost.
"""

from __future__ import annotations

import copy
import ctypes
import struct
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from . import tma
from .device import using
from .launch import cupy
from .recording import Operand, Recording
from .steps import FORK, Address, Launch, Map, View, Work
from .streams import Fork

_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)
# Sets of addresses whose argument blocks are kept, and addresses whose descriptors are.
_BLOCKS = 512
# Bound here so that tests can poison what is allocated.
_empty_like = torch.empty_like

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


class _Launch:
    """A launch whose addresses are not known yet."""

    __slots__ = ("_holes", "_maps", "_memory", "_offsets", "_pack", "_size", "how", "side")

    def __init__(self, step: Launch, slots: list[int], known: dict[Map, _Maps]) -> None:
        grid = (*step.grid, 1, 1)[:3]
        handle = step.kernel.function(step.shared)
        self.how = (handle, *grid, step.threads, 1, 1, step.shared)
        self.side = step.side
        self._holes: list[tuple[int, int]] = []
        self._maps: list[tuple[int, int, int, _Maps]] = []
        # For each argument: its hole, or where its constant lies in memory, or nothing.
        order: list[tuple[str, int]] = []
        constants = bytearray()
        for place, given in enumerate(step.arguments):
            if isinstance(given, Address):
                hole = (slots[given.slot], given.offset)
                if hole not in self._holes:
                    self._holes.append(hole)
                order.append(("hole", self._holes.index(hole)))
            elif isinstance(given, Map):
                slot, offset = slots[given.address.slot], given.address.offset
                found = known.setdefault(given, _Maps(given))
                self._maps.append((place, slot, offset, found))
                order.append(("map", 0))
            else:
                value = np.int64(given) if isinstance(given, int) else given
                order.append(("constant", len(constants)))
                constants += value.tobytes() + bytes(-value.nbytes % 16)
        # Memory: holes, constants, table.
        first = 8 * len(self._holes)
        self._memory = bytes(first) + bytes(constants) + bytes(8 * max(len(order), 1))
        self._size = first + len(constants)
        self._offsets = [8 * n if kind == "hole" else first + n for kind, n in order]
        self._pack = struct.Struct(f"{len(self._holes)}Q"), struct.Struct(f"{len(order)}Q")

    def block(self, pointers: list[int]) -> tuple[tuple[int, ...], int, Any]:
        """Function and sizes, the table of the arguments for these addresses, its memory."""
        memory = bytearray(self._memory)
        view = (ctypes.c_char * len(memory)).from_buffer(memory)  # never moves from now on
        base = ctypes.addressof(view)
        table = [base + offset for offset in self._offsets]
        maps = []
        for place, slot, offset, found in self._maps:
            made = found.at(pointers[slot] + offset)
            table[place] = made[0]
            maps.append(made)
        holes, places = self._pack
        holes.pack_into(memory, 0, *[pointers[slot] + offset for slot, offset in self._holes])
        places.pack_into(memory, self._size, *table)
        return self.how, base + self._size, (view, maps)


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
        self._forks = FORK in self._steps
        results = _several(result)
        self._single = not isinstance(result, tuple)
        self._whole = all(r.whole() for r in results)
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
        plain = all(isinstance(step, int) for step in self._steps)
        self._plain = plain and self._whole
        self._blocks: _Recent[Any] = _Recent()
        self._spare: list[Fork] = []
        self._launch: Any = None
        self._fill()

    def _fill(self) -> None:
        """Models of what a run allocates: tensors that own no memory."""
        self._models = [_model(shape, dtype, self.device) for shape, dtype in self._empties]  # type: ignore[misc]
        self._order = [place - self._given for place, _, _ in self._results]

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
        made._empties, made._blocks, made._spare = list(self._empties), _Recent(), []
        for (place, _, _), shape in zip(self._results, shapes, strict=True):
            old = made._empties[place - self._given]
            assert old is not None
            made._empties[place - self._given] = (tuple(shape), old[1])
        made._fill()
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
        made = [_empty_like(model) for model in self._models]
        pointers += [t.data_ptr() for t in made]
        if not self._plain:
            return self._walk([*given, *made], pointers)
        key = tuple(pointers)
        blocks = self._blocks.get(key)
        if blocks is None:
            blocks = self._made_for(key, pointers)
        stream, launch = _raw_stream(device), self._launch
        for how, table, _ in blocks:
            launch(*how, stream, table, 0)
        if self._single:
            return made[self._order[0]]
        return tuple([made[n] for n in self._order])

    def _made_for(self, key: Hashable, pointers: list[int]) -> Any:
        """Argument blocks of all launches, for these addresses."""
        if self._launch is None:
            self._launch = cupy().cuda.driver.launchKernel
        return self._blocks.keep(key, [launch.block(pointers) for launch in self._launches])

    def _walk(self, held: list[Tensor], pointers: list[int]) -> Any:
        """Steps of all kinds, one after the other."""
        if self._launch is None:
            self._launch = cupy().cuda.driver.launchKernel
        launch, side = self._launch, 0
        stream = _raw_stream(self.device)
        fork = None
        key = tuple(pointers)
        for step in self._steps:
            if isinstance(step, int):
                block = self._blocks.get((step, key))
                if block is None:
                    block = self._blocks.keep((step, key), self._launches[step].block(pointers))
                how, table, _ = block
                launch(*how, side if self._launches[step].side else stream, table, 0)
            elif isinstance(step, Work):
                views = [a.of(held) if isinstance(a, View) else a for a in step.arguments]
                made = step.function(*views, **step.keywords)
                if step.slot is not None:
                    held.append(made)
                    pointers.append(made.data_ptr())
                    key = tuple(pointers)
            elif step is FORK:
                fork = self._spare.pop() if self._spare else Fork()
                side = fork.split(self.device, stream)
            else:
                assert fork is not None
                fork.join(stream, side)
                self._spare.append(fork)
        results = tuple(
            held[place] if view is None else view.of(held) for place, view, _ in self._results
        )
        return results[0] if self._single else results


def _model(shape: tuple[int, ...], dtype: torch.dtype, device: int) -> Tensor:
    """A tensor to make contiguous others like it, in half the time that a shape takes.

    It is one element expanded; torch makes no copy of an expanded dimension's stride.
    """
    return torch.empty((1,) * len(shape), dtype=dtype, device=_place(device)).expand(shape)


def _place(device: int) -> torch.device:
    return torch.device("cuda", device)


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
