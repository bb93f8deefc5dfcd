"""What is wrong with one argument, and the words that the error must contain."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hostile.kinds import Labelled

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.formats.errors import DtypeError, LayoutError, ShapeError, UnsupportedError
from mixgrain.formats.panel import PanelLayout
from mixgrain.primitives.softmax import softmax_backward

N = 20
Q = torch.randn(1, 2, N, 8)
ROW = P.window(3).to_layout("row", N, N)
S = mg.sddmm(Q, Q, ROW)
W = mg.sparsify(torch.randn(N, N), "row")
ONE = torch.tensor


def csr(offsets: list[int], columns: list[int], shape: tuple[int, int] = (2, 3), **more) -> object:
    return mg.RowLayout.from_csr(shape, ONE(offsets), ONE(columns), **more)


def blocks(offsets: list[int], columns: list[int], **more) -> object:
    return mg.BlockLayout.from_blocks((32, 48), 16, ONE(offsets), ONE(columns), **more)


def tiles(rows: list[int], columns: list[int]) -> object:
    return mg.TileLayout.from_tiles(ONE(rows), ONE(columns), (32, 48))


def choice(numbers: list[int], dtype: torch.dtype = torch.int64) -> object:
    given = ONE(numbers, dtype=dtype).expand(1, 4, 2, 2)
    return mg.NMLayout.from_choice(given, (4, 8), 2, 4)


def panels(*written: object) -> object:
    return PanelLayout.from_panels((8, 8), list(written))


Row = tuple[Callable[[], object], type[Exception], str]
TABLE: dict[str, Row] = {
    # Indices that would be written outside of what is allocated for their order.
    "from_csr.columns: too large": (
        lambda: csr([0, 1, 2], [0, 3]),
        LayoutError,
        r"columns holds 3 at 1; expected values in \[0, 3\)",
    ),
    "from_csr.columns: huge": (
        lambda: csr([0, 1, 2], [0, 2**40]),
        LayoutError,
        "columns holds 1099511627776",
    ),
    "from_csr.columns: negative": (
        lambda: csr([0, 1, 2], [-1, 0]),
        LayoutError,
        "columns holds -1 at 0",
    ),
    "from_csr.row_offsets: falling": (
        lambda: csr([0, 3, 2], [0, 1]),
        LayoutError,
        "row_offsets falls from 3 to 2 at 2",
    ),
    "from_csr.row_offsets: beyond": (
        lambda: csr([0, 1, 9], [0, 1]),
        LayoutError,
        "row_offsets runs from 0 to 9; expected 0 to 2",
    ),
    "from_csr.row_offsets: not from 0": (
        lambda: csr([1, 1, 2], [0, 1]),
        LayoutError,
        "runs from 1",
    ),
    "from_csr.row_offsets: too few": (
        lambda: csr([0, 2], [0, 1]),
        ShapeError,
        "row_offsets holds 2 offsets; expected 3",
    ),
    "from_csr.columns: unsorted": (
        lambda: csr([0, 2, 2], [1, 0]).validate(),
        LayoutError,
        "strictly rising",
    ),
    "from_csr.columns: twice": (
        lambda: csr([0, 2, 2], [1, 1]).validate(),
        LayoutError,
        "strictly rising",
    ),
    "from_csr.columns: floats": (
        lambda: mg.RowLayout.from_csr((2, 3), ONE([0, 1, 2]), ONE([0.0, 1.0])),
        DtypeError,
        "columns is torch.float32; expected integers",
    ),
    "from_csr.shape: huge": (
        lambda: csr([0, 1, 2], [0, 1], (2, 2**31)),
        ShapeError,
        "index tensors count in int32",
    ),
    "from_csr.lead: zero": (
        lambda: csr([0, 1, 2], [0, 1], lead=(0, 1)),
        ShapeError,
        "both at least 1",
    ),
    "from_csr.entry: a gap": (
        lambda: csr([0, 1, 2], [0, 1], lead=(1, 2), entry=(0, 2)),
        LayoutError,
        "counted from 0 without gaps",
    ),
    "from_csr.entry: too few": (
        lambda: csr([0, 1, 2], [0, 1], lead=(1, 2), entry=(0,)),
        LayoutError,
        "2 integers expected",
    ),
    "from_blocks.block_columns: too large": (
        lambda: blocks([0, 1, 2], [0, 3]),
        LayoutError,
        r"block_columns holds 3 at 1",
    ),
    "from_blocks.mask_index: too large": (
        lambda: blocks([0, 1, 2], [0, 1], mask_index=ONE([0, 0])),
        LayoutError,
        r"mask_index holds 0 at 0; expected values in \[-1, 0\)",
    ),
    "from_blocks.masks: bool": (
        lambda: blocks([0, 1, 2], [0, 1], masks=torch.ones(1, 16, 2) > 0),
        DtypeError,
        "masks is torch.bool; expected uint8",
    ),
    "from_blocks.masks: another size": (
        lambda: blocks([0, 1, 2], [0, 1], masks=torch.ones(1, 16, 4).byte()),
        ShapeError,
        r"expected \(M, 16, 2\)",
    ),
    "from_tiles.rows: too large": (
        lambda: tiles([0, 2], [0, 0]),
        LayoutError,
        r"rows holds 2 at 1",
    ),
    "from_tiles.columns: negative": (
        lambda: tiles([0, 1], [0, -1]),
        LayoutError,
        "columns holds -1",
    ),
    "from_tiles.columns: unsorted": (
        lambda: tiles([1, 0], [0, 0]),
        LayoutError,
        "rows falls from 1 to 0 at 1",
    ),
    "from_tile_mask.kept: numbers": (
        lambda: mg.TileLayout.from_tile_mask(torch.ones(2, 3), (32, 48)),
        DtypeError,
        "kept is torch.float32; expected bool",
    ),
    # Numbers that would be cut to a byte, or moved to another group.
    "from_choice.choice: 256 is no 0": (lambda: choice([0, 257]), LayoutError, "choice holds 257"),
    "from_choice.choice: negative": (lambda: choice([-256, 1]), LayoutError, "choice holds -256"),
    "from_choice.choice: falling": (
        lambda: choice([2, 1], torch.uint8).validate(),
        LayoutError,
        "holds no '2:4' choice",
    ),
    "from_columns.columns: of another group": (
        lambda: mg.NMLayout.from_columns(ONE([0, 1]).expand(1, 4, 2, 2), (4, 8), 2, 4),
        LayoutError,
        r"column 0 at \(0, 0, 1, 0\) is not in its group",
    ),
    "from_columns.columns: negative": (
        lambda: mg.NMLayout.from_columns(ONE([[-4, -3], [4, 5]]).expand(1, 4, 2, 2), (4, 8), 2, 4),
        LayoutError,
        "column -4",
    ),
    "from_panels: a range of step 2": (
        lambda: panels((range(2), range(0, 8, 2), None)),
        LayoutError,
        "expected step 1",
    ),
    "from_panels: a mask to broadcast": (
        lambda: panels((range(2), range(3), torch.ones(1, 3) > 0)),
        ShapeError,
        r"shape \(1, 3\); expected \(2, 3\)",
    ),
    "from_panels: a list": (
        lambda: panels((range(2), [0, 1], None)),
        TypeError,
        "expected a range or a tensor",
    ),
    "from_panels: outside": (
        lambda: panels((range(2), ONE([0, 9]), None)).validate(),
        LayoutError,
        "col_list",
    ),
    # Tensors that are no plain ones.
    "sddmm.q: a list": (
        lambda: mg.sddmm([[1.0]], Q, ROW),
        DtypeError,
        r"sddmm: q is a list; expected a torch.Tensor; make one with torch.tensor",
    ),
    "sddmm.k: sparse": (
        lambda: mg.sddmm(Q[0, 0], torch.eye(N).to_sparse(), ROW),
        DtypeError,
        r"k is a sparse_coo tensor; .*to_dense",
    ),
    "attend.q: numpy": (
        lambda: mg.attend(Q.numpy(), Q, Q, P.full()),
        DtypeError,
        "q is a ndarray; .*as_tensor",
    ),
    "attend.v: None": (lambda: mg.attend(Q, Q, None, P.full()), DtypeError, "v is a NoneType"),
    "attend.q: float8": (
        lambda: mg.attend(*[Q.to(torch.float8_e5m2)] * 3, P.full()),
        DtypeError,
        "float8_e5m2",
    ),
    "attend.key_mask: a list": (
        lambda: mg.attend(Q, Q, Q, P.full(), key_mask=[True] * N),
        DtypeError,
        "key_mask is a list",
    ),
    "attend.sink_logits: integers": (
        lambda: mg.attend(Q, Q, Q, P.full(), sink_logits=ONE([1, 2])),
        DtypeError,
        "sink_logits is torch.int64",
    ),
    "attend.sink_logits: float8": (
        lambda: mg.attend(Q, Q, Q, P.full(), sink_logits=torch.zeros(2).to(torch.float8_e5m2)),
        DtypeError,
        "sink_logits is torch.float8_e5m2",
    ),
    "linear.x: a number": (
        lambda: mg.linear(ONE(1.0), W),
        ShapeError,
        "linear: x is a single number",
    ),
    "linear.bias: a list": (
        lambda: mg.linear(torch.ones(N), W, [0.0] * N),
        DtypeError,
        "bias is a list",
    ),
    "softmax_backward.grad: None": (
        lambda: softmax_backward(S, None),
        DtypeError,
        "grad is a NoneType",
    ),
    "softmax_backward.grad: integers": (
        lambda: softmax_backward(S, S.values.long()),
        DtypeError,
        "grad is int64",
    ),
    "softmax_backward.grad_lse: complex": (
        lambda: softmax_backward(S, S, torch.ones(1, 2, N) * 1j),
        DtypeError,
        "grad_lse is complex64",
    ),
    "merge.o1: float8": (
        lambda: mg.merge(Q.to(torch.float8_e5m2), Q[..., 0], Q, Q[..., 0]),
        DtypeError,
        "o1 is torch.float8_e5m2",
    ),
    "merge.lse2: on meta": (
        lambda: mg.merge(Q, Q[..., 0], Q, Q[..., 0].to("meta")),
        ShapeError,
        "lse2 on meta",
    ),
    "sparsify.dense: on meta": (
        lambda: mg.sparsify(Q[0, 0].to("meta"), "row"),
        UnsupportedError,
        "holds no values",
    ),
    "SparseTensor.values: float8": (lambda: S.to(torch.float8_e5m2), DtypeError, "float8_e5m2"),
    "SparseTensor.values: on meta": (
        lambda: S.with_values(S.values.to("meta")).to_dense(),
        ShapeError,
        "positions on cpu, values on meta",
    ),
    "SparseTensor.layout: a pattern": (
        lambda: mg.SparseTensor(P.full(), S.values),
        LayoutError,
        "layout is a Full.*to_layout",
    ),
    "SparseTensor.keep: too short": (
        lambda: mg.SparseTensor(ROW, S.values, torch.ones(3) > 0),
        ShapeError,
        r"expected \(B, 20\) or \(20,\)",
    ),
    "SparseTensor.keep: numbers": (
        lambda: mg.SparseTensor(ROW, S.values, torch.ones(N)),
        DtypeError,
        "keep is torch.float32",
    ),
    # Numbers, flags, functions, devices.
    "sddmm.scale: text": (
        lambda: mg.sddmm(Q, Q, ROW, "2"),
        TypeError,
        "scale is a str; expected a real number",
    ),
    "sddmm.scale: a tensor loses its gradient": (
        lambda: mg.sddmm(Q, Q, ROW, torch.ones((), requires_grad=True)),
        TypeError,
        "scale is a Tensor; .*multiply by it",
    ),
    "attend.scale: complex": (
        lambda: mg.attend(Q, Q, Q, P.full(), 1j),
        TypeError,
        "scale is a complex",
    ),
    "softmax.return_lse: text": (lambda: mg.softmax(S, "no"), TypeError, "expected True or False"),
    "attend.enable_gqa: a number": (
        lambda: mg.attend(Q, Q, Q, P.full(), enable_gqa=2),
        TypeError,
        "enable_gqa is a int",
    ),
    "sparsify.density: text": (
        lambda: mg.sparsify(Q[0, 0], "row", prune=True, density="0.5"),
        TypeError,
        "density is a str",
    ),
    "map.f: a builtin": (
        lambda: S.map(torch.tanh),
        TypeError,
        r"expected a Python function f\(v, i, j\)",
    ),
    "map.f: one argument": (lambda: S.map(lambda v: v), TypeError, r"f\(v, i, j\)"),
    "*: a factor for each slot": (lambda: S * S.values, ShapeError, "map works by position"),
    "*: another batch": (
        lambda: S * torch.ones(3, 3, 1),
        ShapeError,
        r"a factor of shape \(3, 3, 1\)",
    ),
    "*: an array": (lambda: np.ones(3) * S, TypeError, "unsupported operand"),
    "+: a number": (lambda: 1 + S, TypeError, "two SparseTensors expected"),
    "Layout.to: unknown": (lambda: ROW.to("gpu"), UnsupportedError, "device 'gpu' given"),
    "to_layout.device: unknown": (
        lambda: P.full().to_layout("row", 3, 3, device="gpu"),
        UnsupportedError,
        "device 'gpu'",
    ),
    "to_layout.nq: text": (
        lambda: P.full().to_layout("row", "3", 3),
        LayoutError,
        r"to_layout\(nq\): '3' given",
    ),
    "to_layout.nk: huge": (
        lambda: P.full().to_layout("row", 3, 2**31),
        ShapeError,
        "below 2\\*\\*31",
    ),
    "to_layout.costs: a number": (
        lambda: P.full().to_layout("row", 3, 3, costs=1),
        TypeError,
        "expected a mixgrain.Costs",
    ),
    "explain: no pattern": (lambda: mg.explain(3, 4, 4), LayoutError, "int given as the pattern"),
    "density: lists": (lambda: P.full().density([], 3), LayoutError, "nq: .* given"),
    "global_keys.idx: a huge range": (
        lambda: P.global_keys(range(2**62)),
        LayoutError,
        "fewer than 2\\*\\*31",
    ),
    "bigbird: huge": (lambda: P.bigbird(2**40, 0, 0, 1, 0), LayoutError, "fewer than 2\\*\\*31"),
    "from_block_mask: a tensor": (
        lambda: P.from_block_mask(torch.ones(2, 2)),
        TypeError,
        "BlockMask expected; .*from_dense",
    ),
    "per_head: one pattern": (lambda: P.per_head(P.full()), TypeError, "expected a list"),
    "Costs: zero": (lambda: mg.Costs(0.0, 1.0, 1.0), LayoutError, "dense_flops = 0.0 given"),
}


@pytest.mark.parametrize("what", TABLE)
def test_the_error_says(what: str) -> None:
    call, error, words = TABLE[what]
    with pytest.raises(error, match=words) as caught:
        call()
    assert len(str(caught.value)) < 700


# Odd but legal inputs give what plain ones give.

VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "transposed": lambda t: t.mT.contiguous().mT,
    "every other": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "overlapping rows": lambda t: t[..., :1, :].expand(t.shape),
    "one number": lambda t: t.flatten()[:1].expand(t.shape),
    "negative bit": lambda t: torch.imag(torch.complex(t, -t).conj()),
    "a parameter": torch.nn.Parameter,
    "of a subclass": lambda t: t.as_subclass(Labelled),
    "made in inference mode": lambda t: inference(t),
    "of a read-only array": lambda t: torch.from_numpy(read_only(t)),
}


def inference(t: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return t.clone()


def read_only(t: torch.Tensor) -> np.ndarray:
    array = t.detach().numpy().copy()
    array.setflags(write=False)
    return array


def everything(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """One result of every operation."""
    found = []
    for kind in ("row", "block", "mixed"):
        s = mg.sddmm(q, k, P.longformer(3, [0, 9]).to_layout(kind, N, N, size=16), scale=0.5)
        p, lse = mg.softmax(s, return_lse=True)
        found += [s.values, p.values, lse, mg.spmm(p, v), s.T.to_dense(), (s * 2 + s).values]
    for impl in ("fused", "composed", "reference"):
        found += mg.attend(q, k, v, P.longformer(3, [0, 9]), return_lse=True, impl=impl)
    w = mg.sparsify(v[0, 0].T, "row")
    found += [w.to_dense(), mg.linear(q[0, 0, :, :8] @ v[0, 0].mT, w), *mg.merge(q, q[..., 0], v,
              v[..., 0])]  # fmt: skip
    return found


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("view", VIEWS)
def test_views_give_what_their_copies_give(view: str) -> None:
    g = torch.Generator().manual_seed(1)
    plain = [torch.randn(1, 2, N, 8, generator=g) for _ in range(3)]
    odd = [VIEWS[view](t) for t in plain]
    copies = [torch.tensor(t.detach().resolve_neg().numpy().copy()) for t in odd]
    before = [t.clone() for t in copies]
    for a, b in zip(everything(*odd), everything(*copies), strict=True):
        torch.testing.assert_close(a.detach().as_subclass(torch.Tensor), b, rtol=1e-6, atol=1e-6)
    for t, b in zip(odd, before, strict=True):
        assert torch.equal(t.detach().resolve_neg(), b)


INDICES: dict[str, Callable[[list], object]] = {
    "int8": lambda a: torch.tensor(a, dtype=torch.int8),
    "uint8": lambda a: torch.tensor(a, dtype=torch.uint8),
    "int32": lambda a: torch.tensor(a, dtype=torch.int32),
    "every other": lambda a: torch.tensor(a).repeat_interleave(2)[::2],
    "numpy, negative strides": lambda a: np.array(a)[::-1].copy()[::-1],
    "numpy, read-only": lambda a: np.broadcast_to(np.array(a), (len(a),)),
    "a tuple": tuple,
}


@pytest.mark.parametrize("kind", INDICES)
def test_indices_of_any_integer_kind(kind: str) -> None:
    make = INDICES[kind]
    expected = P.global_tokens([0, 5, 9]).dense(N, N)
    assert torch.equal(P.global_tokens(make([9, 0, 5, 5])).dense(N, N), expected)
    ids = [0, 0, 1, 1, 2]
    assert torch.equal(P.documents(make(ids)).dense(5, 5), P.documents(ids).dense(5, 5))
    given, same = P.from_csr(make([0, 2, 3]), make([2, 0, 1]), (2, 3)), ONE([[1, 0, 1], [0, 1, 0]])
    assert torch.equal(given.dense(2, 3), same > 0)
    if isinstance(make([0]), torch.Tensor):
        offsets, columns = make([0, 2, 3]), make([0, 2, 1])
        layout = mg.RowLayout.from_csr((2, 3), offsets, columns)
        layout.validate()
        assert torch.equal(layout.mask()[0, 0], same > 0)


def test_leaves_that_a_tree_map_replaced() -> None:
    """A SparseTensor whose leaves became something else is refused, not computed with."""
    from torch.utils import _pytree as pytree

    for value in (None, 3, "x"):
        broken = pytree.tree_map(lambda _, value=value: value, S)
        with pytest.raises((TypeError, ValueError), match=r"sparse operand|spmm"):
            mg.spmm(broken, Q)


@pytest.mark.parametrize("nq, nk", [(0, 0), (0, 5), (5, 0), (1, 1)])
@pytest.mark.parametrize("kind", ["row", "block", "mixed"])
def test_zero_sizes_everywhere(nq: int, nk: int, kind: str) -> None:
    for lead in ((), (0,), (2, 0), (2, 3)):
        for width in (0, 3):
            q, k = torch.ones(*lead, nq, width), torch.ones(*lead, nk, width)
            s = mg.sddmm(q, k, P.full().to_layout(kind, nq, nk, size=16))
            p, lse = mg.softmax(s, return_lse=True)
            assert lse.shape == (*lead, nq) and mg.spmm(p, k).shape == (*lead, nq, width)
            assert s.T.to_dense().shape == (*lead, nk, nq) and s.map(lambda v, i, j: v).nnz == s.nnz
    for impl in ("fused", "composed", "reference"):
        for batch, heads, width in ((0, 2, 4), (2, 0, 4), (2, 2, 0), (1, 2, 4)):
            q, k = torch.ones(batch, heads, nq, width), torch.ones(batch, heads, nk, width)
            inputs = [t.clone().requires_grad_() for t in (q, k, k)]
            o = mg.attend(*inputs, P.full(), impl=impl)
            assert o.shape == q.shape
            o.sum().backward()
            assert all(t.grad is None or torch.isfinite(t.grad).all() for t in inputs)


@pytest.mark.parametrize("kind", ["row", "block", "mixed"])
def test_layouts_on_meta_have_the_shapes_of_real_ones(kind: str) -> None:
    real, meta = (
        P.longformer(3, [0, 9]).to_layout(kind, N, N, size=16, device=device)
        for device in ("cpu", "meta")
    )
    assert meta.device.type == "meta" and (meta.slots, meta.nnz) == (real.slots, real.nnz)
    assert [t.shape for t in meta.tensors()] == [t.shape for t in real.tensors()]


def test_numbers_of_any_size() -> None:
    assert torch.isfinite((S.to(torch.float64) * 2**70).values).all()
    with pytest.raises(TypeError, match="too large"):
        _ = S * 10**400
