"""Packed N:M scores on CUDA: pruned as they are computed, or sampled at given positions."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import kernel
from mixgrain.cuda.tma import descriptor

from ..plans.nm import ENCODINGS, metadata_of
from ..plans.plan import PartPlan, Plan, split
from .block_sm90 import laid_out, operand_map, runs_here
from .nm_parts import CODES as NM_CODES
from .nm_parts import Grid, grid_of, metadata_given, stored, within
from .parts import (
    CODES,
    THREADS,
    aligned,
    check_dtypes,
    dense,
    held_dim,
    mask,
    mask_side,
    sddmm_shared,
    tf32,
)
from .rowwise import kept


class Cut(NamedTuple):
    """How sddmm_nm_sm90 is cut: what its CTAs hold, and how many a multiprocessor has."""

    groups: int  # warpgroups of a CTA, 64 rows each
    units: int  # key units of 64 a step
    stages: int
    queries: int  # places for Q
    results: int  # of a warpgroup
    ctas: int
    held: bool = False  # Q in registers

    @property
    def threads(self) -> int:
        """Consumers, and a producer that leaves its registers to them, or a warp."""
        return 128 * self.groups + (128 if self.held else 32)

    def shared(self, panels: int) -> int:
        """Dynamic shared memory of a CTA: Q, stages of keys, results of its warpgroups."""
        tiles = self.queries * self.groups + self.stages * self.units
        results = self.results * self.groups * (self.units * 4096 + 1024)
        return panels * tiles * 8192 + results + 1024


# By warpgroups of a CTA and panels of 64 columns of D. Warpgroups of a CTA share the keys that come in.
CUTS = {
    (1, 1): Cut(1, 2, 3, 1, 2, 2),
    (1, 2): Cut(1, 1, 3, 1, 2, 2),
    (1, 3): Cut(1, 1, 3, 1, 2, 1),
    (1, 4): Cut(1, 1, 3, 1, 2, 1),
    (2, 1): Cut(2, 2, 3, 1, 2, 2),
    (2, 2): Cut(2, 1, 3, 1, 3, 2),
    (2, 3): Cut(2, 1, 3, 2, 3, 1),
    (2, 4): Cut(2, 1, 3, 1, 3, 1),
    (4, 1): Cut(4, 2, 4, 1, 3, 1, held=True),
    (4, 2): Cut(4, 1, 3, 1, 3, 1, held=True),
}
# What a piece costs besides its steps, in key units.
BEGIN = 2


def prune(
    q: Tensor,
    k: Tensor,
    keep: Tensor | None,
    tensors: list[Tensor],
    dims: list[int],
    name: str,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Scores (1, slots) of the kept keys, and the metadata that says which they are.

    Scores are compared in float32, scaled and masked, before they are rounded.
    """
    check_dtypes("sddmm", q.dtype, k.dtype, dtype)
    plan = Plan(tensors, dims, name)
    slots, _, _, (part,) = split(plan)
    grid_of("sddmm", part)
    shape, kind = metadata_of(plan)
    values = q.new_empty(q.shape[0], slots, dtype=dtype)
    metadata = q.new_empty(*shape, dtype=kind)
    if slots:
        q, k = aligned(q), aligned(k)
        scores(values, metadata, q, k, keep, False, part, scale, given=False)
    return values, metadata


def takes(part: PartPlan, q: Tensor, k: Tensor) -> bool:
    """Whether sampled scores are computed here: of attention; others in ``nm.py``, for any n:m."""
    heads = q.shape[3] <= 256 and q.stride(3) == 1 and k.stride(3) == 1
    return within(part) or (heads and ENCODINGS[part.scalars[2]] in NM_CODES)


def sddmm(
    values: Tensor,
    q: Tensor,
    k: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    part: PartPlan,
    scale: float,
) -> None:
    """Write scale · q kᵀ to the slots of a part "nm"; of "nm_t", to those of the stored matrix.

    Args:
        values: (F, slots), contiguous.
        q: (F, E, nq, D), aligned.
        k: (F, E, nk, D), aligned.
        keep: bool (F, E, n) or None.
        keep_rows: the mask is over rows.
        part: of ``plans.nm``.
        scale: multiplies scores.
    """
    if part.kind == "nm_t":
        q, k, keep_rows = k, q, not keep_rows
    scores(values, metadata_given(part), q, k, keep, keep_rows, part, scale, given=True)


def scores(
    values: Tensor,
    metadata: Tensor,
    q: Tensor,
    k: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    part: PartPlan,
    scale: float,
    given: bool,
    hopper: bool | None = None,
) -> None:
    """Scores at the positions that the metadata gives, or that are chosen now.

    Args:
        values: (F, slots), contiguous.
        metadata: of the layout, to be read (given) or written.
        q: (F, E, nq, D) of the stored matrix.
        k: (F, E, nk, D).
        keep: bool (F, E, n) or None.
        keep_rows: the mask is over stored rows.
        part: of ``plans.nm``.
        scale: multiplies scores, before they are compared.
        given: the positions are.
        hopper: use the kernel for sm_90a; None = where it is one and takes these operands.
    """
    grid = grid_of("sddmm", part)
    if not q.shape[3]:  # no head dimension: scores of zero, of which the first ones stay
        q, k = (t.new_zeros(*t.shape[:3], 8) for t in (q, k))
    can = (
        facts(q.device.index).hopper
        and runs_here(q.shape[3], q.dtype, k.dtype, values.dtype)
        and grid.code < 2
        and grid.size in (0, 64)
        and q.shape[3] <= 256
        and (keep is None or not keep_rows)
    )
    if can if hopper is None else hopper:
        _wgmma(values, metadata, q, k, keep, grid, scale, given)
    else:
        _mma(values, metadata, q, k, keep, keep_rows, grid, scale, given)


@functools.lru_cache(maxsize=256)
def sm90_request(
    dtype: torch.dtype, code: int, within: bool, given: bool, keep: bool, scaled: int, groups: int,
    panels: int,
) -> Request:  # fmt: skip
    """The kernel for D of up to 64 · panels, ``groups`` warpgroups a CTA; ``scaled``: of ``_scaled``."""
    cut = CUTS[groups, panels]
    constants = {
        "DTYPE": CODES[dtype],
        "NM": code,
        "WITHIN": int(within),
        "GIVEN": int(given),
        "KEEP": int(keep),
        "SCALE": scaled,
        "GROUPS": groups,
        "UNITS": cut.units,
        "PANELS": panels,
        "STAGES": cut.stages,
        "QUERIES": cut.queries,
        "RESULTS": cut.results,
        "HELD": int(cut.held),
        "CTAS": 1 if scaled == 1 else cut.ctas,
    }
    return request("sddmm_nm_sm90", constants, flush=True)


def _scaled(scale: float, dtype: torch.dtype, held: bool) -> int:
    """What the scale multiplies: 0 what is kept, 1 scores before they are compared, 2 Q in registers."""
    if not 0 < scale < math.inf:
        return 1
    exact = dtype == torch.bfloat16 and 2.0**-8 <= scale <= 1 and math.frexp(scale)[0] == 0.5
    return 2 if exact and held else 0


def groups_of(within: bool, panels: int, nq: int) -> int:
    """Warpgroups of a CTA: as many as there is room for, unless rows that do not exist fill some."""
    if within:
        return 1
    return 4 if (4, panels) in CUTS and -(-nq // 256) * 2 <= 1.15 * -(-nq // 128) else 2


def span_of(tiles: int, units: int, step: int, workers: int) -> int:
    """Key units of a piece of a row tile, a multiple of ``step``: workers are done soonest."""

    def cost(pieces: int) -> int:
        span = -(-units // (pieces * step)) * step
        return -(-tiles * -(-units // span) // workers) * (span + BEGIN)

    pieces = min(range(1, max(2, min(units // step, 64) + 1)), key=cost)
    return -(-units // (pieces * step)) * step


def _key_maps(k: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Keys 4x, 4x + 1 and keys 4x + 2, 4x + 3, in boxes of 16 x; an even number of keys."""
    free, entries, n, width = k.shape
    size = k.element_size()
    row, entry, batch = (k.stride(d) * size for d in (2, 1, 0))

    def of(shift: int, count: int) -> np.ndarray:
        dims = (width, 2, count, entries, free)
        at = k.data_ptr() + shift * row
        return descriptor(at, k.dtype, dims, (row, 4 * row, entry, batch), (64, 2, 16, 1, 1))

    # Two keys: the second map reads them once more, and no result is taken from there.
    return of(0, -(-n // 4)), of(2, n // 4) if n >= 4 else of(0, 1)


def _wgmma(
    values: Tensor,
    metadata: Tensor,
    q: Tensor,
    k: Tensor,
    keep: Tensor | None,
    grid: Grid,
    scale: float,
    given: bool,
) -> None:
    nq, nk = q.shape[2], k.shape[2]
    q, k = laid_out(q), laid_out(k)
    if nk % 2:  # keys are loaded by twos
        k = torch.nn.functional.pad(k, (0, 0, 0, 1))
    keep = None if keep is None else kept(keep)
    inside, panels = grid.size > 0, -(-q.shape[3] // 64)
    groups, each = groups_of(inside, panels, nq), values.element_size()
    cut, units = CUTS[groups, panels], CUTS[groups, panels].units
    matrices = q.shape[0] * grid.reps
    workers = facts(q.device.index).multiprocessors * cut.ctas
    if inside:
        line, (rows, columns) = 32, (grid.blocks * 64, 64)
        meta_dims, meta_box = (128, grid.blocks, grid.reps), (128, 1, 1)
        chunks = grid.tables[14]
        pieces, span = chunks.shape[0], 0
    else:
        line, (rows, columns) = 32 * units, stored((nq, nk))
        meta_dims = (rows, columns // 32, grid.reps)
        meta_box = (64, 2 * units, 1)
        tiles, across = -(-nq // (64 * groups)), -(-nk // 64)
        span = span_of(tiles * matrices, across, units, workers)
        pieces = tiles * -(-across // span)
    packed = columns // 2
    # The copy engine does not look at what it moves: two words of metadata are 32 bits.
    meta_map = descriptor(
        metadata.data_ptr(),
        torch.float32,
        meta_dims,
        (meta_dims[0] * 4, meta_dims[0] * meta_dims[1] * 4),
        meta_box,
        0,
    )
    values_map = descriptor(
        values.data_ptr(),
        values.dtype,
        (packed, rows, matrices),
        (packed * each, rows * packed * each),
        (line, 64, 1),
        line * each,
    )
    scaled = _scaled(scale, q.dtype, cut.held and not given)
    wanted = sm90_request(
        q.dtype, grid.code, inside, given, keep is not None, scaled, groups, panels
    )
    total = matrices * pieces
    kernel(wanted, q.device.index)(
        (min(total, workers),),
        cut.threads,
        (
            operand_map(q, 64 * groups),
            *_key_maps(k),
            values_map,
            meta_map,
            metadata.data_ptr(),
            *mask(keep)[:3],
            grid.tables[0].data_ptr() if inside else 0,
            grid.tables[14].data_ptr() if inside else 0,
            grid.tables[6].data_ptr() if inside else 0,
            np.int32(total),
            np.int32(pieces),
            np.int32(grid.reps),
            np.int32(grid.own),
            np.int32(grid.blocks),
            np.int32(span),
            np.int32(nq),
            np.int32(nk),
            np.float32(scale),
        ),
        cut.shared(panels),
    )


@functools.lru_cache(maxsize=1024)
def mma_request(
    size: int, width: int, operand: torch.dtype, out: torch.dtype, code: int, given: bool,
    side: int, rounded: bool,
) -> tuple[Request, int]:  # fmt: skip
    """The kernel of every architecture, and its shared memory."""
    dim = held_dim(width, operand)
    shared = sddmm_shared(size if size in (16, 32) else 64, dim, operand, out)
    constants = {
        "SIZE": size,
        "DTYPE": CODES[operand],
        "OUT": CODES[out],
        "NM": code,
        "DIM": dim,
        "GIVEN": int(given),
        "KEEP": side,
        "TF32": int(rounded),
        "SHARED": shared,
    }
    return request("prune_nm", constants, flush=operand != torch.float32), shared


def _mma(
    values: Tensor,
    metadata: Tensor,
    q: Tensor,
    k: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    grid: Grid,
    scale: float,
    given: bool,
) -> None:
    nq, nk = q.shape[2], k.shape[2]
    wanted, shared = mma_request(
        grid.size,
        q.shape[3],
        q.dtype,
        values.dtype,
        grid.code,
        given,
        mask_side(keep, not keep_rows),
        tf32(q.dtype),
    )
    if grid.size:
        pieces = grid.tables[9].shape[0]
    else:
        rows, columns = stored((nq, nk))
        pieces = -(-rows // 64) * -(-columns // 256)
    kernel(wanted, q.device.index)(
        (q.shape[0] * grid.reps * pieces,),
        THREADS,
        (
            values.data_ptr(),
            metadata.data_ptr(),
            *dense(q),
            *dense(k),
            *mask(keep),
            grid.tables[0].data_ptr() if grid.size else 0,
            grid.tables[9].data_ptr() if grid.size else 0,
            grid.tables[6].data_ptr() if grid.size else 0,
            np.int32(pieces),
            np.int32(grid.reps),
            np.int32(grid.own),
            np.int32(grid.blocks),
            np.int32(nq),
            np.int32(nk),
            np.int32(q.shape[3]),
            np.float32(scale),
        ),
        shared,
    )
