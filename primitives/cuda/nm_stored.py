"""A batch of N:M matrices as it lies in memory: what all its kernels are told of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from mixgrain.formats.errors import UnsupportedError
from mixgrain.formats.nm_metadata import metadata_shape, padded

from ..plans.nm import ENCODINGS
from ..plans.plan import PartPlan

#: Elements of a matrix that may stand whole in memory for a while.
MOST_DENSE = 1 << 28


class Stored(NamedTuple):
    """An N:M matrix as it lies, whichever way it is used.

    Attributes:
        metadata: of all entries.
        encoding: index into ENCODINGS.
        n: kept per group.
        m: columns per group.
        entries: number of matrices that metadata tells apart.
        rows: of the matrix.
        columns: of the matrix.
        lines: rows as stored.
        packed: values of a stored row.
    """

    metadata: Tensor
    encoding: int
    n: int
    m: int
    entries: int
    rows: int
    columns: int
    lines: int
    packed: int

    @property
    def words(self) -> int:
        """Bytes of metadata of one matrix."""
        shape, dtype = metadata_shape(
            (1, self.lines, self.packed // self.n, self.n), ENCODINGS[self.encoding], self.m
        )
        return int(np.prod(shape)) * dtype.itemsize

    @property
    def fits(self) -> bool:
        """Whether it may stand whole in memory for a while."""
        return self.rows * self.columns <= MOST_DENSE


def stored(part: PartPlan, shape: tuple[int, int], entries: int) -> Stored:
    """What a part holds.

    Raises:
        UnsupportedError: it lies within a static pattern.
    """
    n, m, encoding, inside = part.scalars[:4]
    if inside:
        raise UnsupportedError(
            "no CUDA kernels of linear and of scores at given positions for an NMLayout within a "
            "BlockLayout in this version (spmm and softmax have them); they run on cpu: move "
            "tensors and layout with .cpu() and .to('cpu')"
        )
    rows, columns = shape[::-1] if part.kind == "nm_t" else shape
    lines, groups = padded(rows, columns, m, ENCODINGS[encoding])
    return Stored(part.tensors[0], encoding, n, m, entries, rows, columns, lines, groups * n)
