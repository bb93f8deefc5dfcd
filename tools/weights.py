"""Dense weights, one tensor at a time: safetensors, shards of it, NumPy's npy and npz, torch's pt.

Nothing in a file is executed: NumPy's and torch's readers refuse pickled code, and sizes that a
file declares are compared with its own size before anything is allocated.
"""

from __future__ import annotations

import json
import math
import zipfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mixgrain.formats.errors import FileFormatError

ENDINGS = (".safetensors", ".npy", ".npz", ".pt", ".pth", ".bin", ".safetensors.index.json")
# What a file that cannot be read raises, depending on the byte at fault.
_BROKEN = (
    SafetensorError, zipfile.BadZipFile, ValueError, TypeError, RuntimeError, EOFError, LookupError,
    AttributeError,
)  # fmt: skip
_TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """What a file says of one tensor before it is read; dtype None: not one we compute with."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


class Weights(ABC):
    """Named dense tensors of one file."""

    entries: dict[str, Entry]
    metadata: dict[str, str]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor, contiguous, on the CPU, sharing nothing with the others."""


def _handle(path: Path) -> Any:
    return safe_open(path, framework="pt", device="cpu")


class _Safetensors(Weights):
    def __init__(self, path: Path) -> None:
        self.file = _handle(path)
        self.metadata = dict(self.file.metadata() or {})
        self.entries = {}
        for name in self.file.keys():  # noqa: SIM118  (a handle, no dictionary)
            piece = self.file.get_slice(name)
            self.entries[name] = Entry(tuple(piece.get_shape()), _TORCH.get(piece.get_dtype()))

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self.file.get_tensor(name)
        return tensor.contiguous()


class _Shards(Weights):
    """A model in several safetensors files, by the index that names the file of each tensor."""

    def __init__(self, path: Path) -> None:
        index = json.loads(path.read_text(encoding="utf-8"))
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict) or not places:
            raise ValueError("no weight_map, which names the file of each tensor")
        for name, file in places.items():
            # An index is no reason to read files elsewhere.
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{name!r} is in {file!r}, a file beside the index expected")
        self.shards = {file: _Safetensors(path.with_name(file)) for file in set(places.values())}
        missing = [name for name in places if name not in self.shards[places[name]].entries]
        if missing:
            raise ValueError(f"{missing[0]!r} is not in {places[missing[0]]!r}")
        self.places: dict[str, str] = places
        self.metadata = self.shards[next(iter(places.values()))].metadata
        self.entries = {name: self.shards[file].entries[name] for name, file in places.items()}

    def read(self, name: str) -> Tensor:
        return self.shards[self.places[name]].read(name)


class _Arrays(Weights):
    """One array of an npy file, or those of an npz archive."""

    def __init__(self, path: Path) -> None:
        self.path, self.metadata = path, {}
        if path.suffix == ".npy":
            with path.open("rb") as file:
                self.entries = {path.stem: _header(file, path.stat().st_size)}
            return
        self.entries = {}
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                with archive.open(info) as file:
                    self.entries[info.filename.removesuffix(".npy")] = _header(file, info.file_size)

    def read(self, name: str) -> Tensor:
        if self.path.suffix == ".npy":
            array = np.load(self.path, allow_pickle=False)
        else:
            with np.load(self.path, allow_pickle=False) as archive:
                array = archive[name]
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(np.ascontiguousarray(native))


def _header(file: Any, size: int) -> Entry:
    """Shape and dtype of an array, if the file is long enough to hold it."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    shape, _, dtype = (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize != size - file.tell():
        raise ValueError(f"an array of {shape} {dtype} declared in {size} bytes")
    known = {"f8": torch.float64, "f4": torch.float32, "f2": torch.float16}
    return Entry(tuple(shape), known.get(dtype.str[1:]))


class _StateDict(Weights):
    def __init__(self, path: Path) -> None:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of before torch 1.6 cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}, no dictionary of tensors")
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise ValueError(
                    f"{name!r} is a {type(value).__name__}, no tensor; save the state dict alone"
                )
            if value.layout != torch.strided or value.is_quantized:
                raise ValueError(f"{name!r} is no dense tensor")
        self.tensors: dict[str, Tensor] = found
        self.metadata = {}
        known = set(_TORCH.values())
        self.entries = {
            name: Entry(tuple(t.shape), t.dtype if t.dtype in known else None)
            for name, t in found.items()
        }

    def read(self, name: str) -> Tensor:
        return self.tensors[name].detach().clone(memory_format=torch.contiguous_format)


def ending_of(path: Path) -> str:
    """Which of ENDINGS a file has, or nothing."""
    return next((ending for ending in ENDINGS if path.name.endswith(ending)), "")


def open_weights(path: Path) -> Weights:
    """The dense tensors of a file, chosen by its ending.

    Raises:
        FileFormatError: another ending, a broken file, or one of mixgrain's own.
        OSError: there is no such file, or it cannot be read.
    """
    ending = ending_of(path)
    if path.is_dir() or not ending:
        raise FileFormatError(
            f"{path}: {'a folder' if path.is_dir() else f'a name that ends in {path.suffix!r}'} "
            f"given, a file of {', '.join(ENDINGS)} expected; folders that mixgrain wrote go with "
            "--to dense"
        )
    with path.open("rb"):  # so that a file that is missing or not ours to read says so itself
        pass
    kinds: dict[str, type[Any]] = {
        ".safetensors": _Safetensors, ".npy": _Arrays, ".npz": _Arrays,
        ".safetensors.index.json": _Shards,
    }  # fmt: skip
    weights: Weights = _guarded(path, lambda: kinds.get(ending, _StateDict)(path))
    if weights.metadata.get("format") == "mixgrain":
        raise FileFormatError(
            f"{path}: already a sparse tensor; load it with mixgrain.load, or give --to dense"
        )
    return weights


def read_tensor(weights: Weights, path: Path, name: str) -> Tensor:
    """One tensor of a file.

    Raises:
        FileFormatError: it cannot be read, or holds something that torch has no type for.
    """
    found: Tensor = _guarded(path, lambda: weights.read(name), name)
    return found


def _guarded(path: Path, act: Any, name: str = "") -> Any:
    from pickle import UnpicklingError

    try:
        return act()
    except FileFormatError:
        raise
    except (*_BROKEN, UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, UnpicklingError):
            reason = "no state dict of plain tensors; write it with torch.save(m.state_dict(), …)"
        place = f"{path}: {name}" if name else f"{path}"
        raise FileFormatError(f"{place}: cannot be read as {path.suffix} ({reason:.200})") from None
