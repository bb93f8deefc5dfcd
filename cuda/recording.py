"""Recording what launch code does, so that the same call can be run again without planning.

Launch code runs once per signature on `Operand`s: descriptions of tensors that hold no data and
whose addresses are symbols (which tensor of the call, how many bytes into it). What it launches is
noted as steps with holes; prepared.py fills the holes and runs them. No role is ever guessed from
an address: a tensor given twice has two slots.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .steps import FORK, JOIN, Address, Launch, Step, View, Work, addresses

if TYPE_CHECKING:
    from .launch import Kernel


class Recording:
    """Steps of one call.

    Attributes:
        device: torch's index.
        slots: shape and dtype of each tensor the steps allocate; None for those that are given or
            that torch makes.
        steps: what to do, in order.
    """

    def __init__(self, device: int) -> None:
        self.device = device
        self.slots: list[tuple[tuple[int, ...], torch.dtype] | None] = []
        self.steps: list[Step] = []
        self._side = self._open = False
        self._forked = 0

    def given(self, like: Tensor, residue: int) -> Operand:
        """An operand described by a tensor (a meta tensor will do).

        Where there is one element only, no stride is ever taken, and any number may stand there:
        here the one of a contiguous tensor, so that all such tensors are described alike.
        """
        self.slots.append(None)
        slot, shape = len(self.slots) - 1, tuple(like.shape)
        triples = zip(shape, like.stride(), strides_of(shape), strict=True)
        strides = tuple(plain if n == 1 else step for n, step, plain in triples)
        return Operand(self, slot, 0, shape, strides, like.dtype, residue)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Operand:
        """A tensor that the call allocates."""
        self.slots.append((shape, dtype))
        return Operand(self, len(self.slots) - 1, 0, shape, strides_of(shape), dtype, 0)

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, ...],
        threads: int,
        arguments: tuple[Any, ...],
        shared: int,
        early: bool = False,
    ) -> None:
        """Note a launch."""
        self.steps.append(Launch(kernel, grid, threads, arguments, shared, self._side, early))

    def work(self, function: Callable[..., Any], arguments: Any, keywords: Any) -> Operand:
        """Note a torch function of operands that returns one new tensor."""
        views = tuple(a.view_of() if isinstance(a, Operand) else a for a in arguments)
        metas = [a.meta() if isinstance(a, Operand) else a for a in arguments]
        made: Tensor = function(*metas, **keywords)
        self.slots.append(None)
        slot = len(self.slots) - 1
        self._torch(Work(function, views, keywords, slot))
        return Operand(self, slot, 0, tuple(made.shape), made.stride(), made.dtype, 0)

    def change(self, function: Callable[..., Any], operand: Operand, *arguments: Any) -> None:
        """Note a torch function that writes into an operand."""
        self._torch(Work(function, (operand.view_of(), *arguments), {}, None))

    def _torch(self, step: Work) -> None:
        # Torch works on the current stream: before the fork what the side stream is to read.
        if self._open and self._launched(step):
            with self.together():
                self.steps.append(step)
        elif self._side or self._open:
            self.steps.insert(self._forked, step)
            self._forked += 1
        else:
            self.steps.append(step)

    def _launched(self, step: Work) -> bool:
        """Whether kernels since the fork have to do with what a step of torch's does."""
        mine = {a.slot for a in step.arguments if isinstance(a, View)}
        since = [s for s in self.steps[self._forked :] if isinstance(s, Launch)]
        places = [a for s in since for given in s.arguments for a in addresses(given)]
        return any(a.slot in mine for a in places)

    @property
    def open(self) -> bool:
        """Whether both streams go on, inside `lanes`."""
        return self._open

    @contextlib.contextmanager
    def lanes(self) -> Iterator[None]:
        """Forks inside are this one: neither stream waits for the other but for `together`."""
        with self.fork():
            self._open = True
            try:
                yield
            finally:
                self._open = False

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Inside `lanes`: work that waits for both streams, and that both then wait for."""
        if not self._open:
            yield
            return
        assert not self._side
        self.steps.append(JOIN)
        self._open = False
        yield
        self._open = True
        self._forked = len(self.steps)
        self.steps.append(FORK)

    @contextlib.contextmanager
    def fork(self) -> Iterator[None]:
        """Inside, launches may go to the side stream; its work is joined at the end."""
        if self._open:
            yield
            return
        self._forked = len(self.steps)
        self.steps.append(FORK)
        yield
        start = self._forked
        inside = [s for s in self.steps[start + 1 :] if isinstance(s, Launch)]
        if len({launch.side for launch in inside}) == 2:
            self.steps.append(JOIN)
            return
        # One lane had nothing to do.
        rest = self.steps[start + 1 :]
        self.steps[start:] = [s._replace(side=False) if isinstance(s, Launch) else s for s in rest]

    @property
    def beside(self) -> bool:
        """Whether launches go to the side stream now."""
        return self._side

    @contextlib.contextmanager
    def side(self) -> Iterator[None]:
        """Launches go to the side stream; only inside `fork`."""
        self._side = True
        try:
            yield
        finally:
            self._side = False


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


class Operand:
    """What launch code sees of a tensor while a call is recorded: everything but the data.

    It answers as a tensor would; what moves data becomes a step of the recording.
    """

    __slots__ = ("_offset", "_recording", "_residue", "_strides", "dtype", "shape", "slot")

    def __init__(
        self,
        recording: Recording,
        slot: int,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: torch.dtype,
        residue: int,
    ) -> None:
        self._recording, self.slot, self._offset = recording, slot, offset
        self.shape, self._strides, self.dtype, self._residue = shape, strides, dtype, residue

    def _part(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Operand:
        at = self._offset + offset
        return Operand(self._recording, self.slot, at, shape, strides, self.dtype, self._residue)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        mine = next(a for a in arguments if isinstance(a, Operand))
        return mine._recording.work(function, arguments, keywords or {})

    @property
    def device(self) -> torch.device:
        """Of the recording."""
        return torch.device("cuda", self._recording.device)

    def stride(self, dim: int | None = None) -> Any:
        """Elements from one index to the next."""
        return self._strides if dim is None else self._strides[dim]

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def numel(self) -> int:
        """Number of elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total

    def element_size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    def data_ptr(self) -> Address:
        """Where the first element will be."""
        return Address(self.slot, self._offset * self.dtype.itemsize, self._residue)

    def view_of(self) -> View:
        """This operand as a part of its slot."""
        return View(self.slot, self._offset, self.shape, self._strides)

    def meta(self) -> Tensor:
        """A tensor without data of the same description."""
        return torch.empty_strided(self.shape, self._strides, dtype=self.dtype, device="meta")

    def whole(self) -> bool:
        """Whether this is all of a tensor that the call allocates."""
        made = self._recording.slots[self.slot]
        return made is not None and not self._offset and self.is_contiguous()

    def is_contiguous(self) -> bool:
        """As torch has it: strides of dimensions of one element do not count."""
        plain = strides_of(self.shape)
        pairs = zip(self.shape, self._strides, plain, strict=True)
        return 0 in self.shape or all(s == p for n, s, p in pairs if n != 1)

    @property
    def mT(self) -> Operand:
        """The last two dimensions exchanged."""
        return self._part(
            0,
            (*self.shape[:-2], self.shape[-1], self.shape[-2]),
            (*self._strides[:-2], self._strides[-1], self._strides[-2]),
        )

    def new_empty(self, *shape: Any, dtype: torch.dtype | None = None) -> Operand:
        """A tensor that the call allocates."""
        sizes = tuple(shape[0]) if shape and not isinstance(shape[0], int) else tuple(shape)
        return self._recording.empty(sizes, dtype or self.dtype)

    def new_zeros(self, *shape: Any, dtype: torch.dtype | None = None) -> Operand:
        """A tensor that the call allocates and clears."""
        return self.new_empty(*shape, dtype=dtype).zero_()

    def zero_(self) -> Operand:
        """Clear it."""
        return self.fill_(0)

    def fill_(self, value: float) -> Operand:
        """Write one value everywhere."""
        if self.numel():
            self._recording.change(torch.Tensor.fill_, self, value)
        return self

    def contiguous(self) -> Operand:
        """Itself, or a copy."""
        return self if self.is_contiguous() else self.clone(torch.contiguous_format)

    def clone(self, memory_format: Any = torch.preserve_format) -> Operand:
        """A copy."""
        return self._recording.work(torch.clone, (self,), {"memory_format": memory_format})

    def to(self, dtype: torch.dtype) -> Operand:
        """Itself, or a converted copy."""
        return (
            self
            if dtype == self.dtype
            else self._recording.work(torch.Tensor.to, (self, dtype), {})
        )

    def view(self, *shape: int) -> Operand:
        """Another shape of a contiguous operand."""
        sizes = tuple(shape[0]) if shape and not isinstance(shape[0], int) else tuple(shape)
        assert self.is_contiguous()
        return self._part(0, sizes, strides_of(sizes))

    def expand(self, *shape: int) -> Operand:
        """Stride 0 where a dimension of one becomes more."""
        sizes = tuple(n if want == -1 else want for n, want in zip(self.shape, shape, strict=True))
        triples = zip(self.shape, sizes, self._strides, strict=True)
        return self._part(0, sizes, tuple(0 if n != want else s for n, want, s in triples))

    def as_strided(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> Operand:
        """Another view from the first element on."""
        return self._part(0, shape, strides)

    def transpose(self, a: int, b: int) -> Operand:
        """Two dimensions exchanged."""
        sizes, steps = list(self.shape), list(self._strides)
        sizes[a], sizes[b], steps[a], steps[b] = sizes[b], sizes[a], steps[b], steps[a]
        return self._part(0, tuple(sizes), tuple(steps))

    def __getitem__(self, index: Any) -> Operand:
        given = index if isinstance(index, tuple) else (index,)
        if Ellipsis in given:
            at = given.index(Ellipsis)
            missing = len(self.shape) - len(given) + 1
            given = (*given[:at], *[slice(None)] * missing, *given[at + 1 :])
        offset, sizes = 0, list(self.shape)
        for d, piece in enumerate(given):
            start, stop, step = piece.indices(self.shape[d])
            assert step == 1
            offset += start * self._strides[d]
            sizes[d] = max(stop - start, 0)
        return self._part(offset, tuple(sizes), self._strides)


class _Current(threading.local):
    recording: Recording | None = None


_current = _Current()


def current() -> Recording | None:
    """The recording of this thread, if launch code is being recorded."""
    return _current.recording


@contextlib.contextmanager
def recorded(into: Recording | None) -> Iterator[None]:
    """Record what launch code of this thread does inside; None: it is done at once."""
    before, _current.recording = _current.recording, into
    try:
        yield
    finally:
        _current.recording = before
