"""Loading kernels through CuPy, and launching one at once or as a step of a recording.

`Kernel` is what launch code calls. While a call is being recorded (recording.py), it notes the
launch; else it launches through CuPy's RawKernel, which suits experiments.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from . import recording
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


class Kernel:
    """A kernel of one device, loaded when it is first asked for its function.

    Attributes:
        wanted: what it is compiled from.
        device: torch's index of the device.
        carveout: percent of a multiprocessor's cache that is made shared memory while it runs;
            None = as much as it needs itself. Where that is too little for another kernel's CTAs,
            they cannot start before this one has left the multiprocessor.
    """

    __slots__ = ("_raw", "_shared", "carveout", "device", "wanted")

    def __init__(self, wanted: Request, device: int, carveout: int | None = None) -> None:
        self.wanted, self.device, self._shared = wanted, device, 0
        self.carveout = carveout
        self._raw: Any = None

    def load(self) -> Any:
        """CuPy's RawKernel.

        Raises:
            CudaError: it would be compiled and loaded while a CUDA graph is captured.
            MissingError: CuPy, NVRTC, headers or kernels for this architecture are missing.
        """
        if self._raw is None:
            if torch.cuda.is_current_stream_capturing():
                raise CudaError(
                    f"{self.wanted.name} would be compiled and loaded while a CUDA graph is "
                    "captured; plan first: run the same call once before the capture"
                )
            built = build(self.wanted, facts(self.device).arch)
            with cupy().cuda.Device(self.device):
                # RawModule keeps modules by path; the path holds the digest of all that went in.
                raw = cupy().RawModule(path=str(built.path)).get_function(self.wanted.name)
                raw.kernel.ptr  # noqa: B018  # loads the module
                if self.carveout is not None:
                    raw.preferred_shared_memory_carveout = self.carveout
                # Static and dynamic together may be this much without asking.
                self._shared = 48 * 1024 - raw.shared_size_bytes
                self._raw = raw
        return self._raw

    def function(self, shared: int) -> int:
        """The driver's handle, allowed this much dynamic shared memory; see `load`."""
        raw = self.load()
        if shared > self._shared:
            raw.max_dynamic_shared_size_bytes = shared
            self._shared = shared
        return int(raw.kernel.ptr)

    def __call__(
        self,
        grid: tuple[int, ...],
        threads: int,
        arguments: Sequence[Argument],
        shared: int = 0,
        early: bool = False,
    ) -> None:
        """Note one launch in the current recording; without one, queue it on torch's stream.

        Args:
            grid: CTAs in x, y, z; a grid with a zero launches nothing.
            threads: threads of a CTA.
            arguments: pointers as ints or addresses, scalars as numpy scalars of the kernel's
                widths, descriptors.
            shared: dynamic shared memory, bytes.
            early: a recorded launch may begin while the kernel before it ends; the kernel waits
                for that one in its code.
        """
        if 0 in grid:
            return
        current = recording.current()
        if current is not None:
            current.launch(self, grid, threads, tuple(arguments), shared, early)
            return
        self.function(shared)
        pointer = torch._C._cuda_getCurrentRawStream(self.device)
        self.load().kernel(grid, (threads,), tuple(arguments), shared, _Stream(pointer))


@functools.lru_cache(maxsize=4096)
def kernel(wanted: Request, device: int, carveout: int | None = None) -> Kernel:
    """The kernel of a request on a device; compiled and loaded when a call with it is prepared.

    Its carve-out holds for every call that asks for this request.
    """
    return Kernel(wanted, device, carveout)
