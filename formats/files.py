"""Saving and loading SparseTensors: safetensors files that carry no code and are checked on load.

A file is an ordinary safetensors file. Its tensors are the values, the index tensors of the layout
under the names of their fields, and the run-time mask if there is one:

    values   key_mask   layout.row_offsets   layout.columns   layout.blocks.masks   …

Its metadata are text: ``format`` ("mixgrain"), ``version``, ``digest`` and ``tensor``, the last a
JSON object with everything that is no tensor:

    {"keep_rows": false, "layout": {"kind": "row", "shape": [4, 6], "lead": [1, 1], "nnz": 9, …}}

The digest (SHA-256 over that text and all tensors) finds damage. It is no signature: whoever can
write the file can write the digest, so every field is checked besides. What is loaded is a copy:
the file may change afterwards without changing what was checked.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import types
import typing
from collections import Counter
from dataclasses import fields, replace
from typing import Any, NoReturn, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .block import BlockLayout
from .errors import DtypeError, FileFormatError, LayoutError
from .layout import Layout
from .mixed import MixedLayout
from .nm import NMLayout
from .panel import PanelLayout
from .row import RowLayout
from .sparse import SparseTensor
from .tile import TileLayout

VERSION = 1

_LAYOUTS: dict[str, type[Any]] = {
    cls.kind: cls
    for cls in (TileLayout, NMLayout, BlockLayout, RowLayout, PanelLayout, MixedLayout)
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Sizes and offsets stay far from overflow in whatever is computed from them.
_LARGEST = 2**48
# Characters of the description; 300,000 entries fit. Parsed, it takes several times as much memory.
_LONGEST = 2**24
# Slots without values: only an empty batch has them, and nothing in the file is as large as they.
_WITHOUT_VALUES = 2**24

Path = str | bytes | os.PathLike[str]


def save(path: Path, s: SparseTensor) -> None:
    """Write a SparseTensor to a safetensors file.

    Args:
        path: the file; an existing one is overwritten.
        s: any layout, on any device; bits are kept.

    Raises:
        LayoutError: not a SparseTensor, or the transposed view of an NMLayout.
        DtypeError: values of a dtype that the library does not compute with.
        OSError: the file cannot be written.
    """
    path = _path("save", path)
    if not isinstance(s, SparseTensor):
        raise LayoutError(
            f"save: given {type(s).__name__}, expected a SparseTensor; make one with sparsify, or "
            "save dense tensors with safetensors itself"
        )
    if isinstance(s.layout, NMLayout) and s.layout.transposed:
        raise LayoutError(
            "save: the transpose of an NMLayout is a view that files do not hold; save the tensor "
            "it was made from (s.T) and transpose after loading"
        )
    if s.dtype not in _DTYPES:
        raise DtypeError(f"save: values of {s.dtype}; expected one of {_DTYPES}; cast with s.to")
    if not s.values.numel() and s.layout.slots > _WITHOUT_VALUES:
        raise LayoutError(
            f"save: values {tuple(s.values.shape)} hold nothing; expected some for a layout of "
            f"more than {_WITHOUT_VALUES} slots; save one entry of the batch"
        )
    tensors = {"values": s.values}
    if s.keep is not None:
        tensors["key_mask"] = s.keep
    tensor = {"keep_rows": s.keep_rows, "layout": _describe(s.layout, "layout", tensors)}
    # safetensors takes no views of one storage, and transposed layouts share theirs.
    plain = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
             for name, t in tensors.items()}  # fmt: skip
    text = json.dumps(tensor, separators=(",", ":"))
    if len(text) > _LONGEST:
        raise LayoutError(
            f"save: {s.layout.entries} entries take {len(text)} characters to describe; expected "
            f"at most {_LONGEST}; save a layout of fewer batch entries at a time"
        )
    metadata = {
        "format": "mixgrain",
        "version": str(VERSION),
        "digest": _digest(text, plain),
        "tensor": text,
    }
    try:
        save_file(plain, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"save: {path}: {error}") from error


def load(path: Path) -> SparseTensor:
    """Read a SparseTensor from a file written by ``save``; tensors are on the CPU.

    Nothing in the file is executed, and nothing is trusted: names, types and sizes are checked
    before tensors are read, then the digest, then the layout by its own ``validate``.

    Args:
        path: the file.

    Returns:
        The SparseTensor that was saved, bit for bit, with a layout of a new key.

    Raises:
        FileFormatError: the file is not what it should be; names the field at fault.
        OSError: there is no such file, or it cannot be read.
    """
    path = _path("load", path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return _Reader(path, file).read()
    except SafetensorError as error:
        raise FileFormatError(
            f"{path}: no intact safetensors file ({error}); write it with mixgrain.save"
        ) from error


def _path(caller: str, path: object) -> str:
    if not isinstance(path, str | bytes | os.PathLike):
        raise TypeError(
            f"{caller}: path is a {type(path).__name__}; expected a str or an os.PathLike"
        )
    return os.fsdecode(path)


def _describe(layout: Layout, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Everything of a layout that is no tensor, as JSON; its tensors go into ``tensors``."""
    described: dict[str, Any] = {"kind": layout.kind}
    for field in fields(cast(Any, layout)):
        value = getattr(layout, field.name)
        name = f"{prefix}.{field.name}"
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, Layout):
            described[field.name] = _describe(value, name, tensors)
        elif field.name != "key":  # an identity within one process
            described[field.name] = value
    return described


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the description and names, dtypes, shapes and bytes of contiguous tensors."""
    total = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


@functools.cache
def _hints(kind: str) -> dict[str, Any]:
    """Types of a layout's fields; looking them up is a third of the time a small file takes."""
    return typing.get_type_hints(_LAYOUTS[kind])


def _copy(tensor: Tensor) -> Tensor:
    """A copy of the very bytes: torch makes every bool but 0 a 1."""
    plain = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
    return plain.clone().view(tensor.dtype)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError if it names a field twice: readers differ in which they take."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = max(Counter(name for name, _ in pairs).items(), key=lambda item: item[1])[0]
        raise ValueError(f"{twice:.40} given twice")
    return made


class _Reader:
    """One file being read; keeps the path for messages and the names of tensors asked for."""

    def __init__(self, path: str, file: Any) -> None:
        self.path = path
        self.file = file
        self.names: set[str] = set(file.keys())
        self.wanted: set[str] = {"values"}

    def fail(self, field: str, given: str, expected: str) -> NoReturn:
        """Raise the error for one field."""
        raise FileFormatError(
            f"{self.path}: {field}: {given}, expected {expected}; the file is damaged or not "
            "written by mixgrain.save"
        )

    def read(self) -> SparseTensor:
        """Check and read the whole file."""
        metadata = self.file.metadata() or {}
        if metadata.get("format") != "mixgrain":
            self.fail("format", f"{metadata.get('format')!r:.80}", "'mixgrain'")
        if metadata.get("version") != str(VERSION):
            self.fail("version", f"{metadata.get('version')!r:.80}", f"'{VERSION}'")
        text = metadata.get("tensor", "")
        if len(text) > _LONGEST:
            self.fail("tensor", f"{len(text)} characters", f"at most {_LONGEST}")
        try:
            tensor = json.loads(text, object_pairs_hook=_each_once)
        except (ValueError, RecursionError) as error:
            self.fail("tensor", f"text that is no JSON ({error!s:.80})", "a JSON object")
        self._names("tensor", tensor, {"keep_rows", "layout"})
        keep_rows = self._static("keep_rows", tensor["keep_rows"], bool)
        build = self._layout("layout", tensor["layout"], tuple(_LAYOUTS.values()))
        if "key_mask" in self.names:
            self.wanted.add("key_mask")
        if self.names != self.wanted:
            odd = sorted(self.names ^ self.wanted)[0]
            given = "missing" if odd in self.wanted else "not a field"
            self.fail(f"{odd:.80}", given, "what save writes")
        # The header of a safetensors file bounds every tensor by the file's own size, so reading
        # allocates no more than that. Copied: what safetensors hands out is the mapped file, which
        # others may yet rewrite (checked indices would change) or truncate (a bus error).
        tensors = {name: _copy(self.file.get_tensor(name)) for name in sorted(self.names)}
        digest = _digest(text, tensors)
        if metadata.get("digest") != digest:
            given = f"{metadata.get('digest')!r:.80}"
            self.fail("digest", given, f"'{digest}', that of the contents")
        layout = build(tensors)
        # Before validate, whose work the number of slots bounds.
        self._values(tensors["values"], layout)
        try:
            layout.validate()
        except LayoutError as error:
            raise FileFormatError(f"{self.path}: {error}") from error
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # A layout so broken that its own checks stumble is still only a bad file.
            raise FileFormatError(
                f"{self.path}: layout: its fields contradict each other ({error})"
            ) from error
        s = SparseTensor(layout, tensors["values"])
        if "key_mask" in tensors:
            self._keep(s, tensors["key_mask"], keep_rows)
        return replace(s, keep=tensors.get("key_mask"), keep_rows=keep_rows)

    def _names(self, field: str, given: object, expected: set[str]) -> None:
        if not isinstance(given, dict):
            self.fail(field, f"a {type(given).__name__}", "a JSON object")
        for name in sorted(expected ^ set(given)):
            at = f"{field}.{name:.80}"
            self.fail(at, "missing" if name in expected else "unknown", f"{sorted(expected)}")

    def _static(self, field: str, value: Any, hint: Any) -> Any:
        """A JSON value as the type its dataclass field declares."""
        if hint in (bool, str) and type(value) is hint:
            return value
        if hint is int and type(value) is int and 0 <= value <= _LARGEST:
            return value
        arguments = typing.get_args(hint)
        if typing.get_origin(hint) is tuple and isinstance(value, list):
            length = None if arguments[-1] is Ellipsis else len(arguments)
            if length in (None, len(value)):
                return tuple(self._static(field, item, int) for item in value)
        wanted = getattr(hint, "__name__", str(hint)) if not arguments else str(hint)
        numbers = "" if hint in (bool, str) else ", numbers from 0 to 2**48"
        self.fail(field, f"{value!r:.80}", f"{wanted}{numbers}")

    def _layout(self, prefix: str, given: Any, allowed: tuple[type[Any], ...]) -> Any:
        """Check a described layout; returns the function that builds it from the tensors."""
        kind = given.get("kind") if isinstance(given, dict) else None
        cls = _LAYOUTS.get(kind) if isinstance(kind, str) else None
        if cls is None or cls not in allowed:
            names = [c.kind for c in allowed]
            self.fail(f"{prefix}.kind", f"{kind!r:.80}", f"one of {names}")
        hints = _hints(cls.kind)
        names = [field.name for field in fields(cls) if field.name != "key"]
        tensors = [name for name in names if hints[name] is Tensor]
        self._names(prefix, given, {"kind", *names} - set(tensors))
        self.wanted.update(f"{prefix}.{name}" for name in tensors)
        static: dict[str, Any] = {}
        nested: dict[str, Any] = {}
        for name in sorted(set(names) - set(tensors)):
            hint, value, at = hints[name], given[name], f"{prefix}.{name}"
            if not isinstance(hint, types.UnionType):
                static[name] = self._static(at, value, hint)
            elif value is None:
                static[name] = None
            else:  # a layout or None
                inner = tuple(c for c in typing.get_args(hint) if c is not type(None))
                nested[name] = self._layout(at, value, inner)
        (b, h), entry = static["lead"], static["entry"]
        if len(entry) != b * h:
            self.fail(f"{prefix}.entry", f"{len(entry)} entries", f"{b * h} for lead ({b}, {h})")
        if static.get("transposed"):
            self.fail(f"{prefix}.transposed", "true", "false: files hold no transposed views")
        if not static["entry_slots"]:
            self.fail(f"{prefix}.entry_slots", "nothing", "at least one offset")
        if cls is MixedLayout:
            for name in nested:
                slots, most = given[name]["entry_slots"][-1], static["entry_slots"][-1]
                if slots > most:
                    self.fail(f"{prefix}.{name}.entry_slots", f"{slots} slots", f"at most {most}")

        def build(loaded: dict[str, Tensor]) -> Layout:
            parts = {name: inner(loaded) for name, inner in nested.items()}
            own = {name: loaded[f"{prefix}.{name}"] for name in tensors}
            return cast(Layout, cls(**static, **parts, **own))

        return build

    def _values(self, values: Tensor, layout: Layout) -> None:
        if values.dtype not in _DTYPES:
            self.fail("values", str(values.dtype), f"one of {_DTYPES}")
        if values.dim() < 1 or values.shape[-1] != layout.slots:
            self.fail(
                "values",
                f"shape {tuple(values.shape)}",
                f"(…, {layout.slots}) by layout.entry_slots",
            )
        if not values.numel() and layout.slots > _WITHOUT_VALUES:
            self.fail("values", f"nothing for {layout.slots} slots", "values for so many")

    def _keep(self, s: SparseTensor, keep: Tensor, rows: bool) -> None:
        length = s.layout.shape[0 if rows else 1]
        batch = s.lead_shape[-2] if len(s.lead_shape) > 1 else None
        fits = keep.dim() == 1 or (keep.dim() == 2 and keep.shape[0] in (1, batch) and batch)
        if keep.dtype != torch.bool or not fits or keep.shape[-1] != length:
            self.fail(
                "key_mask",
                f"{keep.dtype} {tuple(keep.shape)}",
                f"bool ({length},) or (B, {length})",
            )
        if bool((keep.view(torch.uint8) > 1).any()):
            self.fail("key_mask", "bytes above 1", "bytes 0 and 1")
