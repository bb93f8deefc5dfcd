"""Arrays of other libraries as tensors, and the checks that every index array passes on its way in.

DLPack moves memory without a question asked. torch 2.13 ends the process on a negative stride and
hands out writable tensors over read-only memory, so both are looked for first.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from ..arguments import SIDE_LIMIT, kind_of, shown
from ..errors import DtypeError, LayoutError, ShapeError, UnsupportedError
from ..source import INTEGERS

VALUES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CPU = 1  # DLPack's number of the device "host memory"


def from_dlpack(array: Any) -> Tensor:
    """A tensor over the memory of any array that speaks DLPack, on the array's device.

    Memory is shared, except where torch could not or must not share it: arrays with negative
    strides, read-only ones and those of another byte order are copied. bfloat16 of ml_dtypes is
    taken. Nothing is lost. The other way needs no function: every tensor of a SparseTensor or
    layout has ``__dlpack__`` (``detach()`` values that require gradients).

    Args:
        array: a torch tensor (returned as it is), numpy or CuPy array, or anything with
            ``__dlpack__``.

    Returns:
        A tensor of the array's shape and dtype.

    Raises:
        LayoutError: no array, or one that cannot be shared nor safely copied.
        DtypeError: a dtype that torch does not have.
    """
    return _shared(array, "from_dlpack")


def _shared(array: Any, who: str) -> Tensor:
    """As ``from_dlpack``; `who` names the caller in errors."""
    if isinstance(array, Tensor):
        return array
    if isinstance(array, np.ndarray | np.generic):
        return _from_numpy(np.asarray(array), who)
    if isinstance(array, type) or not hasattr(array, "__dlpack__"):
        raise LayoutError(
            f"{who}: {kind_of(array)} given, a tensor or an array with __dlpack__ "
            "expected; make one with numpy.asarray"
        )
    if _on_cpu(array, who):
        try:  # numpy takes any strides, and its arrays say whether they may be written
            return _from_numpy(np.from_dlpack(array), who)
        except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
            raise LayoutError(
                f"{who}: {type(array).__name__} cannot be shared: {error}; detach it, or "
                "copy it to numpy first"
            ) from error
    strides = getattr(array, "strides", None)
    if strides is not None and any(step < 0 for step in strides):
        raise LayoutError(
            f"{who}: {type(array).__name__} with strides {tuple(strides)}; torch cannot hold "
            "negative ones; pass a contiguous copy, e.g. cupy.ascontiguousarray(array)"
        )
    try:
        shared: Tensor = torch.utils.dlpack.from_dlpack(array)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        raise LayoutError(f"{who}: {type(array).__name__} cannot be shared: {error}") from error
    return shared


def _on_cpu(array: Any, who: str) -> bool:
    if not hasattr(array, "__dlpack_device__"):
        return False
    place = array.__dlpack_device__()
    if not isinstance(place, tuple) or len(place) != 2:
        raise LayoutError(
            f"{who}: {kind_of(array)} says that it is on {place!r:.80}; (device type, number) "
            "expected of __dlpack_device__"
        )
    return bool(place[0] == _CPU)


def _from_numpy(array: np.ndarray[Any, Any], who: str) -> Tensor:
    if array.dtype.name == "bfloat16":  # of ml_dtypes; numpy itself has none
        return _from_numpy(array.view(np.uint16), who).view(torch.bfloat16)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable or any(step < 0 for step in array.strides):
        array = array.copy()
    try:
        tensor: Tensor = torch.from_numpy(array)
    except TypeError as error:
        raise DtypeError(
            f"{who}: {array.dtype} given, which torch does not have; use .astype"
        ) from error
    return tensor


def as_array(data: Any, who: str) -> Tensor:
    """A tensor of an array as ``from_dlpack`` takes it, or of a list of numbers."""
    if isinstance(data, list | tuple | range):
        if not data:
            return torch.empty(0, dtype=torch.int64)
        if isinstance(data, range) and data[SIDE_LIMIT:]:
            raise LayoutError(f"{who}: {data} given, fewer than 2**31 numbers expected")
        try:
            listed: Tensor = (
                torch.arange(data.start, data.stop, data.step)
                if isinstance(data, range)
                else torch.tensor(data)
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise LayoutError(f"{who}: no array of numbers: {error}") from error
        return listed
    tensor = _shared(data, who)
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        given: object = "a nested tensor" if tensor.is_nested else tensor.layout
        given = "a quantized tensor" if tensor.is_quantized else given
        raise LayoutError(f"{who}: {given} given, a dense array of numbers expected")
    if tensor.is_meta:
        raise UnsupportedError(
            f"{who}: a tensor on meta given, which holds no numbers; expected one with data"
        )
    return tensor


def indices(data: Any, who: str, ndim: int = 1) -> Tensor:
    """An array of integers with `ndim` dimensions.

    Raises:
        LayoutError: no array.
        DtypeError: not integers.
        ShapeError: another number of dimensions.
    """
    tensor = as_array(data, who)
    if tensor.dtype not in INTEGERS:
        raise DtypeError(f"{who}: {tensor.dtype} given, integers expected; convert with .long()")
    if tensor.ndim != ndim:
        raise ShapeError(f"{who}: shape {tuple(tensor.shape)} given, {ndim}-D expected")
    # Differences of 8-bit and 16-bit numbers, and limits they are compared with, would wrap.
    return tensor if tensor.dtype in (torch.int32, torch.int64) else tensor.long()


def values(data: Any, who: str, shape: tuple[int, ...]) -> Tensor:
    """Values of a floating dtype that mixgrain computes with, of a given shape.

    Raises:
        LayoutError: no array.
        DtypeError: another dtype.
        ShapeError: another shape.
    """
    tensor = as_array(data, who)
    if tensor.dtype not in VALUES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in VALUES)
        raise DtypeError(
            f"{who}: values of {tensor.dtype}, expected {names}; cast them (for positions alone "
            "use a pattern, e.g. patterns.from_csr)"
        )
    if tuple(tensor.shape) != shape:
        raise ShapeError(f"{who}: values of shape {tuple(tensor.shape)}, expected {shape}")
    return tensor


def as_shape(shape: Any, who: str) -> tuple[int, int]:
    """(nq, nk) of two integers from 0 to 2**31 − 1.

    Raises:
        ShapeError: anything else.
    """
    try:
        if isinstance(shape, Tensor):
            raise TypeError
        nq, nk = (operator.index(side) for side in shape)
    except (TypeError, ValueError):
        nq = nk = -1
    if not (0 <= nq < SIDE_LIMIT and 0 <= nk < SIDE_LIMIT):
        raise ShapeError(
            f"{who}: shape {shown(shape)} given, (nq, nk) expected, integers from 0 to 2**31 - 1"
        )
    return nq, nk


def check_within(tensor: Tensor, low: int, high: int, who: str, what: str) -> None:
    """Raise LayoutError unless every number lies in [low, high)."""
    if high > torch.iinfo(tensor.dtype).max:  # torch would wrap it
        tensor = tensor.long()
    bad = (tensor < low) | (tensor >= high)
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        raise LayoutError(
            f"{who}: {what} {int(tensor[tuple(at)])} at {at[0] if len(at) == 1 else tuple(at)}, "
            f"{low} <= {what} < {high} expected"
        )


def expanded(
    offsets: Tensor, count: int, lines: int, who: str, names: tuple[str, str] = ("row", "columns")
) -> Tensor:
    """The line of each element of a compressed matrix, int64 (count,); checks the offsets.

    Raises:
        LayoutError: too many or few offsets, or ones that do not rise from 0 to count.
    """
    line, elements = names
    if offsets.numel() != lines + 1:
        raise LayoutError(
            f"{who}: {offsets.numel()} offsets, {lines + 1} expected: one per {line}, and the end"
        )
    offsets = offsets.long()
    counts = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != count:
        raise LayoutError(
            f"{who}: offsets run from {int(offsets[0])} to {int(offsets[-1])}, 0 to {count} "
            f"expected, the number of {elements}"
        )
    if bool((counts < 0).any()):
        at = int((counts < 0).nonzero()[0])
        raise LayoutError(
            f"{who}: offsets fall from {int(offsets[at])} to {int(offsets[at + 1])} at {line} "
            f"{at}; they must not decrease"
        )
    rows = torch.arange(lines, device=offsets.device)
    return torch.repeat_interleave(rows, counts, output_size=count)


def in_row_order(
    row: Tensor, col: Tensor, shape: tuple[int, int], who: str, what: str = "position"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Positions in C order, each once.

    Args:
        row: int (n,), as given.
        col: int (n,), as given.
        shape: rows and columns.
        who: names the caller in errors.
        what: names one position in errors.

    Returns:
        offsets int64 (rows + 1,), columns int64 (n,), and the order (n,) that sorts the positions
        as given, None where they were sorted.

    Raises:
        LayoutError: one out of range, or given twice.
    """
    if row.device != col.device or row.shape != col.shape:
        raise LayoutError(
            f"{who}: {tuple(row.shape)} rows on {row.device} and {tuple(col.shape)} columns on "
            f"{col.device}; expected as many of each, on one device"
        )
    check_within(row, 0, shape[0], who, "row")
    check_within(col, 0, shape[1], who, "column")
    key, order = row.long() * shape[1] + col.long(), None
    if bool((key[1:] < key[:-1]).any()):
        key, order = key.sort()
    double = key[1:] == key[:-1]
    if bool(double.any()):
        i, j = divmod(int(key[1:][double][0]), shape[1])
        raise LayoutError(
            f"{who}: {what} ({i}, {j}) is given twice; each may be given once: add them up first "
            "(scipy: sum_duplicates, torch: coalesce)"
        )
    line = key // max(shape[1], 1)
    counts = torch.bincount(line, minlength=shape[0])
    offsets = torch.zeros(shape[0] + 1, dtype=torch.int64, device=key.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets, key - line * shape[1], order
