"""What an NMLayout asks of the BlockLayout that limits it, answered from what the host knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .block import BlockLayout
from .entries import distinct_starts, unpack_bits
from .errors import LayoutError


def used_patterns(
    within: BlockLayout, shape: tuple[int, int], lead: tuple[int, int], m: int
) -> tuple[int, ...]:
    """The distinct pattern of ``within`` that each entry of ``lead`` uses.

    Raises:
        LayoutError: blocks that are too large or cut groups of m, another shape, or a lead that
            does not broadcast to ``lead``.
    """
    if within.size > 64 or within.size % m:
        raise LayoutError(
            f"NMLayout.within: blocks of {within.size} for groups of {m}; expected a BlockLayout "
            "of 16, 32 or 64 that holds whole groups; pass size=… to to_layout, or another m"
        )
    fits = all(w in (1, n) for w, n in zip(within.lead, lead, strict=True))
    if within.shape != shape or not fits:
        raise LayoutError(
            f"NMLayout.within: shape {within.shape}, lead {within.lead}; expected shape {shape} "
            f"and a lead that broadcasts to {lead}"
        )
    (b, h), (wb, wh) = lead, within.lead
    return tuple(within.entry[i % wb * wh + j % wh] for i in range(b) for j in range(h))


def block_starts(within: BlockLayout) -> list[int]:
    """Where each distinct pattern's blocks start among all distinct blocks, and the end."""
    return [slot // within.size**2 for slot in distinct_starts(within.entry, within.entry_slots)]


def stored_blocks(within: BlockLayout, used: Sequence[int]) -> Tensor:
    """int64 (blocks of all entries,): the distinct block that each stored one is."""
    starts, device = block_starts(within), within.device
    ranges = [torch.arange(starts[u], starts[u + 1], device=device) for u in used]
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64, device=device)


def block_masks(within: BlockLayout) -> Tensor:
    """Bool (masks + 1, size, size): the distinct masks, and one all True that index −1 finds."""
    masks = unpack_bits(within.masks)
    return torch.cat((masks, masks.new_ones(1, within.size, within.size)))


# Reading counts from a device would stall every dynamic call, so each layout's are read once.
_counted: dict[tuple[int, int, int], list[int]] = {}


def live_slots(within: BlockLayout, n: int, m: int) -> list[int]:
    """Σ min(n, live members) over the groups of each distinct pattern."""
    known = _counted.get((within.key, n, m))
    if known is None:
        groups = block_masks(within).unflatten(-1, (within.size // m, m))
        live = groups.sum(-1).clamp_(max=n).sum((1, 2))[within.mask_index.long()]
        running = torch.cumsum(torch.cat((live.new_zeros(1), live)), 0)
        known = running[block_starts(within)].diff().tolist()
        while len(_counted) >= 64:
            _counted.pop(next(iter(_counted)))
        _counted[within.key, n, m] = known
    return known
