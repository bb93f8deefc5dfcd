"""Plans for NMLayout. They depend on shapes and ``within`` alone; metadata is passed through.

So a layout made from scores a moment ago costs no planning; what the static pattern needs on CUDA
is planned once for it.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from mixgrain.formats.block import BlockLayout
from mixgrain.formats.entries import distinct_starts
from mixgrain.formats.layout import entry_slots_of, next_key
from mixgrain.formats.nm import NMLayout
from mixgrain.formats.nm_metadata import metadata_shape, padded

from . import block, cuda_block
from .plan import PartPlan, Plan, cached, join, split, validate_once

ENCODINGS = ("2:4", "1:2-half", "1:2-float32", "bytes")
# Rows of at most this many blocks are a warp's along rows; longer ones a team's of warps.
SHORT_BLOCKS = 16


def plan_of(layout: NMLayout, device: str = "") -> Plan:
    """The plan of a layout whose metadata is trusted, or not there yet.

    Args:
        layout: the positions.
        device: kind of device to plan for; "" = the one that ``within`` is on.

    Tensors: the metadata, then what the device's kernels need of ``within``: on CUDA those of
    ``cuda_block.part`` for some of the entries, which the others repeat.

    Scalars: n, m, number of the encoding, how many of these follow: size of a block of ``within``
    (on CUDA also the entries whose blocks are listed, rows of many blocks, the most blocks of
    another row); then the distinct pattern of each entry.
    """
    tensors: list[Tensor] = []
    inner: list[int] = []
    if layout.within is not None:
        if (device or layout.within.device.type) == "cuda":
            (listed,) = split(_blocks(layout.within, layout.lead, layout.within_entry))[3]
            tensors, inner = listed.tensors, listed.scalars
        else:
            tensors, inner = block.cpu(layout.within).tensors, [layout.within.size]
    scalars = [layout.n, layout.m, ENCODINGS.index(layout.encoding), len(inner), *inner]
    scalars += layout.within_entry
    kind = "nm_t" if layout.transposed else "nm"
    starts = list(layout.entry_slots)
    return join(layout, [PartPlan(kind, [layout.metadata, *tensors], scalars, starts)])


def _blocks(within: BlockLayout, lead: tuple[int, int], used: tuple[int, ...]) -> Plan:
    """Blocks of the entries that do not merely repeat others, one part "cblock".

    Entries in order are the same ones again and again where the pattern does not vary over the
    batch; where it varies over the batch but not over heads, all are listed.
    """

    def make() -> Plan:
        listed = within
        if within.lead[0] > 1 and within.lead[1] != lead[1]:
            starts = distinct_starts(within.entry, within.entry_slots)
            slots = entry_slots_of(used, [stop - start for start, stop in pairwise(starts)])
            listed = replace(within, lead=lead, entry=used, entry_slots=slots, key=next_key())
        made = cuda_block.part(listed)
        counts = made.tensors[1].diff()
        long = counts > SHORT_BLOCKS
        rest = torch.where(long, 0, counts)
        most = int(rest.max()) if rest.numel() else 0
        scalars = [within.size, listed.entries, int(long.sum()), most]
        return join(listed, [made._replace(scalars=scalars)])

    heads = lead if within.lead[0] > 1 else 0
    return cached(within, make, f"nm {heads} {cuda_block.variety(within)}")


def plan(layout: NMLayout) -> Plan:
    """The plan of an NMLayout, for every operation on the device it is on."""
    validate_once(layout)
    return plan_of(layout)


def cuda(layout: NMLayout) -> Plan:
    """The CUDA plan of an NMLayout, for every operation."""
    validate_once(layout)
    return plan_of(layout, "cuda")


def metadata_of(plan: Plan) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the metadata that belongs to a plan."""
    _, shape, entry, (part,) = split(plan)
    n, m, encoding = part.scalars[0], part.scalars[1], ENCODINGS[part.scalars[2]]
    if part.scalars[3]:
        size = part.scalars[4]
        grid = (part.starts[-1] // (size * size // m * n), size, size // m, n)
    else:
        grid = (len(entry), *padded(*shape, m, encoding), n)
    return metadata_shape(grid, encoding, m)
