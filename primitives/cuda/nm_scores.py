"""Packed N:M scores on CUDA: pruned as they are computed, or sampled at given positions."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import kernel

from ..plans.nm import ENCODINGS, metadata_of
from ..plans.plan import PartPlan, Plan, split
from . import nm_scores_sm90
from .block_sm90 import runs_here
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
        nm_scores_sm90.scores(values, metadata, q, k, keep, grid, scale, given)
    else:
        _mma(values, metadata, q, k, keep, keep_rows, grid, scale, given)


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
