"""What the CUDA functions share that compute on packed N:M values."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixgrain.formats.errors import UnsupportedError
from mixgrain.formats.nm_metadata import padded

from ..plans.nm import ENCODINGS
from ..plans.plan import PartPlan

#: MG_NM of nm.cuh.
CODES = {"2:4": 0, "1:2-half": 1, "1:2-float32": 2}


class Grid(NamedTuple):
    """How the matrices of one NMLayout lie in its values and metadata.

    Attributes:
        code: MG_NM.
        size: side of the blocks that limit the choice, 0 without.
        reps: times that the listed entries are repeated to make all; all entries without blocks.
        own: listed entries; 1 without blocks.
        blocks: of the listed entries.
        slots: values of the listed entries.
        tables: of ``plans.cuda_block``, of the listed entries.
        long: block rows that a team takes along rows.
        most: blocks in the longest of the others.
    """

    code: int
    size: int
    reps: int
    own: int
    blocks: int
    slots: int
    tables: list[Tensor]
    long: int
    most: int


def within(part: PartPlan) -> bool:
    """Whether a static pattern limits the choice."""
    return bool(part.scalars[3])


def grid_of(op: str, part: PartPlan) -> Grid:
    """Read a part of kind "nm" or "nm_t".

    Raises:
        UnsupportedError: N:M that has no CUDA kernels.
    """
    n, m, number, inner = part.scalars[:4]
    encoding = ENCODINGS[number]
    if encoding not in CODES:
        raise UnsupportedError(
            f"{op}: no CUDA kernels for {n}:{m}; there are 2:4 and 1:2; compute on the CPU with "
            ".cpu(), or in float64 with mixgrain.primitives.reference"
        )
    entries = len(part.starts) - 1
    slots = part.starts[-1]
    if not inner:
        each = slots // max(entries, 1)
        return Grid(CODES[encoding], 0, entries, 1, 0, each, [], 0, 0)
    size, own, long, most = part.scalars[4:8]
    tables = part.tensors[1:]
    reps = entries // max(own, 1)
    blocks = tables[0].shape[0]
    return Grid(
        CODES[encoding], size, reps, own, blocks, blocks * size * size // 2, tables, long, most
    )


def stored(shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that are stored of a matrix without blocks."""
    rows, pairs = padded(*shape, 2, "1:2-half")
    return rows, pairs * 2


def repeated(t: Any, reps: int) -> Any:
    """(F, reps · own, N, …) as (F · reps, own, N, …); a copy where strides do not allow it."""
    if reps == 1:
        return t
    free, entries, *rest = t.shape
    if free > 1 and t.stride(0) != entries * t.stride(1):
        t = t.contiguous()
    own = entries // reps
    steps = t.stride()
    return t.as_strided((free * reps, own, *rest), (own * steps[1], *steps[1:]))


def metadata_given(part: PartPlan) -> Tensor:
    """The metadata, at an address that kernels can read in words."""
    metadata = part.tensors[0]
    if metadata.data_ptr() % 16:
        metadata = metadata.clone(memory_format=torch.contiguous_format)
    return metadata
