"""CUDA kernels of the operators, as functions of the same signatures as those of ``cpu``.

Nothing here is imported before an operator first meets a CUDA tensor: CuPy comes with it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from mixgrain.cuda.device import using
from mixgrain.cuda.errors import CudaError
from mixgrain.formats.errors import BackendUnavailableError

#: The module of each operator.
MODULES = {
    "sddmm": "sddmm",
    "spmm": "spmm",
    "spmm_t": "spmm",
    "softmax": "softmax",
    "softmax_backward": "softmax",
    "row_sum": "softmax",
    "row_expand": "softmax",
}


@functools.cache
def operator(name: str) -> Callable[..., Any]:
    """The function behind an operator.

    What the floor of kernels misses (CuPy, NVRTC, kernels for this architecture) it raises as
    BackendUnavailableError.
    """
    function = getattr(importlib.import_module(f".{MODULES[name]}", __name__), name)

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        try:
            with using(arguments[0].device.index):
                return function(*arguments)
        except CudaError as error:
            raise BackendUnavailableError(f"{name}: {error}") from error

    return run
