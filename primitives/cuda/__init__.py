"""CUDA kernels of the operators, as functions of the same signatures as those of ``cpu``.

Nothing here is imported before an operator first meets a CUDA tensor: CuPy comes with it. The
functions are launch code: they run once per signature, on descriptions of tensors, and what they
launch is recorded and run again (``calls.py``).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mixgrain.cuda.device import using
from mixgrain.cuda.errors import CudaError
from mixgrain.cuda.prepared import Prepared
from mixgrain.formats.errors import BackendUnavailableError

from . import calls

#: The module of each operator.
MODULES = {
    "sddmm": "sddmm",
    "prune": "nm_scores",
    "spmm": "spmm",
    "spmm_t": "spmm",
    "linear": "spmm",
    "affine": "spmm",
    "softmax": "softmax",
    "softmax_backward": "softmax",
    "row_sum": "softmax",
    "row_expand": "softmax",
    "chain": "chain",
}


@functools.cache
def launch_code(name: str) -> Callable[..., Any]:
    """The function behind an operator, to be recorded."""
    made: Callable[..., Any] = getattr(importlib.import_module(f".{MODULES[name]}", __name__), name)
    return made


def prepared(name: str, arguments: tuple[Any, ...], alone: bool = False) -> Prepared:
    """The prepared call of an operator for arguments like these.

    Args:
        name: the operator.
        arguments: what it takes: tensors, plan, scalars.
        alone: of several results the first only.

    Raises:
        BackendUnavailableError: CuPy, NVRTC or kernels for this architecture are missing.
    """
    try:
        with using(arguments[0].device.index):
            return calls.of(name, launch_code(name), arguments, alone)
    except CudaError as error:
        raise BackendUnavailableError(f"{name}: {error}") from error


@functools.cache
def operator(name: str) -> Callable[..., Any]:
    """What runs when an operator meets CUDA tensors."""

    def run(*arguments: Any) -> Any:
        call = prepared(name, arguments)
        given: list[Tensor] = calls.given(arguments)
        return call(given, [t.data_ptr() for t in given])

    return run
