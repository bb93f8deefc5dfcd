"""What the CUDA kernels of tiles share: derived tables, orders of values, tiles as blocks."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from mixgrain.cuda.compile import request
from mixgrain.cuda.derived import derived
from mixgrain.cuda.launch import kernel

from ..plans import cuda_tile
from ..plans.plan import PartPlan
from .parts import CODES


def rows_first(values: Tensor, back: bool) -> Tensor:
    """Values in the order of rows, or back in that of fragments."""
    out = values.new_empty(values.shape)
    wanted = request("tile_order", {"DTYPE": CODES[values.dtype], "BACK": int(back)})
    count = values.numel()
    kernel(wanted, values.device.index)(
        (-(-count // 2048),), 256, (out.data_ptr(), values.data_ptr(), np.int64(count))
    )
    return out


def blocks_of(part: PartPlan) -> PartPlan:
    """The tiles as 16-blocks."""
    bounds, cells, t_bounds, t_cells = part.tensors
    rows, columns = part.scalars
    return derived(
        cells,
        "blocks",
        lambda: cuda_tile.as_blocks(bounds, cells, t_bounds, t_cells, (rows, columns)),
    )
