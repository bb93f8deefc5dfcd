"""What torch.compile must not trace, and how to work with real tensors while something traces."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@functools.cache
def _disabled(function: Callable[..., T]) -> Callable[..., T]:
    made: Callable[..., T] = torch.compiler.disable(function)
    return made


def untraced(function: Callable[..., T]) -> Callable[..., T]:
    """``torch.compiler.disable(function)``, decided when it is called.

    Deciding at import would load all of torch._dynamo, a second that only those who compile owe.
    """

    def call(*arguments: Any) -> T:
        made: T = _disabled(function)(*arguments)
        return made

    # Tells a tracer to break the graph here, as torch.compiler.disable does.
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call


def constant(function: F) -> F:
    """``torch.compiler.assume_constant_result`` without loading torch._dynamo.

    torch.compile runs the function when it traces a call and makes what it returns part of the
    graph. Numbers and strings among its arguments are guarded by value, other objects by identity;
    a tensor would be read once and never again, so none may be handed in. Numbers and strings can
    be returned, and tuples that hold such or tensors; ``keep`` other objects and return the name.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Kept:
    """Objects that were found or made while a call was traced, as attributes.

    torch.compile can guard what it reads here, unlike an object that a constant function returns;
    and unlike a dict, it reads what was put here a moment ago.
    """


kept = Kept()


def keep(name: str, value: object) -> str:
    """Make ``value`` the attribute ``name`` of ``kept``; returns the name."""
    setattr(kept, name, value)
    return name


def concretely(make: Callable[[], T]) -> T:
    """What ``make`` returns when nothing that the caller is in the middle of has a hold on it.

    Layouts and plans are made once and kept, so their tensors must be real and ordinary, even if
    they are first needed inside torch.export, make_fx, torch.func, inference mode or under another
    default device.
    """
    inference = torch.is_inference_mode_enabled()
    functions = torch._C._len_torch_function_stack()
    dispatch = (
        torch._C._len_torch_dispatch_stack() or torch._ops._len_torch_dispatch_stack_pre_dispatch()
    )
    transforms = torch._C._functorch.peek_interpreter_stack() is not None
    if not (inference or functions or dispatch or transforms):
        return make()
    with contextlib.ExitStack() as stack:
        if inference:
            stack.enter_context(torch.inference_mode(False))
        if functions:
            stack.enter_context(torch._C.DisableTorchFunction())
        if dispatch:
            from torch.utils._python_dispatch import _disable_current_modes

            stack.enter_context(_disable_current_modes())
        if transforms:
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

            stack.enter_context(temporarily_clear_interpreter_stack())
        return make()
