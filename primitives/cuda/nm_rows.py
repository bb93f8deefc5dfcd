"""The operators along rows over packed N:M values: which lanes look at which slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from mixgrain.cuda.compile import request
from mixgrain.cuda.launch import Argument, kernel

from ..plans.plan import PartPlan
from .nm_parts import Grid, grid_of, metadata_given, stored

if TYPE_CHECKING:
    from .rowwise import Call, Vectors

# rowwise.py: OP, PHASE; warps of a CTA whose rows are their own, and of a team.
_BACKWARD, _ONCE = 1, 0
WARPS, TEAM = 4, 8
# Pieces that a lane holds: the registers of 16 of one tensor, or 8 of two.
HOLDS = {False: (1, 2, 4, 8, 16), True: (1, 2, 4, 8)}
STREAM = 4


def shape_of(size: int, piece: int, pieces: int, most: int, backward: bool) -> tuple[int, ...]:
    """How rows lie over lanes.

    Args:
        size: side of a block; 0 without blocks.
        piece: slots that a lane takes together.
        pieces: pieces of a row without blocks.
        most: blocks of a row, the most there are.
        backward: two tensors are held instead of one.

    Returns:
        LANES of a row, TEAM of warps, HOLD.
    """
    holds = HOLDS[backward]
    if size:
        return size // 2 // piece, 1, _fitting(holds, most)
    if pieces <= 32 * holds[-1]:
        # Several pieces a lane keep more loads under way than several warps would.
        lanes = min(32, 1 << max(-(-pieces // STREAM) - 1, 0).bit_length())
        return lanes, 1, _fitting(holds, -(-pieces // lanes))
    return 32, TEAM, _fitting(holds, -(-pieces // (32 * TEAM)))


def _fitting(holds: tuple[int, ...], wanted: int) -> int:
    return next((hold for hold in holds if hold >= wanted), holds[-1])


def run(call: Call, phase: int, part: PartPlan, v: Vectors) -> None:
    """Queue one phase of a part "nm"."""
    grid = grid_of("softmax", part)
    if not call.free:
        return
    nq, nk = call.rows, call.columns
    rows, columns = stored((nq, nk))
    piece = min(call.piece(), 8)
    if grid.size == 16:
        piece = 4
    backward = call.op == _BACKWARD
    if grid.size == 0:
        masked = call.side > 0 or (rows, columns) != (nq, nk)
        lanes, team, hold = shape_of(0, piece, columns // 2 // piece, 0, backward)
        units = -(-rows // (32 // lanes))
        _launch(call, phase, part, grid, v, (piece, lanes, team, hold, masked), (0, 0), units)
        return
    lines = grid.tables[2].shape[0]
    masked = call.side > 0 or grid.tables[6].shape[0] > 0
    lanes, _, hold = shape_of(grid.size, piece, 0, grid.most, backward)
    runs = grid.size * lanes // 32  # warps that share a block row
    for first, stop, team in ((0, grid.long, TEAM), (grid.long, lines, 1)):
        if stop > first:
            held = HOLDS[backward][-1] if team > 1 else hold
            how = (piece, lanes, team, held, masked)
            _launch(call, phase, part, grid, v, how, (first, stop - first), (stop - first) * runs)


def _launch(
    call: Call,
    phase: int,
    part: PartPlan,
    grid: Grid,
    v: Vectors,
    how: tuple[int, int, int, int, bool],
    lines: tuple[int, int],
    units: int,
) -> None:
    piece, lanes, team, hold, masked = how
    if phase != _ONCE:
        hold = STREAM  # nothing is kept between two looks
    constants = dict(call.constants(phase, piece, hold, team, masked))
    constants |= {"NM": grid.code, "SIZE": grid.size, "LANES": lanes}
    pieces = units if team > 1 else -(-units // WARPS)
    tables = grid.tables
    wanted = request("rowwise_nm", constants)
    kernel(wanted, call.device)(
        (call.free * grid.reps * pieces,),
        32 * (team if team > 1 else WARPS),
        (
            *(_at(t) for t in (call.values, call.grad, call.out if phase != 1 else None)),
            *(_at(t) for t in (v.numbers, v.lse, v.grad_lse)),
            *call.mask(0),
            metadata_given(part).data_ptr(),
            *((tables[n].data_ptr() if grid.size else 0) for n in (0, 1, 2, 6)),
            np.int32(lines[0]),
            np.int32(lines[1]),
            np.int32(pieces),
            np.int32(grid.reps),
            np.int32(grid.own),
            np.int32(grid.blocks),
            np.int32(call.rows),
            np.int32(call.columns),
        ),
    )


def _at(t: Tensor | None) -> Argument:
    return 0 if t is None else t.data_ptr()
