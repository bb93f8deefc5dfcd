"""What public functions accept as tensors, numbers, flags, devices, shapes and indices.

Each check names the function and the argument, says what was given, what is expected and, where
there is one, the way from the one to the other.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import BackendUnavailableError, DtypeError, LayoutError, ShapeError, UnsupportedError

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
FLOAT8 = (
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)
# Index tensors count rows and columns in int32.
SIDE_LIMIT = 2**31
_STRIDED = torch.strided


def kind_of(value: object) -> str:
    """The type of a value, for messages."""
    return f"class {value.__name__}" if isinstance(value, type) else type(value).__name__


def shown(value: object) -> str:
    """A value that is none of those expected, for messages: short, whatever it holds."""
    array = isinstance(value, Tensor) or hasattr(value, "__array__")
    return f"a {kind_of(value)}" if array else f"{value!r:.80}"


def among(value: object, options: Iterable[object]) -> bool:
    """Whether a value is one of these; what cannot be compared with them is none."""
    whole = isinstance(value, numbers.Integral)  # of numpy, too
    return any(
        (isinstance(value, type(option)) or (whole and isinstance(option, int))) and value == option
        for option in options
    )


def shape_of(value: Tensor) -> str:
    """The shape of any tensor, for messages; nested ones have none."""
    return "nested" if value.is_nested else str(tuple(value.shape))


def check_dense(op: str, what: str, value: object) -> None:
    """Raise DtypeError unless ``value`` is a tensor whose elements lie at strides in memory."""
    if not isinstance(value, Tensor):
        remedy = "torch.tensor(…)" if isinstance(value, list | tuple) else "torch.as_tensor(…)"
        raise DtypeError(
            f"{op}: {what} is a {kind_of(value)}; expected a torch.Tensor; make one with {remedy}"
        )
    # Nested tensors may call themselves strided.
    if value.layout is not _STRIDED or value.is_nested or value.is_quantized:
        given = str(value.layout).removeprefix("torch.")
        given = "nested" if value.is_nested else "quantized" if value.is_quantized else given
        raise DtypeError(
            f"{op}: {what} is a {given} tensor; expected a dense one (torch.strided); convert it "
            "with .to_dense(), .dequantize() or to_padded_tensor"
        )


def as_number(op: str, what: str, value: Any) -> float:
    """A real number as a float.

    Raises:
        TypeError: no number; a tensor, whose gradient would be lost.
    """
    try:
        if type(value) is float or type(value) is int:  # the others are slow to ask about
            return float(value)
        if isinstance(value, numbers.Real | torch.SymFloat | torch.SymInt):
            return float(value)
    except OverflowError:
        raise TypeError(
            f"{op}: {what} is too large; expected a number that a float holds"
        ) from None
    remedy = f"; multiply by it what {op} takes or returns" if isinstance(value, Tensor) else ""
    raise TypeError(f"{op}: {what} is a {kind_of(value)}; expected a real number{remedy}")


def as_flag(op: str, what: str, value: Any) -> bool:
    """True or False; TypeError for anything else."""
    if isinstance(value, bool) or type(value).__name__ == "bool_" or type(value) is torch.SymBool:
        return bool(value)
    raise TypeError(f"{op}: {what} is a {kind_of(value)}; expected True or False")


def check_pair(op: str, what: str, value: object) -> tuple[int, int]:
    """Two integers.

    Raises:
        ShapeError: anything else.
    """
    try:
        if isinstance(value, str | bytes | Tensor):
            raise TypeError
        a, b = (operator.index(n) for n in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ShapeError(f"{op}: {what} {value!r:.80} given, two integers expected") from None
    return a, b


def as_shape(op: str, value: object) -> tuple[int, int]:
    """(nq, nk), both from 0 to 2**31 − 1; ShapeError otherwise."""
    nq, nk = check_pair(op, "shape", value)
    if min(nq, nk) < 0 or max(nq, nk) >= SIDE_LIMIT:
        raise ShapeError(
            f"{op}: shape ({nq}, {nk}) given, (nq, nk) from 0 to 2**31 - 1 expected; index tensors "
            "count in int32"
        )
    return nq, nk


def as_lead(op: str, value: object) -> tuple[int, int]:
    """(b, h), both at least 1; ShapeError otherwise."""
    b, h = check_pair(op, "lead", value)
    if b < 1 or h < 1:
        raise ShapeError(f"{op}: lead ({b}, {h}) given, (b, h), both at least 1, expected")
    return b, h


def as_entry(op: str, lead: tuple[int, int], value: object) -> tuple[int, ...]:
    """The distinct pattern of each of the b * h entries; None = pattern 0 for all.

    Raises:
        LayoutError: not b * h integers that use every pattern from 0 on.
    """
    count = lead[0] * lead[1]
    if value is None:
        return (0,) * count
    try:
        # The length first: a range may be longer than memory.
        if isinstance(value, str | bytes) or len(value) != count:  # type: ignore[arg-type]
            raise TypeError
        made = tuple(operator.index(u) for u in value)  # type: ignore[attr-defined]
    except (OverflowError, TypeError, ValueError):
        made = ()
    if len(made) != count or set(made) != set(range(len(set(made)))):
        raise LayoutError(
            f"{op}: entry {value!r:.80} given, {count} integers expected for lead {lead}: the "
            "distinct pattern of each entry, counted from 0 without gaps"
        )
    return made


def as_device(op: str, value: Any, data: bool = False) -> torch.device:
    """A device that tensors can be made on; with ``data``, one that keeps what they hold.

    Raises:
        TypeError: neither a string nor a torch.device.
        UnsupportedError: a name that torch does not know; meta where data are needed.
        BackendUnavailableError: a device that this machine or this build of torch lacks.
    """
    index = isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(value, str | torch.device) and not index:
        raise TypeError(
            f"{op}: device is a {kind_of(value)}; expected a string or torch.device, e.g. 'cpu'"
        )
    try:
        device = torch.device(value)
    except (OverflowError, RuntimeError, ValueError) as error:
        raise UnsupportedError(
            f"{op}: device {value!r:.80} given, expected one that torch knows, e.g. 'cpu' or "
            f"'cuda:0' ({str(error).splitlines()[0]:.160})"
        ) from None
    if device.type == "meta" and data:
        raise UnsupportedError(
            f"{op}: device 'meta' given, which holds no indices; make them on 'cpu' and move them"
        )
    if device.type in ("cpu", "meta"):
        return device
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:
        raise BackendUnavailableError(
            f"{op}: device {value!s:.80} given, but it is not there: "
            f"{str(error).splitlines()[0]:.160}; run on 'cpu', or install what it needs"
        ) from error


def check_index(op: str, what: str, value: object, dims: int = 1) -> None:
    """A dense integer tensor of this many dimensions.

    Raises:
        DtypeError: no tensor, or not of integers.
        ShapeError: another number of dimensions.
    """
    check_dense(op, what, value)
    assert isinstance(value, Tensor)
    if value.dtype not in INTEGERS:
        raise DtypeError(
            f"{op}: {what} is {value.dtype}; expected integers; convert it with .long()"
        )
    if value.dim() != dims:
        raise ShapeError(f"{op}: {what} has shape {tuple(value.shape)}; expected {dims} dimensions")
    if value.device.type == "meta":
        raise UnsupportedError(
            f"{op}: {what} is on meta and holds no indices; expected a tensor with data"
        )


def check_csr(op: str, names: tuple[str, str], arrays: tuple[Any, Any], rows: int, cols: int
              ) -> None:  # fmt: skip
    """Compressed rows whose indices stay inside the shape; nothing more.

    Without this they would be written outside of what is allocated for their order.

    Args:
        op: the function, for messages.
        names: of the two arrays.
        arrays: (rows + 1,) where each row starts, and the column of each element.
        rows: of all distinct patterns together.
        cols: of one pattern.

    Raises:
        LayoutError: offsets that do not run from 0 up to the number of elements, or a column
            outside the shape.
        DtypeError: not integers.
        ShapeError: another length, or two devices.
    """
    offsets, columns = arrays
    check_index(op, names[0], offsets)
    check_index(op, names[1], columns)
    if offsets.device != columns.device:
        raise ShapeError(
            f"{op}: {names[0]} on {offsets.device}, {names[1]} on {columns.device}; move one"
        )
    if offsets.numel() != rows + 1:
        raise ShapeError(
            f"{op}: {names[0]} holds {offsets.numel()} offsets; expected {rows + 1}, one for each "
            "row and the end"
        )
    count = columns.numel()
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != count:
        raise LayoutError(
            f"{op}: {names[0]} runs from {first} to {last}; expected 0 to {count}, the length of "
            f"{names[1]}"
        )
    if bool((offsets[1:] < offsets[:-1]).any()):
        at = int((offsets[1:] < offsets[:-1]).nonzero()[0]) + 1
        raise LayoutError(
            f"{op}: {names[0]} falls from {int(offsets[at - 1])} to {int(offsets[at])} at {at}; "
            "expected offsets that never fall"
        )
    check_inside(op, names[1], columns, 0, cols)


def check_inside(op: str, what: str, values: Tensor, low: int, high: int) -> None:
    """Raise LayoutError unless every integer lies in [low, high)."""
    if not values.numel():
        return
    least, most = (int(n) for n in values.aminmax())
    if least < low or most >= high:
        given = least if least < low else most
        at = int((values.flatten() == given).nonzero()[0])
        raise LayoutError(f"{op}: {what} holds {given} at {at}; expected values in [{low}, {high})")


def check_sequence(op: str, what: str, value: object) -> Sequence[Any]:
    """A list or tuple; TypeError otherwise."""
    if isinstance(value, list | tuple):
        return value
    raise TypeError(f"{op}: {what} is a {kind_of(value)}; expected a list")


def as_index(value: Any, who: str) -> int:
    """Any integer; LayoutError for anything else. `who` names the argument."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise LayoutError(f"{who}: {value!r:.80} given, an integer expected") from None


def as_integer(value: object, who: str, least: int) -> int:
    """`value` as an int >= least; LayoutError otherwise. `who` names the argument."""
    try:
        number = as_index(value, who)
    except LayoutError:
        number = least - 1
    if number < least:
        raise LayoutError(f"{who}: {value!r:.80} given, an integer >= {least} expected")
    return number


def as_size(op: str, what: str, value: object, least: int = 0) -> int:
    """An integer from `least` to 2**31 − 1; LayoutError otherwise."""
    try:
        number = as_index(value, op)
    except LayoutError:
        number = least - 1
    if not least <= number < SIDE_LIMIT:
        raise LayoutError(
            f"{op}({what}): {shown(value)} given, an integer >= {least} expected, and below 2**31"
        )
    return number
