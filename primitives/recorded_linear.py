"""The short way of linear, and its recording for autograd; see ``eager.py``.

A layer is one prepared call from the input as it is held to the output: launch code folds and
unfolds while it is recorded, so that nothing is left of that when the call runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor

from mixgrain.formats.layout import Layout
from mixgrain.formats.nm import NMLayout
from mixgrain.formats.sparse import SparseTensor

from . import ops, ops_linear
from .activations import ACTIVATIONS
from .eager import (
    LAYOUT_TYPES,
    Backward,
    Call,
    find,
    index_of,
    learnable,
    without_index,
)
from .eager import learn as learn_call
from .fold import fold_mask
from .plans.plan import Plan

_grad_enabled = torch.is_grad_enabled


class Layer(NamedTuple):
    """What is recorded of a layer, forward.

    Attributes:
        plan: of the layout; of an NMLayout without its metadata.
        keep_rows: the run-time mask is over rows.
        activation: a name of ``activations``, or None.
    """

    plan: Plan
    keep_rows: bool
    activation: str | None = None

    def prepare(self, given: Sequence[Tensor | None], keep: Tensor | None) -> Call:
        """The call for values, x, bias and metadata like these."""
        from .cuda import alone

        *tensors, index = given
        how = (keep, self.keep_rows, self.activation)
        made = alone("tokens", (*tensors, *_with(self.plan, index), *how))
        return Call(self, made, False, False)


class LayerGradients(NamedTuple):
    """What computes the gradients of a layer, of values, x, the gradient above and metadata.

    Attributes:
        layer: the layer.
        dtype: of the bias.
        wanted: which of the gradients of values, x and bias.
    """

    layer: Layer
    dtype: torch.dtype
    wanted: tuple[bool, ...] = (True, True, True)

    def of(self, wanted: tuple[bool, ...]) -> Self:
        """The same for some of the gradients."""
        return self._replace(wanted=wanted)

    def prepare(self, tensors: Sequence[Tensor | None], keep: Tensor | None) -> Call:
        """The call for tensors like these."""
        from .cuda import alone

        values, x, grad, index = tensors
        shared = (*_with(self.layer.plan, index), keep, self.layer.keep_rows)
        made = alone("token_gradients", (values, x, grad, *shared, self.wanted, self.dtype))
        return Call(self, made, False, False)

    def through_operators(
        self, tensors: Sequence[Tensor | None], keep: Tensor | None
    ) -> list[Tensor]:
        """Compute by the dispatcher, so that whatever is active sees it."""
        values, x, grad = cast(tuple[Tensor, ...], tensors[:3])
        plan = _with(self.layer.plan, tensors[3])
        weights, above, columns = values[None], _columns(grad), _columns(x)
        shared = (fold_mask(keep, (1, 1), ()), self.layer.keep_rows, plan, 1.0)
        made = []
        if self.wanted[0]:
            made.append(ops.sddmm(above, columns, *shared, values.dtype)[0])
        if self.wanted[1] and keep is None and ops_linear.by_rows(plan):
            made.append(ops_linear.linear(weights, above[0].mT, None, plan, True).reshape(x.shape))
        elif self.wanted[1]:
            made.append(ops.spmm_t(weights, above, *shared, x.dtype).mT.reshape(x.shape))
        if self.wanted[2]:
            made.append(above.sum((0, 1, 3)).to(self.dtype))
        return made


def _columns(t: Tensor) -> Tensor:
    """(..., n) as (1, 1, n, T)."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])[None, None].mT


def _with(plan: Plan, index: Tensor | None) -> Plan:
    """A plan with the metadata of an NMLayout in its place."""
    return plan if index is None else plan._replace(tensors=[index, *plan.tensors[1:]])


class _Context(torch.autograd.function.FunctionCtx):
    """What the forward below leaves for its backward."""

    gradients: Backward
    keep: Tensor | None
    index: Tensor | None
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        call: Call,
        index: Tensor | None,
        keep: Tensor | None,
        pointers: list[int],
        values: Tensor,
        x: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        assert call.backward is not None
        ctx.gradients, ctx.index, ctx.keep = call.backward, index, keep
        ctx.save_for_backward(values, x)
        made: Tensor = call.run(_given(values, x, bias, index, keep), pointers)
        return made

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Any, ...]:
        values, x = ctx.saved_tensors
        held = (values, x, grad, ctx.index)
        return None, None, None, None, *ctx.gradients(held, ctx.keep, ctx.needs_input_grad[4:])


# What Function.apply does besides is to look for transforms, which calls that are found have not.
_apply: Callable[..., Any] = super(torch.autograd.Function, _Linear).apply


def _given(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple([t for t in tensors if t is not None])


def _rest(
    w: SparseTensor, bias: Tensor | None, index: Tensor | None, activation: str | None
) -> Hashable:
    """What of a call is no tensor, and which tensors there are."""
    return "linear", w.keep_rows, activation, bias is None, index is None, w.keep is None


def linear(x: Any, w: Any, bias: Any, activation: Any) -> Tensor | None:
    """What ``linear`` returns, or None: not seen before, or not to be had this way."""
    if activation is not None:
        if type(activation) is not str or activation not in ACTIVATIONS:
            return None
        held = (x, bias, getattr(w, "values", None))
        if _grad_enabled() and any(getattr(t, "requires_grad", False) for t in held):
            # Gradients need what is activated.
            made = linear(x, w, bias, None)
            return None if made is None else ACTIVATIONS[activation](made)
    if torch.compiler.is_dynamo_compiling() or type(w) is not SparseTensor:
        return None
    layout, values, keep = w.layout, w.values, w.keep
    if type(layout) not in LAYOUT_TYPES or x is None or values is None:
        return None
    calls = find(layout)
    if calls is None:
        return None
    index = layout.metadata if type(layout) is NMLayout else None
    given = _given(values, x, bias, index, keep)
    seen = calls.find(given, _rest(w, bias, index, activation))
    if seen is None:
        return None
    call, pointers = seen
    if _records(values, x, bias):
        return cast(Tensor, _apply(call, index, keep, pointers, values, x, bias))
    return cast(Tensor, call.run(given, pointers))


def _records(values: Tensor, x: Tensor, bias: Tensor | None) -> bool:
    """Whether gradients of a call are recorded."""
    return _grad_enabled() and (
        values.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)
    )


def learn(
    x: Tensor, w: SparseTensor, bias: Tensor | None, activation: str | None, plan: Plan
) -> Tensor | None:
    """Keep the call that passed all checks, and run it; see ``recorded.learn_sddmm``."""
    layout: Layout = w.layout
    if type(layout) not in LAYOUT_TYPES or not learnable(x, w.values, bias, w.keep):
        return None
    if activation is not None and _records(w.values, x, bias):
        made = learn(x, w, bias, None, plan)
        return None if made is None else ACTIVATIONS[activation](made)
    given = (w.values, x, bias, index_of(layout))
    layer = Layer(without_index(layout, plan)[1], w.keep_rows, activation)
    call = learn_call(layout, _rest(w, bias, given[3], activation), layer, given, w.keep)
    if call.backward is None and activation is None:
        dtype = x.dtype if bias is None else bias.dtype
        call.backward = Backward(LayerGradients(layer, dtype))
    return linear(x, w, bias, activation)
