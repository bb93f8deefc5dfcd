"""Whether calls mean what they say, and tensors are what they look like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

TENSORS = (Tensor, torch.nn.Parameter)

_function_modes: Callable[[], int] = torch._C._len_torch_function_stack
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_transforms: Callable[[], bool] = torch._C._are_functorch_transforms_active
_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
_tracing: Callable[[], object] = torch._C._get_tracing_state
_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled


def watched() -> bool:
    """Whether something watches that the guards of tensors may not see."""
    return bool(
        _function_modes() or _dispatch_modes() or _tracing() or forward_ad._current_level >= 0
    )


def plain() -> bool:
    """Whether calls mean what they say: nothing that watches or changes operators is active."""
    return not (
        _function_modes()  # e.g. a default device, or someone's logging of torch functions
        or _dispatch_modes()  # fake tensors, tracing by make_fx, flop counters
        or _transforms()  # vmap, grad, jvp: tensors may be wrappers
        or _tracing()  # torch.jit.trace
        or _autocast()  # may cast the operators' inputs
        or forward_ad._current_level >= 0  # tensors may carry tangents
    )


def usable(t: Any) -> bool:
    """Whether a tensor is what it looks like: dense, on CUDA, no subclass, nothing lazy."""
    return (
        type(t) in TENSORS
        and t.is_cuda
        and t.layout is torch.strided
        and not (t.is_neg() or t.is_nested or t._is_zerotensor() or _wrapped(t))
    )


def address(t: Any) -> int:
    """Where a tensor begins, on any device, 0 if empty; −1 if it is not what it looks like."""
    if type(t) not in TENSORS or t.is_neg() or t.is_nested:
        return -1
    try:
        at: int = t.data_ptr()
    except RuntimeError:  # sparse, or a wrapper that outlived its transform
        return -1
    return at if at or not t.numel() else -1  # zeros that were never written have no address
