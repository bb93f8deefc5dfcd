"""SparseTensors from and to CuPy's sparse matrices, which live on a GPU; CuPy loads when needed."""

from __future__ import annotations

from typing import Any

import torch

from ..arguments import among, kind_of, shown
from ..entries import INT32_LIMIT
from ..errors import BackendUnavailableError, DtypeError, LayoutError
from ..sparse import SparseTensor
from .arrays import as_shape, expanded, indices, values
from .compressed import check_sparse, elements, from_positions


def from_cupy(matrix: Any) -> SparseTensor:
    """The SparseTensor of a cupyx.scipy.sparse csr, csc or coo matrix, on its device.

    Arrays move by DLPack, so anything with the attributes of such a matrix will do.

    Args:
        matrix: (nq, nk), float32 or float64, indices in any order.

    Returns:
        A SparseTensor with a RowLayout; csr with sorted indices shares its values. Lost: which
        format it was.

    Raises:
        LayoutError: another format, a position given twice, indices out of range.
        DtypeError: another dtype.
    """
    who, kind = "from_cupy", str(getattr(matrix, "format", None))
    needed = {"csr": ("indptr", "indices"), "csc": ("indptr", "indices"), "coo": ("row", "col")}
    if kind not in needed or not all(hasattr(matrix, name) for name in (*needed[kind], "data")):
        raise LayoutError(
            f"{who}: {kind_of(matrix)} given, a cupyx.scipy.sparse csr, csc or coo "
            "matrix expected; convert it with .tocsr()"
        )
    shape = as_shape(getattr(matrix, "shape", None), who)
    first, second = (indices(getattr(matrix, name), who) for name in needed[kind])
    data = values(matrix.data, who, tuple(second.shape))
    if kind == "coo":
        return from_positions(who, shape, first, second, data)
    by_row = kind == "csr"
    names = ("row", "columns") if by_row else ("column", "rows")
    line = expanded(first, second.numel(), shape[0 if by_row else 1], who, names)
    row, col = (line, second) if by_row else (second, line)
    return from_positions(who, shape, row, col, data)


def to_cupy(s: SparseTensor, format: str = "csr") -> Any:
    """A cupyx.scipy.sparse matrix of a SparseTensor's matrix.

    Args:
        s: 2-D, float32 or float64, any layout; from the CPU it is copied to CuPy's current device.
        format: "csr", "csc" or "coo".

    Returns:
        csr_matrix, csc_matrix or coo_matrix of the kept positions, indices int32. Shares values on
        a GPU where s has a RowLayout. Lost: the key mask (dropped positions are stored zeros) and
        gradients.

    Raises:
        LayoutError: leading dimensions, an unknown format, or more than 2**31 − 1 positions, which
            CuPy would count wrongly.
        DtypeError: another dtype.
        BackendUnavailableError: CuPy, or a GPU, is missing.
    """
    check_sparse("to_cupy", s)
    if s.dtype not in (torch.float32, torch.float64):
        raise DtypeError(
            f"to_cupy: values of {s.dtype}, expected float32 or float64; use s.to(dtype)"
        )
    if not among(format, ("csr", "csc", "coo")):
        raise LayoutError(f"to_cupy: format {shown(format)}; choose 'csr', 'csc' or 'coo'")
    if s.nnz >= INT32_LIMIT or max(s.layout.shape) >= INT32_LIMIT:
        raise LayoutError(
            f"to_cupy: {s.nnz} positions of {s.layout.shape}; CuPy's indices are 32-bit and would "
            "wrap; convert parts of the matrix"
        )
    found = elements("to_cupy", s)
    try:
        import cupy
        import cupyx.scipy.sparse as sparse

        parts = [t.detach() for t in (found.values, found.columns, found.offsets.int())]
        data, columns, offsets = (
            cupy.from_dlpack(t) if t.is_cuda else cupy.asarray(t.numpy()) for t in parts
        )
        made = sparse.csr_matrix((data, columns, offsets), shape=s.layout.shape)
    except (
        Exception
    ) as error:  # a missing CuPy, driver, or cache folder each has an error of its own
        raise BackendUnavailableError(
            f"to_cupy: CuPy cannot be used here ({type(error).__name__}: {error}); install "
            "mixgrain[cuda13] on a machine with a GPU"
        ) from error
    return made if format == "csr" else made.asformat(format)
