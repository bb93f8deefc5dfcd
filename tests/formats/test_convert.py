"""Round trips through scipy's and torch's CSR and BSR, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch

from mixgrain.formats import patterns as P
from mixgrain.formats.block import BlockLayout
from mixgrain.formats.convert import from_scipy, from_torch, to_scipy, to_torch
from mixgrain.formats.errors import DtypeError, LayoutError
from mixgrain.formats.row import RowLayout
from mixgrain.formats.sparsify import sparsify

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")


def matrix(nq: int, nk: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(nq + nk)
    return torch.where(torch.rand(nq, nk) < 0.2, torch.randn(nq, nk), 0.0).to(dtype)


@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (7, 0), (1, 1), (40, 70)])
def test_csr(shape) -> None:
    x = matrix(*shape)
    s = sparsify(x, "row")
    a = to_scipy(s)
    assert isinstance(a, scipy.sparse.csr_array) and a.has_canonical_format
    assert np.array_equal(a.toarray(), x.numpy())
    for back in (from_scipy(a), from_scipy(scipy.sparse.csr_matrix(a)), from_torch(to_torch(s))):
        assert isinstance(back.layout, RowLayout)
        assert torch.equal(back.values, s.values)
        assert torch.equal(back.layout.columns, s.layout.columns)
    assert torch.equal(to_torch(s).to_dense(), x)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_bsr(size) -> None:
    x = matrix(256, 128)
    x[:size] = 0
    s = sparsify(x, "block", size=size)
    a = to_scipy(s)
    assert isinstance(a, scipy.sparse.bsr_array) and a.blocksize == (size, size)
    assert np.array_equal(a.toarray(), x.numpy())
    for back in (from_scipy(a), from_torch(to_torch(s))):
        assert isinstance(back.layout, BlockLayout) and back.layout.size == size
        assert torch.equal(back.values, s.values)
        assert torch.equal(back.to_dense(), x)


def test_dead_slots_become_zeros() -> None:
    layout = P.causal().to_layout("block", 64, 64, size=16)
    s = sparsify(torch.ones(64, 64), layout=layout)
    dirty = s.with_values(torch.where(layout.live(), s.values, torch.nan))
    assert np.array_equal(to_scipy(dirty).toarray(), np.tril(np.ones((64, 64))))
    assert torch.equal(to_torch(dirty).to_dense(), torch.ones(64, 64).tril())


def test_unsorted_columns_and_int64_and_stored_zeros() -> None:
    a = scipy.sparse.csr_array(
        (np.array([1.0, 0.0, 3.0]), np.array([4, 1, 2]), np.array([0, 2, 3])), shape=(2, 5)
    )
    before = a.indices.copy()
    s = from_scipy(a)
    assert s.nnz == 3 and s.values.tolist() == [0, 1, 3]
    assert s.layout.columns.dtype == torch.int32
    assert np.array_equal(a.indices, before)  # the caller's arrays stay as they were


def test_values_are_shared() -> None:
    a = to_scipy(sparsify(matrix(9, 9), "row"))
    assert from_scipy(a).values.data_ptr() == a.data.ctypes.data
    t = to_torch(sparsify(matrix(9, 9), "row"))
    assert from_torch(t).values.data_ptr() == t.values().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype) -> None:
    s = sparsify(matrix(9, 9, dtype), "row")
    assert torch.equal(from_torch(to_torch(s)).values, s.values)
    if dtype == torch.float64:
        assert to_scipy(s).dtype == np.float64
    else:
        with pytest.raises(DtypeError, match="float32 or float64"):
            to_scipy(s)


def test_gradients_reach_the_values() -> None:
    s = sparsify(matrix(6, 8, torch.float64), "row")
    values = s.values.clone().requires_grad_()
    to_torch(s.with_values(values)).to_dense().square().sum().backward()
    assert torch.equal(values.grad, 2 * s.values)


def test_refusals() -> None:
    x = matrix(32, 32)
    broken = scipy.sparse.csr_array(x.numpy())
    broken.indices = broken.indices + 30
    twice = scipy.sparse.csr_array((np.ones(2), [1, 1], [0, 2]), shape=(1, 3))
    heads = sparsify(x.expand(2, 32, 32), "row")
    batch = torch.stack([x, x]).to_sparse_csr()
    cases = [
        (lambda: from_scipy(scipy.sparse.coo_array(x.numpy())), LayoutError, "tocsr"),
        (lambda: from_scipy(x.numpy()), LayoutError, "ndarray"),
        (lambda: from_scipy(scipy.sparse.csr_array(x.int().numpy())), DtypeError, "astype"),
        (lambda: from_scipy(broken), LayoutError, "broken"),
        (lambda: from_scipy(twice), LayoutError, "columns"),
        (lambda: from_scipy(scipy.sparse.bsr_array(x.numpy(), blocksize=(8, 8))), LayoutError,
         "8×8"),
        (lambda: from_scipy(scipy.sparse.bsr_array(x.numpy(), blocksize=(16, 32))), LayoutError,
         "16×32"),
        (lambda: from_torch(x), LayoutError, "to_sparse_csr"),
        (lambda: from_torch(batch), LayoutError, "one by one"),
        (lambda: from_torch(x.int().to_sparse_csr()), DtypeError, "cast"),
        (lambda: to_scipy(heads), LayoutError, "one by one"),
        (lambda: to_torch(sparsify(x, "tile")), LayoutError, "TileLayout"),
        (lambda: to_torch(x), LayoutError, "Tensor"),
        (lambda: to_scipy(sparsify(matrix(30, 32), "block", size=16)), LayoutError, "hang over"),
    ]  # fmt: skip
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()
    wrong = torch.sparse_csr_tensor(
        torch.tensor([0, 2]), torch.tensor([0, 9]), torch.ones(2), (1, 3), check_invariants=False
    )
    with pytest.raises(LayoutError, match="broken"):
        from_torch(wrong)
