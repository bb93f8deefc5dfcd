"""Files to attack: small ones of every layout and dtype, taken apart and put together by hand.

Reads and writes the safetensors format by itself (8 bytes of length, a JSON header, the bytes), so
that a forged file may say anything at all, and can carry a digest that fits whatever it says.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import torch

from mixgrain.formats import patterns as P
from mixgrain.formats.files import save
from mixgrain.formats.nm import NMLayout, choose
from mixgrain.formats.panel import PanelLayout
from mixgrain.formats.sparse import SparseTensor
from mixgrain.formats.sparsify import sparsify

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# safetensors' names and what torch calls them: the digest speaks torch.
TORCH_NAMES = {
    "F16": "torch.float16", "BF16": "torch.bfloat16", "F32": "torch.float32",
    "F64": "torch.float64", "I8": "torch.int8", "I16": "torch.int16", "I32": "torch.int32",
    "I64": "torch.int64", "U8": "torch.uint8", "BOOL": "torch.bool", "U16": "torch.uint16",
    "U32": "torch.uint32", "U64": "torch.uint64", "F8_E4M3": "torch.float8_e4m3fn",
    "F8_E5M2": "torch.float8_e5m2", "C64": "torch.complex64",
}  # fmt: skip
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip

NQ, NK = 23, 36
PATTERN = P.window(3) | P.global_tokens([0, 21])
HEADS = P.per_head([PATTERN, P.causal() - P.window(2), PATTERN])
BATCH = P.per_batch([PATTERN, P.window(5, 0)])


def _panels() -> PanelLayout:
    """Ranges and lists, masked and not, in two distinct patterns."""
    mask = torch.rand(6, 11) < 0.5
    mask[0, 0] = True
    panels = [
        (torch.tensor([1, 4, 9]), range(NK), None),
        (range(10, 16), torch.arange(0, 33, 3), mask),
        (range(NQ), torch.tensor([2, 3, 20]), None),
    ]
    return PanelLayout.from_panels((NQ, NK), panels, (1, 2), (0, 1), [0, 0, 1])


def example(name: str, dtype: torch.dtype) -> SparseTensor:
    """One SparseTensor; a name is a kind and what is special about it."""
    torch.manual_seed(0)
    kind, _, special = name.partition(", ")
    if kind == "tile":
        return sparsify(torch.randn(NQ, NK).to(dtype), "tile", prune=True, density=0.6)
    if kind == "nm" and special == "within":
        within = PATTERN.to_layout("block", NQ, NK, size=16)
        live = within.live().view(-1, 16, 16)
        choice = choose(torch.rand(live.shape), live, 2, 4)
        layout = NMLayout.from_choice(choice, (NQ, NK), 2, 4, within=within)
        return SparseTensor(layout, torch.randn(2, layout.slots).to(dtype))
    if kind == "nm":
        n, m = {"bytes": (3, 5), "1:2": (1, 2)}.get(special, (2, 4))
        return sparsify(torch.randn(2, NQ, NK).to(dtype), "nm", prune=True, n=n, m=m)
    if kind == "panel":
        layout = _panels()
        return SparseTensor(layout, torch.randn(layout.slots).to(dtype))
    pattern = {"heads": HEADS, "batch": BATCH}.get(special, PATTERN)
    layout = pattern.to_layout(kind, NQ, NK, size=16)
    if special == "empty":
        return sparsify(torch.zeros(NQ, NK, dtype=dtype), kind)
    dense = torch.randn(*((2, 3) if special in ("heads", "batch") else ()), NQ, NK).to(dtype)
    s = sparsify(dense, layout=layout)
    if special == "heads":
        s = dataclasses.replace(s, keep=torch.rand(2, NK) < 0.8)
    if special == "turned":
        s = dataclasses.replace(s.T, keep=torch.rand(NK) < 0.8, keep_rows=True)
    return s


NAMES = ["tile", "nm", "nm, bytes", "nm, 1:2", "nm, within", "panel", "mixed, empty"] + [
    kind + special
    for kind in ("block", "row", "mixed")
    for special in ("", ", heads", ", batch", ", turned")
]


@dataclasses.dataclass
class Forged:
    """A safetensors file taken apart.

    Attributes:
        metadata: the file's text entries.
        tensor: the JSON object among them, parsed.
        tensors: name -> [safetensors dtype, shape, bytes].
    """

    metadata: dict[str, str]
    tensor: dict
    tensors: dict[str, list]

    @property
    def index_names(self) -> list[str]:
        """Names of the index arrays that hold anything."""
        return [n for n, (_, _, raw) in self.tensors.items() if n != "values" and raw]

    def layouts(self) -> list[dict]:
        """The described layout and those inside it."""
        outer = self.tensor["layout"]
        return [outer, *(v for v in outer.values() if isinstance(v, dict))]

    def write(self) -> bytes:
        """The whole file, with a digest that fits."""
        self.metadata["tensor"] = json.dumps(self.tensor)
        self.metadata["digest"] = digest(self.metadata["tensor"], self.tensors)
        return join(self.metadata, self.tensors)


def digest(text: str, tensors: dict[str, list]) -> str:
    """What mixgrain.formats.files computes, from the words of its docstring."""
    total = hashlib.sha256(text.encode(errors="surrogatepass"))
    for name in sorted(tensors):
        dtype, shape, raw = tensors[name]
        total.update(f"\0{name} {TORCH_NAMES.get(dtype)} {tuple(shape)}\0".encode())
        total.update(raw)
    return total.hexdigest()


def join(metadata: dict, tensors: dict[str, list]) -> bytes:
    """A safetensors file; the writer orders tensors by the size of their elements, as ours does."""
    header: dict = {"__metadata__": metadata}
    at = 0
    pieces = []
    for name in sorted(tensors, key=lambda n: (-SIZES.get(tensors[n][0], 1), n)):
        dtype, shape, raw = tensors[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(raw)]}
        at += len(raw)
        pieces.append(raw)
    return frame(json.dumps(header).encode(), b"".join(pieces))


def frame(header: bytes, body: bytes) -> bytes:
    """Length, header padded with spaces to a multiple of 8, bytes."""
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + body


def take_apart(content: bytes) -> Forged:
    """The inverse of ``Forged.write``."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    body = content[8 + size :]
    metadata = header.pop("__metadata__")
    tensors = {
        name: [d["dtype"], d["shape"], body[slice(*d["data_offsets"])]]
        for name, d in header.items()
    }
    return Forged(metadata, json.loads(metadata["tensor"]), tensors)


def corpus(folder: Path) -> dict[str, bytes]:
    """Every example in every dtype it exists for, as the bytes of its file."""
    found = {}
    for name in NAMES:
        for dtype in DTYPES:
            path = folder / "seed"
            save(path, example(name, dtype))
            found[f"{name}, {str(dtype).removeprefix('torch.')}"] = path.read_bytes()
    return found
