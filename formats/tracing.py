"""What torch.compile must not trace, and how to work with real tensors while something traces."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

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


def _constant(function: F) -> F:
    """``torch.compiler.assume_constant_result`` without loading torch._dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# What traced code hands to constant functions, by id, as long as it lives.
_handed: weakref.WeakValueDictionary[int, ByIdentity] = weakref.WeakValueDictionary()


class ByIdentity:
    """An object that traced code can hand to a constant function.

    torch 2.11 hands over no object but the one whose method it calls, later versions any. So the
    object lays itself where the function can find it, and its id is what is handed over.
    """

    @_constant
    def _hand(self) -> None:
        _handed[id(self)] = self


def constant(function: F) -> F:
    """A function that torch.compile runs when it traces a call, to make the result part of a graph.

    Numbers and strings among its arguments are guarded by value, what is ``ByIdentity`` by just
    that; a tensor would be read once and never again, so none may be handed in. Numbers and strings
    can be returned, and tuples that hold such or tensors; ``keep`` other objects and return the
    name. Arguments are positional.
    """

    @_constant
    @functools.wraps(function)
    def found(by_identity: tuple[bool, ...], *arguments: Any) -> Any:
        pairs = zip(by_identity, arguments, strict=True)
        return function(*(_handed[given] if use else given for use, given in pairs))

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            return function(*arguments)
        by_identity, given = [], []
        for argument in arguments:
            use = isinstance(argument, ByIdentity)
            if use:
                argument._hand()
            by_identity.append(use)
            given.append(id(argument) if use else argument)  # the id of an object is guarded
        return found(tuple(by_identity), *given)

    return cast(F, call)


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
