"""Round trips through scipy's and torch's own sparse matrices, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch

from mixgrain.formats import patterns as P
from mixgrain.formats.block import BlockLayout
from mixgrain.formats.errors import DtypeError, LayoutError
from mixgrain.formats.interchange import from_scipy, from_torch, to_scipy, to_torch
from mixgrain.formats.row import RowLayout
from mixgrain.formats.sparse import SparseTensor
from mixgrain.formats.sparsify import sparsify

pytestmark = pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC):UserWarning")


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
    deep = torch.stack([x, x])[None, None].to_sparse_csr()
    hybrid = torch.ones(4, 4, 2).to_sparse(2)
    uncoalesced = torch.sparse_coo_tensor(
        [[0, 0], [1, 1]], torch.ones(2), (2, 2), check_invariants=True
    )
    stray = torch.sparse_coo_tensor([[0], [8]], torch.ones(1), (2, 2), check_invariants=False)
    ragged = sparsify(torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]]]), "row")
    cases = [
        (lambda: from_scipy(scipy.sparse.lil_array(x.numpy())), LayoutError, "given lil.*tocsr"),
        (lambda: from_scipy(scipy.sparse.coo_array(np.ones(3))), LayoutError, "2-D"),
        (lambda: from_scipy(x.numpy()), LayoutError, "ndarray"),
        (lambda: from_scipy(scipy.sparse.csr_array(x.int().numpy())), DtypeError, "astype"),
        (lambda: from_scipy(broken), LayoutError, "column 32 at 1, 0 <= column < 32"),
        (lambda: from_scipy(twice), LayoutError, r"position \(0, 1\) is given twice"),
        (lambda: from_scipy(scipy.sparse.bsr_array(x.numpy(), blocksize=(8, 8))), LayoutError,
         "8×8"),
        (lambda: from_scipy(scipy.sparse.bsr_array(x.numpy(), blocksize=(16, 32))), LayoutError,
         "16×32"),
        (lambda: from_torch(x), LayoutError, "to_sparse_csr"),
        (lambda: from_torch(deep), LayoutError, "one by one"),
        (lambda: from_torch(hybrid), LayoutError, "1 dense dimensions"),
        (lambda: from_torch(uncoalesced), LayoutError, "coalesce"),
        (lambda: from_torch(stray), LayoutError, "index of dimension 1 8 at 0"),
        (lambda: from_torch(x.int().to_sparse_csr()), DtypeError, "cast"),
        (lambda: to_scipy(heads), LayoutError, "one by one"),
        (lambda: to_torch(sparsify(x, "tile"), torch.sparse_bsr), LayoutError, "TileLayout"),
        (lambda: to_torch(sparsify(x, "row"), torch.strided), LayoutError, "choose torch.sparse"),
        (lambda: to_torch(ragged), LayoutError, "0 to 1 positions.*sparse_coo"),
        (lambda: to_torch(x), LayoutError, "Tensor"),
        (lambda: to_scipy(sparsify(x, "row"), "dia"), LayoutError, "choose one of csr"),
        (lambda: to_scipy(sparsify(matrix(30, 32), "block", size=16)), LayoutError, "hang over"),
    ]  # fmt: skip
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()
    wrong = torch.sparse_csr_tensor(
        torch.tensor([0, 2]), torch.tensor([0, 9]), torch.ones(2), (1, 3), check_invariants=False
    )
    with pytest.raises(LayoutError, match="0 <= column < 3"):
        from_torch(wrong)


SCIPY = ("csr", "csc", "coo")


@pytest.mark.parametrize("kind", ["row", "block", "mixed", "tile", "nm"])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (40, 70)])
def test_every_layout_to_every_format_of_elements(kind, shape) -> None:
    x = matrix(*shape)
    s = sparsify(x, kind, size=16, n=4, m=4)
    for name in SCIPY:
        a = to_scipy(s, name)
        assert a.format == name and a.nnz == s.nnz
        assert np.array_equal(a.toarray(), x.numpy())
        back = from_scipy(a)
        back.layout.validate()
        assert torch.equal(back.to_dense(), x) and back.nnz == s.nnz
    for name in (torch.sparse_csr, torch.sparse_csc, torch.sparse_coo):
        t = to_torch(s, name)
        assert t.layout == name and t._nnz() == s.nnz
        assert torch.equal(t.to_dense(), x)
        back = from_torch(t)
        back.layout.validate()
        assert torch.equal(back.to_dense(), x) and back.nnz == s.nnz


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (33, 70)])
def test_formats_that_the_others_made(shape) -> None:
    """Not what to_scipy and to_torch happen to write."""
    x = matrix(*shape)
    whole = scipy.sparse.coo_array(x.numpy())
    shuffled = np.random.default_rng(0).permutation(whole.nnz)
    place = (whole.row[shuffled], whole.col[shuffled])
    mixed_up = scipy.sparse.coo_array((whole.data[shuffled], place), shape=shape)
    for a in (mixed_up, whole.tocsc(), scipy.sparse.csc_matrix(x.numpy())):
        assert torch.equal(from_scipy(a).to_dense(), x)
    t = torch.sparse_coo_tensor(torch.tensor(np.array(place)), torch.tensor(mixed_up.data), shape)
    assert t._nnz() == 0 or not t.is_coalesced()
    for given in (t, x.to_sparse(), x.to_sparse_csc(), x.to_sparse_csr()):
        assert torch.equal(from_torch(given).to_dense(), x)


@pytest.mark.parametrize("size", [16, 64])
def test_blocks_by_column(size) -> None:
    x = matrix(192, 128)
    x[:64, 64:] = 0
    t = to_torch(sparsify(x, "block", size=size), torch.sparse_bsc)
    assert t.layout == torch.sparse_bsc and torch.equal(t.to_dense(), x)
    for given in (t, x.to_sparse_bsc((size, size))):
        back = from_torch(given)
        back.layout.validate()
        assert isinstance(back.layout, BlockLayout) and torch.equal(back.to_dense(), x)


@pytest.mark.parametrize("lead", [(1, 1), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize("kind", ["row", "block"])
def test_batches(lead, kind) -> None:
    """Dimensions that share positions and dimensions that do not, in the order of s.shape."""
    pattern = P.per_batch([P.per_head([P.window(i, 1 - i) for i in (0, 1, 0)])] * 2)
    pattern = {
        (1, 1): P.window(1), (2, 3): pattern,
        (1, 3): P.per_head([P.window(i, 1 - i) for i in (0, 1, 1)]),
        (2, 1): P.per_batch([P.window(i, 1 - i) for i in (0, 1)]),
    }[lead]  # fmt: skip
    layout = pattern.to_layout(kind, 32, 32, size=16)
    assert layout.lead == lead
    torch.manual_seed(0)
    dense = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    cases = [sparsify(dense, layout=layout)]
    if lead == (1, 1):
        cases += [sparsify(dense[0], layout=layout)]
    if lead[0] > 1 and lead[1] == 1:
        cases += [SparseTensor(layout, torch.randn(layout.slots))]
    names = [torch.sparse_csr, torch.sparse_csc, torch.sparse_coo]
    names += [torch.sparse_bsr, torch.sparse_bsc] if kind == "block" else []
    for s in cases:
        for name in names:
            t = to_torch(s, name)
            assert t.layout == name and t.shape == s.shape
            assert torch.equal(t.to_dense(), s.to_dense())
            back = from_torch(t)
            back.layout.validate()
            assert torch.equal(back.to_dense(), s.to_dense())


def test_batches_that_torch_made() -> None:
    x = torch.stack([matrix(32, 64), matrix(32, 64).flip(0)])
    one = x[:1].to_sparse()
    for t in (
        x.to_sparse_csr(), x.to_sparse_csc(), x.to_sparse(), x[None].to_sparse_csr(),
        x[:, None].to_sparse_csr(), one, x[:1, None].to_sparse_csr(),
    ):  # fmt: skip
        s = from_torch(t)
        s.layout.validate()
        assert torch.equal(s.to_dense(), t.to_dense())
    uneven = torch.stack([matrix(9, 9), torch.zeros(9, 9)]).to_sparse()
    assert torch.equal(from_torch(uneven).to_dense(), uneven.to_dense())
    assert torch.equal(to_torch(from_torch(uneven), torch.sparse_coo).to_dense(), uneven.to_dense())


def test_key_mask_becomes_stored_zeros() -> None:
    keep = torch.tensor([True, False, True])
    s = sparsify(torch.ones(3, 3), "row")
    s = SparseTensor(s.layout, torch.where(keep, 1.0, torch.nan).repeat(3), keep)
    expected = torch.tensor([1.0, 0, 1]).expand(3, 3)
    assert np.array_equal(to_scipy(s).toarray(), expected.numpy()) and to_scipy(s).nnz == 9
    for name in (torch.sparse_csr, torch.sparse_coo):
        assert torch.equal(to_torch(s, name).to_dense(), expected)


@pytest.mark.parametrize("name", [torch.sparse_csc, torch.sparse_coo])
def test_gradients_pass_through_the_sorting(name) -> None:
    s = sparsify(matrix(6, 8, torch.float64), "row")
    values = s.values.clone().requires_grad_()
    back = from_torch(to_torch(s.with_values(values), name))
    weight = torch.arange(back.values.numel(), dtype=torch.float64)
    (back.values * weight).sum().backward()
    assert torch.equal(values.grad, weight)


STRUCTURES = {
    "short offsets": lambda: ([0, 1], [0], (2, 2)),
    "late start": lambda: ([1, 1, 1], [0], (2, 2)),
    "falling": lambda: ([0, 2, 1], [0, 1], (2, 2)),
    "early end": lambda: ([0, 0, 1], [0, 1], (2, 2)),
    "negative": lambda: ([0, 1, 1], [-1], (2, 2)),
    "too large": lambda: ([0, 1, 1], [2], (2, 2)),
    "twice": lambda: ([0, 2, 2], [1, 1], (2, 2)),
    "twice, apart": lambda: ([0, 3, 3], [1, 0, 1], (2, 2)),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_broken_arrays(name) -> None:
    """torch takes all of these without a word when it is not asked to look."""
    offsets, inner, shape = STRUCTURES[name]()
    offsets, inner = torch.tensor(offsets), torch.tensor(inner)
    data = torch.ones(inner.numel())
    for layout in (torch.sparse_csr, torch.sparse_csc):
        t = torch.sparse_compressed_tensor(
            offsets, inner, data, shape, layout=layout, check_invariants=False
        )
        with pytest.raises(LayoutError, match="from_torch"):
            from_torch(t)
    batch = torch.sparse_csr_tensor(
        offsets.expand(2, -1), inner.expand(2, -1), data.expand(2, -1), (2, *shape),
        check_invariants=False,
    )  # fmt: skip
    with pytest.raises(LayoutError, match="from_torch"):
        from_torch(batch)
    broken = scipy.sparse.csr_array((2, 2), dtype=np.float32)
    broken.indptr, broken.indices, broken.data = offsets.numpy(), inner.numpy(), data.numpy()
    with pytest.raises(LayoutError, match="from_scipy"):
        from_scipy(broken)
