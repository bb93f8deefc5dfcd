"""Packed N:M scores on Hopper: how sddmm_nm_sm90 is cut and called."""

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

from .block_sm90 import laid_out, operand_map
from .nm_parts import Grid, stored
from .parts import CODES, mask
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


# By warpgroups of a CTA, which share the keys that come in, and panels of 64 columns of D.
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


@functools.lru_cache(maxsize=256)
def sm90_request(
    dtype: torch.dtype, code: int, within: bool, given: bool, keep: bool, scaled: int, groups: int,
    panels: int,
) -> Request:  # fmt: skip
    """The kernel for D of up to 64 · panels by CTAs of ``groups``; ``scaled``: ``scaled_by``."""
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


def scaled_by(scale: float, dtype: torch.dtype, held: bool) -> int:
    """What the scale multiplies: 0 what is kept, 1 scores before they are compared, 2 Q."""
    if not 0 < scale < math.inf:
        return 1
    exact = dtype == torch.bfloat16 and 2.0**-8 <= scale <= 1 and math.frexp(scale)[0] == 0.5
    return 2 if exact and held else 0


def groups_of(within: bool, panels: int, nq: int) -> int:
    """Warpgroups of a CTA: all that there is room for, unless rows that are not there fill some."""
    if within:
        return 1
    return 4 if (4, panels) in CUTS and -(-nq // 256) * 2 <= 1.15 * -(-nq // 128) else 2


def shares(tiles: int, units: int, step: int, workers: int) -> tuple[int, int, int]:
    """How row tiles are shared out among CTAs: whole ones by turns, the key units of the others.

    Args:
        tiles: row tiles of all matrices.
        units: key units of each; steps do not go on from one row tile to the next.
        step: units of a step.
        workers: CTAs at most.

    Returns:
        CTAs; whole row tiles of each; key units of the other row tiles that each takes, each row
        tile's rounded up to whole steps.
    """
    turns, rest = divmod(tiles, workers)
    steps = rest * -(-units // step)
    each = -(-steps // workers)
    return workers if turns else -(-steps // each), turns, each * step


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


def scores(
    values: Tensor,
    metadata: Tensor,
    q: Tensor,
    k: Tensor,
    keep: Tensor | None,
    grid: Grid,
    scale: float,
    given: bool,
) -> None:
    """Scores at the positions that the metadata gives, or that are chosen now: of ``nm_scores``.

    Args:
        values: (F, slots), contiguous.
        metadata: of the layout, to be read (given) or written.
        q: (F, E, nq, D), D at most 256, its rows contiguous.
        k: (F, E, nk, D).
        keep: bool (F, E, nk) or None.
        grid: alone, or within blocks of 64.
        scale: multiplies scores, before they are compared.
        given: the positions are.
    """
    nq, nk = q.shape[2], k.shape[2]
    q, k = laid_out(q), laid_out(k)
    if nk % 2:  # keys are loaded by twos
        k = torch.nn.functional.pad(k, (0, 0, 0, 1))
    keep = None if keep is None else kept(keep)
    inside, panels = grid.size > 0, -(-q.shape[3] // 64)
    groups, each = groups_of(inside, panels, nq), values.element_size()
    cut, units = CUTS[groups, panels], CUTS[groups, panels].units
    matrices = q.shape[0] * grid.reps
    scaled = scaled_by(scale, q.dtype, cut.held and not given)
    workers = facts(q.device.index).multiprocessors * (1 if scaled == 1 else cut.ctas)
    if inside:
        line, (rows, columns) = 32, (grid.blocks * 64, 64)
        meta_dims, meta_box = (128, grid.blocks, grid.reps), (128, 1, 1)
        chunks = grid.tables[14]
        pieces = chunks.shape[0]
        ctas, turns, share = min(matrices * pieces, workers), 0, 0
    else:
        line, (rows, columns) = 32 * units, stored((nq, nk))
        meta_dims = (rows, columns // 32, grid.reps)
        meta_box = (64, 2 * units, 1)
        pieces = -(-nq // (64 * groups))
        ctas, turns, share = shares(matrices * pieces, -(-nk // 64), units, workers)
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
    wanted = sm90_request(
        q.dtype, grid.code, inside, given, keep is not None, scaled, groups, panels
    )
    kernel(wanted, q.device.index)(
        (ctas,),
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
            np.int32(matrices * pieces),
            np.int32(pieces),
            np.int32(grid.reps),
            np.int32(grid.own),
            np.int32(grid.blocks),
            np.int32(turns),
            np.int32(share),
            np.int32(nq),
            np.int32(nk),
            np.float32(scale),
        ),
        cut.shared(panels),
    )
