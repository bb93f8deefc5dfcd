"""What torch.compile must not trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


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
