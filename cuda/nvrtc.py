"""NVRTC through ctypes: source text in, cubin out.

CuPy can compile too, but it appends ``-ftz=true`` after every option it is given (float32
subnormals would be flushed, and only on the GPU), asks for ``sm_90`` where wgmma needs ``sm_90a``,
and does not see edits of included files. Going direct cures the three, and needs neither CuPy nor a
GPU: the wheel ``nvidia-cuda-nvrtc`` is enough.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import CompileError, MissingError

# Newest first: a newer NVRTC makes cubins that every driver of its major version loads.
_MAJORS = (13, 12)


def _nvidia_folders() -> Iterator[Path]:
    """Folders of NVIDIA's wheels, then those of an installed toolkit."""
    found = importlib.util.find_spec("nvidia")
    for root in (found.submodule_search_locations if found else None) or ():
        yield Path(root) / "cu13"
        yield Path(root) / "cuda_nvrtc"
        yield Path(root) / "cuda_runtime"
    for given in (os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME")):
        if given:
            yield Path(given)
    yield Path("/usr/local/cuda")


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded NVRTC library.

    Raises:
        MissingError: there is none; names the extra that brings it.
    """
    names = [f"libnvrtc.so.{major}" for major in _MAJORS]
    candidates = [
        str(folder / sub / name)
        for folder in _nvidia_folders()
        for sub in ("lib", "lib64")
        for name in names
        if (folder / sub / name).exists()
    ]
    for candidate in (*candidates, *names):
        try:
            # NVRTC opens its builtins by bare name: loaded before, they are found beside it.
            if Path(candidate).is_absolute():
                for builtins in sorted(Path(candidate).parent.glob("libnvrtc-builtins.so.*")):
                    ctypes.CDLL(str(builtins))
            loaded = ctypes.CDLL(candidate)
        except OSError:
            continue
        loaded.nvrtcGetErrorString.restype = ctypes.c_char_p
        return loaded
    raise MissingError(
        f"no NVRTC found ({', '.join(names)}); it compiles mixgrain's kernels: "
        "pip install 'mixgrain[cuda13]' (or 'mixgrain[cuda12]')"
    )


@functools.cache
def header_folder() -> Path:
    """The folder that holds cuda_fp16.h.

    Raises:
        MissingError: there is none; names the extra that brings it.
    """
    for folder in _nvidia_folders():
        if (folder / "include" / "cuda_fp16.h").exists():
            return folder / "include"
    raise MissingError(
        "no CUDA headers found (cuda_fp16.h); kernels include them: "
        "pip install 'mixgrain[cuda13]' (or 'mixgrain[cuda12]')"
    )


@functools.cache
def version() -> tuple[int, int, str]:
    """NVRTC's version, and the file it is: two builds of one version are told apart."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    lib = library()
    lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value, Path(lib._name).name


def compile_source(source: str, name: str, options: Sequence[str]) -> tuple[bytes, str]:
    """Compile CUDA C++ to a cubin.

    Args:
        source: text of one translation unit.
        name: its file name in messages.
        options: NVRTC options, the architecture (``-arch=sm_90a``) and include folders among them.

    Returns:
        The cubin, and NVRTC's log: ptxas advisories stand there even when the compile succeeds.

    Raises:
        CompileError: NVRTC refused the source; carries the log.
        MissingError: there is no NVRTC.
    """
    lib = library()
    program = ctypes.c_void_p()
    _check(
        lib.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), name.encode(), 0, None, None
        ),
        name,
    )
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = lib.nvrtcCompileProgram(program, len(options), given)
        log = _text(lib, program, "nvrtcGetProgramLog")
        if status != 0:
            reason = lib.nvrtcGetErrorString(status).decode()
            raise CompileError(f"{name}: {reason} with {' '.join(options)}\n{log}", log)
        size = ctypes.c_size_t()
        _check(lib.nvrtcGetCUBINSize(program, ctypes.byref(size)), name)
        image = ctypes.create_string_buffer(size.value)
        _check(lib.nvrtcGetCUBIN(program, image), name)
        return image.raw, log
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def _text(lib: ctypes.CDLL, program: ctypes.c_void_p, getter: str) -> str:
    size = ctypes.c_size_t()
    getattr(lib, getter + "Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(max(size.value, 1))
    getattr(lib, getter)(program, text)
    return text.value.decode(errors="replace")


def _check(status: int, name: str) -> None:
    if status != 0:
        raise CompileError(f"{name}: NVRTC returned {library().nvrtcGetErrorString(status)!r}", "")
