"""The short way of sddmm with P.nm, which chooses positions by score; see ``eager.py``.

Every call makes a layout of its own, of which only the metadata is new: all else is that of the
first call of the signature.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixgrain.formats.cache import LRU
from mixgrain.formats.layout import next_key
from mixgrain.formats.nm import NMLayout
from mixgrain.formats.pattern_nm import NM
from mixgrain.formats.sparse import SparseTensor

from .eager import (
    LAYOUTS,
    Backward,
    Call,
    Term,
    learnable,
)
from .gradients import KINDS, Work, gradients
from .lately import Signatures, signature
from .looks import TENSORS, plain
from .plans.plan import Plan, trust

_grad_enabled = torch.is_grad_enabled
_NUMBERS = (float, int)
_DTYPES = (torch.dtype, type(None))
_new = object.__new__


class _Choice(NamedTuple):
    """What is kept of a call.

    Attributes:
        call: returns values and metadata.
        fields: of the layout, those it remembers included; all but its metadata and key.
    """

    call: Call
    fields: dict[str, Any]


_choices: LRU[Signatures[_Choice]] = LRU(LAYOUTS)


class _Context(torch.autograd.function.FunctionCtx):
    """What the forward below leaves for its backward."""

    gradients: Backward
    keep: Tensor | None
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _Prune(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, call: Call, keep: Tensor | None, pointers: list[int], q: Tensor, k: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert call.backward is not None
        ctx.gradients, ctx.keep = call.backward, keep
        values, metadata = call.run((q, k) if keep is None else (q, k, keep), pointers)
        ctx.mark_non_differentiable(metadata)
        ctx.save_for_backward(q, k, metadata)
        return values, metadata

    @staticmethod
    def backward(ctx: _Context, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        q, k, metadata = ctx.saved_tensors
        made = ctx.gradients((q, k, grad, metadata), ctx.keep, ctx.needs_input_grad[3:])
        return None, None, None, *made


# What Function.apply does besides is to look for transforms, which calls that are found have not.
_apply: Callable[..., Any] = super(torch.autograd.Function, _Prune).apply


def _place(pattern: NM) -> Hashable:
    """What the calls of a pattern are kept under; None: numbers that have to be checked."""
    if type(pattern.n) is not int or type(pattern.m) is not int:
        return None
    return (pattern.n, pattern.m) if pattern.within is None else pattern.expression_key()


def sddmm(
    q: Any, k: Any, pattern: NM, scale: float, keep: Any, out_dtype: Any
) -> SparseTensor | None:
    """What ``sddmm`` returns, or None: not seen before, or not to be had this way."""
    # Other numbers are checked the long way; a scale of 0 and one of −0 are equal keys.
    if type(scale) not in _NUMBERS or not scale or not plain():
        return None
    if type(out_dtype) not in _DTYPES or type(q) not in TENSORS:
        return None
    choices = _choices.peek(_place(pattern))
    if choices is None:
        return None
    given = (q, k) if keep is None else (q, k, keep)
    dtype = q.dtype if out_dtype is None else out_dtype
    seen = choices.find(given, (scale, dtype, keep is None))
    if seen is None:
        return None
    found, pointers = seen
    call = found.call
    if _grad_enabled() and (q.requires_grad or k.requires_grad):
        if call.backward is None:
            return None
        values, metadata = _apply(call, keep, pointers, q, k)
    else:
        values, metadata = call.run(given, pointers)
    layout = _new(NMLayout)
    layout.__dict__.update(found.fields, metadata=metadata, key=next_key())
    trust(layout)
    made = _new(SparseTensor)
    made.__dict__.update(layout=layout, values=values, keep=keep, keep_rows=False)
    return made


def learn(
    q: Tensor,
    k: Tensor,
    pattern: NM,
    scale: float,
    keep: Tensor | None,
    dtype: torch.dtype,
    plan: Plan,
    lead: tuple[int, ...],
    blank: NMLayout,
) -> SparseTensor | None:
    """Keep the call that passed all checks, and run it; see ``recorded.learn_sddmm``.

    Args:
        q: as ``sddmm`` was given it.
        k: likewise.
        pattern: likewise.
        scale: likewise.
        keep: the key mask.
        dtype: of the values.
        plan: without metadata.
        lead: leading dimensions of the matrices.
        blank: the layout without metadata.
    """
    place = _place(pattern)
    if place is None or type(scale) not in _NUMBERS or not scale or not learnable(q, k, keep):
        return None
    choices, rest = _choices.get(place, Signatures), (scale, dtype, keep is None)
    given = [t for t in (q, k, keep) if t is not None]
    pointers = [t.data_ptr() for t in given]
    if signature(given, pointers, rest) in choices:  # may not be recorded, or none would ask
        return None
    work = Work("prune", (0, 1), (float(scale), dtype), ("values", "index"))
    term = Term((work,), blank, lead, KINDS["sddmm"][0], False, plan)
    with torch.no_grad():
        call = term.prepare((q, k), keep)
    if q.shape[:-2] == lead == k.shape[:-2]:
        works = gradients("sddmm", (q.dtype, k.dtype), (float(scale),))
        kinds = ("dense", "dense", "values", "index")
        call.backward = Backward(term._replace(works=works, kinds=kinds))
    fields = {name: value for name, value in vars(blank).items() if name not in ("metadata", "key")}
    fields["_home"] = q.device
    choices.keep(given, pointers, rest, _Choice(call, fields))
    return sddmm(q, k, pattern, scale, keep, dtype)
