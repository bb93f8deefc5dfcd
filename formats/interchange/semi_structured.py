"""2:4 weights from and to torch's semi-structured tensors.

torch holds a (rows, columns) matrix as ``packed`` (rows, columns / 2), the kept values row by row,
and ``meta`` (rows, columns / 16) int16 in the order that CUTLASS wants, which is the order an
NMLayout keeps (nm_metadata.py). float32 is 1:2 there, with a meta of columns / 8.

cuSPARSELt's form is one buffer, values and then metadata, in an order that NVIDIA does not
document and that differs between GPU generations: it cannot be read or written here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensor

from ..arguments import check_dense, kind_of
from ..errors import DtypeError, LayoutError, ShapeError, UnsupportedError
from ..nm import NMLayout
from ..nm_metadata import pack
from ..sparse import SparseTensor
from .compressed import check_sparse, live_values

#: dtype: (n, m, encoding, multiple of rows, multiple of columns), as torch asks for them.
_FORMS = {
    torch.float16: (2, 4, "2:4", 32, 64),
    torch.bfloat16: (2, 4, "2:4", 32, 64),
    torch.float32: (1, 2, "1:2-float32", 32, 32),
}


class SemiStructured(NamedTuple):
    """What torch's SparseSemiStructuredTensorCUTLASS is made of.

    Attributes:
        packed: (rows, columns / 2), the kept values.
        meta: int16 (rows, columns / 16), for float32 (rows, columns / 8).
    """

    packed: Tensor
    meta: Tensor

    def tensor(self) -> Tensor:
        """The SparseSemiStructuredTensorCUTLASS around both; its products need a CUDA device."""
        from torch.sparse import SparseSemiStructuredTensorCUTLASS

        rows, kept = self.packed.shape
        return SparseSemiStructuredTensorCUTLASS(
            torch.Size((rows, 2 * kept)), self.packed, self.meta, None, None, None
        )


def is_semi_structured(matrix: object) -> bool:
    """Whether this is one of torch's semi-structured tensors."""
    return isinstance(matrix, SparseSemiStructuredTensor)


def from_semi_structured(packed: Any, meta: Tensor | None = None) -> SparseTensor:
    """The SparseTensor of a torch semi-structured matrix.

    Args:
        packed: a SparseSemiStructuredTensor made by CUTLASS, or its ``packed`` (rows, columns / 2),
            float16, bfloat16 or float32.
        meta: with packed values, their int16 (rows, columns / 16) metadata, for float32
            (rows, columns / 8); also in the three dimensions torch's pruning kernels give it.

    Returns:
        A SparseTensor with an NMLayout, 2:4 (1:2 for float32), that shares the values where it
        pads nothing.

    Raises:
        LayoutError: cuSPARSELt's single buffer, or metadata that stands for no choice.
        DtypeError: another dtype.
        ShapeError: shapes that do not fit.
    """
    if is_semi_structured(packed):
        if packed.packed is None:
            raise LayoutError(
                "from_semi_structured: a transposed view given (it holds packed_t alone); pass the "
                "tensor it was made from, and use .T of what you get"
            )
        packed, meta = packed.packed, packed.meta
    if not isinstance(packed, Tensor) or (meta is not None and not isinstance(meta, Tensor)):
        raise LayoutError(
            f"from_semi_structured: {kind_of(packed)} and {kind_of(meta)} given, a "
            "SparseSemiStructuredTensor, or packed values and metadata, expected"
        )
    if meta is None:
        raise LayoutError(
            f"from_semi_structured: {tuple(packed.shape)} without metadata given: cuSPARSELt's "
            "single buffer, whose order is not documented and differs between GPUs; expand it "
            "where it was made, sparsify(w.to_dense(), 'nm'), or make it with "
            "SparseSemiStructuredTensor._FORCE_CUTLASS = True"
        )
    for name, given in (("packed", packed), ("meta", meta)):
        check_dense("from_semi_structured", name, given)
        if given.is_meta:
            raise UnsupportedError(
                f"from_semi_structured: {name} is on the meta device and holds nothing; expected "
                "a tensor with data"
            )
    n, m, encoding, high, wide = _form("from_semi_structured", packed.dtype)
    if packed.dim() != 2:
        raise ShapeError(
            f"from_semi_structured: packed {tuple(packed.shape)}, (rows, columns / 2) expected"
        )
    rows, columns = int(packed.shape[0]), 2 * int(packed.shape[1])
    words = columns // (4 * m)
    if rows % high or columns % wide:
        raise ShapeError(
            f"from_semi_structured: a {rows}×{columns} matrix, multiples of {high} rows and "
            f"{wide} columns expected"
        )
    if meta.dim() == 3:  # (rows, 2, words / 2), stored as words / 2, rows, 2
        meta = meta.permute(2, 0, 1)
    if meta.dtype != torch.int16 or meta.numel() != rows * words or meta.device != packed.device:
        raise ShapeError(
            f"from_semi_structured: meta {tuple(meta.shape)} {meta.dtype} on {meta.device}, int16 "
            f"({rows}, {words}) on {packed.device} expected"
        )
    layout = NMLayout.from_metadata(
        meta.reshape(1, rows, words), (rows, columns), n, m, encoding=encoding
    )
    if layout.grid[2] * m != columns:
        # torch takes float32 in multiples of 32 columns, an NMLayout is padded to 64.
        choice = _choice(meta, rows, columns, n, m, encoding)
        layout = NMLayout.from_choice(
            choice, (rows, columns), n, m, dtype=packed.dtype, encoding=encoding
        )
    layout.validate()
    padding = layout.grid[2] * n - columns // 2
    kept = torch.nn.functional.pad(packed, (0, padding)) if padding else packed
    return SparseTensor(layout, kept.reshape(-1))


def to_semi_structured(s: SparseTensor) -> SemiStructured:
    """The packed values and metadata of a 2:4 matrix (1:2 for float32), as CUTLASS takes them.

    Args:
        s: 2-D with an NMLayout, alone: 2:4 of float16 or bfloat16 or 1:2 of any of them with 32·i
            rows and 64·j columns, 1:2 of float32 with 32·i rows and 32·j columns.

    Returns:
        (packed, meta); ``.tensor()`` wraps them. Gradients flow through packed; nothing is lost but
        which of the two encodings a 1:2 of half precision had.

    Raises:
        LayoutError: another layout, n:m or shape, or leading dimensions.
        DtypeError: float64.
    """
    check_sparse("to_semi_structured", s)
    layout = s.layout
    n, m, encoding, high, wide = _form("to_semi_structured", s.dtype)
    alone = isinstance(layout, NMLayout) and not layout.transposed and layout.within is None
    # Two 1:2 pairs are a 2:4 group whatever they keep.
    if (
        not isinstance(layout, NMLayout)
        or not alone
        or (layout.n, layout.m) not in {(n, m), (1, 2)}
    ):
        raise LayoutError(
            f"to_semi_structured: given {layout!r} of {s.dtype}, an NMLayout of {n}:{m} alone "
            f"expected; convert with s.to_layout('nm', n={n}, m={m})"
        )
    rows, columns = layout.shape
    if rows % high or columns % wide:
        raise LayoutError(
            f"to_semi_structured: a {rows}×{columns} matrix, multiples of {high} rows and {wide} "
            "columns expected; pad it with zeros"
        )
    choice = layout.choice()[:, :rows]
    groups = layout.grid[2]
    packed = live_values(s).reshape(-1, groups * layout.n)[:rows, : columns // 2]
    if m == 4 and layout.m == 2:
        pairs = choice[..., 0].unflatten(-1, (-1, 2))
        choice = torch.stack((pairs[..., 0], pairs[..., 1] + 2), dim=-1)
    meta = pack(choice[:, :, : columns // m].contiguous(), encoding)[0]
    return SemiStructured(packed.contiguous(), meta)


def _form(who: str, dtype: torch.dtype) -> tuple[int, int, str, int, int]:
    if dtype not in _FORMS:
        raise DtypeError(
            f"{who}: values of {dtype}, float16, bfloat16 or float32 expected; cast them"
        )
    return _FORMS[dtype]


def _choice(meta: Tensor, rows: int, columns: int, n: int, m: int, encoding: str) -> Tensor:
    from ..nm_metadata import check_metadata, unpack

    words = meta.reshape(1, rows, -1)
    check_metadata(words, encoding, m)
    return unpack(words, encoding)[:, :, : columns // m]
