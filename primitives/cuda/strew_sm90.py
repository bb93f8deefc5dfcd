"""Rows of single entries times rows of tokens on sm_90a: spmm_strew_sm90."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.derived import derived
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import kernel

from ..plans import cuda_strew
from ..plans.plan import PartPlan
from .block_sm90 import operand_map
from .parts import CODES, MOST_MATRICES, activation_constant, of_layer

# Tiles of tokens that a grid counts.
MOST_TILES = 65_535
# Entries whose tables are worth their memory: while they are made, some 150 bytes each.
MOST_ENTRIES = 1 << 27


class Cut(NamedTuple):
    """How the work is cut.

    Attributes:
        tall: rows of a CTA, 64 or 128.
        wide: tokens of a CTA.
        deep: inner positions of a step, 64 or 128.
        parts: CTAs of a cluster, which share the steps of a line.
        stages: of a step.
        teams: of producers.
        team: threads of a team.
    """

    tall: int
    wide: int
    deep: int
    parts: int
    stages: int
    teams: int
    team: int

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return 2 * self.tall + self.teams * self.team

    @property
    def piece(self) -> int:
        """Bundles of entries that a team of producers has at once, of an eighth of a tile."""
        return self.tall * self.deep // (8 * cuda_strew.BUNDLE)

    @property
    def shared(self) -> int:
        """Dynamic shared memory of a CTA, bytes."""
        # Two pieces of each team, 4 bytes an entry; room to align.
        tables = 2 * self.teams * self.piece * cuda_strew.BUNDLE * 4
        return self.stages * 2 * self.deep * (self.tall + self.wide) + tables + 1024


# Cycles of a multiprocessor until a CTA has its first step and after its last, of an entry, and of
# each piece of a step but one: slots that are far apart are in several.
START, ENTRY, PIECE = 4200, 0.28, 150
# What kernels that gather take to start; bytes that they turn, and of rows of x that they gather,
# in a cycle.
LAUNCHES, TURN, GATHER = 17_600, 12, 44
# What spmm_row_few takes to start, and for each of up to eight tokens; bytes of x that it gathers.
FEW, FEW_TOKEN, FEW_GATHER = 4800, 900, 32
# Cycles of a step, by cut.
COSTS = {
    Cut(64, 16, 128, 2, 8, 4, 64): 470,
    Cut(64, 32, 128, 2, 7, 4, 64): 540,
    Cut(64, 64, 128, 1, 5, 4, 64): 620,
    Cut(64, 64, 128, 2, 5, 4, 64): 680,
    Cut(128, 128, 64, 1, 5, 4, 64): 770,
    Cut(128, 128, 64, 2, 5, 4, 64): 920,
    Cut(128, 256, 64, 1, 4, 4, 32): 1180,
}


def takes(
    parts: list[PartPlan],
    values: Tensor,
    x: Tensor,
    keep: Tensor | None,
    dtype: torch.dtype,
    transposed: bool,
    outer: int,
    few: bool,
) -> bool:
    """Whether ``spmm`` is for this product, and faster than gathering rows of x for each entry.

    Args:
        parts: of the plan.
        values: (F, slots).
        x: (F, E, inner, T), any strides.
        keep: run-time mask or None.
        dtype: of the result.
        transposed: multiply by the transpose.
        outer: rows of the result.
        few: ``row_few`` takes it too.
    """
    part = parts[0]
    if len(parts) > 1 or part.kind != "crow" or not of_layer(keep, (values.dtype, dtype), x):
        return False
    order = part.tensors[4]
    if order.dtype != torch.int32 or not 0 < order.numel() <= MOST_ENTRIES:
        return False
    if outer % 8 or x.shape[3] > MOST_TILES * max(how.wide for how in COSTS):
        return False
    if not facts(x.device.index).hopper:
        return False
    inner, width = x.shape[2:]
    return faster(facts(x.device.index).multiprocessors, outer, inner, width, order.numel(), few)


def faster(several: int, outer: int, inner: int, width: int, positions: int, few: bool) -> bool:
    """Whether this beats kernels that gather, whatever the number of matrices."""
    how = cut(several, outer, inner, width, positions)
    gathered = positions * width * 2 / several
    if few:
        others = FEW + FEW_TOKEN * min(width, 8) + gathered / FEW_GATHER
    else:
        turned = (outer + inner) * width * 4 / (TURN * several)
        others = LAUNCHES + turned + gathered / GATHER
    return cycles(how, several, outer, inner, width, positions) < others


def spmm(
    out: Tensor,
    values: Tensor,
    x: Tensor,
    part: PartPlan,
    scale: float,
    transposed: bool,
    bias: Tensor | None = None,
    activation: int = 0,
) -> None:
    """Scale · S x, or scale · Sᵀ x, plus the bias of each row, activated, to rows of tokens.

    Args:
        out: (F, 1, T, outer), contiguous.
        values: (F, slots), contiguous.
        x: (F, 1, inner, T), as ``takes`` says.
        part: from ``plans.cuda_row``.
        scale: multiplies the product.
        transposed: multiply by the transpose.
        bias: (outer,) of x's dtype, contiguous, or None.
        activation: a code of ``activations``, applied before rounding; 0 = none.
    """
    _, _, width, outer = out.shape
    inner, device = x.shape[2], x.device.index
    indices, items = (part.tensors[n] for n in ((3, 5) if transposed else (0, 1)))
    order = part.tensors[4] if transposed else None
    how = cut(facts(device).multiprocessors, outer, inner, width, len(indices))
    table = derived(
        items,
        ("strewn", how.tall, how.deep),
        lambda: cuda_strew.strewn(items, indices, order, outer, inner, how.tall, how.deep),
    )
    dealt = derived(
        items,
        ("dealt", *how),
        lambda: cuda_strew.dealt(table, how.parts, how.teams, how.piece),
    )
    run = kernel(spmm_request(how, x.dtype, activation), device)
    for start in range(0, out.shape[0], MOST_MATRICES):
        to, weights, right = (t[start : start + MOST_MATRICES] for t in (out, values, x))
        run(
            (dealt.heads.shape[0], -(-width // how.wide), to.shape[0]),
            how.threads,
            (
                operand_map(right.mT, how.wide),
                weights.data_ptr() + part.starts[0] * values.element_size(),
                np.int64(weights.shape[1]),
                dealt.heads.data_ptr(),
                dealt.pieces.data_ptr(),
                table.spots.data_ptr(),
                table.slots.data_ptr(),
                table.bounds.data_ptr(),
                indices.data_ptr(),
                0 if order is None else order.data_ptr(),
                right.data_ptr(),
                np.int64(right.stride(0)),
                np.int64(right.stride(3)),
                np.float32(scale),
                0 if bias is None else bias.data_ptr(),
                to.data_ptr(),
                np.int32(outer),
                np.int32(width),
            ),
            how.shared,
        )


def cut(several: int, outer: int, inner: int, width: int, positions: int) -> Cut:
    """How the work is cut, whatever the number of matrices: all add up the same way."""
    fitting = (how for how in COSTS if -(-width // how.wide) <= MOST_TILES)
    return min(fitting, key=lambda how: cycles(how, several, outer, inner, width, positions))


def cycles(how: Cut, several: int, outer: int, inner: int, width: int, positions: int) -> float:
    """What one matrix takes, of which every step is there."""
    ctas = -(-outer // how.tall) * how.parts
    steps = -(-inner // (how.deep * how.parts))
    further = max(how.tall * positions / (outer * cuda_strew.FAR) - 1, 0)
    one = START + steps * (COSTS[how] + PIECE * further) + ENTRY * positions / ctas
    return -(-ctas * -(-width // how.wide) // several) * one


@functools.lru_cache(maxsize=256)
def spmm_request(how: Cut, dtype: torch.dtype, activation: int = 0) -> Request:
    """The kernel."""
    constants = {"ROWS": how.tall, "WIDE": how.wide, "DEEP": how.deep, "PARTS": how.parts}
    constants |= {"STAGES": how.stages, "TEAMS": how.teams, "TEAM": how.team, "DTYPE": CODES[dtype]}
    constants |= activation_constant(activation)
    return request("spmm_strew_sm90", constants, flush=True)
