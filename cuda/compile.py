"""The compile service: a kernel's name and constants in, the path of a cubin out.

A kernel is one file ``kernels/<name>.cu`` with one ``extern "C"`` entry point of the same name. Its
constants arrive as ``-DMG_<NAME>=<value>``; only ints and bools reach the compiler, never a user's
text. Cubins are kept in a folder of the user's, under a digest of all that went into them; CuPy
loads them from there by path.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from mixgrain import __version__

from . import nvrtc
from .errors import CompileError, MissingError

HERE = Path(__file__).resolve().parent
KERNELS, INCLUDE = HERE / "kernels", HERE / "include"

# Architectures the kernels are written for. The suffix is NVRTC's: 90a has wgmma and setmaxnreg.
ARCHITECTURES = ("80", "86", "89", "90", "90a", "100", "120")

_INCLUDE_LINE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
# ptxas says so when it serialises wgmma; the kernel still compiles and is several times slower.
_ADVISORY = re.compile(r"\(C75\d\d\)[^\n]*")
_SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class Request:
    """One specialisation of one kernel.

    Attributes:
        name: the kernel; ``kernels/<name>.cu`` and its entry point.
        constants: name and value of each constant, sorted by name; use `request`.
        flush: let float32 subnormals flush to zero; half-precision kernels only.
    """

    name: str
    constants: tuple[tuple[str, int], ...] = ()
    flush: bool = field(default=False)


def request(name: str, constants: Mapping[str, int], flush: bool = False) -> Request:
    """A request from a mapping of constants.

    Raises:
        ValueError: a constant is no int or bool, or its name is no upper-case identifier.
    """
    for key, value in constants.items():
        if not isinstance(value, int) or not re.fullmatch(r"[A-Z][A-Z0-9_]*", key):
            raise ValueError(
                f"{name}: constant {key!r} = {value!r} given; expected an upper-case name and an "
                "int or bool"
            )
    return Request(name, tuple(sorted((k, int(v)) for k, v in constants.items())), flush)


@dataclass(frozen=True)
class Built:
    """A compiled kernel and what the compiler said of it."""

    path: Path
    log: str

    @property
    def registers(self) -> int:
        """Registers of a thread, 0 when the compiler did not say (a cubin from the cache)."""
        found = _REGISTERS.search(self.log)
        return int(found[1]) if found else 0

    def faults(self) -> list[str]:
        """Spills and ptxas's "serialised" advisories; a kernel with any does not ship."""
        found = [match[0] for match in _ADVISORY.finditer(self.log)]
        found += [m[0] for m in _SPILL.finditer(self.log) if m[1] != "0" or m[2] != "0"]
        return found


@functools.cache
def source(name: str) -> str:
    """Text of a kernel with every file it includes put in its place, each once."""
    path = KERNELS / f"{name}.cu"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in KERNELS.glob("*.cu")))
        raise MissingError(f"no kernel {name!r}; there are: {known or 'none'}")
    seen: set[str] = set()

    def expand(file: Path) -> str:
        def replace(match: re.Match[str]) -> str:
            included = match[1]
            if included in seen:
                return ""
            seen.add(included)
            return expand(INCLUDE / included)

        text = file.read_text(encoding="utf-8").replace("#pragma once", "")
        return _INCLUDE_LINE.sub(replace, text)

    return expand(path)


def options(wanted: Request, arch: str) -> list[str]:
    """NVRTC's options for a request, without include folders (those are machine paths)."""
    return [
        f"-arch=sm_{arch}",
        "--std=c++17",
        f"-ftz={'true' if wanted.flush else 'false'}",
        "--ptxas-options=-v",
        *(f"-DMG_{name}={value}" for name, value in wanted.constants),
    ]


def digest(wanted: Request, arch: str) -> str:
    """What a cubin is filed under: source, headers of ours, options, NVRTC, this version."""
    parts = [__version__, repr(nvrtc.version()), source(wanted.name), *options(wanted, arch)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@functools.cache
def cache_folder() -> Path:
    """Where cubins are kept: MIXGRAIN_CACHE_DIR, or mixgrain under the user's cache folder.

    Raises:
        MissingError: it cannot be made, or others could plant cubins in it.
    """
    given = os.environ.get("MIXGRAIN_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    folder = Path(given) if given else Path(base) / "mixgrain"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
    except OSError as error:
        raise MissingError(
            f"the kernel cache {folder} cannot be made ({error}); set MIXGRAIN_CACHE_DIR to a "
            "folder of yours"
        ) from error
    if facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o022:
        raise MissingError(
            f"the kernel cache {folder} can be written by others, who could plant code in it; "
            "chmod go-w it, or set MIXGRAIN_CACHE_DIR to a folder of yours"
        )
    return folder


def build(wanted: Request, arch: str) -> Built:
    """The cubin of a request for one architecture, compiled unless it is on disk.

    Args:
        wanted: what to compile.
        arch: one of ARCHITECTURES.

    Raises:
        CompileError: NVRTC refused it.
        MissingError: no NVRTC, headers, cache folder, or not an architecture of ours.
    """
    if arch not in ARCHITECTURES:
        raise MissingError(f"architecture {arch!r} given; there are {', '.join(ARCHITECTURES)}")
    path = cache_folder() / f"{wanted.name}-{arch}-{digest(wanted, arch)}.cubin"
    if path.exists():
        return Built(path, "")
    flags = [*options(wanted, arch), f"-I{nvrtc.header_folder()}"]
    image, log = nvrtc.compile_source(source(wanted.name), f"{wanted.name}.cu", flags)
    # A name of its own, then a rename: two processes that compile the same never tear a file.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".building-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(image)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return Built(path, log)


def build_all(
    wanted: Iterable[tuple[Request, str]], threads: int = 4
) -> list[Built | CompileError]:
    """Build many, in threads (NVRTC lets go of the interpreter); failures stand in their place."""

    def one(item: tuple[Request, str]) -> Built | CompileError:
        try:
            return build(*item)
        except CompileError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, wanted))
