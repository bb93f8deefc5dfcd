"""Source: a caller's tensor as the data of a pattern, read late and named by reference in keys."""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .cache import Reference
from .errors import DtypeError, LayoutError, ShapeError
from .tracing import ByIdentity, concretely, constant, keep, kept

T = TypeVar("T")

BYTES_IN_KEY = 64 * 1024
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


class Source(ByIdentity):
    """A tensor, or one entry of it, that a pattern was made from.

    The tensor is the caller's own: a change in place is seen by the next use, because everything
    that is derived from it is kept only while its version counter stands still.
    """

    def __init__(self, tensor: Tensor, index: tuple[int, ...] = ()) -> None:
        self.base = tensor
        self.index = index
        self._derived: dict[Hashable, tuple[object, Any]] = {}

    @property
    def tensor(self) -> Tensor:
        """The tensor itself, on its own device."""
        return self.base[self.index] if self.index else self.base

    def __reduce__(self) -> tuple[type["Source"], tuple[Tensor, tuple[int, ...]]]:
        return Source, (self.base, self.index)  # a copy derives its own

    def entry(self, *index: int) -> "Source":
        """The source of one entry along the leading dimensions; it shares the tensor."""
        if torch.compiler.is_dynamo_compiling():
            found: Source = getattr(kept, _entry(self, *index))
            return found
        return Source(self.base, (*self.index, *index))

    def key(self) -> Hashable:
        """What names the data in a cache key; reads no device memory if there is a version."""
        if torch.compiler.is_dynamo_compiling():
            return _name(self)
        base = self.base
        entries = max(1, math.prod(base.shape[: len(self.index)]))
        size = base.numel() // entries * base.element_size()
        if (base.device.type == "cpu" and size <= BYTES_IN_KEY) or base.is_inference():
            return concretely(self._contents)
        return (Reference(base), base._version, self.index)

    def _contents(self) -> Hashable:
        tensor = self.tensor.detach()
        return (str(tensor.dtype), tuple(tensor.shape), tensor.cpu().numpy().tobytes())

    def derive(
        self, name: Hashable, device: torch.device, make: Callable[..., T], *others: "Source"
    ) -> T:
        """make(*tensors on `device`), remembered under `name` until one of the tensors changes."""
        sources = (self, *others)

        def made() -> T:
            return make(*(source.tensor.detach().to(device) for source in sources))

        if any(source.base.is_inference() for source in sources):
            return concretely(made)  # no version counter, so nothing would tell that they changed
        versions = tuple(source.base._version for source in sources)
        held = self._derived.get((name, device))
        if held is None or held[0] != versions:
            # Patterns may be made and read inside a transform, which would wrap what is kept.
            held = (versions, concretely(made))
            self._derived[name, device] = held
        value: T = held[1]
        return value


def as_tensor(data: object, who: str) -> Tensor:
    """A caller's tensor as it is; anything else copied, because only tensors say when they change.

    Raises:
        LayoutError: `data` is no array of numbers.
    """
    if torch.compiler.is_dynamo_compiling():
        raise LayoutError(
            f"{who}: a pattern is made of a tensor inside torch.compile, which cannot know what "
            "the tensor will hold; make the pattern outside the compiled function and pass it in"
        )
    if isinstance(data, Tensor):
        return data
    if isinstance(data, range):
        ends = (data.start, data.stop, data.step)
        if max(map(abs, ends)) >= 2**62 or (data.stop - data.start) // data.step >= 2**31:
            raise LayoutError(f"{who}: {data} given, fewer than 2**31 positions expected")
        if not len(data):  # torch takes no bounds that lie the wrong way round
            return torch.empty(0, dtype=torch.int64)
        return concretely(lambda: torch.arange(data.start, data.stop, data.step))
    try:
        if isinstance(data, Sequence) and not len(data):
            return torch.empty(0, dtype=torch.int64)
        # torch takes no negative strides.
        plain = data.copy(order="C") if isinstance(data, np.ndarray) else data
        return concretely(lambda: torch.tensor(plain))
    except (OverflowError, TypeError, ValueError, RuntimeError) as error:
        raise LayoutError(
            f"{who}: {type(data).__name__} {data!r:.60} is no tensor or sequence of numbers; "
            "pass a tensor, an array or a list"
        ) from error


def integers(data: object, who: str, ndim: tuple[int, ...] = (1,)) -> Source:
    """A source of integers with one of the given numbers of dimensions.

    Raises:
        DtypeError: not integers.
        ShapeError: another number of dimensions.
    """
    if torch.compiler.is_dynamo_compiling() and not isinstance(data, Tensor):
        listed: Source = getattr(kept, _listed(data, who, ndim))
        return listed
    tensor = as_tensor(data, who)
    if tensor.dtype not in INTEGERS:
        raise DtypeError(f"{who}: {tensor.dtype} given, integers expected; convert with .long()")
    if tensor.ndim not in ndim:
        expected = " or ".join(f"{n}-D" for n in ndim)
        raise ShapeError(f"{who}: shape {tuple(tensor.shape)} given, {expected} expected")
    return Source(tensor)


@constant
def _name(source: Source) -> str:
    """What tells sources apart within one trace."""
    key = source.key()
    same = isinstance(key, tuple) and isinstance(key[0], Reference)
    return f"{id(source.base)} {source.base._version} {source.index}" if same else repr(key)


@constant
def _entry(source: Source, *index: int) -> str:
    return keep(f"source {_name(source)} at {index}", source.entry(*index))


@constant
def _listed(data: object, who: str, ndim: tuple[int, ...]) -> str:
    """Keep the source of numbers that are written out in code being traced."""
    return keep(f"{who} {data!r}", integers(data, who, ndim))


def positions(data: object, who: str) -> Source:
    """A source of token positions, 1-D and not negative.

    Tensors on a device are checked when they are first used: a constructor on the call path must
    not wait for the device.

    Raises:
        LayoutError: a negative position.
        DtypeError: not integers.
        ShapeError: not 1-D.
    """
    source = integers(data, who)
    if torch.compiler.is_dynamo_compiling():
        return source  # checked where it is read, which traced code cannot
    if source.base.device.type == "cpu":
        sorted_positions(source, source.base.device, who)
    return source


def sorted_positions(source: Source, device: torch.device, who: object) -> Tensor:
    """The positions of a source, sorted and unique, int64 on `device`.

    Args:
        source: positions.
        device: where they go.
        who: is written out in the error only.

    Raises:
        LayoutError: a negative position.
    """

    def make(tensor: Tensor) -> Tensor:
        unique: Tensor
        if tensor.device.type == "cpu":  # where numpy is quicker, and most lists rise already
            unique = tensor.to(torch.int64, copy=True)
            plain = unique.numpy()
            if not (plain[1:] > plain[:-1]).all():
                unique = torch.from_numpy(np.unique(plain))
        else:
            unique = torch.unique(tensor.long())
        if unique.numel() and int(unique[0]) < 0:
            raise LayoutError(
                f"{who}: index {int(unique[0])} given, positions >= 0 expected; "
                "count from the first key, negative indices have no meaning here"
            )
        return unique

    return source.derive("positions", device, make)


def booleans(data: object, who: str, ndim: tuple[int, ...] = (2, 3, 4)) -> Source:
    """A source of booleans with one of the given numbers of dimensions.

    Raises:
        DtypeError: not bool.
        ShapeError: another number of dimensions.
    """
    tensor = as_tensor(data, who)
    if tensor.dtype != torch.bool:
        raise DtypeError(
            f"{who}: {tensor.dtype} given, bool expected (True = kept); pass mask != 0"
        )
    if tensor.ndim not in ndim:
        expected = " or ".join(f"{n}-D" for n in ndim)
        raise ShapeError(f"{who}: shape {tuple(tensor.shape)} given, {expected} expected")
    return Source(tensor)
