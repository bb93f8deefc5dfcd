"""Products of packed N:M values within a static pattern: its blocks are filled in first."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from mixgrain.cuda.compile import request
from mixgrain.cuda.launch import kernel

from ..plans.plan import PartPlan
from . import block
from .nm_parts import Grid, grid_of, metadata_given, repeated
from .parts import CODES


def spmm(
    out: Tensor,
    values: Tensor,
    x: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    part: PartPlan,
    scale: float,
    transposed: bool,
    add: bool,
) -> None:
    """Write, or add, scale · S x (or Sᵀ x when transposed) to every row of out.

    Args:
        out: (F, E, outer, D), contiguous; float32 to add.
        values: (F, slots), contiguous, aligned.
        x: (F, E, inner, D), aligned.
        keep: bool (F, E, n) or None.
        keep_rows: the mask is over rows of S.
        part: of ``plans.nm``, kind "nm", or "nm_t" where S is the transpose of what is stored.
        scale: multiplies the product.
        transposed: multiply by the transpose.
        add: add to what out holds.
    """
    grid = grid_of("spmm", part)
    if part.kind == "nm_t":
        transposed, keep_rows = not transposed, not keep_rows
    filled = expand(values, part, grid)
    blocks = PartPlan("cblock", grid.tables, [grid.size], [0, filled.shape[1]])
    block.spmm(
        repeated(out, grid.reps),
        filled,
        repeated(x, grid.reps),
        None if keep is None else repeated(keep, grid.reps),
        keep_rows,
        blocks,
        scale,
        transposed,
        add,
    )


def expand(values: Tensor, part: PartPlan, grid: Grid) -> Tensor:
    """(F, slots) as values of the blocks, (F · reps, blocks · size²)."""
    area = grid.size * grid.size
    matrices = values.shape[0] * grid.reps
    out = values.new_empty(matrices, grid.blocks * area)
    pieces = matrices * grid.blocks * area // 16
    constants = {"NM": grid.code, "SIZE": grid.size, "VALUES": CODES[values.dtype]}
    kernel(request("nm_blocks", constants), values.device.index)(
        (-(-pieces // 256),),
        256,
        (
            values.data_ptr(),
            metadata_given(part).data_ptr(),
            out.data_ptr(),
            np.int64(pieces),
            np.int64(grid.reps * grid.blocks),
        ),
    )
    return out
