"""Rules for ``torch.func.vmap``: a mapped dimension joins the free one.

Every operator takes folded tensors, (free, …), and treats each free index alike (see fold.py), so
a mapped dimension of any operand becomes part of it and the plan stays as it is. What differs with
every index is a plan that is mapped itself: dynamic N:M chooses other positions for each of them.
Then one call is made for each index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .schemas import LIB, SCHEMAS

# How many leading arguments are tensors with a free dimension; the run-time mask is the last.
_FOLDED = {
    "sddmm": 3, "spmm": 3, "spmm_t": 3, "affine": 4, "activated": 4, "softmax": 2,
    "softmax_backward": 4, "row_sum": 2, "row_expand": 2, "linear": 2,
}  # fmt: skip

# An argument among them without a free dimension.
_PLAIN = {"affine": 2, "activated": 2}


def front(t: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension first; a view of ``size`` equal ones where there is none."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def one_by_one(
    op: Callable[..., Any], size: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> tuple[Any, Any]:
    """A call for each mapped index, results stacked."""

    def at(i: int, given: Any, dim: Any) -> Any:
        if isinstance(given, Tensor):
            return given if dim is None else given.select(dim, i)
        if isinstance(given, list | tuple) and isinstance(dim, list | tuple):
            return [at(i, one, d) for one, d in zip(given, dim, strict=True)]
        return given

    made = [
        op(*(at(i, given, dim) for given, dim in zip(arguments, in_dims, strict=True)))
        for i in range(size)
    ]
    if isinstance(made[0], Tensor):
        return torch.stack(made), 0
    stacked = tuple(torch.stack(parts) for parts in zip(*made, strict=True))
    return stacked, (0,) * len(stacked)


def mapped(dims: Any) -> bool:
    """Whether anything in a structure of dimensions is mapped."""
    if isinstance(dims, list | tuple):
        return any(mapped(dim) for dim in dims)
    return dims is not None


def _rule(name: str) -> Callable[..., Any]:
    op, folded = getattr(torch.ops.mixgrain, name).default, _FOLDED.get(name, 0)
    plain = _PLAIN.get(name, -1)

    def run(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        size = info.batch_size
        if mapped(in_dims[folded:]) or (plain >= 0 and mapped(in_dims[plain])) or not size:
            return one_by_one(op, size, in_dims, arguments)
        joined = [
            t if t is None or at == plain else front(t, dim, size).flatten(0, 1)
            for at, (t, dim) in enumerate(zip(arguments[:folded], in_dims[:folded], strict=True))
        ]
        made = op(*joined, *arguments[folded:])
        if isinstance(made, Tensor):
            return made.unflatten(0, (size, -1)), 0
        p, lse = made
        p = p.unflatten(0, (size, -1))
        return ((p, lse.unflatten(0, (size, -1))), (0, 0)) if lse.numel() else ((p, lse), (0, None))

    return run


for _name in SCHEMAS:
    torch.library.register_vmap(f"mixgrain::{_name}", _rule(_name), lib=LIB)
