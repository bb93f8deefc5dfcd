"""CUDA kernels of the operators, as functions of the same signatures as those of ``cpu``.

Nothing here is imported before an operator first meets a CUDA tensor: CuPy comes with it. The
functions are launch code: they run once per signature, on descriptions of tensors, and what they
launch is recorded and run again (``calls.py``).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from mixgrain.cuda.device import using
from mixgrain.cuda.errors import CudaError
from mixgrain.cuda.prepared import Prepared
from mixgrain.formats.errors import BackendUnavailableError

from ..gradients import Work
from ..plans.plan import Plan
from . import calls

#: The module of each operator.
MODULES = {
    "sddmm": "sddmm",
    "prune": "nm_scores",
    "spmm": "spmm",
    "spmm_t": "spmm",
    "linear": "spmm",
    "affine": "spmm",
    "activated": "spmm",
    "softmax": "softmax",
    "softmax_backward": "softmax",
    "row_sum": "softmax",
    "row_expand": "softmax",
    "chain": "chain",
    "tokens": "tokens",
    "token_gradients": "tokens",
}


@functools.cache
def launch_code(name: str) -> Callable[..., Any]:
    """The function behind an operator, to be recorded."""
    made: Callable[..., Any] = getattr(_modules()[MODULES[name]], name)
    return made


@functools.cache
def _modules() -> dict[str, ModuleType]:
    """All launch code: with the first operator, which brings CuPy, so that no later one waits."""
    return {name: importlib.import_module(f".{name}", __name__) for name in set(MODULES.values())}


def together(
    works: Sequence[Work],
    operands: Sequence[Tensor | None],
    keep: Tensor | None,
    keep_rows: bool,
    plan: Plan,
    indexed: bool = False,
) -> Prepared:
    """One prepared call of several operators on the same positions; see ``calls.together``.

    Raises:
        BackendUnavailableError: CuPy, NVRTC or kernels for this architecture are missing.
    """
    code = [(launch_code(work.op), work) for work in works]
    try:
        return calls.together(code, operands, keep, keep_rows, plan, indexed)
    except CudaError as error:
        raise _unavailable(", ".join(work.op for work in works), error) from error


def alone(name: str, arguments: tuple[Any, ...]) -> Prepared:
    """A prepared call of launch code on its own; see ``calls.prepare``.

    Raises:
        BackendUnavailableError: CuPy, NVRTC or kernels for this architecture are missing.
    """
    try:
        with using(arguments[0].device.index):
            return calls.prepare(launch_code(name), arguments)
    except CudaError as error:
        raise _unavailable("linear", error) from error


@functools.cache
def operator(name: str) -> Callable[..., Any]:
    """What runs when an operator meets CUDA tensors."""

    def run(*arguments: Any) -> Any:
        try:
            call = calls.of(name, launch_code(name), arguments)
        except CudaError as error:
            raise _unavailable(name, error) from error
        given = calls.given(arguments)
        return call(given, [t.data_ptr() for t in given])

    return run


def _unavailable(names: str, error: CudaError) -> BackendUnavailableError:
    return BackendUnavailableError(f"{names}: {error}")
