"""The fused kernels as operators of ``torch.ops.mixgrain``, below the planner.

An operator receives tensors, plan tensors and ints; layouts never cross this boundary. Registered
are a kernel for the CPU, a fake one (shapes only), the derivative and the rule for vmap; the
backward is an operator too, whose own derivative raises, as forward mode does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction

from mixgrain.formats.errors import UnsupportedError
from mixgrain.primitives.batching import front, mapped, one_by_one
from mixgrain.primitives.keys import below, differentiable, without_autocast

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


# Shapes for tracing


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


torch.library.register_fake("mixgrain::attention", _attention_shapes, lib=_library)
torch.library.register_fake(
    "mixgrain::attention_backward", _attention_backward_shapes, lib=_library
)

# Derivatives


def _refuse(what: str) -> NoReturn:
    raise UnsupportedError(
        f'the fused attention has no {what}; use attend(…, impl="composed"), whose primitives have'
    )


class _Attention(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        keep, sink, ctx.scale, ctx.plan, ctx.ints = rest
        ctx.set_materialize_grads(False)
        out, lse = below(attention, q, k, v, *rest)
        ctx.save_for_backward(q, k, v, keep, sink, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, keep, sink, out, lse = ctx.saved_tensors
        if grad is None and grad_lse is None:
            return (None,) * 8
        if grad is None:
            grad = torch.zeros_like(out)
        dq, dk, dv, dsink = attention_backward(
            grad, grad_lse, q, k, v, keep, sink, out, lse, ctx.scale, ctx.plan, ctx.ints
        )
        return dq, dk, dv, None, None if sink is None else dsink, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse("forward-mode derivative")


class _AttentionBackward(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        made: tuple[Tensor, ...] = below(attention_backward, *arguments)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        _refuse("second derivative")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse("second derivative")


_library.impl("attention", differentiable(_Attention, attention, 5), "Autograd")
_library.impl("attention_backward", differentiable(_AttentionBackward, attention_backward, 9),
              "Autograd")  # fmt: skip
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("attention", without_autocast(attention), _key)
    _library.impl("attention_backward", without_autocast(attention_backward), _key)

# vmap: a mapped dimension joins the batch, unless that differs by index in a way the plan knows of.


def _plain(size: int, sink: int | None, plan: Any, ints: Sequence[int]) -> bool:
    return bool(size) and ints[2] == 1 and sink is None and not mapped(plan)


def _join(size: int) -> Callable[[Tensor | None, int | None], Tensor | None]:
    return lambda t, dim: None if t is None else front(t, dim, size).flatten(0, 1)


def _map_attention(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    size = info.batch_size
    if not _plain(size, in_dims[4], in_dims[6], arguments[7]):
        return one_by_one(attention, size, in_dims, arguments)
    joined = map(_join(size), arguments[:4], in_dims[:4])
    out, lse = attention(*joined, *arguments[4:])
    return (out.unflatten(0, (size, -1)), lse.unflatten(0, (size, -1))), (0, 0)


def _map_backward(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    size = info.batch_size
    # Each index has a sink gradient of its own, which the operator would add up.
    if arguments[6] is not None or not _plain(size, in_dims[6], in_dims[10], arguments[11]):
        return one_by_one(attention_backward, size, in_dims, arguments)
    first = map(_join(size), arguments[:6], in_dims[:6])
    last = map(_join(size), arguments[7:9], in_dims[7:9])
    *made, none = attention_backward(*first, None, *last, *arguments[9:])
    return (*(d.unflatten(0, (size, -1)) for d in made), none), (0, 0, 0, None)


torch.library.register_vmap("mixgrain::attention", _map_attention, lib=_library)
torch.library.register_vmap("mixgrain::attention_backward", _map_backward, lib=_library)
