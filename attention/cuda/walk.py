"""Which item of which matrix each persistent CTA computes, in which order."""

from __future__ import annotations

import heapq
import itertools

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .plan import Work

# Bytes of K and V that are worked on at a time: what stays in L2 beside Q and the output.
RESIDENT = 24 << 20
# Beyond this many tiles, a walk by strides is even enough.
DEALT = 4096
_walks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def walk(work: Work, shape: tuple[int, int, int], head_bytes: int, ctas: int) -> tuple[Tensor, Tensor]:
    """The tiles of every CTA, kept with the plan.

    Args:
        work: the plan.
        shape: batch entries, query heads, key heads.
        head_bytes: bytes of K and V of one key head.
        ctas: persistent CTAs, at most.

    Returns:
        int32 (n + 1,), where each CTA's tiles start, and int32 (tiles, 2), item and matrix
        ``b * heads + h``. Heads whose keys fit L2 together are worked on together, longest items
        first.
    """
    kept = _walks.setdefault(work.items, {})
    key = (shape, head_bytes, ctas)
    if key not in kept:
        kept[key] = _walk(work, shape, head_bytes, ctas)
    made: tuple[Tensor, Tensor] = kept[key]
    return made


def patterns_of(work: Work, batch: int, heads: int, device: torch.device) -> Tensor:
    """int64 (B, Hq): the distinct pattern of every matrix."""
    entry = torch.tensor(work.entry, device=device).view(work.lead)
    return entry.expand(batch, heads)


def _walk(
    work: Work, shape: tuple[int, int, int], head_bytes: int, ctas: int
) -> tuple[Tensor, Tensor]:
    batch, heads, kv = shape
    device = work.items.device
    pattern = patterns_of(work, batch, heads, device).flatten()
    starts = torch.tensor(work.item_starts, device=device)
    counts = starts.diff()[pattern]
    total = sum(
        n * c
        for n, c in zip(
            [b - a for a, b in itertools.pairwise(work.item_starts)],
            torch.bincount(pattern, minlength=work.patterns).tolist(),
            strict=True,
        )
    )
    matrix = torch.repeat_interleave(
        torch.arange(batch * heads, device=device), counts, output_size=total
    )
    item = torch.arange(total, device=device) - (counts.cumsum(0) - counts)[matrix]
    item = item + starts[pattern[matrix]]
    cost = work.costs[item].long()
    # As many sections of key heads as L2 needs, of about equal size.
    together = max(1, RESIDENT // max(head_bytes, 1))
    sections = -(-batch * kv // together)
    section = matrix // (heads // kv) * sections // (batch * kv)
    order = torch.argsort(matrix, stable=True)
    for key in (item, -cost, section):
        order = order[torch.argsort(key[order], stable=True)]
    tiles = torch.stack([item, matrix], 1)[order].to(torch.int32)
    ctas = max(1, min(ctas, total))
    if ctas < total <= DEALT:
        first, turn = _dealt(cost[order].tolist(), ctas)
    else:
        first, turn = _strided(total, ctas)
    return first.to(device, torch.int32), tiles[turn.to(device)].contiguous()


def _dealt(costs: list[int], ctas: int) -> tuple[Tensor, Tensor]:
    """Each tile to the CTA that is free first."""
    free = list(range(ctas))  # load * ctas + cta
    mine: list[list[int]] = [[] for _ in range(ctas)]
    for number, cost in enumerate(costs):
        first = free[0]
        mine[first % ctas].append(number)
        heapq.heapreplace(free, first + cost * ctas)
    starts = [0, *itertools.accumulate(map(len, mine))]
    return torch.tensor(starts), torch.tensor([n for own in mine for n in own])


def _strided(total: int, ctas: int) -> tuple[Tensor, Tensor]:
    """Tiles in turn; every other turn goes backwards, so that all end together."""
    turns = -(-total // ctas)
    tile = torch.arange(turns * ctas).view(turns, ctas)
    tile[1::2] = tile[1::2].flip(1)
    tile = tile.T
    kept = tile < total
    return torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)]), tile[kept]
