"""Loading kernels through CuPy and launching them on torch's current stream.

The launch path does as little as it can: kernels are kept by (request, device), stream wrappers by
raw pointer, and arguments go as raw pointers and numpy scalars. Tensors are allocated by torch, so
its caching allocator and CUDA graphs see every byte.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from .compile import Request, build
from .device import facts
from .errors import CudaError, MissingError

Argument = Any  # an int (a pointer), a numpy scalar, or a numpy array of one element (by value)


@functools.cache
def cupy() -> Any:
    """The cupy module.

    Raises:
        MissingError: it is not installed, or cannot run here; names the extra.
    """
    try:
        import cupy as module

        available = module.cuda.is_available()
    except Exception as error:  # an unwritable home gives FileNotFoundError, not ImportError
        raise MissingError(
            f"CuPy cannot be imported ({type(error).__name__}: {error}); it loads and launches "
            "mixgrain's kernels: pip install 'mixgrain[cuda13]' (or 'mixgrain[cuda12]')"
        ) from error
    if not available:
        raise MissingError(
            "CuPy finds no usable CUDA device (no driver, or one too old for this CuPy); "
            "install NVIDIA's driver, or move the tensors to the CPU"
        )
    return module


class _Stream:
    """What CuPy's launcher asks of a stream: the raw pointer."""

    __slots__ = ("ptr",)

    def __init__(self, pointer: int) -> None:
        self.ptr = pointer


@functools.lru_cache(maxsize=64)
def _stream(pointer: int) -> _Stream:
    return _Stream(pointer)


class Kernel:
    """A loaded kernel of one device, ready to launch.

    Attributes:
        wanted: what it was compiled from.
        device: torch's index of the device it is loaded on.
    """

    __slots__ = ("_function", "_shared", "device", "raw", "wanted")

    def __init__(self, wanted: Request, device: int) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise CudaError(
                f"{wanted.name} would be compiled and loaded while a CUDA graph is captured; "
                "plan first: run the same call once before the capture"
            )
        built = build(wanted, facts(device).arch)
        self.wanted, self.device, self._shared = wanted, device, 48 * 1024
        with cupy().cuda.Device(device):
            # RawModule keeps the module by path; the path holds the digest of all that went in.
            self.raw = cupy().RawModule(path=str(built.path)).get_function(wanted.name)
            self._function = self.raw.kernel

    def __call__(
        self,
        grid: tuple[int, ...],
        threads: int,
        arguments: Sequence[Argument],
        shared: int = 0,
    ) -> None:
        """Queue one launch on torch's current stream of the kernel's device.

        Args:
            grid: CTAs in x, y, z; a grid with a zero launches nothing.
            threads: threads of a CTA.
            arguments: pointers as ints, scalars as numpy scalars of the kernel's widths.
            shared: dynamic shared memory, bytes.
        """
        if 0 in grid:
            return
        if shared > self._shared:
            self.raw.max_dynamic_shared_size_bytes = shared
            self._shared = shared
        pointer = torch._C._cuda_getCurrentRawStream(self.device)
        self._function(grid, (threads,), tuple(arguments), shared, _stream(pointer))


@functools.lru_cache(maxsize=4096)
def kernel(wanted: Request, device: int) -> Kernel:
    """The loaded kernel of a request on a device; compiled and loaded at first use.

    Raises:
        CudaError: first use while a CUDA graph is being captured.
        MissingError: CuPy, NVRTC, headers or kernels for this architecture are missing.
    """
    return Kernel(wanted, device)
