"""The fused kernels as operators of ``torch.ops.mixgrain``, below the planner.

An operator receives tensors, plan tensors and ints; layouts never cross this boundary. Registered
are a kernel for the CPU, a fake one (shapes only) and the derivative; the backward is an operator
too, whose own derivative raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from mixgrain.formats.errors import UnsupportedError

from .cpu import compute_dtype, empty_output, forward
from .cpu_backward import backward

_library = torch.library.Library("mixgrain", "FRAGMENT")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor? sink, float scale, "
    "Tensor[] plan, int[] ints) -> (Tensor, Tensor)"
)
_library.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
    "Tensor? keep, Tensor? sink, Tensor out, Tensor lse, float scale, Tensor[] plan, int[] ints) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("attention", forward, "CPU")
_library.impl("attention_backward", backward, "CPU")

attention = torch.ops.mixgrain.attention.default
attention_backward = torch.ops.mixgrain.attention_backward.default


def _attention_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    sink: Tensor | None,
    scale: float,
    plan: Sequence[Tensor],
    ints: Sequence[int],
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=compute_dtype(q.dtype))
    return empty_output(q, v.shape[-1]), lse


def _attention_backward_shapes(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    plan: Sequence[Tensor],
    ints: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsink = q.new_empty(0) if sink is None else torch.empty_like(sink)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dsink


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, keep, sink, scale, plan, ints = inputs
    ctx.save_for_backward(q, k, v, keep, sink, *output, *plan)
    ctx.scale, ctx.ints = scale, ints


def _derive(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    q, k, v, keep, sink, out, lse, *plan = ctx.saved_tensors
    dq, dk, dv, dsink = attention_backward(
        grad_out, grad_lse, q, k, v, keep, sink, out, lse, ctx.scale, plan, ctx.ints
    )
    return dq, dk, dv, None, None if sink is None else dsink, None, [None] * len(plan), None


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _refuse(ctx: Any, *grads: Tensor) -> NoReturn:
    raise UnsupportedError(
        'the fused attention has no second derivative; use attend(…, impl="composed"), whose '
        "primitives can be differentiated twice"
    )


torch.library.register_fake("mixgrain::attention", _attention_shapes, lib=_library)
torch.library.register_fake(
    "mixgrain::attention_backward", _attention_backward_shapes, lib=_library
)
torch.library.register_autograd("mixgrain::attention", _derive, setup_context=_save, lib=_library)
torch.library.register_autograd(
    "mixgrain::attention_backward", _refuse, setup_context=_save_nothing, lib=_library
)
