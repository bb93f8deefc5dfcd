"""save and load: every layout bit for bit, and every broken file refused by name."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mixgrain.formats import files
from mixgrain.formats import patterns as P
from mixgrain.formats.errors import DtypeError, FileFormatError, LayoutError
from mixgrain.formats.files import load, save
from mixgrain.formats.layout import Layout
from mixgrain.formats.nm import NMLayout, choose
from mixgrain.formats.sparse import SparseTensor
from mixgrain.formats.sparsify import sparsify


def example(name: str) -> SparseTensor:
    torch.manual_seed(0)
    pattern = P.window(5) | P.global_tokens([0, 33])
    heads = P.per_head([pattern, P.causal() - P.window(2), pattern])
    if name == "tile":
        return sparsify(torch.randn(40, 56).half(), "tile", prune=True, density=0.4)
    if name == "nm":
        return sparsify(torch.randn(2, 40, 70).bfloat16(), "nm", prune=True)
    if name == "nm bytes":
        return sparsify(torch.randn(40, 70), "nm", prune=True, n=3, m=5)
    if name == "nm within":
        within = pattern.to_layout("block", 40, 48, size=16)
        live = within.live().view(-1, 16, 16)
        choice = choose(torch.rand(live.shape), live, 2, 4)
        layout = NMLayout.from_choice(choice, (40, 48), 2, 4, within=within)
        return SparseTensor(layout, torch.randn(2, 3, layout.slots))
    kind = name.split()[0]
    if name.endswith("heads"):
        layout = heads.to_layout(kind, 40, 44, size=16)
        keep = torch.rand(2, 44) < 0.8
        return dataclasses.replace(sparsify(torch.randn(2, 3, 40, 44), layout=layout), keep=keep)
    if name.endswith("empty"):
        return sparsify(torch.zeros(20, 30), kind)
    if name.endswith("transposed"):
        s = sparsify(torch.randn(40, 44), layout=pattern.to_layout(kind, 40, 44, size=16)).T
        return dataclasses.replace(s, keep=torch.rand(44) < 0.8, keep_rows=True)
    layout = pattern.to_layout(kind, 40, 44, size=16)
    return sparsify(torch.randn(40, 44, dtype=torch.float64), layout=layout)


NAMES = ["tile", "nm", "nm bytes", "nm within", "tile empty"] + [
    kind + more
    for kind in ("block", "row", "mixed")
    for more in ("", " heads", " empty", " transposed")
]


def same(a: object, b: object) -> bool:
    """Equal in everything but the key."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Layout):
        return type(a) is type(b) and all(
            same(getattr(a, f.name), getattr(b, f.name))
            for f in dataclasses.fields(a)
            if f.name != "key"
        )
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name, tmp_path) -> None:
    s = example(name)
    s.layout.validate()
    save(tmp_path / "s.safetensors", s)
    back = load(tmp_path / "s.safetensors")
    assert same(back.layout, s.layout)
    assert same(back.values, s.values)
    assert same(back.keep, s.keep) and back.keep_rows == s.keep_rows
    assert back.layout.key != s.layout.key
    assert back.shape == s.shape and torch.equal(back.to_dense(), s.to_dense())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_bits_survive(dtype, tmp_path) -> None:
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    info = torch.iinfo(integer)
    s = sparsify(torch.randint(info.min, info.max, (30, 50), dtype=integer).view(dtype), "row")
    save(str(tmp_path / "s"), s)
    assert torch.equal(load(str(tmp_path / "s")).values.view(integer), s.values.view(integer))


def test_gradients_and_views_can_be_saved(tmp_path) -> None:
    s = example("row")
    values = torch.randn(2, s.layout.slots, 2, dtype=torch.float32, requires_grad=True)[..., 0]
    save(tmp_path / "s", s.with_values(values))
    assert torch.equal(load(tmp_path / "s").values, values)


def test_the_file_is_plain_safetensors(tmp_path) -> None:
    save(tmp_path / "s", example("mixed"))
    with safe_open(tmp_path / "s", "pt") as file:
        metadata = file.metadata()
        names = set(file.keys())
    assert metadata["format"] == "mixgrain" and metadata["version"] == "1"
    described = json.loads(metadata["tensor"])["layout"]
    assert described["kind"] == "mixed" and described["shape"] == [40, 44]
    assert "values" in names and all(n == "values" or n.startswith("layout.") for n in names)


def test_save_refuses(tmp_path) -> None:
    path = tmp_path / "s"
    with pytest.raises(LayoutError, match="transpose after loading"):
        save(path, sparsify(torch.randn(8, 8), "nm", prune=True).T)
    with pytest.raises(LayoutError, match="given Tensor, expected a SparseTensor"):
        save(path, torch.zeros(3))
    with pytest.raises(DtypeError, match="int32"):
        save(path, example("row").to(torch.int32))
    assert not path.exists()


def test_load_refuses_other_files(tmp_path) -> None:
    path = tmp_path / "s"
    with pytest.raises(OSError):
        load(path)
    for content in (b"", b"hello", b"\xff" * 100, pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match="no intact safetensors"):
            load(path)
    save_file({"values": torch.ones(3)}, path)
    with pytest.raises(FileFormatError, match="format: None"):
        load(path)
    save(path, example("row"))
    whole = path.read_bytes()
    for content in (whole[:-1], whole + b"\0", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(FileFormatError):
            load(path)


class Edit:
    """A saved file taken apart, to be changed and put together again with a digest that fits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, "pt") as file:
            self.metadata = file.metadata()
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.tensor = json.loads(self.metadata["tensor"])
        self.layout = self.tensor["layout"]

    def write(self) -> None:
        self.metadata["tensor"] = json.dumps(self.tensor)
        self.metadata["digest"] = files._digest(self.metadata["tensor"], self.tensors)
        save_file(self.tensors, self.path, metadata=self.metadata)


BIG = 2**62
CHANGES = {
    "version": ("row", lambda e: e.metadata.update(version="2")),
    "tensor": ("row", lambda e: setattr(e, "tensor", [1])),
    "tensor.keep_rows": ("row", lambda e: e.tensor.pop("keep_rows")),
    "keep_rows": ("row", lambda e: e.tensor.update(keep_rows=1)),
    "layout.kind": ("row", lambda e: e.layout.update(kind="coo")),
    "layout.kind ": ("row", lambda e: e.layout.update(kind=["row"])),
    "layout.more": ("row", lambda e: e.layout.update(more=1)),
    "layout.nnz": ("row", lambda e: e.layout.pop("nnz")),
    "layout.nnz ": ("row", lambda e: e.layout.update(nnz=-1)),
    "layout.nnz  ": ("row", lambda e: e.layout.update(nnz=True)),
    "layout.nnz   ": ("row", lambda e: e.layout.update(nnz=1.0)),
    "RowLayout.nnz": ("row", lambda e: e.layout.update(nnz=1)),
    "layout.shape": ("row", lambda e: e.layout.update(shape=[BIG, BIG])),
    "layout.shape ": ("row", lambda e: e.layout.update(shape=[40, 44, 1])),
    "RowLayout.shape": ("row", lambda e: e.layout.update(shape=[2**40, 44])),
    "RowLayout.row_offsets": ("row", lambda e: e.layout.update(shape=[2**30, 44])),
    "layout.entry": ("row", lambda e: e.layout.update(lead=[2**20, 2**20])),
    "layout.entry_slots": ("row", lambda e: e.layout.update(entry_slots=[])),
    "layout.entry_slots ": ("row", lambda e: e.layout.update(entry_slots=[0, 2**40])),
    "RowLayout.entry_slots": (
        "row",
        lambda e: (
            e.layout.update(entry_slots=[0, 3]),
            e.tensors.update(values=e.tensors["values"][:3].clone()),
        ),
    ),
    "RowLayout.columns": ("row", lambda e: e.tensors["layout.columns"].fill_(44)),
    "RowLayout.t_order": ("row", lambda e: e.tensors["layout.t_order"].fill_(2**30)),
    "values": ("row", lambda e: e.tensors.update(values=torch.ones(3))),
    "values ": ("row", lambda e: e.tensors.update(values=e.tensors["values"].int())),
    "layout.columns": ("row", lambda e: e.tensors.pop("layout.columns")),
    "stray": ("row", lambda e: e.tensors.update(stray=torch.ones(1))),
    "key_mask": ("row heads", lambda e: e.tensors.update(key_mask=torch.ones(2, 40) > 0)),
    "key_mask ": ("row heads", lambda e: e.tensors.update(key_mask=torch.ones(2, 44))),
    "key_mask  ": ("row heads", lambda e: e.tensors.update(key_mask=torch.ones(5, 44) > 0)),
    "key_mask   ": (
        "row heads",
        lambda e: e.tensors.update(key_mask=torch.full((44,), 3).byte().view(torch.bool)),
    ),
    "BlockLayout.size": ("block", lambda e: e.layout.update(size=0)),
    "BlockLayout.mask_index": ("block", lambda e: e.tensors["layout.mask_index"].fill_(99)),
    "NMLayout.metadata": ("nm", lambda e: e.tensors["layout.metadata"].zero_()),
    "encoding": ("nm", lambda e: e.layout.update(encoding="4:8")),
    "layout.encoding": ("nm", lambda e: e.layout.update(encoding=4)),
    "1 ≤ n ≤ m": ("nm", lambda e: e.layout.update(m=2**40, encoding="bytes")),
    "layout.transposed": ("nm", lambda e: e.layout.update(transposed=True)),
    "layout.within.kind": ("nm within", lambda e: e.layout["within"].update(kind="row")),
    "TileLayout.tile_columns": ("tile", lambda e: e.tensors["layout.tile_columns"].fill_(-1)),
    "layout.blocks.kind": ("mixed", lambda e: e.layout.update(blocks=3)),
    "layout.blocks.nnz": ("mixed", lambda e: e.layout["blocks"].pop("nnz")),
    "MixedLayout.starts": ("mixed", lambda e: e.layout.update(starts=[0])),
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
def test_load_names_the_field(field, tmp_path) -> None:
    name, change = CHANGES[field]
    save(tmp_path / "s", example(name))
    edit = Edit(tmp_path / "s")
    change(edit)
    edit.write()
    with pytest.raises(FileFormatError, match=field.strip()):
        load(tmp_path / "s")


def test_deep_json_is_refused(tmp_path) -> None:
    save(tmp_path / "s", example("row"))
    edit = Edit(tmp_path / "s")
    edit.metadata["tensor"] = "[" * 100_000
    save_file(edit.tensors, edit.path, metadata=edit.metadata)
    with pytest.raises(FileFormatError, match="no JSON"):
        load(tmp_path / "s")


def test_damage_is_found(tmp_path) -> None:
    """One flipped bit in the values is invisible to every check but the digest."""
    path = tmp_path / "s"
    save(path, example("row"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="digest"):
        load(path)


def survives(path: Path) -> None:
    """The file is refused, or loads as something consistent enough to be used."""
    try:
        s = load(path)
    except FileFormatError:
        return
    s.layout.validate()
    if s.layout.shape[0] * s.layout.shape[1] < 10**6:
        s.to_dense()


@pytest.mark.parametrize("name", ["tile", "nm", "nm within", "row heads", "block", "mixed"])
def test_flipped_bytes(name, tmp_path) -> None:
    path = tmp_path / "s"
    save(path, example(name))
    content = path.read_bytes()
    draw = random.Random(name)
    for _ in range(50):
        broken = bytearray(content)
        for _ in range(draw.choice((1, 1, 3))):
            # Half of the flips hit the header, where most of the structure is.
            end = 8 + int.from_bytes(content[:8], "little") if draw.random() < 0.5 else len(content)
            broken[draw.randrange(end)] = draw.randrange(256)
        path.write_bytes(broken)
        survives(path)


@pytest.mark.parametrize("name", ["tile", "nm", "nm within", "row heads", "block", "mixed heads"])
def test_forged_fields(name, tmp_path) -> None:
    """Changes that come with a digest that fits: only the validators stand between."""
    path = tmp_path / "s"
    save(path, example(name))
    content = path.read_bytes()
    draw = random.Random(name)
    for _ in range(40):
        path.write_bytes(content)
        edit = Edit(path)
        if draw.random() < 0.6:
            chosen = draw.choice(
                [t for n, t in sorted(edit.tensors.items()) if n != "values" and t.numel()]
            )
            raw = chosen.view(-1).view(torch.uint8)
            raw[draw.randrange(raw.numel())] = draw.randrange(256)
        else:
            target = draw.choice(
                [edit.layout, *(v for v in edit.layout.values() if isinstance(v, dict))]
            )
            field = draw.choice(sorted(target))
            target[field] = draw.choice([0, 1, 3, 17, 2**31, 2**40, -1, [], [0], [1, 1], [7, 9],
                                         None, "row", "bytes", True, {}])  # fmt: skip
        edit.write()
        survives(path)
