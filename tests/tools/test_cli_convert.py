"""`mixgrain convert`: every bit comes back, whatever the file; mistakes end with one line."""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import mixgrain as mg
from mixgrain.tools import cli, convert

Streams = pytest.CaptureFixture[str]


def sparse(rows: int, columns: int, density: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A matrix with few values, among them −0, infinities and a NaN with a payload."""
    draw = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=draw).to(dtype)
    dense[torch.rand(rows, columns, generator=draw) >= density] = 0
    dense[0, :4] = torch.tensor([-0.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    return dense


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model: matrices of three dtypes, a bias, a stack, integers, metadata."""
    path = tmp_path / "model.safetensors"
    tensors = {
        "layers.0.up.weight": sparse(64, 96, 0.2, torch.float32),
        "layers.0.up.bias": torch.randn(64),
        "layers.1.up.weight": sparse(100, 70, 0.1, torch.bfloat16),
        "odd/ name…": sparse(32, 32, 0.5, torch.float16),
        "experts": torch.randn(2, 32, 48),
        "ids": torch.arange(12).view(3, 4),
    }
    save_file(tensors, path, metadata={"format": "pt", "made by": "a test"})
    return path


def same(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(
            a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
        )
    )


def run(*arguments: object) -> int:
    return cli.main(["convert", *map(str, arguments)])


@pytest.mark.parametrize("kind", ["tile", "block", "row", "mixed"])
def test_there_and_back(kind: str, model: Path, tmp_path: Path, capsys: Streams) -> None:
    out = tmp_path / "sparse model"
    assert run(model, "--to", kind, "--size", 16, "--out", out) == 0
    table = capsys.readouterr().out
    before = load_file(model)
    files = {path.name for path in (out / "sparse").iterdir()}
    assert files == {
        "layers.0.up.weight.safetensors",
        "layers.1.up.weight.safetensors",
        "odd%2F%20name%E2%80%A6.safetensors",
    }
    s = mg.load(out / "sparse" / "layers.1.up.weight.safetensors")
    assert s.layout.kind == kind
    assert same(s.to_dense(), before["layers.1.up.weight"])
    line = next(line for line in table.splitlines() if line.startswith("layers.1.up.weight"))
    found = line.replace(",", "").split()
    size = (out / "sparse" / "layers.1.up.weight.safetensors").stat().st_size
    assert found[1] == "100×70" and found[2] == kind
    assert (int(found[-5]), int(found[-3]), int(found[-2])) == (s.nnz, 14000, size)
    assert float(found[-1]) == round(size / 14000, 2)

    back = tmp_path / "back.safetensors"
    assert run(out, "--to", "dense", "--out", back) == 0
    after = load_file(back)
    assert after.keys() == before.keys()
    assert all(same(after[name], before[name]) for name in before)
    with safe_open(back, "pt") as file:
        assert file.metadata() == {"format": "pt", "made by": "a test"}


def test_pruned(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    assert run(model, "--to", "nm", "--prune", "--out", out, "--tensors", "experts",
               "--tensors", "odd*") == 0  # fmt: skip
    before = load_file(model)
    for name, file in {"experts": "experts", "odd/ name…": "odd%2F%20name%E2%80%A6"}.items():
        expected = mg.sparsify(before[name], "nm", prune=True)
        assert same(mg.load(out / "sparse" / f"{file}.safetensors").values, expected.values)
    assert load_file(out / "dense.safetensors").keys() == before.keys() - {"experts", "odd/ name…"}
    assert run(model, "--to", "tile", "--prune", "--density", 0.5, "--out", tmp_path / "t") == 0
    s = mg.load(tmp_path / "t" / "sparse" / "layers.0.up.weight.safetensors")
    assert s.density == 0.5


@pytest.mark.parametrize("ending", ["npy", "npz", "pt", "old.pt"])
def test_other_files(ending: str, tmp_path: Path, capsys: Streams) -> None:
    weight, path = sparse(40, 24, 0.3, torch.float64), tmp_path / f"w.{ending}"
    if ending == "npy":
        np.save(path, weight.numpy().T.astype(">f8").T)  # by columns, and the other byte order
    elif ending == "npz":
        np.savez_compressed(path, w=weight.numpy(), names=np.array(["a", "b"]), i=np.arange(3))
    else:
        state = {"w": weight.T.contiguous().T, "tied": weight, "bias": torch.ones(3)}
        torch.save(state, path, _use_new_zipfile_serialization=ending == "pt")
    chosen = ["--tensors", "w"] if ending.endswith("pt") else []
    status = run(path, "--to", "row", "--out", tmp_path / "out", *chosen)
    if ending == "npz":  # text has no place in a safetensors file: said, not dropped
        assert status == 2 and "names" in capsys.readouterr().err
        return
    assert status == 0
    assert same(mg.load(tmp_path / "out" / "sparse" / "w.safetensors").to_dense(), weight)


def test_shards(tmp_path: Path, capsys: Streams) -> None:
    a, b = sparse(40, 24, 0.3, torch.float32), sparse(24, 40, 0.3, torch.bfloat16)
    save_file({"a": a, "bias": torch.ones(3)}, tmp_path / "m-1.safetensors", {"format": "pt"})
    save_file({"b": b}, tmp_path / "m-2.safetensors", {"format": "pt"})
    places = {"a": "m-1.safetensors", "bias": "m-1.safetensors", "b": "m-2.safetensors"}
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert run(index, "--to", "row", "--out", tmp_path / "out") == 0
    assert run(tmp_path / "out", "--to", "dense", "--out", tmp_path / "one.safetensors") == 0
    whole = load_file(tmp_path / "one.safetensors")
    assert whole.keys() == places.keys() and same(whole["a"], a) and same(whole["b"], b)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "m.safetensors").write_bytes(b"")
    assert run(index, "--to", "row") == 0 and (tmp_path / "m.row" / "dense.safetensors").exists()
    places = ["../m.safetensors", "elsewhere/m.safetensors", "/etc/passwd", "none.safetensors", 1]
    for wrong in [{}, [], {"x": "m-1.safetensors"}, *({"a": place} for place in places)]:
        index.write_text(json.dumps({"weight_map": wrong}))
        assert run(index, "--to", "row", "--out", tmp_path / "no") == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "no").exists()


def test_one_file(tmp_path: Path) -> None:
    weight = sparse(40, 24, 0.3, torch.float16)
    np.save(tmp_path / "w.npy", weight.numpy())
    assert run(tmp_path / "w.npy", "--to", "mixed", "--out", tmp_path / "w.safetensors") == 0
    assert same(mg.load(tmp_path / "w.safetensors").to_dense(), weight)
    assert run(tmp_path / "w.safetensors", "--to", "dense") == 0
    assert same(load_file(tmp_path / "w.dense.safetensors")["w"], weight)


def test_default_place_and_force(model: Path, capsys: Streams) -> None:
    assert run(model, "--to", "row") == 0
    assert (model.parent / "model.row" / "sparse").is_dir()
    assert run(model, "--to", "row") == 2
    assert "--force" in capsys.readouterr().err
    assert run(model, "--to", "row", "--tensors", "odd*", "--force") == 0
    assert len(list((model.parent / "model.row" / "sparse").iterdir())) == 1
    assert not list(model.parent.glob(".mixgrain-*"))


def test_a_folder_of_other_things_stays(model: Path, capsys: Streams) -> None:
    theirs = model.parent / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    assert run(model, "--to", "row", "--out", theirs, "--force") == 2
    assert [path.name for path in theirs.iterdir()] == ["thesis.tex"]
    assert run(model, "--to", "row", "--out", model, "--force") == 2
    assert len(load_file(model)) == 6


def test_a_layout_that_loses_bits_is_found(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    real = mg.load

    def wrong(path: Path) -> mg.SparseTensor:
        s = real(path)
        return s.with_values(s.values + 0.0)  # turns −0 into 0

    monkeypatch.setattr(convert.mg, "load", wrong)
    assert run(model, "--to", "row", "--out", tmp_path / "out") == 1
    assert "bit for bit" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def test_empty_and_tiny_matrices(tmp_path: Path) -> None:
    tensors = {"empty": torch.zeros(0, 5), "none": torch.zeros(5, 0), "one": torch.ones(1, 1)}
    save_file({**tensors, "zero": torch.zeros(20, 20)}, tmp_path / "w.safetensors")
    for kind in ("tile", "nm", "block", "row", "mixed"):
        options = ["--prune"] if kind == "nm" else []
        assert run(tmp_path / "w.safetensors", "--to", kind, *options) == 0
        assert run(tmp_path / f"w.{kind}", "--to", "dense", "--out", tmp_path / "b.safetensors",
                   "--force") == 0  # fmt: skip
        back = load_file(tmp_path / "b.safetensors")
        assert all(same(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("what", ["a full disk", "a long name"])
def test_what_cannot_be_written(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    name = "w" if what == "a full disk" else "w" * 300
    save_file({name: torch.ones(4, 4)}, tmp_path / "w.safetensors")
    if what == "a full disk":

        def full(*_: object, **__: object) -> None:
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        monkeypatch.setattr("mixgrain.formats.files.save_file", full)
    assert run(tmp_path / "w.safetensors", "--to", "row") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "w.row: cannot be written" in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


# Rules


def test_one_of_two_ways_to_say_what(model: Path, capsys: Streams) -> None:
    assert run(model) == 2 and "--to" in capsys.readouterr().err
    assert run(model, "--to", "row", "--rule", "odd*=row") == 2
    assert "not allowed with" in capsys.readouterr().err


class Net(torch.nn.Module):
    """Linear layers, one of them tied to an embedding, and a bare matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(32, 64)
        self.up = torch.nn.Linear(64, 128)
        self.down = torch.nn.Linear(128, 64, bias=False)
        self.mix = torch.nn.Parameter(torch.randn(64, 64))
        self.experts = torch.nn.Parameter(torch.randn(2, 64, 64))
        self.head = torch.nn.Linear(64, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) @ self.mix @ self.experts[1]
        return self.head(self.down(torch.relu(self.up(x))))


RULES = ["--rule", "up=tile,density=0.5", "--rule", "head=dense", "--rule", "*.weight=2:4",
         "--rule", "mix=panel,density=0.25,axis=columns", "--prune"]  # fmt: skip


def test_rules_are_those_of_sparsify_model(tmp_path: Path, capsys: Streams) -> None:
    net = Net()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    assert run(tmp_path / "net.safetensors", *RULES) == 0
    table = [line.split()[:4] for line in capsys.readouterr().out.splitlines()]
    for words in (["up.weight", "128×64", "tile", "4,096"], ["down.weight", "64×128", "nm", "2:4"],
                  ["mix", "64×64", "panel", "columns"]):  # fmt: skip
        assert words in table
    out = tmp_path / "net.sparse"
    assert sorted(path.name for path in (out / "sparse").iterdir()) == [
        "down.weight.safetensors", "embedding.weight.safetensors", "mix.safetensors",
        "up.weight.safetensors",
    ]  # fmt: skip
    assert load_file(out / "dense.safetensors").keys() == {
        "experts", "head.bias", "head.weight", "up.bias"
    }  # fmt: skip
    loaded, expected = Net(), Net()
    mg.load_model(loaded, out)
    for name, choice in {
        "embedding.weight": {"kind": "nm"},
        "mix": {"kind": "panel", "density": 0.25, "axis": "columns"},
    }.items():
        pruned = mg.sparsify(net.state_dict()[name], prune=True, **choice).to_dense()
        expected.load_state_dict({name: pruned}, strict=False)
    mg.sparsify_model(
        expected,
        {
            "up": {"kind": "tile", "density": 0.5, "prune": True},
            "head": None,
            "*": {"kind": "2:4", "prune": True},
        },
    )
    for name in ("up", "down"):
        assert torch.equal(getattr(loaded, name).to_dense(), getattr(expected, name).to_dense())
    assert type(loaded.head) is torch.nn.Linear
    tokens = torch.arange(32)
    assert torch.equal(loaded(tokens), expected(tokens))


def test_what_an_embedding_shares_is_loaded_dense(tmp_path: Path) -> None:
    def tied() -> Net:
        net = Net()
        net.head.weight = net.embedding.weight
        return net

    state = {name: t.clone() for name, t in tied().state_dict().items()}
    save_file(state, tmp_path / "net.safetensors")
    assert run(tmp_path / "net.safetensors", "--to", "nm", "--prune") == 0
    loaded = tied()
    mg.load_model(loaded, tmp_path / "net.nm")
    assert loaded.head.weight is loaded.embedding.weight
    pruned = mg.sparsify(state["head.weight"], "nm", prune=True).to_dense()
    assert torch.equal(loaded.head.weight, pruned)
    assert isinstance(loaded.up, mg.SparseLinear)


def test_a_stack_is_converted_where_it_is_named(tmp_path: Path, capsys: Streams) -> None:
    save_file(Net().state_dict(), tmp_path / "net.safetensors")
    assert run(tmp_path / "net.safetensors", "--rule", "experts=2:4,prune") == 0
    assert "2×64×64" in capsys.readouterr().out
    loaded = Net()
    mg.load_model(loaded, tmp_path / "net.sparse")  # a parameter, so it is dense there
    assert (loaded.experts == 0).float().mean() == 0.5


# Mistakes

MISTAKES = {
    "--to nm": "not \\+0.*--prune",
    "--to nm --prune --n 5": "1 ≤ n ≤ m",
    "--to tile --prune": "density",
    "--to row --density 0.5": "--prune",
    "--to row --tensors nothing*": "no tensor is called 'nothing\\*'.*layers.0.up.weight",
    "--to row --tensors ids": "nothing to convert",
    "--to row --out one.safetensors": "one file holds one tensor",
    "--to tile --tensors experts": "experts: .*2-D",
    "--to row --out no/such/folder": "no folder",
    "--to dense": "format",
    "--to panel --prune --density 0.5": "axis=None",
    "--rule layers": "expected GLOB=KIND",
    "--rule =row": "expected GLOB=KIND",
    "--rule odd*=diagonal": "'diagonal' given; expected a kind",
    "--rule odd*=row,sparsity=0.5": "option 'sparsity=0.5'; expected prune, density=VALUE",
    "--rule odd*=row,prune=1": "option 'prune=1'; expected prune",
    "--rule odd*=nm,n=two": "n is 'two'",
    "--rule odd*=row,density": "option 'density'; expected prune",
    "--rule odd*=row --rule odd*=tile": "has a rule already",
    "--rule odd*=dense,size=16": "takes no options",
    "--rule odd*=dense": "nothing to convert",
    "--rule odd*=2:4": "not \\+0.*--prune",
    "--rule none*=row": "no tensor is called 'none\\*'",
    "--rule odd*=row --size 16": "--size beside --rule",
    "--rule odd*=row --tensors odd*": "--tensors beside --rule",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_mistake(options: str, model: Path, tmp_path: Path, capsys: Streams,
                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(model, *options.split()) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and re.search(MISTAKES[options], error), error
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


class Pickled:
    """What a pickle could run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("executed",))


def declared(shape: str) -> bytes:
    """An npy file of a few bytes that declares an array of any shape."""
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(64)


def zipped(content: bytes) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("w.npy", content)
    return held.getvalue()


def torch_file(what: object) -> bytes:
    held = io.BytesIO()
    torch.save(what, held)
    return held.getvalue()


HUGE = "(1099511627776, 1048576)"
BAD_FILES = {
    "junk.safetensors": b"x" * 100,
    "junk.npy": b"x" * 100,
    "junk.npz": b"x" * 100,
    "junk.pt": b"x" * 100,
    "empty.safetensors": b"",
    "empty.npy": b"",
    "empty.npz": b"",
    "empty.pt": b"",
    "huge.npy": declared(HUGE),
    "huge.npz": zipped(declared(HUGE)),
    "deep.npy": declared("(" * 50 + "1" + ",)" * 50),
    "short.npz": zipped(declared("(8, 8)")[:-1])[:-30],
    "code.pt": pickle.dumps(Pickled()),
    "code.pth": torch_file({"w": Pickled()}),
    "module.pt": torch_file(torch.nn.Linear(2, 2)),
    "nested.pt": torch_file({"model": {"w": torch.ones(2, 2)}}),
    "list.pt": torch_file([torch.ones(2, 2)]),
    "coo.pt": torch_file({"w": torch.eye(3).to_sparse()}),
    "code.npy": declared("(1,)").replace(b"<f8", b"|O ")[:-64] + pickle.dumps([Pickled()]),
    "text.txt": b"hello",
    "list.safetensors.index.json": b"[]",
    "broken.safetensors.index.json": b"{" * 100,
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("to", ["row", "dense"])
def test_bad_file(name: str, to: str, tmp_path: Path, capsys: Streams) -> None:
    path = tmp_path / name
    path.write_bytes(BAD_FILES[name])
    assert run(path, "--to", to) == 2
    streams = capsys.readouterr()
    assert "executed" not in streams.out
    assert len(streams.err.splitlines()) == 1 and name in streams.err, streams.err
    assert list(tmp_path.iterdir()) == [path]


def test_missing_and_unreadable(tmp_path: Path, capsys: Streams) -> None:
    for to in ("row", "dense"):
        assert run(tmp_path / "none.safetensors", "--to", to) == 2
        assert "none.safetensors" in capsys.readouterr().err
        assert run(tmp_path, "--to", to) == 2
        assert str(tmp_path) in capsys.readouterr().err


# warm


def test_warm_names_what_is_missing(capsys: Streams) -> None:
    assert cli.main(["warm", "--arch", "sm_77"]) == 2
    assert "sm_90a" in capsys.readouterr().err
