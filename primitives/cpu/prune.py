"""CPU kernel of dynamic N:M: score, choose n of every m, encode."""

from __future__ import annotations

import torch
from torch import Tensor

from mixgrain.formats.nm import choose
from mixgrain.formats.nm_metadata import ROWS, pack

from ..checks import accumulation
from ..plans.nm import metadata_of
from ..plans.plan import Plan
from .matrix import Matrix, operand
from .nm import NMPart, NMWithinPart
from .part import Dropped


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

    Scores are compared in the accumulation dtype, scaled and masked, before they are rounded. The
    full matrix of scores never exists; it is chosen from strip by strip.
    """
    plan = Plan(tensors, dims, name)
    shape, kind = metadata_of(plan)
    metadata = torch.zeros(shape, dtype=kind)
    matrix = Matrix(plan._replace(tensors=[metadata, *tensors[1:]]))
    values = q.new_empty(1, matrix.slots, dtype=dtype)
    wide = accumulation(q.dtype, dtype)
    rows, cols = matrix.padded
    for f, e in matrix.pairs(1):
        dropped = matrix.dropped(keep, False, f, e)
        left, right = operand(q[f, e], rows, wide), operand(k[f, e], cols, wide)
        ((part, span),) = matrix.parts(e)
        if isinstance(part, NMWithinPart):
            _prune_within(part, values[f, span], left, right, scale, dropped)
        else:
            assert isinstance(part, NMPart)
            _prune_alone(part, values[f, span], left, right, scale, dropped)
    return values, metadata


def _prune_alone(
    part: NMPart, out: Tensor, q: Tensor, k: Tensor, scale: float, dropped: Dropped | None
) -> None:
    nk = part.shape[1]
    live = None if dropped is None else ~dropped.mask[:nk]
    # Padding keeps the first n of each group, which every encoding can say.
    filler = torch.arange(part.n, dtype=torch.uint8)
    for begin, stop in part.pieces(q.shape[1]):
        scores = (q[begin:stop] @ k.T).mul_(scale)
        choice = filler.repeat(stop - begin, part.groups, 1)
        inside = scores[: max(part.shape[0] - begin, 0), :nk]
        picked = choose(inside, live, part.n, part.m)
        choice[: picked.shape[0], : picked.shape[1]] = picked
        if part.encoding == "bytes":
            part.metadata[begin:stop] = choice
        else:
            split = part.metadata.view(-1, part.padded[0] // ROWS, 2 * ROWS)
            packed = pack(choice[None], part.encoding).view(split.shape[0], -1, 2 * ROWS)
            split[:, begin // ROWS : stop // ROWS] = packed
        strip = part.strip(begin, stop)
        m = scores.gather(1, strip.at)
        strip.kill(m, 0.0, dropped)
        strip.store(out, m)


def _prune_within(
    part: NMWithinPart, out: Tensor, q: Tensor, k: Tensor, scale: float, dropped: Dropped | None
) -> None:
    size = part.size
    for inner in part.block_strips(q.shape[1]):
        scores = inner.scores(q, k, scale)
        inside = torch.ones(scores.shape, dtype=torch.bool)
        inner.kill_static(inside, False)
        live = inside
        if dropped is not None:
            live = inside.clone()
            inner.kill(live, False, dropped)

        def blocks(m: Tensor, c: int = inner.count) -> Tensor:
            return m.view(-1, size, c, size).transpose(1, 2).reshape(-1, size, size)

        apart = blocks(scores)
        choice = choose(apart, blocks(live), part.n, part.m, blocks(inside))
        part.metadata[inner.span or inner.blocks] = pack(choice, part.encoding)
        strip = part.within_strip(inner)
        m = apart.unflatten(-1, (-1, part.m)).gather(-1, strip.choice)
        m = strip.side_by_side(m)
        strip.kill(m, 0.0, dropped)
        strip.store(out, m)
