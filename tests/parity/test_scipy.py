"""Products of every layout against scipy.sparse, whose code has nothing in common with ours."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.special
import torch
from torch import Tensor

import mixgrain as mg
from mixgrain import patterns as P

ROWS, COLUMNS = 77, 130


def matrix(kind: str, integers: bool, seed: int = 0) -> sp.csr_array:
    """A random sparse matrix that the layout can hold; integers keep every sum exact."""
    draw = np.random.default_rng(seed)
    dense = draw.integers(1, 9, (ROWS, COLUMNS)) * draw.choice([-1.0, 1.0], (ROWS, COLUMNS))
    if not integers:
        dense = draw.standard_normal((ROWS, COLUMNS))
    keep = draw.random((ROWS, COLUMNS)) < 0.15
    if kind in ("tile", "block"):
        keep = np.kron(draw.random((5, 9)) < 0.4, np.ones((16, 16), bool))[:ROWS, :COLUMNS]
    elif kind == "nm":
        keep = draw.random((ROWS, 33, 4)).argsort(2) < 2
        keep = keep.reshape(ROWS, -1)[:, :COLUMNS]
    elif kind == "mixed":  # a band, full rows and columns, single entries
        keep |= np.abs(np.subtract.outer(np.arange(ROWS), np.arange(COLUMNS))) < 12
        keep[[3, 40]], keep[:, [5, 77]] = True, True
    return sp.csr_array(np.where(keep, dense, 0.0))


OPTIONS = {
    "tile": {},
    "nm": {"n": 2, "m": 4},
    "block": {"size": 16},
    "row": {},
    "mixed": {"size": 16},
}
KINDS = list(OPTIONS)


def ours(csr: sp.csr_array, kind: str, dtype: torch.dtype = torch.float64) -> mg.SparseTensor:
    return mg.sparsify(torch.from_numpy(csr.toarray()).to(dtype), kind, **OPTIONS[kind])


def random(*shape: int, integers: bool = False, seed: int = 1) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.integers(-9, 10, shape).astype(float) if integers else draw.standard_normal(shape)


def same(got: Tensor, expected: np.ndarray, tolerance: float) -> None:
    assert got.shape == expected.shape
    scale = max(1.0, np.abs(expected).max())
    assert np.abs(got.double().numpy() - expected).max() <= tolerance * scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "integers, dtype, tolerance",
    [
        (True, torch.float64, 0.0),
        (True, torch.float32, 0.0),
        (True, torch.bfloat16, 2**-8),
        (False, torch.float64, 1e-14),
        (False, torch.float32, 1e-6),
    ],
)
def test_spmm_and_linear(kind, integers, dtype, tolerance) -> None:
    a = matrix(kind, integers)
    s = ours(a, kind, dtype)
    x, y = random(COLUMNS, 7, integers=integers), random(ROWS, 5, integers=integers)
    same(mg.spmm(s, torch.from_numpy(x).to(dtype)), a @ x, tolerance)
    same(mg.spmm(s.T, torch.from_numpy(y).to(dtype)), a.T @ y, tolerance)
    same(mg.linear(torch.from_numpy(x.T.copy()).to(dtype), s), (a @ x).T, tolerance)


@pytest.mark.parametrize("kind", ["nm", "block", "row", "mixed"])
@pytest.mark.parametrize(
    "integers, dtype, tolerance",
    [(True, torch.float32, 0.0), (False, torch.float64, 1e-14), (False, torch.float32, 1e-6)],
)
def test_sddmm(kind, integers, dtype, tolerance) -> None:
    """Scores at the places of a sparse matrix are its elementwise product with all scores."""
    a = matrix(kind, True)
    s = ours(a, kind, dtype)
    q, k = random(ROWS, 24, integers=integers), random(COLUMNS, 24, integers=integers, seed=2)
    made = mg.sddmm(
        torch.from_numpy(q).to(dtype), torch.from_numpy(k).to(dtype), s.layout, scale=0.5
    )
    places = s.layout.mask().reshape(ROWS, COLUMNS).numpy()
    assert (places >= (a.toarray() != 0)).all()
    expected = sp.csr_array(places.astype(float)).multiply(0.5 * q @ k.T)
    same(made.to_dense(), expected.toarray(), tolerance)


@pytest.mark.parametrize("kind", ["nm", "block", "row", "mixed"])
def test_softmax(kind) -> None:
    """Row by row over what scipy's CSR arrays list."""
    s = ours(matrix(kind, False), kind)
    kept = sp.csr_array(s.layout.mask().reshape(ROWS, COLUMNS).numpy())
    dense = s.to_dense().numpy()
    expected, lse = np.zeros((ROWS, COLUMNS)), np.full(ROWS, -np.inf)
    for i in range(ROWS):
        at = kept.indices[kept.indptr[i] : kept.indptr[i + 1]]
        if at.size:
            expected[i, at] = scipy.special.softmax(dense[i, at])
            lse[i] = scipy.special.logsumexp(dense[i, at])
    made, sums = mg.softmax(s, return_lse=True)
    same(made.to_dense(), expected, 1e-14)
    full = np.isfinite(lse)
    assert np.array_equal(np.isfinite(sums.numpy()), full)
    assert np.abs(sums.numpy()[full] - lse[full]).max() < 1e-13


@pytest.mark.parametrize("kind", KINDS)
def test_arithmetic(kind) -> None:
    a = matrix(kind, True)
    s = ours(a, kind)
    t = s.with_values(s.values * s.values)
    x = random(COLUMNS, 3, integers=True)
    expected = (2 * a + a.multiply(a)) @ x
    same(mg.spmm(s * 2 + t, torch.from_numpy(x)), expected, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_products_with_the_transpose(kind) -> None:
    a, g = matrix(kind, True), random(ROWS, 4, integers=True)
    s, x = ours(a, kind), torch.from_numpy(random(COLUMNS, 4, integers=True)).requires_grad_()
    values = s.values.clone().requires_grad_()
    y = mg.spmm(s.with_values(values), x)
    dx, dvalues = torch.autograd.grad(y, (x, values), torch.from_numpy(g))
    same(dx, a.T @ g, 0.0)
    places = s.layout.mask().reshape(ROWS, COLUMNS).numpy().astype(float)
    expected = sp.csr_array(places).multiply(g @ x.detach().numpy().T).toarray()
    same(s.with_values(dvalues).to_dense(), expected, 0.0)


@pytest.mark.parametrize(
    "form", [sp.coo_array, sp.csr_array, sp.csc_array, sp.bsr_array, sp.lil_array]
)
def test_patterns_of_scipys_forms(form) -> None:
    """Any form of scipy, through CSR, is a pattern; attention over it is dense masked attention."""
    a = sp.csr_array(form(matrix("row", True)))
    a.sort_indices()
    pattern = P.from_csr(torch.from_numpy(a.indptr), torch.from_numpy(a.indices), a.shape)
    assert pattern.nnz(*a.shape) == a.nnz
    assert np.array_equal(pattern.dense(*a.shape).numpy(), a.toarray() != 0)
