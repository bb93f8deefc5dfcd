"""`mixgrain warm`: kernels compiled ahead of their first use, also for another machine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import repeat

import torch

from mixgrain.cuda.compile import ARCHITECTURES, Request, build, cache_folder
from mixgrain.cuda.device import facts
from mixgrain.cuda.errors import CompileError, CudaError
from mixgrain.formats.errors import BackendUnavailableError, UnsupportedError

from .progress import counted

# The modules whose functions `requests(arch)` list the kernels of the common calls.
LISTS = ("mixgrain.primitives.cuda.warm", "mixgrain.attention.cuda.warm")
THREADS = 4


def warm(named: list[str]) -> int:
    """Compiles every kernel for some architectures into the cache.

    Args:
        named: architectures such as "sm_90a" or "90a"; those of this machine's GPUs if empty.

    Returns:
        0, or 1 when a kernel did not compile.

    Raises:
        UnsupportedError: an architecture without kernels.
        BackendUnavailableError: NVRTC, its headers, the cache folder or a GPU is missing.
    """
    unknown = [name for name in named if name.removeprefix("sm_") not in ARCHITECTURES]
    if unknown:
        known = ", ".join(f"sm_{arch}" for arch in ARCHITECTURES)
        raise UnsupportedError(f"warm: --arch {unknown[0]} given; there are kernels for {known}")
    lists = [import_module(name).requests for name in LISTS]
    try:
        archs = {name.removeprefix("sm_"): None for name in named or _present()}
        wanted = [(one, arch) for arch in archs for listed in lists for one in listed(arch)]
        with ThreadPoolExecutor(THREADS) as pool:
            made = pool.map(_faults, *zip(*wanted, strict=True)) if wanted else repeat("", 0)
            faults = [fault for fault in counted(made, "compiling", len(wanted)) if fault]
    except CudaError as error:
        raise BackendUnavailableError(f"warm: {error}") from error
    print("\n".join(faults) + "\n" if faults else "", end="")
    print(f"{len(wanted) - len(faults)} kernels for {', '.join(archs)} in {cache_folder()}")
    return 1 if faults else 0


def _present() -> list[str]:
    if not torch.cuda.is_available():
        raise BackendUnavailableError(
            "warm: torch finds no GPU here; name the architectures to compile for, e.g. "
            "--arch sm_90a"
        )
    return [facts(index).arch for index in range(torch.cuda.device_count())]


def _faults(request: Request, arch: str) -> str:
    """Compiles one kernel unless it is in the cache; what went wrong, or nothing."""
    try:
        build(request, arch)
    except CompileError as error:
        return str(error)
    return ""
