"""DLPack, edge lists, 2:4 weights and CuPy, in and out."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass as torch_compress,
)

import mixgrain as mg
from mixgrain.formats import interchange as X
from mixgrain.formats import patterns as P
from mixgrain.formats.errors import (
    BackendUnavailableError,
    DtypeError,
    LayoutError,
    ShapeError,
)
from mixgrain.formats.nm import NMLayout
from mixgrain.formats.row import RowLayout

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

# DLPack


class Capsule:
    """An array of another library: DLPack and nothing else."""

    def __init__(self, array) -> None:
        self.array = array

    def __dlpack__(self, **arguments):
        return self.array.__dlpack__(**arguments)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "int64", "bool"])
def test_memory_is_shared(dtype) -> None:
    a = np.arange(12).reshape(3, 4).astype(dtype)
    for given in (a, a.T, a[:, ::2]):
        t = X.from_dlpack(given)
        assert t.data_ptr() == given.ctypes.data and np.array_equal(t.numpy(), given)
    t = X.from_dlpack(torch.from_numpy(a))
    assert t.data_ptr() == a.ctypes.data
    writable = X.from_dlpack(Capsule(torch.from_numpy(a)))
    assert torch.equal(writable, t)


@pytest.mark.parametrize("wrap", [lambda a: a, Capsule])
def test_negative_strides_are_copied(wrap) -> None:
    """torch.from_dlpack would end the process."""
    a = np.arange(6.0).reshape(2, 3)
    for given in (a[::-1], a[:, ::-1], a[::-1, ::-1].T):
        assert X.from_dlpack(wrap(given)).tolist() == given.tolist()


@pytest.mark.parametrize("wrap", [lambda a: a, Capsule])
def test_read_only_memory_stays_as_it_is(wrap) -> None:
    """torch.from_dlpack would hand out a writable tensor over it."""
    a = np.arange(4.0)
    a.flags.writeable = False
    t = X.from_dlpack(wrap(a))
    t.fill_(7)
    assert a.tolist() == [0, 1, 2, 3]


def test_other_byte_orders_scalars_and_bfloat16() -> None:
    assert X.from_dlpack(np.arange(3, dtype=">i4")).tolist() == [0, 1, 2]
    assert X.from_dlpack(np.float32(2.5)).item() == 2.5
    ml_dtypes = pytest.importorskip("ml_dtypes")
    a = np.array([1.5, -2.0], dtype=ml_dtypes.bfloat16)
    assert torch.equal(X.from_dlpack(a), torch.tensor([1.5, -2.0]).bfloat16())


def test_what_speaks_no_dlpack() -> None:
    class Strided(Capsule):
        strides = (-4,)

        def __dlpack_device__(self):
            return 2, 0  # a GPU, where torch would end the process likewise

    needs_gradient = torch.ones(2, requires_grad=True)
    cases = [
        (lambda: X.from_dlpack([1, 2]), LayoutError, "list given"),
        (lambda: X.from_dlpack(np.array(["a"])), DtypeError, "torch does not have"),
        (lambda: X.from_dlpack(Strided(np.ones(2))), LayoutError, "negative"),
        (lambda: X.from_dlpack(Capsule(needs_gradient)), LayoutError, "cannot be shared"),
        (lambda: X.from_dlpack(Capsule(torch.ones(2).bfloat16())), LayoutError, "cannot be shared"),
    ]
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()


def test_tensors_of_layouts_leave_by_dlpack() -> None:
    s = mg.sparsify(torch.eye(5), "row")
    for t in (s.values, *s.layout.tensors()):
        assert np.array_equal(np.from_dlpack(t), t.numpy())


# Edge lists


def edges_of(nq: int, nk: int, seed: int = 0, density: float = 0.3) -> torch.Tensor:
    """(2, E): sources (keys) above targets (queries), shuffled."""
    generator = torch.Generator().manual_seed(seed)
    pairs = (torch.rand(nq, nk, generator=generator) < density).nonzero()
    pairs = pairs[torch.randperm(len(pairs), generator=generator)]
    return pairs.T.flip(0)


@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
@pytest.mark.parametrize("nq, nk", [(0, 0), (7, 5), (5, 7), (1, 1)])
def test_edges(flow, nq, nk) -> None:
    index = edges_of(nq, nk) if flow == "source_to_target" else edges_of(nk, nq)
    gather, scatter = (1, 0) if flow == "source_to_target" else (0, 1)
    dense = torch.zeros(nq, nk)
    weight = torch.arange(1.0, index.shape[1] + 1)
    for e in range(index.shape[1]):  # message passing, one edge at a time
        dense[index[gather, e], index[scatter, e]] = weight[e]
    pattern = X.from_edges(index, (nq, nk), flow=flow)
    assert torch.equal(pattern.dense(nq, nk), dense != 0)
    s = X.from_edges(index, (nq, nk), weight, flow)
    assert isinstance(s.layout, RowLayout) and torch.equal(s.to_dense(), dense)
    for source in (pattern, s.layout, s, s.to_layout("mixed", size=16)):
        arguments = (nq, nk) if source is pattern else (None, None)
        out = X.to_edges(source, *arguments, flow=flow)
        assert out.edge_index.dtype == torch.int64
        kept = sorted(map(tuple, index.T.tolist()))
        assert sorted(map(tuple, out.edge_index.T.tolist())) == kept
        if out.edge_weight is not None:
            assert torch.equal(X.from_edges(*out[:1], (nq, nk), out[1], flow).to_dense(), dense)
    x = torch.randn(nk, 3)
    passed = torch.zeros(nq, 3).index_add_(0, index[gather], weight[:, None] * x[index[scatter]])
    torch.testing.assert_close(mg.spmm(s, x), passed)


def test_edges_of_arrays_and_gradients() -> None:
    index = edges_of(6, 8)
    expected = X.from_edges(index, (6, 8)).dense(6, 8)
    for given in (index.numpy(), index.int(), index.tolist(), index.numpy()[:, ::-1]):
        assert torch.equal(X.from_edges(given, (6, 8)).dense(6, 8), expected)
    weight = torch.rand(index.shape[1], dtype=torch.float64, requires_grad=True)
    s = X.from_edges(index, (6, 8), weight)
    (s.to_dense() * torch.arange(48.0).reshape(6, 8)).sum().backward()
    assert torch.equal(weight.grad, (index[1] * 8 + index[0]).double())


def test_edge_errors() -> None:
    index = torch.tensor([[0, 1], [2, 2]])
    cases = [
        (lambda: X.from_edges(index, (2, 2)), LayoutError, "row 2 at 0, 0 <= row < 2"),
        (lambda: X.from_edges(index - 1, (3, 3)), LayoutError, "column -1"),
        (lambda: X.from_edges(index.T.repeat(2, 2), (3, 3)), LayoutError, "transpose"),
        (lambda: X.from_edges(index * 0, (3, 3)), LayoutError, r"edge \(0, 0\) is given twice"),
        (lambda: X.from_edges(index[0], (3, 3)), ShapeError, "2-D"),
        (lambda: X.from_edges(torch.nested.nested_tensor([torch.ones(2)]), (3, 3)), LayoutError,
         "a nested tensor given"),
        (lambda: X.from_edges(index.float(), (3, 3)), DtypeError, "integers"),
        (lambda: X.from_edges(index, (3, 3), torch.ones(3)), ShapeError, r"expected \(2,\)"),
        (lambda: X.from_edges(index, (3, 3), torch.ones(2).int()), DtypeError, "cast"),
        (lambda: X.from_edges(index, (3, 3), flow="up"), LayoutError, "'source_to_target'"),
        (lambda: X.from_edges(index, 3), ShapeError, "nq, nk"),
        (lambda: X.from_edges(index, (3, 2.5)), ShapeError, "integers from 0"),
        (lambda: X.from_edges(index, (3, 2**31)), ShapeError, "2\\*\\*31 - 1"),
        (lambda: X.from_edges(range(2**62), (3, 3)), LayoutError, "fewer than"),
        (lambda: X.to_edges(P.per_head([P.full(), P.causal()]), 3, 3), LayoutError, ".distinct"),
        (lambda: X.to_edges(mg.sparsify(torch.ones(2, 3, 3), "row")), LayoutError, "one by one"),
        (lambda: X.to_edges(torch.ones(2, 2)), LayoutError, "Tensor given"),
    ]  # fmt: skip
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()


@hypothesis.given(
    seed=st.integers(0, 2**31), nq=st.integers(0, 12), nk=st.integers(0, 12),
    density=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
)  # fmt: skip
def test_any_graph_round_trips(seed, nq, nk, density) -> None:
    index = edges_of(nq, nk, seed, density)
    weight = torch.rand(index.shape[1])
    graph = scipy.sparse.coo_array(
        (weight.numpy(), (index[1].numpy(), index[0].numpy())), shape=(nq, nk)
    )
    s = X.from_edges(index, (nq, nk), weight)
    assert np.array_equal(X.to_scipy(s).toarray(), graph.toarray())
    out = X.to_edges(s)
    assert torch.equal(out.edge_index.flip(0).T, X.to_edges(s.layout).edge_index.flip(0).T)
    back = X.from_edges(out.edge_index, (nq, nk), out.edge_weight)
    assert torch.equal(back.values, s.values)
    assert torch.equal(back.layout.columns, s.layout.columns)


# 2:4 weights


def pruned(rows: int, columns: int, n: int, m: int, dtype: torch.dtype) -> torch.Tensor:
    """Exactly n of every m kept; bfloat16 numbers, because torch moves a float32 as two halves."""
    torch.manual_seed(rows + columns)
    x = torch.randn(rows, columns).bfloat16().to(dtype)
    x[x == 0] = 1
    order = torch.rand(rows, columns // m, m).argsort(-1) < n
    return torch.where(order.reshape(rows, columns), x, torch.zeros((), dtype=dtype))


FORMS = [(2, 4, torch.float16), (2, 4, torch.bfloat16), (1, 2, torch.float32)]


@pytest.mark.parametrize("n, m, dtype", FORMS)
@pytest.mark.parametrize("rows, columns", [(32, 64), (96, 192), (64, 96)])
def test_semi_structured(n, m, dtype, rows, columns) -> None:
    if columns % 64 and m == 4:
        pytest.skip("torch takes these columns for float32 alone")
    dense = pruned(rows, columns, n, m, dtype)
    values, metadata = torch_compress(dense)
    s = mg.sparsify(dense, "nm", n=n, m=m)
    made = X.to_semi_structured(s)
    assert torch.equal(made.packed, values) and torch.equal(made.meta, metadata)
    assert torch.equal(made.tensor().to_dense(), dense)
    three = metadata.reshape(-1, rows, 2).permute(1, 2, 0)  # as torch's pruning kernels have it
    for back in (
        X.from_semi_structured(values, metadata),
        X.from_semi_structured(values, three),
        X.from_semi_structured(made.tensor()),
        X.from_torch(made.tensor()),
    ):
        back.layout.validate()
        assert isinstance(back.layout, NMLayout) and (back.layout.n, back.layout.m) == (n, m)
        assert torch.equal(back.to_dense(), dense)
        assert torch.equal(back.layout.metadata, s.layout.metadata)
    if columns % 64 == 0:
        assert X.from_semi_structured(values, metadata).values.data_ptr() == values.data_ptr()


def test_one_of_two_in_half_precision_leaves_as_two_of_four() -> None:
    dense = pruned(32, 128, 1, 2, torch.float16)
    s = mg.sparsify(dense, "nm", n=1, m=2)
    made = X.to_semi_structured(s)
    assert torch.equal(made.tensor().to_dense(), dense)
    assert torch.equal(X.from_semi_structured(made.packed, made.meta).to_dense(), dense)
    as_bytes = NMLayout.from_choice(
        s.layout.choice()[:, :32, :64], (32, 128), 1, 2, encoding="bytes"
    )
    other = mg.sparsify(dense, layout=as_bytes)
    assert torch.equal(X.to_semi_structured(other).meta, made.meta)


def test_semi_structured_gradients() -> None:
    s = mg.sparsify(pruned(32, 64, 1, 2, torch.float32), "nm", n=1, m=2)
    values = s.values.clone().requires_grad_()
    made = X.to_semi_structured(s.with_values(values))
    X.from_semi_structured(*made).to_dense().square().sum().backward()
    assert torch.equal(values.grad, 2 * s.values)


def test_semi_structured_errors() -> None:
    half = mg.sparsify(pruned(32, 64, 2, 4, torch.float16), "nm")
    packed, meta = X.to_semi_structured(half)
    broken = meta.clone()
    broken[3, 1] = 0  # nibble 0: the same column twice
    odd = mg.sparsify(torch.zeros(30, 64).half(), "nm")
    within = P.causal().to_layout("block", 32, 64, size=16)
    inside = NMLayout.from_choice(
        torch.arange(2).repeat(len(within.block_columns), 16, 4, 1), (32, 64), 2, 4, within=within
    )
    cases = [
        (lambda: X.from_semi_structured(packed), LayoutError, "cuSPARSELt"),
        (lambda: X.from_semi_structured(packed, broken), LayoutError, "holds no .2:4. choice"),
        (lambda: X.from_semi_structured(packed, meta[:16]), ShapeError, r"int16 \(32, 4\)"),
        (lambda: X.from_semi_structured(packed, meta.int()), ShapeError, "int16"),
        (lambda: X.from_semi_structured(packed[:, :9], meta), ShapeError, "multiples of 32"),
        (lambda: X.from_semi_structured(packed.flatten(), meta), ShapeError, "columns / 2"),
        (lambda: X.from_semi_structured(packed.double(), meta), DtypeError, "float16"),
        (lambda: X.from_semi_structured(None, meta), LayoutError, "NoneType"),
        (lambda: X.from_semi_structured(X.SemiStructured(packed, meta).tensor().t()), LayoutError,
         "transposed"),
        (lambda: X.to_semi_structured(half.T), LayoutError, "alone"),
        (lambda: X.to_semi_structured(odd), LayoutError, "multiples of 32 rows"),
        (lambda: X.to_semi_structured(mg.sparsify(torch.zeros(32, 64).half(), "row")), LayoutError,
         "RowLayout"),
        (lambda: X.to_semi_structured(mg.sparsify(torch.zeros(32, 64), "nm")), LayoutError, "1:2"),
        (lambda: X.to_semi_structured(mg.SparseTensor(inside, torch.zeros(inside.slots).half())),
         LayoutError, "alone"),
        (lambda: X.to_semi_structured(mg.sparsify(torch.zeros(32, 64).double(), "nm")), DtypeError,
         "float64"),
        (lambda: X.to_semi_structured(mg.sparsify(torch.zeros(2, 32, 64).half(), "nm")),
         LayoutError, "one by one"),
    ]  # fmt: skip
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()


# CuPy


class CupyMatrix:
    """What from_cupy uses of a cupyx.scipy.sparse matrix, with arrays that speak DLPack alone."""

    def __init__(self, a) -> None:
        self.format, self.shape = a.format, a.shape
        for name in ("indptr", "indices", "row", "col", "data"):
            if hasattr(a, name):
                setattr(self, name, Capsule(getattr(a, name)))


@pytest.mark.parametrize("name", ["csr", "csc", "coo"])
@pytest.mark.parametrize("shape", [(0, 3), (9, 7)])
def test_from_cupy(name, shape) -> None:
    x = np.where(np.random.default_rng(0).random(shape) < 0.4, 1.5, 0).astype(np.float32)
    a = scipy.sparse.coo_array(x)
    mixed_up = np.random.default_rng(1).permutation(a.nnz)
    a = scipy.sparse.coo_array(
        (a.data[mixed_up], (a.row[mixed_up], a.col[mixed_up])), shape=shape
    ).asformat(name)
    s = X.from_cupy(CupyMatrix(a))
    s.layout.validate()
    assert np.array_equal(s.to_dense().numpy(), x)


def test_cupy_errors() -> None:
    s = mg.sparsify(torch.eye(3), "row")
    broken = CupyMatrix(scipy.sparse.csr_array(np.eye(3, dtype=np.float32)))
    broken.indices = Capsule(np.array([0, 1, 3]))
    cases = [
        (lambda: X.from_cupy(broken), LayoutError, "column 3 at 2"),
        (lambda: X.from_cupy(CupyMatrix(scipy.sparse.csr_array(np.eye(3, dtype=int)))), DtypeError,
         "cast"),
        (lambda: X.from_cupy(scipy.sparse.bsr_array((2, 2))), LayoutError, "tocsr"),
        (lambda: X.from_cupy(torch.eye(3)), LayoutError, "Tensor given"),
        (lambda: X.to_cupy(s, "bsr"), LayoutError, "'csr'"),
        (lambda: X.to_cupy(s.to(torch.float16)), DtypeError, "float32 or float64"),
        (lambda: X.to_cupy(mg.sparsify(torch.ones(2, 3, 3), "row")), LayoutError, "one by one"),
    ]  # fmt: skip
    if not torch.cuda.is_available():
        cases.append((lambda: X.to_cupy(s), BackendUnavailableError, "mixgrain.cuda13"))
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["csr", "csc", "coo"])
def test_cupy_on_a_gpu(name) -> None:
    x = torch.where(torch.rand(70, 50) < 0.3, torch.randn(70, 50), 0.0)
    s = mg.sparsify(x, "row").to("cuda")
    a = X.to_cupy(s, name)
    assert a.format == name and np.array_equal(a.toarray().get(), x.numpy())
    back = X.from_cupy(a)
    assert back.device.type == "cuda" and torch.equal(back.to_dense().cpu(), x)
    if name == "csr":
        assert back.values.data_ptr() == s.values.data_ptr()
    assert np.array_equal(X.to_cupy(s.to("cpu")).toarray().get(), x.numpy())
