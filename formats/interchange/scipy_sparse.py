"""SparseTensors from and to scipy's sparse arrays and matrices.

    scipy            mixgrain          arrays shared
    csr              RowLayout         values
    csc, coo         RowLayout         none: they are put into row order
    bsr, s × s       BlockLayout       values

One 2-D matrix each way. Stored zeros stay stored: positions are what the arrays say.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import among, shown
from ..block import BlockLayout
from ..errors import DtypeError, LayoutError, ShapeError
from ..sparse import SparseTensor
from .arrays import as_shape, expanded, indices, values
from .compressed import blocks, check_sparse, elements, from_blocks, from_positions

_FORMATS = ("csr", "csc", "coo", "bsr")


def from_scipy(matrix: Any) -> SparseTensor:
    """The SparseTensor of a scipy csr, csc, coo or bsr array or matrix.

    Args:
        matrix: (nq, nk), float32 or float64, indices in any order; bsr with square blocks of 16,
            32, 64 or 128.

    Returns:
        A SparseTensor with a RowLayout, or a BlockLayout for bsr. Shares the values of csr and bsr
        whose indices are sorted. Lost: which of the formats csr, csc and coo it was.

    Raises:
        LayoutError: another format or block size, a position given twice, indices out of range.
        DtypeError: another dtype.
    """
    import scipy.sparse  # here: import mixgrain loads no scipy

    known = scipy.sparse.issparse(matrix) and matrix.format in _FORMATS
    # Of what somebody set in place of a shape, ndim would fail.
    if not known or not isinstance(matrix.shape, tuple) or len(matrix.shape) != 2:
        given = getattr(matrix, "format", type(matrix).__name__)
        raise LayoutError(
            f"from_scipy: given {given}, expected a 2-D scipy array of {', '.join(_FORMATS)}; "
            "convert it with .tocsr() or .tobsr(blocksize=(64, 64))"
        )
    dtype = getattr(matrix.data, "dtype", None)
    if dtype not in (np.float32, np.float64):
        raise DtypeError(
            f"from_scipy: values of {dtype}, expected float32 or float64; use .astype (for "
            "positions alone: patterns.from_csr(m.indptr, m.indices, m.shape))"
        )
    shape = as_shape(matrix.shape, "from_scipy")
    if matrix.format == "coo":
        try:
            place = matrix.row, matrix.col
        except IndexError as error:
            raise LayoutError("from_scipy: a coo array without rows and columns") from error
        row, col = (indices(t, "from_scipy") for t in place)
        data = values(matrix.data, "from_scipy", tuple(row.shape))
        return from_positions("from_scipy", shape, row, col, data)
    offsets, inner = indices(matrix.indptr, "from_scipy"), indices(matrix.indices, "from_scipy")
    if matrix.format == "bsr":
        if matrix.data.ndim != 3 or 0 in matrix.data.shape[1:]:
            raise ShapeError(
                f"from_scipy: bsr data of shape {matrix.data.shape}; (blocks, rows, columns) "
                "expected"
            )
        high, wide = matrix.data.shape[1:]
        data = values(matrix.data, "from_scipy", (inner.numel(), high, wide))
        row = expanded(offsets, inner.numel(), shape[0] // high, "from_scipy")
        return from_blocks("from_scipy", shape, row, inner, data)
    data = values(matrix.data, "from_scipy", (inner.numel(),))
    if matrix.format == "csc":
        column = expanded(offsets, inner.numel(), shape[1], "from_scipy", ("column", "rows"))
        return from_positions("from_scipy", shape, inner, column, data)
    row = expanded(offsets, inner.numel(), shape[0], "from_scipy")
    return from_positions("from_scipy", shape, row, inner, data)


def to_scipy(s: SparseTensor, format: str | None = None) -> Any:
    """A scipy sparse array of a SparseTensor's matrix.

    Args:
        s: 2-D, float32 or float64 (scipy knows no others), any device and layout.
        format: "csr", "csc", "coo" or "bsr"; None = "bsr" for a BlockLayout, else "csr".

    Returns:
        csr_array, csc_array or coo_array of the kept positions, or bsr_array of whole blocks, whose
        masked positions are stored zeros. Values are shared where s has the layout of the format.
        Lost: the key mask (dropped positions are stored zeros) and gradients.

    Raises:
        LayoutError: leading dimensions, or a layout that bsr cannot hold.
        DtypeError: another dtype.
    """
    import scipy.sparse

    check_sparse("to_scipy", s)
    if s.dtype not in (torch.float32, torch.float64):
        raise DtypeError(
            f"to_scipy: values of {s.dtype}, expected float32 or float64; use s.to(dtype)"
        )
    if format is None:
        format = "bsr" if isinstance(s.layout, BlockLayout) else "csr"
    if not among(format, _FORMATS):
        raise LayoutError(f"to_scipy: format {shown(format)}; choose one of {', '.join(_FORMATS)}")
    found = blocks("to_scipy", s) if format == "bsr" else elements("to_scipy", s)
    data, columns = _numpy(found.values), _numpy(found.columns)
    if format == "coo":
        place = (_numpy(found.rows()), columns)
        return scipy.sparse.coo_array((data, place), shape=s.layout.shape)
    make = scipy.sparse.bsr_array if format == "bsr" else scipy.sparse.csr_array
    made = make((data, columns, _numpy(found.offsets)), shape=s.layout.shape)
    return made.tocsc() if format == "csc" else made


def _numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.detach().cpu().numpy()
    return array
