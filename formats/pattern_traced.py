"""Patterns inside torch.compile: taken apart by the tracer, put together where it cannot see.

A pattern may be made in the compiled function, where it is no real object yet, or outside. Either
way the tracer can read its fields: classes and numbers, which it guards by value, and tensors, held
by a `Source`, which it guards by identity. So an equal pattern compiles nothing anew.
"""

import operator
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, cast

from .costs import Costs
from .layout import Layout, put, take
from .pattern import Pattern
from .tracing import constant


def parts(value: object) -> list[Any]:
    """A pattern or costs as a flat list: a class is followed by its fields, tuple by its length."""
    if isinstance(value, Pattern | Costs):
        found: list[Any] = [type(value)]
        for field in fields(value):
            found += parts(getattr(value, field.name))
        return found
    if isinstance(value, tuple):
        found = [tuple, len(value)]
        for one in value:
            found += parts(one)
        return found
    if isinstance(value, int) and not isinstance(value, bool):
        # One that differs from the last call's becomes a dynamic number; this asks what it is.
        return [operator.index(value)]
    return [float.fromhex(value.hex()) if isinstance(value, float) else value]


def whole(found: Iterator[Any]) -> Any:
    """The inverse of `parts`; reads as much as belongs to one value."""
    first = next(found)
    if first is tuple:
        return tuple(whole(found) for _ in range(next(found)))
    if isinstance(first, type) and issubclass(first, Pattern | Costs):
        made = object.__new__(first)
        for field in fields(first):
            object.__setattr__(made, field.name, whole(found))
        return made
    return first


def traced_layout(
    pattern: Pattern, kind: str, nq: int, nk: int, size: int, device: Any, costs: Any
) -> Layout:
    """``pattern.to_layout`` in traced code: made or remembered while the call is being traced."""
    # A layout is of one shape: index makes a dynamic size the number that it is now.
    nq, nk, size = operator.index(nq), operator.index(nk), operator.index(size)
    made: Layout = take(_layout(kind, nq, nk, size, device, *parts(pattern), *parts(costs)))
    return made


@constant
def _layout(kind: str, nq: int, nk: int, size: int, device: Any, *found: Any) -> str:
    source = iter(found)
    made = cast(Pattern, whole(source))
    return put(made.to_layout(kind, nq, nk, size, device, whole(source)))
