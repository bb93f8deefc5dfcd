"""Facts of a CUDA device that plans and kernels depend on, read once from torch."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .errors import CudaError, MissingError

# Compute capability to the architecture its kernels are compiled for.
_ARCH = {(8, 0): "80", (8, 6): "86", (8, 9): "89", (9, 0): "90a", (10, 0): "100", (12, 0): "120"}
# Most dynamic shared memory of one CTA by architecture, bytes, where there is no device to ask.
SHARED_BYTES = {
    "80": 166_912, "86": 101_376, "89": 101_376, "90": 232_448, "90a": 232_448, "100": 232_448,
    "120": 101_376,
}  # fmt: skip


@dataclass(frozen=True)
class DeviceFacts:
    """What a launch has to know of a device.

    Attributes:
        index: torch's index of the device.
        name: the vendor's name.
        arch: architecture its kernels are compiled for, one of compile.ARCHITECTURES.
        multiprocessors: streaming multiprocessors; persistent kernels launch this many CTAs.
        shared_bytes: most dynamic shared memory of one CTA, bytes.
    """

    index: int
    name: str
    arch: str
    multiprocessors: int
    shared_bytes: int

    @property
    def hopper(self) -> bool:
        """Whether wgmma and TMA kernels run here."""
        return self.arch == "90a"


class _Pretended(threading.local):
    facts: DeviceFacts | None = None


_pretended = _Pretended()


@contextlib.contextmanager
def pretending(arch: str, multiprocessors: int = 1) -> Iterator[None]:
    """Let launch code of this thread believe that every device has this architecture.

    For listing kernels; there may be no device at all.
    """
    before = _pretended.facts
    _pretended.facts = DeviceFacts(0, f"sm_{arch}", arch, multiprocessors, SHARED_BYTES[arch])
    try:
        yield
    finally:
        _pretended.facts = before


def facts(index: int) -> DeviceFacts:
    """Facts of the device with torch's index.

    Raises:
        MissingError: mixgrain has no kernels for its architecture.
    """
    return _pretended.facts or _facts(index)


def hopper(device: torch.device) -> bool:
    """Whether wgmma and TMA kernels run on a device; elsewhere than on CUDA, if that is pretended.

    Raises:
        MissingError: mixgrain has no kernels for the device's architecture.
    """
    known = facts(device.index) if device.type == "cuda" else _pretended.facts
    return known is not None and known.hopper


@functools.cache
def _facts(index: int) -> DeviceFacts:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    # A minor version runs the code of the minor versions before it (8.7 runs 8.6's).
    fitting = [cc for cc in _ARCH if cc[0] == capability[0] and cc[1] <= capability[1]]
    if not fitting:
        known = ", ".join(f"{major}.{minor}" for major, minor in _ARCH)
        raise MissingError(
            f"{properties.name} has compute capability {capability[0]}.{capability[1]}; there are "
            f"kernels for {known}: move the tensors to such a device or to the CPU"
        )
    return DeviceFacts(
        index=index,
        name=properties.name,
        arch=_ARCH[max(fitting)],
        multiprocessors=properties.multi_processor_count,
        shared_bytes=int(getattr(properties, "shared_memory_per_block_optin", 101_376)),
    )


@functools.cache
def driver() -> ctypes.CDLL:
    """NVIDIA's driver library.

    Raises:
        MissingError: there is none.
    """
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise MissingError(f"NVIDIA's driver library is missing: {error}") from error


@functools.cache
def _primary(index: int) -> int:
    """The context that torch uses on a device, held for the life of the process."""
    context = ctypes.c_void_p()
    status = driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), ctypes.c_int(index))
    if status != 0 or not context.value:
        raise CudaError(f"no context on CUDA device {index} (driver error {status})")
    return context.value


@contextlib.contextmanager
def using(index: int) -> Iterator[None]:
    """Make a device current for launches and descriptors, for torch and for the driver.

    Args:
        index: torch's index of the device.

    A thread that has called no CUDA function yet, autograd's for instance, has no context; the
    runtime would make one by itself, but launches and descriptors go to the driver.
    """
    with contextlib.ExitStack() as stack:
        if torch.cuda.current_device() != index:
            stack.enter_context(torch.cuda.device(index))
        context = ctypes.c_void_p()
        driver().cuCtxGetCurrent(ctypes.byref(context))
        if not context.value:
            driver().cuCtxSetCurrent(ctypes.c_void_p(_primary(index)))
        yield
