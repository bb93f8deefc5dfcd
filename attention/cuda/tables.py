"""What the kernels need of a plan for some number of matrices, kept with the plan.

Which CTA computes which item of which matrix, in which order: one kernel finds out, and writes
where every matrix finds its part of the plan.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.derived import derived
from mixgrain.cuda.launch import kernel
from mixgrain.formats.tracing import concretely

from .plan import Work, wait
from .room import Struct, room

# Bytes of K and V that are worked on at a time: what stays in L2 beside Q and the output.
RESIDENT = 24 << 20
# The end is as many of the shortest items as take every CTA this part of its longest item's time.
SPARE = 4
# Fewer tiles than this at once are dealt singly, so many at a time.
FEW, SINGLY = 24, 256
# With more tiles than this for every CTA, a walk by strides is even enough; so it is with more
# CTAs than threads.
DEALT, MOST_CTAS = 32, 1024
# A tile: its item; from this bit on, the warpgroups that leave it to other tiles.
APART = 28
SHARED = 33168
# Numbers of a plan that go by value.
FEW_GIVEN = 48

#: plan_walk.cu: Walk.
WALK = Struct(
    ("costs", "given", "keys", "first", "late", "after", "mine", "kept", "tile", "taker",
     "starts", "tiles", "query_patterns", "key_patterns", "merge_ranges", "row_ranges"),
    ("items", "patterns", "entry_batches", "entry_heads", "batch", "heads", "kv", "sections", "nq",
     "total", "ctas", "spare", "dealt", "parts", "groups", "by_head",
     *(f"few {n}" for n in range(FEW_GIVEN))),
)  # fmt: skip


class Tables(NamedTuple):
    """What the kernels need of a plan for some number of matrices.

    Attributes:
        starts: int32 (n + 1,), where each CTA's tiles start.
        tiles: int32 (t, 2), item, with the warpgroups that leave it to other tiles from bit
            ``APART`` on; matrix ``b * heads + h``.
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


@functools.cache
def walk_request() -> Request:
    """The kernel."""
    constants = {"FEW": FEW, "SINGLY": SINGLY, "APART": APART, "GIVEN": FEW_GIVEN}
    return request("plan_walk", constants | {"SHARED": SHARED, "CTAS": MOST_CTAS})


def tables(
    work: Work, shape: tuple[int, int, int], head_bytes: int, ctas: int, groups: int = 1
) -> Tables:
    """The tables for a batch, kept with the plan.

    Heads whose keys fit L2 together are worked on together, longest items first. The shortest tiles
    of all of them come last: an end made of the last heads alone is ragged. Where CTAs would have
    nothing to do, tiles are taken apart, a CTA for every part; results are the same, as a warpgroup
    sees the same keys in the same order.

    Args:
        work: the plan, on CUDA.
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
    device, matrices, items = work.items.device, batch * heads, work.item_starts[-1]
    by_head = work.lead[1] > 1
    mine = [b - a for a, b in zip(work.item_starts, work.item_starts[1:], strict=False)]
    # Every entry of the pattern is there for so many matrices.
    total = matrices // len(work.entry) * sum(mine[u] for u in work.entry)
    parts = 1
    if groups > 1 and 2 * total <= ctas:
        parts = groups if groups * total <= ctas else 2
    # As many sections of key heads as L2 needs, of about equal size.
    together = max(1, RESIDENT // max(head_bytes, 1))
    sections = max(1, -(-batch * kv // together))
    wait(work.items)
    given = [
        *work.entry, *work.item_starts, *work.merge_starts, *work.row_starts, *work.row_longer
    ]  # fmt: skip
    # Few numbers go along with the launch.
    few = len(given) <= FEW_GIVEN
    table = None if few else torch.tensor(given, dtype=torch.int32).to(device)
    streams = min(ctas, total) if parts == 1 else parts * total
    made = room(
        {
            "starts": max(1, streams) + 1, "tiles": 2 * parts * total, "query_patterns": matrices,
            "key_patterns": matrices if by_head else batch * kv, "merge_ranges": 2 * matrices,
            "row_ranges": 8 * matrices,
        },
        device,
    )  # fmt: skip
    scratch = room(
        {
            "keys": 2 << max(1, items).bit_length(), "first": sections * items,
            "late": sections * items, "after": items, "mine": 2 * matrices,
            "kept": sections, "tile": 2 * total, "taker": 2 * total,
        },
        device,
    )  # fmt: skip
    places = {
        "costs": work.costs.data_ptr(), "given": 0 if table is None else table.data_ptr(),
        **scratch.at, **made.at,
    }  # fmt: skip
    dealt = total <= DEALT * ctas and ctas <= MOST_CTAS
    argument = WALK.value(
        places,
        (items, work.patterns, *work.lead, batch, heads, kv, sections, work.shape[0], total, ctas,
         SPARE, dealt, parts, groups, by_head, *(given if few else ()),
         *[0] * (FEW_GIVEN - len(given) if few else FEW_GIVEN)),
    )  # fmt: skip
    with torch.cuda.device(device):
        kernel(walk_request(), device.index)((1,), 1024, (argument,), SHARED)
    dead = None
    if work.dead.numel():
        dead = work.dead[torch.tensor(work.entry, device=device)].view(*work.lead, -1)
        if by_head:
            # A head's value is left alone if any of the queries' heads that share it needs it.
            dead = dead.unflatten(1, (kv, -1)).all(2)
    # Other streams may read the tables at once.
    torch.cuda.current_stream(device).synchronize()
    found = made.parts()
    return Tables(
        found["starts"],
        found["tiles"].view(parts * total, 2),
        found["query_patterns"].view(batch, heads),
        found["key_patterns"].view(batch, heads if by_head else kv),
        found["merge_ranges"].view(matrices, 2),
        found["row_ranges"].view(2, matrices, 4),
        dead,
    )
