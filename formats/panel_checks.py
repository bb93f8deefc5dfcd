"""What ``PanelLayout.validate`` checks; no loop over panels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import check_common, check_nnz, check_same, check_slots, check_tensor, fail
from .panel_tools import PITCH, count_live, round_up, slot_table

if TYPE_CHECKING:
    from .panel import PanelLayout


def validate_panels(layout: PanelLayout, alone: bool = True) -> None:
    """Raise LayoutError naming the first field at fault, or return None.

    Args:
        layout: the panels.
        alone: also look for panels that overlap each other; a mixed layout does so for all parts.
    """
    check_common(layout)
    int64, int32 = torch.int64, torch.int32
    of = check_tensor(layout, "panel_entry", (None,), int32)
    count = of.numel()
    if count and (int(of.min()) < 0 or int(of.max()) >= layout.distinct):
        raise fail(
            layout, "panel_entry", f"{int(of.min())} … {int(of.max())}",
            f"distinct patterns 0 … {layout.distinct - 1}",
        )  # fmt: skip
    if bool((of.diff() < 0).any()):
        raise fail(layout, "panel_entry", "falls", "panels in order of their distinct pattern")
    for axis, extent in (("row", layout.shape[0]), ("col", layout.shape[1])):
        for name in ("start", "count", "list_offset"):
            check_tensor(layout, f"{axis}_{name}", (count,), int64)
        _check_ranges(layout, axis, extent)
    # Sides are below 2**31, so that one panel's slots do not overflow; all of them together might.
    if float((layout.row_count.double() * layout.pitch.double()).sum()) > 2.0**62:
        raise fail(layout, "row_count", "more than 2**62 slots", "panels that memory can hold")
    offsets, slots = slot_table(of, layout.row_count, layout.col_count, layout.distinct)
    check_same(
        layout, "slot_offsets", check_tensor(layout, "slot_offsets", (count + 1,), int64), offsets,
        "rows × pitch of the panels before it, each rounded up to 128",
    )  # fmt: skip
    check_slots(layout, slots)
    # What follows takes memory by the number of slots, which is known to be right by now.
    for axis, extent in (("row", layout.shape[0]), ("col", layout.shape[1])):
        check_tensor(layout, f"{axis}_list", (None,), int32)
        _check_lists(layout, axis, extent)
    check_tensor(layout, "mask_offset", (count,), int64)
    bits = check_tensor(layout, "mask_bits", (None,), torch.uint8)
    size = layout.row_count * layout.pitch // 8
    bad = (layout.mask_offset < -1) | (
        (layout.mask_offset >= 0) & (layout.mask_offset > bits.numel() - size)
    )
    if bool(bad.any()):
        p = _first(bad)
        raise fail(
            layout, "mask_offset", f"{int(layout.mask_offset[p])} for panel {p}",
            f"−1, or {int(size[p])} bytes inside the {bits.numel()} of mask_bits",
        )  # fmt: skip
    _check_padding(layout)
    live = count_live(layout)
    check_nnz(layout, sum(live[u] for u in layout.entry))
    if not alone:
        return
    from .overlap import find_overlap

    where = find_overlap(layout)
    if where is not None:
        raise fail(
            layout, "panel_entry", where[1], "panels of one pattern that share no position",
            "drop the position from one of the panels",
        )  # fmt: skip


def _first(bad: Tensor) -> int:
    return int(bad.nonzero()[0, 0])


def _check_ranges(layout: PanelLayout, axis: str, extent: int) -> None:
    """Ranges lie inside the shape, no panel is empty or larger than the shape."""
    start, count = getattr(layout, f"{axis}_start"), getattr(layout, f"{axis}_count")
    bad = (count < 1) | (count > extent)
    if bool(bad.any()):
        p = _first(bad)
        raise fail(
            layout,
            f"{axis}_count",
            f"{int(count[p])} for panel {p}",
            f"at least 1, at most {extent}",
        )
    bad = (start < -1) | (start > extent - count)  # a sum could overflow
    if bool(bad.any()):
        p = _first(bad)
        raise fail(
            layout, f"{axis}_start", f"{int(start[p])} + {int(count[p])} for panel {p}",
            f"−1 for a list, or a range inside 0 … {extent - 1}",
        )  # fmt: skip


def _check_lists(layout: PanelLayout, axis: str, extent: int) -> None:
    """Lists lie inside the stored members, which lie inside the shape and rise."""
    start, count = getattr(layout, f"{axis}_start"), getattr(layout, f"{axis}_count")
    offset, listed = getattr(layout, f"{axis}_list_offset"), getattr(layout, f"{axis}_list")
    lists = start < 0
    bad = lists & ((offset < 0) | (offset > listed.numel() - count))
    if bool(bad.any()):
        p = _first(bad)
        raise fail(
            layout, f"{axis}_list_offset", f"{int(offset[p])} for panel {p}",
            f"{int(count[p])} members inside the {listed.numel()} of {axis}_list",
        )  # fmt: skip
    counts = count[lists]
    which = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    step = torch.arange(which.numel(), device=counts.device)
    step = step - (torch.cumsum(counts, 0) - counts)[which]
    members = listed[offset[lists][which] + step].long()
    bad = (members < 0) | (members >= extent)
    bad[1:] |= (which[1:] == which[:-1]) & (members[1:] <= members[:-1])
    if bool(bad.any()):
        at = _first(bad)
        raise fail(
            layout, f"{axis}_list", f"{int(members[at])} as member {int(step[at])} of a list",
            f"strictly rising members in [0, {extent})",
        )  # fmt: skip


def _check_padding(layout: PanelLayout) -> None:
    """Mask bits beyond a panel's columns are zero: they are counted as kept otherwise."""
    masked = layout.mask_offset >= 0
    ragged = masked & (layout.col_count % PITCH > 0)
    if not bool(ragged.any()):
        return
    rows = layout.row_count[ragged]
    which = torch.repeat_interleave(torch.arange(rows.numel(), device=rows.device), rows)
    row = torch.arange(which.numel(), device=rows.device) - (torch.cumsum(rows, 0) - rows)[which]
    width = (round_up(layout.col_count, PITCH) // 8)[ragged][which]
    last = layout.mask_bits[layout.mask_offset[ragged][which] + (row + 1) * width - 1]
    used = (layout.col_count % PITCH)[ragged][which]
    if bool((last.long() >> used).any()):
        at = _first((last.long() >> used) > 0)
        raise fail(
            layout, "mask_bits", f"bits beyond the columns of masked panel {int(which[at])}",
            "zeros in the padding of every row",
        )  # fmt: skip
