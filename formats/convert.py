"""SparseTensors from and to scipy's and torch's own CSR and BSR matrices.

    scipy / torch      mixgrain        arrays shared
    csr                RowLayout       values; scipy's columns, too, where they are int32
    bsr, s × s         BlockLayout     values

Both ways take one 2-D matrix. Stored zeros stay stored: positions are what the arrays say.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from .block import SIZES, BlockLayout
from .errors import DtypeError, LayoutError
from .row import RowLayout
from .sparse import SparseTensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Dimensions of the values of one matrix.
_VALUES: dict[object, int] = {torch.sparse_csr: 1, torch.sparse_bsr: 3}


def from_scipy(matrix: Any) -> SparseTensor:
    """The SparseTensor of a scipy csr or bsr array or matrix.

    Args:
        matrix: float32 or float64; bsr with square blocks of 16, 32, 64 or 128.

    Raises:
        LayoutError: another format or block size, duplicate entries, or indices out of range.
        DtypeError: another dtype.
    """
    if not scipy.sparse.issparse(matrix) or matrix.format not in ("csr", "bsr"):
        given = getattr(matrix, "format", type(matrix).__name__)
        raise LayoutError(
            f"from_scipy: given {given}, expected a scipy csr or bsr array; convert it with "
            ".tocsr() or .tobsr(blocksize=(64, 64))"
        )
    if matrix.dtype not in (np.float32, np.float64):
        raise DtypeError(
            f"from_scipy: values of {matrix.dtype}, expected float32 or float64; use .astype"
        )
    try:
        matrix.check_format(full_check=True)
    except ValueError as error:
        raise LayoutError(f"from_scipy: scipy calls the matrix broken: {error}") from error
    matrix = matrix if matrix.has_sorted_indices else matrix.sorted_indices()
    offsets, columns = torch.from_numpy(matrix.indptr), torch.from_numpy(matrix.indices)
    return _from_arrays("from_scipy", matrix.shape, offsets, columns, torch.from_numpy(matrix.data))


def from_torch(matrix: Tensor) -> SparseTensor:
    """The SparseTensor of a torch.sparse_csr or torch.sparse_bsr matrix, on its device.

    Args:
        matrix: 2-D, float16, bfloat16, float32 or float64; bsr with square blocks of 16 … 128.

    Raises:
        LayoutError: another layout, dimension or block size, or broken indices.
        DtypeError: another dtype.
    """
    given = matrix.layout if isinstance(matrix, Tensor) else type(matrix).__name__
    # Batches and trailing dense dimensions show in the values.
    if given not in _VALUES or matrix.values().dim() != _VALUES[given]:
        shape = tuple(matrix.shape) if isinstance(matrix, Tensor) else ""
        raise LayoutError(
            f"from_torch: given {given} {shape}, expected one 2-D torch.sparse_csr or sparse_bsr "
            "matrix; convert it with .to_sparse_csr() or .to_sparse_bsr((64, 64)), batches one by "
            "one"
        )
    if matrix.dtype not in _DTYPES:
        raise DtypeError(f"from_torch: values of {matrix.dtype}, expected {_DTYPES}; cast them")
    offsets, columns, values = matrix.crow_indices(), matrix.col_indices(), matrix.values()
    try:
        torch.sparse_compressed_tensor(
            offsets, columns, values, matrix.shape, layout=matrix.layout, check_invariants=True
        )
    except RuntimeError as error:
        raise LayoutError(f"from_torch: torch calls the matrix broken: {error}") from error
    return _from_arrays("from_torch", tuple(matrix.shape), offsets, columns, values)


def _from_arrays(
    caller: str, shape: tuple[int, ...], offsets: Tensor, columns: Tensor, values: Tensor
) -> SparseTensor:
    """A SparseTensor from compressed rows of elements, or of blocks if values are (n, r, c)."""
    nq, nk = int(shape[0]), int(shape[1])
    layout: RowLayout | BlockLayout
    if values.dim() == 1:
        layout = RowLayout.from_csr((nq, nk), offsets, columns)
    else:
        rows, cols = values.shape[1:]
        if rows != cols or rows not in SIZES:
            raise LayoutError(
                f"{caller}: blocks of {rows}×{cols}, expected square ones of {SIZES}; convert the "
                "matrix to such blocks, or to csr"
            )
        layout = BlockLayout.from_blocks((nq, nk), rows, offsets, columns)
    layout.validate()  # the one fault left to find is a column given twice
    return SparseTensor(layout, values.reshape(-1))


def _arrays(caller: str, s: SparseTensor) -> tuple[Tensor, Tensor, Tensor]:
    """(offsets, columns, values), zeros at dead slots; values (n,) or (blocks, size, size)."""
    if not isinstance(s, SparseTensor) or not isinstance(s.layout, RowLayout | BlockLayout):
        given = type(s.layout if isinstance(s, SparseTensor) else s).__name__
        raise LayoutError(
            f"{caller}: given {given}, expected a SparseTensor with a RowLayout (csr) or "
            "BlockLayout (bsr); make one with sparsify(s.to_dense(), 'row') or 'block'"
        )
    if s.lead_shape:
        raise LayoutError(
            f"{caller}: given shape {s.shape}, expected one 2-D matrix; convert the entries one by "
            "one"
        )
    live, values = s.live(), s.values
    if live is not None:
        values = torch.where(live, values, values.new_zeros(()))
    if isinstance(s.layout, RowLayout):
        return s.layout.row_offsets, s.layout.columns, values
    size = s.layout.size
    if any(n % size for n in s.layout.shape):
        raise LayoutError(
            f"{caller}: bsr cannot hold blocks of {size} that hang over the shape "
            f"{s.layout.shape}; pad the matrix, or use a RowLayout"
        )
    return s.layout.block_offsets, s.layout.block_columns, values.unflatten(0, (-1, size, size))


def to_scipy(s: SparseTensor) -> Any:
    """A scipy csr_array (RowLayout) or bsr_array (BlockLayout); dead slots become stored zeros.

    Args:
        s: 2-D, float32 or float64 (scipy knows no others), any device.

    Raises:
        LayoutError: another layout, leading dimensions, or blocks that hang over the shape.
        DtypeError: another dtype.
    """
    offsets, columns, values = _arrays("to_scipy", s)
    if values.dtype not in (torch.float32, torch.float64):
        raise DtypeError(
            f"to_scipy: values of {values.dtype}, expected float32 or float64; use s.to(dtype)"
        )
    parts = [t.detach().cpu().numpy() for t in (values, columns, offsets)]
    make = scipy.sparse.csr_array if values.dim() == 1 else scipy.sparse.bsr_array
    return make(tuple(parts), shape=s.layout.shape)


def to_torch(s: SparseTensor) -> Tensor:
    """A torch.sparse_csr (RowLayout) or torch.sparse_bsr (BlockLayout) matrix on the same device.

    Args:
        s: 2-D; dead slots become stored zeros. Gradients flow through the values.

    Raises:
        LayoutError: another layout, leading dimensions, or blocks that hang over the shape.
    """
    offsets, columns, values = _arrays("to_torch", s)
    layout = torch.sparse_csr if values.dim() == 1 else torch.sparse_bsr
    # torch wants both index tensors of one dtype.
    columns = columns.to(offsets.dtype)
    return torch.sparse_compressed_tensor(
        offsets, columns, values, s.layout.shape, layout=layout, check_invariants=True
    )
