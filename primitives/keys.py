"""What an operator does at torch's dispatch keys above its kernel, whatever its derivative is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch import autograd_function
from torch.autograd import forward_ad

Saved = tuple[Tensor, ...]


def below(op: Callable[..., Any], *arguments: Any) -> Any:
    """Run the kernel itself: dispatch below the Autograd key.

    Under transforms of ``torch.func`` what comes below is the next transform out, which wants its
    own derivative of a call that an autograd.Function makes with gradients switched off.
    """
    if torch._C._are_functorch_transforms_active():
        with (
            torch.enable_grad(),
            forward_ad._set_fwd_grad_enabled(True),
            torch._C._AutoDispatchBelowAutograd(),
        ):
            return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def differentiable(function: type[Any], op: Callable[..., Any], inputs: int) -> Callable[..., Any]:
    """What an operator does at the Autograd key.

    Args:
        function: its ``apply`` runs where something is recorded: that of an autograd.Function,
            which calls the operator ``below`` and knows its derivatives, or of operators that do.
        op: the operator.
        inputs: how many leading arguments are tensors or None.
    """

    def run(*arguments: Any) -> Any:
        # A level of forward mode is open: a tangent says nothing of itself in requires_grad.
        if forward_ad._current_level >= 0 or (
            torch.is_grad_enabled()
            and any(t is not None and t.requires_grad for t in arguments[:inputs])
        ):
            if torch._C._are_functorch_transforms_active():
                with autograd_function.enable_single_level_autograd_function():  # type: ignore[attr-defined]
                    return function.apply(*arguments)
            return function.apply(*arguments)
        return below(op, *arguments)

    return run


def forward_rule(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The ``jvp`` of an autograd.Function, from one that is also given the saved tensors.

    An autograd.Function runs it with forward mode switched off. Under transforms of ``torch.func``
    that would hide the tangents of the next transform out, so it is on, and the saved tensors come
    without the tangents of this one.
    """

    def jvp(ctx: Any, *tangents: Any) -> Any:
        saved: Saved = ctx.saved_tensors
        if not torch._C._are_functorch_transforms_active():
            return rule(ctx, saved, *tangents)
        with forward_ad._set_fwd_grad_enabled(True):
            plain = tuple(None if t is None else forward_ad.unpack_dual(t).primal for t in saved)
            return rule(ctx, plain, *tangents)

    return jvp


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def without_autocast(op: Callable[..., Any]) -> Callable[..., Any]:
    """What an operator does at an Autocast key: nothing inside a kernel is cast.

    The public functions cast what they are given (see checks.py).
    """

    def run(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return op(*arguments)

    return run
