"""From one layout to another: the same positions and values in another order of slots.

Nothing dense is built on the way: positions are compared as sorted numbers, one per kept position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .costs import Costs, check_costs
from .errors import LayoutError
from .layout import Layout
from .nm import NMLayout, choose
from .nm_metadata import check_encoding
from .pattern_ragged import from_layout
from .sparse import SparseTensor
from .split import KINDS as SPLIT_KINDS
from .split import to_layout as split_layout
from .tile import SIZE, TileLayout

KINDS = ("tile", "nm", *SPLIT_KINDS)


def convert_layout(
    layout: Layout,
    kind: str,
    size: int = 64,
    n: int = 2,
    m: int = 4,
    dtype: torch.dtype = torch.float32,
    costs: Costs | None = None,
) -> Layout:
    """A layout of another kind that keeps the same positions.

    "row", "block" and "mixed" keep exactly them, and share equal entries as ``layout`` does. "tile"
    and "nm" keep whole units: every position of a touched tile, n of every m columns.

    Args:
        layout: any layout, on any device.
        kind: "row", "block", "mixed", "tile" or "nm".
        size: side of the blocks (block, mixed).
        n: kept of each group (nm).
        m: columns of a group (nm).
        dtype: of the values it is meant for; picks the metadata of 1:2 (nm).
        costs: rates that "mixed" minimises; the device's defaults if None.

    Raises:
        LayoutError: an unknown kind or size, or positions that the kind cannot hold.
    """
    if kind not in KINDS:
        raise LayoutError(f"to_layout: kind {kind!r}; choose one of {', '.join(map(repr, KINDS))}")
    return _convert(layout, None, kind, size, n, m, dtype, costs)


def to_layout(
    s: SparseTensor,
    target: str | Layout,
    size: int = 64,
    n: int = 2,
    m: int = 4,
    costs: Costs | None = None,
) -> SparseTensor:
    """A SparseTensor's positions and values in another layout; see SparseTensor.to_layout."""
    source = s.layout
    check_costs("to_layout", costs)
    if isinstance(target, str) and target not in KINDS:
        raise LayoutError(
            f"to_layout: kind {target!r}; choose one of {', '.join(map(repr, KINDS))}"
        )
    key, slot = sorted_positions(source)
    if isinstance(target, str):
        made = _convert(source, key, target, size, n, m, s.dtype, costs)
    else:
        made = target
        _check_target(source, made)
    where = _places(made, key, slot)
    held = int((where >= 0).sum())
    if held != key.numel():
        raise _lacking(source, made, key, where, slot)
    if not source.slots:
        values = s.values.new_zeros(*s.values.shape[:-1], made.slots)
    else:
        values = s.values.index_select(-1, where.clamp(min=0))
        values = torch.where(where >= 0, values, values.new_zeros(()))
    return SparseTensor(made, values, s.keep, s.keep_rows)


def _convert(
    layout: Layout,
    key: Tensor | None,
    kind: str,
    size: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    costs: Costs | None,
) -> Layout:
    if kind in SPLIT_KINDS:
        return split_layout(from_layout(layout), kind, *layout.shape, size, layout.device, costs)
    key = sorted_positions(layout)[0] if key is None else key
    return _tiles(layout, key) if kind == "tile" else _groups(layout, key, n, m, dtype)


def sorted_positions(layout: Layout) -> tuple[Tensor, Tensor]:
    """The kept positions of every entry in C order.

    Returns:
        key: int64 (nnz,), (entry · nq + row) · nk + column, rising.
        slot: int64 (nnz,), the slot of each.
    """
    nq, nk = layout.shape
    row, column = layout.indices()
    key = (layout.slot_entry() * nq + row) * nk + column
    live = layout.live()
    slot = torch.arange(layout.slots, device=key.device)
    if live is not None:
        key, slot = key[live], slot[live]
    if bool((key[1:] <= key[:-1]).any()):
        key, order = key.sort()
        slot = slot[order]
    return key, slot


def _tiles(layout: Layout, key: Tensor) -> TileLayout:
    if layout.lead != (1, 1):
        raise LayoutError(
            f"to_layout: 'tile' holds one 2-D matrix, given lead {layout.lead}; convert the "
            "entries one by one, or choose another kind"
        )
    (nq, nk), across = layout.shape, -(-layout.shape[1] // SIZE)
    row, column = key // max(nk, 1), key % max(nk, 1)
    tile = torch.unique(row // SIZE * across + column // SIZE)
    return TileLayout.from_tiles(tile // max(across, 1), tile % max(across, 1), (nq, nk))


def _groups(layout: Layout, key: Tensor, n: int, m: int, dtype: torch.dtype) -> NMLayout:
    check_encoding(n, m, "bytes")
    nq, nk = layout.shape
    groups = -(-nk // m)
    line, column = key // max(nk, 1), key % max(nk, 1)
    _, counts = torch.unique_consecutive(line * groups + column // m, return_counts=True)
    if bool((counts > n).any()):
        at = int((counts.cumsum(0) - counts)[counts > n][0])
        entry, row = divmod(int(line[at]), nq)
        raise LayoutError(
            f"to_layout: {int(counts.max())} positions in one group of {m}, first in entry "
            f"{entry}, row {row}, group {int(column[at]) // m}; {n}:{m} holds {n}; choose another "
            "n and m, or prune with sparsify(s.to_dense(), 'nm', prune=True)"
        )
    # n of every m are stored whatever is kept, so a flag for each element is no more than that.
    kept = torch.zeros(layout.entries * nq * nk, dtype=torch.bool, device=key.device)
    kept[key] = True
    kept = kept.reshape(layout.entries, nq, nk)
    choice = choose(torch.zeros((), device=key.device).expand(kept.shape), kept, n, m)
    return NMLayout.from_choice(choice, (nq, nk), n, m, lead=layout.lead, dtype=dtype)


def _places(made: Layout, key: Tensor, slot: Tensor) -> Tensor:
    """int64 (slots of `made`,): the source slot at the same position, −1 where there is none."""
    where = torch.full((made.slots,), -1, dtype=torch.int64, device=key.device)
    wanted, into = sorted_positions(made)
    if not key.numel():
        return where
    at = torch.searchsorted(key, wanted).clamp_(max=key.numel() - 1)
    found = key[at] == wanted
    where[into[found]] = slot[at[found]]
    return where


def _check_target(source: Layout, made: Layout) -> None:
    if not isinstance(made, Layout):
        raise LayoutError(
            f"to_layout: {type(made).__name__} given; give a kind, one of "
            f"{', '.join(map(repr, KINDS))}, or a layout"
        )
    if (made.shape, made.lead) != (source.shape, source.lead) or made.device != source.device:
        raise LayoutError(
            f"to_layout: given {made!r} on {made.device} for {source!r} on {source.device}; "
            "expected the same shape, lead and device"
        )


def _lacking(source: Layout, made: Layout, key: Tensor, where: Tensor, slot: Tensor) -> LayoutError:
    missing = torch.ones(source.slots, dtype=torch.bool, device=key.device)
    missing[where[where >= 0]] = False
    first = int(key[missing[slot]][0])
    line, column = divmod(first, source.shape[1])
    entry, row = divmod(line, source.shape[0])
    return LayoutError(
        f"to_layout: {made!r} lacks {int(missing[slot].sum())} of {key.numel()} positions, first "
        f"row {row}, column {column} of entry {entry}; to drop values on purpose use "
        "sparsify(s.to_dense(), layout=…)"
    )
