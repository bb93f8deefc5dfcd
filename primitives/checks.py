"""Checks that the public functions share; every message says what was given and what to do."""

from __future__ import annotations

import torch
from torch import Tensor

from mixgrain.formats.arguments import check_dense
from mixgrain.formats.errors import DtypeError, LayoutError, ShapeError
from mixgrain.formats.layout import Layout
from mixgrain.formats.sparse import SparseTensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def check_dtype(op: str, what: str, dtype: torch.dtype) -> None:
    """Raise DtypeError unless the dtype is one of the four floats."""
    if not isinstance(dtype, torch.dtype):
        raise DtypeError(
            f"{op}: {what} is a {type(dtype).__name__}; expected a dtype such as torch.float32"
        )
    if dtype not in FLOATS:
        raise DtypeError(
            f"{op}: {what} is {name_of(dtype)}; expected one of "
            f"{', '.join(map(name_of, FLOATS))}; convert it with .to(torch.float32)"
        )


def check_floats(op: str, what: str, t: Tensor) -> None:
    """Raise DtypeError unless ``t`` is a dense tensor of one of the four floats."""
    check_dense(op, what, t)
    check_dtype(op, what, t.dtype)


def check_matrix(op: str, what: str, t: Tensor) -> None:
    """Raise unless ``t`` is a float tensor of at least two dimensions."""
    check_floats(op, what, t)
    if t.dim() < 2:
        raise ShapeError(
            f"{op}: {what} has shape {tuple(t.shape)}; expected (*leading, rows, columns)"
        )


def check_same_dtype(op: str, a: str, b: str, x: Tensor, y: Tensor) -> None:
    """Raise DtypeError unless both have one dtype."""
    if x.dtype != y.dtype:
        raise DtypeError(
            f"{op}: {a} is {name_of(x.dtype)} and {b} {name_of(y.dtype)}; convert one, e.g. "
            f"{b}.to({a}.dtype)"
        )


def check_sparse(op: str, s: SparseTensor) -> None:
    """Raise unless ``s`` is a SparseTensor of floats."""
    if not isinstance(s, SparseTensor):
        raise LayoutError(
            f"{op}: the sparse operand is a {type(s).__name__}; expected a SparseTensor, e.g. "
            "from sddmm or sparsify(dense, kind)"
        )
    check_floats(op, "the sparse operand", s.values)


def check_key_mask(op: str, mask: Tensor | None, nk: int) -> None:
    """Raise unless ``mask`` is None or bool (nk,) or (B, nk)."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = name_of(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        raise DtypeError(
            f"{op}: key_mask is {given}; expected bool, True = kept; write key_mask.bool()"
        )
    check_dense(op, "key_mask", mask)
    if mask.dim() not in (1, 2) or mask.shape[-1] != nk:
        raise ShapeError(
            f"{op}: key_mask has shape {tuple(mask.shape)}; expected (batch, {nk}) or ({nk},)"
        )


def check_fits(op: str, layout: Layout, nq: int, nk: int) -> None:
    """Raise ShapeError unless the layout is of an nq × nk matrix."""
    if layout.shape != (nq, nk):
        raise ShapeError(
            f"{op}: the tensors have {nq} query and {nk} key rows, the layout is "
            f"{layout.shape[0]}×{layout.shape[1]}; build it with to_layout(kind, {nq}, {nk})"
        )


def accumulation(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if any is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as torch.matmul sees them under torch.autocast; unchanged outside of it.

    All floats but float64 become the dtype of the autocast of the first one's device.
    """
    if not all(isinstance(t, Tensor) for t in tensors):
        return tensors  # the checks say what is wrong
    if not torch._C._is_any_autocast_enabled():
        return tensors
    device = tensors[0].device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )
