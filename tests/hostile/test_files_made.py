"""Files made by hand: sizes that overflow, numbers that fit each other and nothing else, bombs."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hostile.forge import Forged, example, frame, take_apart

from mixgrain.formats.errors import FileFormatError, LayoutError
from mixgrain.formats.files import load, save
from mixgrain.formats.panel import PanelLayout
from mixgrain.formats.sparse import SparseTensor
from mixgrain.formats.sparsify import sparsify
from mixgrain.primitives.spmm import spmm

ROOT = Path(__file__).resolve().parents[2]
TOP = 2**63 - 1


def raw(dtype: str, *values: int) -> bytes:
    """Integers as safetensors stores them."""
    code = {"I64": "q", "I32": "i", "U8": "B", "I16": "h", "BOOL": "B"}[dtype]
    return struct.pack(f"<{len(values)}{code}", *values)


def put(name: str, at: int, value: int) -> Callable[[Forged], None]:
    """Overwrite one element of a tensor."""

    def change(f: Forged) -> None:
        dtype, _, content = f.tensors[name]
        one = raw(dtype, value)
        at_byte = at % (len(content) // len(one)) * len(one)
        f.tensors[name][2] = content[:at_byte] + one + content[at_byte + len(one) :]

    return change


def tensor(name: str, dtype: str, shape: list[int], *values: int) -> Callable[[Forged], None]:
    """Replace a tensor."""
    return lambda f: f.tensors.update({name: [dtype, shape, raw(dtype, *values)]})


def say(**fields: object) -> Callable[[Forged], None]:
    """Fields of the description."""
    return lambda f: f.tensor["layout"].update(fields)


def narrow(name: str) -> Callable[[Forged], None]:
    """The same int32 numbers as int16."""

    def change(f: Forged) -> None:
        numbers = struct.unpack(f"<{len(f.tensors[name][2]) // 4}i", f.tensors[name][2])
        tensor(name, "I16", [len(numbers)], *numbers)(f)

    return change


def panels(shape: list[int], *panels: tuple[int, int, int, int]) -> Callable[[Forged], None]:
    """Ranges alone, (row_start, row_count, col_start, col_count) each, and no values at all."""

    def change(f: Forged) -> None:
        count, spans = len(panels), []
        for _, rows, _, cols in panels:
            spans.append((rows * ((cols + 7) // 8 * 8) + 127) // 128 * 128 % 2**64)
        starts = [sum(spans[:i]) % 2**63 for i in range(count + 1)]
        for i, name in enumerate(("row_start", "row_count", "col_start", "col_count")):
            tensor(f"layout.{name}", "I64", [count], *(p[i] for p in panels))(f)
        for name in ("row_list_offset", "col_list_offset"):
            tensor(f"layout.{name}", "I64", [count], *[0] * count)(f)
        for name in ("row_list", "col_list"):
            tensor(f"layout.{name}", "I32", [0])(f)
        tensor("layout.panel_entry", "I32", [count], *[0] * count)(f)
        tensor("layout.mask_offset", "I64", [count], *[-1] * count)(f)
        tensor("layout.mask_bits", "U8", [0])(f)
        tensor("layout.slot_offsets", "I64", [count + 1], *starts)(f)
        slots = starts[-1]
        f.tensors["values"] = ["F32", [0, slots], b""]
        nnz = sum(p[1] * p[3] for p in panels) % 2**48
        say(shape=shape, lead=[1, 1], entry=[0], entry_slots=[0, slots], nnz=nnz)(f)

    return change


# What the error must say: example, change.
FILES: dict[str, tuple[str, Callable[[Forged], None]]] = {
    # Sums that overflow int64 would pass a comparison.
    "col_start: 9223372036854775807": ("panel", put("layout.col_start", 0, TOP)),
    "row_start: 9223372036854775800": ("panel", put("layout.row_start", 1, TOP - 7)),
    "row_list_offset: 9223372036854775807": ("panel", put("layout.row_list_offset", 0, TOP)),
    "col_list_offset: 9223372036854775804": ("panel", put("layout.col_list_offset", 1, TOP - 3)),
    "mask_offset: 9223372036854775807": ("panel", put("layout.mask_offset", 1, TOP)),
    "row_count: 9223372036854775807": ("panel", put("layout.row_count", 0, TOP)),
    "row_count: -9223372036854775808": ("panel", put("layout.row_count", 0, -TOP - 1)),
    # Sizes that a few numbers claim and no memory holds.
    "shape: \\(1099511627776, 36\\)": ("block", say(shape=[2**40, 36])),
    "shape: \\(23, 1099511627776\\)": ("tile", say(shape=[23, 2**40])),
    "RowLayout.t_offsets": ("row", say(shape=[23, 2**31 - 1])),
    "BlockLayout.t_offsets": ("block", say(shape=[23, 2**31 - 1])),
    "TileLayout.t_offsets": ("tile", say(shape=[23, 2**31 - 1])),
    "NMLayout.entry_slots|by layout.entry_slots": ("nm", say(shape=[2**31 - 1, 2**31 - 1])),
    "RowLayout.entry: ": ("row, heads", say(entry=[0, 1, 2**48])),
    "BlockLayout.entry: ": ("block, heads", say(entry=[2, 2, 2])),
    "nothing for \\d+ slots": ("panel", panels([2**31 - 1] * 2, (0, 2**20, 0, 2**20))),
    "layout.entry_slots": ("panel", panels([2**31 - 1] * 2, (0, 2**31 - 1, 0, 2**31 - 1))),
    "row_count: more than|entry_slots": (
        "panel", panels([2**31 - 1] * 2, *[(0, 2**31 - 8, 0, 2**31 - 8)] * 4),
    ),
    "layout.blocks.entry_slots": (
        "mixed", lambda f: f.tensor["layout"]["blocks"].update(entry_slots=[0, 2**47]),
    ),
    # Two panels in the same place, small enough to be looked into.
    "panels of one pattern that share no position": (
        "panel", panels([2**20, 2**20], (0, 3, 0, 9), (2, 2, 8, 1)),
    ),
    # Order.
    "RowLayout.row_offsets: falls": ("row", put("layout.row_offsets", 3, 1)),
    "RowLayout.row_offsets: starts at 1": ("row", put("layout.row_offsets", 0, 1)),
    "RowLayout.row_offsets: ends": ("row", put("layout.row_offsets", -1, 10**6)),
    "RowLayout.row_offsets: falls ": ("row", put("layout.row_offsets", 5, -(2**62))),
    "RowLayout.columns: .* strictly rising": ("row", put("layout.columns", 2, 1)),
    "RowLayout.columns: 36 at 0": ("row", put("layout.columns", 0, 36)),
    "RowLayout.columns: -1 at 0": ("row", put("layout.columns", 0, -1)),
    "RowLayout.t_order": ("row", put("layout.t_order", 0, 7)),
    "BlockLayout.block_columns: 3 at 0": ("block", put("layout.block_columns", 0, 3)),
    "BlockLayout.mask_index: -2": ("block", put("layout.mask_index", 0, -2)),
    "BlockLayout.mask_index: block \\d+ keeps (rows|columns) beyond": (
        "block", lambda f: f.tensors["layout.mask_index"].__setitem__(2, raw("I32", *[-1] * 6)),
    ),
    "PanelLayout.mask_bits: bits beyond": ("panel", put("layout.mask_bits", 1, 255)),
    "PanelLayout.col_list": ("panel", put("layout.col_list", 1, 0)),
    "PanelLayout.panel_entry": ("panel", put("layout.panel_entry", 0, 9)),
    "NMLayout.metadata: matrix 0, row 0, group 0": ("nm, bytes", put("layout.metadata", 0, 9)),
    "NMLayout.metadata: matrix 0, row 0, nibble 0": ("nm", put("layout.metadata", 0, 0)),
    "NMLayout.within_entry": ("nm, within", say(within_entry=[])),
    "NMLayout.within: blocks of 16 for groups of 5": ("nm, within", say(m=5, encoding="bytes")),
    "expected ints 1 ≤ n ≤ m": ("nm", say(n=0)),
    # Types.
    "layout.columns|RowLayout.columns: dtype torch.int64": (
        "row", lambda f: tensor("layout.columns", "I64", [1], 1)(f),
    ),
    "RowLayout.columns: shape": ("row", tensor("layout.columns", "I32", [2, 1], 1, 2)),
    "RowLayout.t_order: dtype torch.int16": ("row", narrow("layout.t_order")),
    "layout.shape: '23', expected int": ("row", say(shape=["23", 36])),
    "layout.nnz: nan": ("row", say(nnz=float("nan"))),
    "layout.nnz: inf": ("row", say(nnz=float("inf"))),
    "layout.shape: nan": ("row", say(shape=[float("nan"), 36])),
    "layout.lead: None": ("row", say(lead=None)),
    "layout.encoding: 4": ("nm", say(encoding=4)),
    "N:M encoding '9:9'": ("nm", say(encoding="9:9")),
}  # fmt: skip


@pytest.mark.parametrize("words", FILES)
def test_the_error_names_the_fault(words: str, tmp_path) -> None:
    name, change = FILES[words]
    path = tmp_path / "s"
    save(path, example(name, torch.float32))
    forged = take_apart(path.read_bytes())
    change(forged)
    path.write_bytes(forged.write())
    with pytest.raises(FileFormatError, match=words.strip()):
        load(path)


def texts() -> dict[str, str]:
    """Descriptions that are hard to parse."""
    return {
        "deep lists": "[" * 2**20,
        "deep objects": '{"layout":' * 2**20,
        "a long number": '{"keep_rows": ' + "9" * 2**20 + "}",
        "a long list": '{"keep_rows": false, "layout": [' + "0," * 2**22 + "0]}",
        "one key many times": "{" + ",".join(['"a":0'] * 2**20) + "}",
        "many keys": "{" + ",".join(f'"{i}":0' for i in range(2**18)) + "}",
        "many keys, one twice": "{" + ",".join(f'"{i}":0' for i in range(2**18)) + ',"7":1}',
        "too long": '{"keep_rows": "' + "x" * 2**25 + '"}',
        "half a surrogate": '{"keep_rows": "\\ud800"}',
        "no object": "3",
        "nothing": "",
        "not a number": "NaN",
    }


@pytest.mark.parametrize("name", texts())
def test_descriptions_that_are_hard_to_parse(name: str, tmp_path) -> None:
    path = tmp_path / "s"
    save(path, example("row", torch.float32))
    forged = take_apart(path.read_bytes())
    header = {"__metadata__": {**forged.metadata, "tensor": texts()[name]}}
    path.write_bytes(frame(json.dumps(header).encode(), b""))
    with pytest.raises(FileFormatError) as caught:
        load(path)
    assert len(str(caught.value)) < 1000


def test_a_field_given_twice_is_refused(tmp_path) -> None:
    """Readers differ in which of the two they take."""
    path = tmp_path / "s"
    save(path, example("row", torch.float32))
    forged = take_apart(path.read_bytes())
    text = forged.metadata["tensor"].replace('"nnz":', '"nnz":0,"nnz":', 1)
    header = {"__metadata__": {**forged.metadata, "tensor": text}}
    path.write_bytes(frame(json.dumps(header).encode(), b""))
    with pytest.raises(FileFormatError, match="nnz given twice"):
        load(path)


CHILD = """
import os, sys
import torch
import mixgrain as mg
path = sys.argv[1]
s = mg.load(path)
before = mg.spmm(s, torch.eye(36))
content = open(path, "rb").read()
body = 8 + int.from_bytes(content[:8], "little")
with open(path, "r+b") as file:
    file.write(content[:body] + b"\\x7f" * (len(content) - body))
s = mg.SparseTensor(s.layout, s.values)
mg.clear_caches()
assert torch.equal(mg.spmm(s, torch.eye(36)), before)
os.truncate(path, 10)
assert torch.equal(mg.spmm(s, torch.eye(36)), before)
print("whole")
"""


def test_what_was_loaded_outlives_the_file(tmp_path) -> None:
    """Checked indices stay as they were checked; a file cut short is no bus error."""
    save(tmp_path / "s", example("mixed", torch.float32))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "s")],
        env={"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert child.stdout == "whole\n", f"{child.returncode}: {child.stderr[-1000:]}"


def test_saving_over_the_file_that_was_loaded(tmp_path) -> None:
    path = tmp_path / "s"
    save(path, example("row", torch.float32))
    s = load(path)
    before = s.to_dense()
    save(path, s.with_values(-s.values))
    assert torch.equal(load(path).to_dense(), -before) and torch.equal(s.to_dense(), before)


@pytest.mark.parametrize("call", [load, lambda path: save(path, example("row", torch.float32))])
def test_paths(call, tmp_path) -> None:
    for path, error in ((3, TypeError), (None, TypeError), ([], TypeError)):
        with pytest.raises(error, match=f"path is a {type(path).__name__}; expected a str"):
            call(path)
    for path in (tmp_path, tmp_path / "no" / "file", "", "a\0b"):
        with pytest.raises((OSError, ValueError)):
            call(path)
    good = os.fsencode(tmp_path / "bytes")
    save(good, example("row", torch.float32))
    call(good)


def test_a_large_layout_without_values(tmp_path) -> None:
    """An empty batch is saved and loaded, up to what may be computed without a file as large."""
    panel = PanelLayout.from_panels((64, 2**15), [(range(64), range(2**15), None)])
    s = SparseTensor(panel, torch.zeros(0, panel.slots))
    save(tmp_path / "s", s)
    assert load(tmp_path / "s").values.shape == (0, panel.slots)
    wide = PanelLayout.from_panels((2**12, 2**13), [(range(2**12), range(2**13), None)])
    with pytest.raises(LayoutError, match="hold nothing"):
        save(tmp_path / "s", SparseTensor(wide, torch.zeros(0, wide.slots)))


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1)])
@pytest.mark.parametrize("kind", ["tile", "nm", "block", "row", "mixed"])
def test_smallest_matrices_round_trip(kind: str, shape: tuple[int, int], tmp_path) -> None:
    s = sparsify(torch.ones(shape), kind, prune=kind == "nm")
    save(tmp_path / "s", s)
    back = load(tmp_path / "s")
    assert torch.equal(back.to_dense(), s.to_dense())
    x = torch.ones(shape[1], 2)
    assert torch.equal(spmm(back, x), s.to_dense() @ x)
