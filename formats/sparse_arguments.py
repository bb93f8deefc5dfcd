"""What SparseTensor accepts: its mask, factors, and the functions that ``map`` calls."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .arguments import as_flag, as_number, check_dense
from .errors import DtypeError, ShapeError
from .layout import Layout


def check_keep(layout: Layout, keep: object, rows: object) -> None:
    """Raise unless keep is bool (n,) or (B, n) for the rows or columns of the layout."""
    check_dense("SparseTensor", "keep", keep)
    assert isinstance(keep, Tensor)
    if keep.dtype != torch.bool:
        raise DtypeError(f"SparseTensor: keep is {keep.dtype}; expected bool, True = kept")
    n = layout.shape[0 if as_flag("SparseTensor", "keep_rows", rows) else 1]
    if keep.dim() not in (1, 2) or keep.shape[-1] != n:
        raise ShapeError(
            f"SparseTensor: keep has shape {tuple(keep.shape)}; expected (B, {n}) or ({n},) for "
            f"the {'rows' if rows else 'columns'} of {layout!r}"
        )


def check_together(op: str, layout: Layout, values: Tensor, keep: Tensor | None) -> Layout:
    """The layout; ShapeError if it, its values and their mask are not on one device."""
    if torch.compiler.is_dynamo_compiling():
        return layout
    devices = [layout.home, values.device, None if keep is None else keep.device]
    if len({device for device in devices if device is not None}) > 1:
        raise ShapeError(
            f"{op}: positions on {layout.home}, values on {values.device}, mask on {devices[2]}; "
            "expected one device; move them with .to(device)"
        )
    return layout


def is_factor(value: object) -> bool:
    """Whether a value may scale a SparseTensor at all: a real number or a tensor."""
    return isinstance(value, Tensor | numbers.Real | torch.SymFloat | torch.SymInt)


def factor_of(sign: str, factor: float | Tensor, values: Tensor) -> float | Tensor:
    """A factor for values (*free, slots), once it is known not to depend on the slot.

    Raises:
        ShapeError: a tensor that does not broadcast over (*free, 1), or on another device.
    """
    if not isinstance(factor, Tensor):
        return as_number(sign, "the factor", factor)
    check_dense(sign, "the factor", factor)
    shape = tuple(values.shape)
    try:
        if factor.dim() and factor.shape[-1] != 1:
            raise RuntimeError
        torch.broadcast_shapes(shape, factor.shape)
    except RuntimeError:
        raise ShapeError(
            f"{sign}: a factor of shape {tuple(factor.shape)} for values {shape}; give a number, "
            f"or a tensor that broadcasts to {(*shape[:-1], 1)}; map works by position"
        ) from None
    if factor.dim() and factor.device != values.device:
        raise ShapeError(f"{sign}: the factor is on {factor.device}, the values on {values.device}")
    return factor


def arguments_of(f: Callable[..., Any]) -> int:
    """How many arguments a function takes that ``map`` may call.

    Raises:
        TypeError: no function, or one that does not take v, i and j.
    """
    if torch.compiler.is_dynamo_compiling():
        return int(f.__code__.co_argcount)  # inspect.signature cannot be traced
    try:
        signature = inspect.signature(f)
        found = len(signature.parameters)
        signature.bind(*range(4 if found >= 4 else 3))
    except (TypeError, ValueError):
        raise TypeError(
            f"map: f is {f!r:.80}; expected a Python function f(v, i, j) or f(v, i, j, h), e.g. "
            "lambda v, i, j: v.tanh()"
        ) from None
    return found
