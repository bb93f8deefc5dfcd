"""Error paths: each message says what was given, what is expected and what to do."""

from __future__ import annotations

import pytest
import torch
from cases import build

from mixgrain.formats import patterns as P
from mixgrain.formats.errors import DtypeError, LayoutError, ShapeError, UnsupportedError
from mixgrain.formats.layout import Layout
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives.dispatch import TABLE, plan_for
from mixgrain.primitives.linear import linear
from mixgrain.primitives.sddmm import sddmm
from mixgrain.primitives.softmax import softmax, softmax_backward
from mixgrain.primitives.spmm import spmm

Q = torch.randn(2, 20, 8)
LAYOUT = P.window(3).to_layout("row", 20, 20)
S = sddmm(Q, Q, LAYOUT)
MASK = torch.ones(20, 20, dtype=torch.bool)


def tile() -> SparseTensor:
    layout = build("tile", "odd sizes")
    return SparseTensor(layout, torch.randn(layout.slots))


def turned() -> SparseTensor:
    return sddmm(Q, Q, P.nm(2, 4)).T


ERRORS = {
    "a dense mask": (lambda: sddmm(Q, Q, MASK), LayoutError, "patterns.from_dense"),
    "no layout at all": (lambda: sddmm(Q, Q, "block"), LayoutError, "given a str"),
    "other sizes": (lambda: sddmm(Q[:, :9], Q, LAYOUT), ShapeError, "9 query and 20 key rows"),
    "other head dimension": (lambda: sddmm(Q, Q[..., :3], LAYOUT), ShapeError, "8 columns and k 3"),
    "a vector": (lambda: sddmm(Q[0, 0], Q, LAYOUT), ShapeError, "leading, rows, columns"),
    "integers": (lambda: sddmm(Q.long(), Q.long(), LAYOUT), DtypeError, "int64"),
    "no tensor": (lambda: sddmm([[1.0]], Q, LAYOUT), DtypeError, "list"),
    "two dtypes": (lambda: sddmm(Q, Q.half(), LAYOUT), DtypeError, "float32 and k float16"),
    "out_dtype": (lambda: sddmm(Q, Q, LAYOUT, out_dtype=torch.int8), DtypeError, "int8"),
    "key_mask of floats": (lambda: sddmm(Q, Q, LAYOUT, 1.0, Q[0, 0]), DtypeError, "bool"),
    "key_mask too short": (lambda: sddmm(Q, Q, LAYOUT, 1.0, MASK[0, :9]), ShapeError, "batch, 20"),
    "key_mask of many": (lambda: sddmm(Q, Q, LAYOUT, 1.0, MASK[None]), ShapeError, "batch, 20"),
    "key_mask of another batch": (
        lambda: sddmm(Q[None].expand(5, 2, 20, 8), Q, LAYOUT, 1.0, MASK[:3]),
        ShapeError,
        "broadcast",
    ),
    "softmax of tiles": (lambda: softmax(tile()), LayoutError, "TileLayout; it exists for"),
    "softmax of a view": (lambda: softmax(turned()), LayoutError, "transpose of an NMLayout"),
    "softmax of a tensor": (lambda: softmax(Q), LayoutError, "SparseTensor"),
    "sddmm on tiles": (lambda: sddmm(Q, Q, tile().layout), (LayoutError, ShapeError), "sddmm"),
    "gradient of another layout": (
        lambda: softmax_backward(S, sddmm(Q, Q, P.causal())),
        LayoutError,
        "one layout",
    ),
    "gradient of another shape": (lambda: softmax_backward(S, S.values[0]), ShapeError, "same"),
    "grad_lse": (lambda: softmax_backward(S, S, Q[0, 0]), ShapeError, "one number a row"),
    "spmm sizes": (lambda: spmm(S, Q[:, :7]), ShapeError, "x has 7 rows"),
    "spmm swapped": (lambda: spmm(Q, S), LayoutError, "SparseTensor"),
    "linear of a batch": (lambda: linear(Q[..., :20], S), ShapeError, "without leading"),
    "linear sizes": (lambda: linear(Q, tile()), ShapeError, "x has 8 columns; expected 37"),
    "linear dtypes": (lambda: linear(Q.half(), tile()), DtypeError, "float16"),
    "linear bias": (
        lambda: linear(torch.randn(2, 37), tile(), torch.randn(3)),
        ShapeError,
        r"expected \(41,\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


def test_corrupt_layouts_never_reach_a_kernel() -> None:
    layout = build("row", "odd sizes")
    layout.columns[3] = 10_000
    with pytest.raises(LayoutError, match="columns"):
        spmm(SparseTensor(layout, torch.randn(layout.slots)), torch.randn(37, 4))


def test_another_device() -> None:
    """Told apart before dispatch; and a device without kernels names the way out."""
    meta = torch.empty(20, 8, device="meta")
    with pytest.raises(ShapeError, match=r"on meta and a layout on cpu"):
        sddmm(meta, meta, LAYOUT)
    with pytest.raises(UnsupportedError, match=r"no meta kernels.*\.cpu\(\).*reference"):
        plan_for("sddmm", LAYOUT.to("meta"), meta)


def test_every_missing_cell_names_what_exists() -> None:
    unknown = type("Unknown", (Layout,), {})
    unknown.__abstractmethods__ = frozenset()
    for op, cells in TABLE.items():
        with pytest.raises(LayoutError, match=next(iter(cells)).__name__):
            plan_for(op, unknown())


def test_the_table_covers_the_design() -> None:
    names = {op: {cls.__name__ for cls in cells} for op, cells in TABLE.items()}
    four = {"NMLayout", "BlockLayout", "RowLayout", "MixedLayout"}
    for op in ("sddmm", "softmax", "softmax_backward"):
        assert names[op] == four | {"PanelLayout"}
    for op in ("spmm", "linear"):
        assert names[op] == four | {"PanelLayout", "TileLayout"}
