"""What the kernels need of a plan for some number of matrices, kept with the plan."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.derived import derived
from mixgrain.formats.tracing import concretely

from .plan import Work
from .upload import upload
from .walk import taken_apart, walk


class Tables(NamedTuple):
    """What the kernels need of a plan for some number of matrices.

    Attributes:
        starts: int32 (n + 1,), where each CTA's tiles start.
        tiles: int32 (t, 2), item, with the warpgroups that leave it to other tiles from bit
            ``walk.APART`` on; matrix ``b * heads + h``.
        query_patterns: int32 (B, Hq), the distinct pattern of every matrix.
        key_patterns: int32 (B, Hkv), or (B, Hq) where patterns differ by head.
        merge_ranges: int32 (B · Hq, 2), first merged row of the matrix's pattern, and how many.
        row_ranges: int32 (2, B · Hq, 4), likewise of the longer row items, and of the short ones;
            first of its row offsets; 0.
        dead: bool (B or 1, Hkv or 1, nk), values to be zeroed; None if there are none.
    """

    starts: Tensor
    tiles: Tensor
    query_patterns: Tensor
    key_patterns: Tensor
    merge_ranges: Tensor
    row_ranges: Tensor
    dead: Tensor | None


def tables(
    work: Work, shape: tuple[int, int, int], head_bytes: int, ctas: int, groups: int = 1
) -> Tables:
    """The tables for a batch, kept with the plan.

    Args:
        work: the plan.
        shape: batch entries, query heads, key heads.
        head_bytes: bytes of K and V of one key head.
        ctas: persistent CTAs, at most.
        groups: warpgroups of an item that may work in different CTAs; 1: none.

    Raises:
        CudaError: first use while a CUDA graph is being captured.
    """
    key = ("tables", shape, head_bytes, ctas, groups)
    make = functools.partial(_make, work, shape, head_bytes, ctas, groups)
    return derived(work.items, key, lambda: concretely(make))


def _make(
    work: Work, shape: tuple[int, int, int], head_bytes: int, ctas: int, groups: int
) -> Tables:
    batch, heads, kv = shape
    device = work.items.device
    pattern = np.broadcast_to(np.array(work.entry).reshape(work.lead), (batch, heads))
    flat = pattern.reshape(-1)
    merges, rows = np.array(work.merge_starts), np.array(work.row_starts)
    longer = np.array(work.row_longer)
    merge_ranges = np.stack([merges[flat], np.diff(merges)[flat]], 1)
    row_ranges = np.zeros((2, len(flat), 4), np.int64)
    row_ranges[0, :, 0], row_ranges[0, :, 1] = rows[flat], longer[flat]
    row_ranges[1, :, 0] = (rows[:-1] + longer)[flat]
    row_ranges[1, :, 1] = (np.diff(rows) - longer)[flat]
    row_ranges[:, :, 2] = flat * work.shape[0]
    by_key = pattern if work.lead[1] > 1 else np.broadcast_to(pattern[:, :1], (batch, kv))
    dead = None
    if work.dead.numel():
        dead = work.dead[torch.tensor(work.entry, device=device)].view(*work.lead, -1)
        if work.lead[1] > 1:
            # A head's value is left alone if any of the queries' heads that share it needs it.
            dead = dead.unflatten(1, (kv, -1)).all(2)
    costs = derived(work.items, "costs", lambda: work.costs.cpu().numpy())
    first, item, matrix = walk(costs, work.item_starts, flat, shape, head_bytes, ctas)
    if groups > 1 and 2 * len(item) <= ctas:
        first, item, matrix = taken_apart(item, matrix, ctas, groups)
    tiles = np.stack([item, matrix], 1)
    starts, walked, queries, keys, merged, single = upload(
        [first, tiles, pattern, by_key, merge_ranges, row_ranges], device
    )
    return Tables(starts, walked, queries, keys, merged, single, dead)
