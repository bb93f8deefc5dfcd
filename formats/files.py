"""Saving and loading SparseTensors: safetensors files that carry no code and are checked on load.

A file is an ordinary safetensors file. Its tensors are the values, the index tensors of the layout
under the names of their fields, and the run-time mask if there is one:

    values   key_mask   layout.row_offsets   layout.columns   layout.blocks.masks   …

Its metadata are text: ``format`` ("mixgrain"), ``version``, ``digest`` and ``tensor``, the last a
JSON object with everything that is no tensor:

    {"keep_rows": false, "layout": {"kind": "row", "shape": [4, 6], "lead": [1, 1], "nnz": 9, …}}

The digest (SHA-256 over that text and all tensors) finds damage. It is no signature: whoever can
write the file can write the digest, so every field is checked besides.
"""

from __future__ import annotations

import hashlib
import json
import os
import types
import typing
from dataclasses import fields
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

Path = str | os.PathLike[str]


def save(path: Path, s: SparseTensor) -> None:
    """Write a SparseTensor to a safetensors file.

    Args:
        path: the file; an existing one is overwritten.
        s: any layout, on any device; bits are kept.

    Raises:
        LayoutError: not a SparseTensor, or the transposed view of an NMLayout.
        DtypeError: values of a dtype that the library does not compute with.
    """
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
    tensors = {"values": s.values}
    if s.keep is not None:
        tensors["key_mask"] = s.keep
    tensor = {"keep_rows": s.keep_rows, "layout": _describe(s.layout, "layout", tensors)}
    # safetensors takes no views of one storage, and transposed layouts share theirs.
    plain = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
             for name, t in tensors.items()}  # fmt: skip
    text = json.dumps(tensor, separators=(",", ":"))
    metadata = {
        "format": "mixgrain",
        "version": str(VERSION),
        "digest": _digest(text, plain),
        "tensor": text,
    }
    save_file(plain, path, metadata=metadata)


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
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return _Reader(path, file).read()
    except SafetensorError as error:
        raise FileFormatError(
            f"{os.fspath(path)}: no intact safetensors file ({error}); write it with mixgrain.save"
        ) from error


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


class _Reader:
    """One file being read; keeps the path for messages and the names of tensors asked for."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path = os.fspath(path)
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
            self.fail("format", repr(metadata.get("format")), "'mixgrain'")
        if metadata.get("version") != str(VERSION):
            self.fail("version", repr(metadata.get("version")), f"'{VERSION}'")
        text = metadata.get("tensor", "")
        try:
            tensor = json.loads(text)
        except (ValueError, RecursionError):
            self.fail("tensor", "text that is no JSON", "a JSON object")
        self._names("tensor", tensor, {"keep_rows", "layout"})
        keep_rows = self._static("keep_rows", tensor["keep_rows"], bool)
        build = self._layout("layout", tensor["layout"], tuple(_LAYOUTS.values()))
        if "key_mask" in self.names:
            self.wanted.add("key_mask")
        if self.names != self.wanted:
            odd = sorted(self.names ^ self.wanted)[0]
            self.fail(odd, "missing" if odd in self.wanted else "not a field", "what save writes")
        # The header of a safetensors file bounds every tensor by the file's own size, so reading
        # allocates no more than that.
        tensors = {name: self.file.get_tensor(name) for name in sorted(self.names)}
        digest = _digest(text, tensors)
        if metadata.get("digest") != digest:
            self.fail("digest", repr(metadata.get("digest")), f"'{digest}', that of the contents")
        layout = build(tensors)
        try:
            layout.validate()
        except LayoutError as error:
            raise FileFormatError(f"{self.path}: {error}") from error
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # A layout so broken that its own checks stumble is still only a bad file.
            raise FileFormatError(
                f"{self.path}: layout: its fields contradict each other ({error})"
            ) from error
        self._values(tensors["values"], layout)
        s = SparseTensor(layout, tensors["values"], tensors.get("key_mask"), keep_rows)
        if s.keep is not None:
            self._keep(s, s.keep)
        return s

    def _names(self, field: str, given: object, expected: set[str]) -> None:
        if not isinstance(given, dict):
            self.fail(field, f"a {type(given).__name__}", "a JSON object")
        for name in sorted(expected ^ set(given)):
            at = f"{field}.{name}"
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
        self.fail(field, f"{value!r:.80}", f"{wanted}, numbers from 0 to 2**48")

    def _layout(self, prefix: str, given: Any, allowed: tuple[type[Any], ...]) -> Any:
        """Check a described layout; returns the function that builds it from the tensors."""
        kind = given.get("kind") if isinstance(given, dict) else None
        cls = _LAYOUTS.get(kind) if isinstance(kind, str) else None
        if cls is None or cls not in allowed:
            names = [c.kind for c in allowed]
            self.fail(f"{prefix}.kind", f"{kind!r:.80}", f"one of {names}")
        hints = typing.get_type_hints(cls)
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

        def build(loaded: dict[str, Tensor]) -> Layout:
            parts = {name: inner(loaded) for name, inner in nested.items()}
            own = {name: loaded[f"{prefix}.{name}"] for name in tensors}
            return cast(Layout, cls(**static, **parts, **own))

        return build

    def _values(self, values: Tensor, layout: Layout) -> None:
        if values.dtype not in _DTYPES:
            self.fail("values", str(values.dtype), f"one of {_DTYPES}")
        if values.dim() < 1 or values.shape[-1] != layout.slots:
            self.fail("values", f"shape {tuple(values.shape)}", f"(…, {layout.slots}), the slots")

    def _keep(self, s: SparseTensor, keep: Tensor) -> None:
        length = s.layout.shape[0 if s.keep_rows else 1]
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
