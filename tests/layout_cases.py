"""Layouts from masks and masks from layouts, by plain loops over the documented arrays."""

from __future__ import annotations

import torch
from torch import Tensor

from mixgrain.formats.block import BlockLayout
from mixgrain.formats.costs import Costs
from mixgrain.formats.layout import Layout
from mixgrain.formats.mixed import MixedLayout
from mixgrain.formats.panel import PanelLayout
from mixgrain.formats.row import RowLayout

# Every rate set so that one kind of part is attractive even for tiny matrices.
RATES = {
    "h200": Costs.h200(),
    "cpu": Costs.cpu(),
    "no launches": Costs(6e14, 4.2e12, 8.9e12, launch_seconds=0.0),
    "cheap panels": Costs(6e14, 4.2e12, 8.9e12, launch_seconds=0.0, private_panel_factor=0.1),
    "cheap entries": Costs(6e12, 4.2e12, 8.9e14, launch_seconds=0.0),
}


def random_mask(seed: int, *shape: int, density: float = 0.3) -> Tensor:
    """A reproducible bool mask."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < density


def row_layout(masks: Tensor, lead: tuple[int, int] = (1, 1), entry=None) -> RowLayout:
    """RowLayout of distinct masks (U, nq, nk) or one (nq, nk)."""
    masks = masks if masks.dim() == 3 else masks[None]
    offsets, columns = [0], []
    for mask in masks:
        for row in mask.tolist():
            columns += [j for j, kept in enumerate(row) if kept]
            offsets.append(len(columns))
    return RowLayout.from_csr(
        tuple(masks.shape[1:]), torch.tensor(offsets), torch.tensor(columns, dtype=torch.int32),
        lead, entry,
    )  # fmt: skip


def block_layout(
    masks: Tensor, size: int, lead: tuple[int, int] = (1, 1), entry=None
) -> BlockLayout:
    """BlockLayout of all touched blocks of distinct masks (U, nq, nk) or one (nq, nk)."""
    masks = masks if masks.dim() == 3 else masks[None]
    nq, nk = masks.shape[1:]
    offsets, columns, index, table = [0], [], [], []
    for mask in masks:
        for top in range(0, nq, size):
            for left in range(0, nk, size):
                part = mask[top : top + size, left : left + size]
                if not part.any():
                    continue
                columns.append(left // size)
                if part.shape == (size, size) and part.all():
                    index.append(-1)
                    continue
                index.append(len(table))
                bits = [[0] * (size // 8) for _ in range(size)]
                for r, row in enumerate(part.tolist()):
                    for c, kept in enumerate(row):
                        bits[r][c // 8] |= int(kept) << (c % 8)
                table.append(bits)
            offsets.append(len(columns))
    return BlockLayout.from_blocks(
        (nq, nk), size, torch.tensor(offsets), torch.tensor(columns, dtype=torch.int32),
        torch.tensor(index, dtype=torch.int32),
        torch.tensor(table, dtype=torch.uint8).reshape(-1, size, size // 8), lead, entry,
    )  # fmt: skip


def literal_slots(layout: Layout) -> dict[int, tuple[int, int, int]]:
    """slot -> (entry, row, column) of every live slot, from the documented arrays alone."""
    if isinstance(layout, MixedLayout):
        found = {}
        for part, start in zip(layout.parts, layout.part_offsets, strict=False):
            found |= {start + slot: place for slot, place in literal_slots(part).items()}
        return found
    found = {}
    for e, u in enumerate(layout.entry):
        start = layout.entry_slots[e]
        for slot, row, column in _literal(layout, u):
            assert start <= start + slot < layout.entry_slots[e + 1]
            assert start + slot not in found
            found[start + slot] = (e, row, column)
    return found


def _literal(layout: Layout, u: int):
    """(slot inside the entry, row, column) of the live slots of one distinct pattern."""
    nq, _ = layout.shape
    if isinstance(layout, RowLayout):
        offsets, columns = layout.row_offsets.tolist(), layout.columns.tolist()
        for i in range(nq):
            for n in range(offsets[u * nq + i], offsets[u * nq + i + 1]):
                yield n - offsets[u * nq], i, columns[n]
    elif isinstance(layout, BlockLayout):
        size, offsets = layout.size, layout.block_offsets.tolist()
        nqb = -(-nq // size)
        masks, index = layout.masks.tolist(), layout.mask_index.tolist()
        for b in range(nqb):
            for n in range(offsets[u * nqb + b], offsets[u * nqb + b + 1]):
                column = int(layout.block_columns[n])
                for r in range(size):
                    for c in range(size):
                        if index[n] < 0 or masks[index[n]][r][c // 8] >> (c % 8) & 1:
                            local = (n - offsets[u * nqb]) * size * size + r * size + c
                            yield local, b * size + r, column * size + c
    else:
        assert isinstance(layout, PanelLayout)
        bits = layout.mask_bits.tolist()
        for p, of in enumerate(layout.panel_entry.tolist()):
            if of != u:
                continue
            rows = _literal_axis(layout, "row", p)
            cols = _literal_axis(layout, "col", p)
            pitch, mask = -(-len(cols) // 8) * 8, int(layout.mask_offset[p])
            for r, row in enumerate(rows):
                for c, column in enumerate(cols):
                    byte = mask + (r * pitch + c) // 8
                    if mask < 0 or bits[byte] >> (c % 8) & 1:
                        yield int(layout.slot_offsets[p]) + r * pitch + c, row, column


def _literal_axis(layout: PanelLayout, axis: str, p: int) -> list[int]:
    start = int(getattr(layout, f"{axis}_start")[p])
    count = int(getattr(layout, f"{axis}_count")[p])
    if start >= 0:
        return list(range(start, start + count))
    offset = int(getattr(layout, f"{axis}_list_offset")[p])
    return getattr(layout, f"{axis}_list")[offset : offset + count].tolist()


def literal_mask(layout: Layout) -> Tensor:
    """bool (b, h, nq, nk) from the documented arrays; fails on a position held twice."""
    out = torch.zeros(layout.entries, *layout.shape, dtype=torch.bool)
    for e, row, column in literal_slots(layout).values():
        assert not out[e, row, column], f"({row}, {column}) of entry {e} is held twice"
        out[e, row, column] = True
    return out.reshape(*layout.lead, *layout.shape)


def check_layout(layout: Layout, mask: Tensor) -> None:
    """Everything a layout promises, against the mask it should stand for: (b, h, nq, nk)."""
    layout.validate()
    slots = literal_slots(layout)
    assert torch.equal(literal_mask(layout), mask)
    assert torch.equal(layout.mask(), mask)
    assert layout.nnz == int(mask.sum())
    live = layout.live()
    live = torch.ones(layout.slots, dtype=torch.bool) if live is None else live
    assert live.dtype == torch.bool and live.shape == (layout.slots,)
    assert sorted(slots) == live.nonzero().flatten().tolist()
    row, column = layout.indices()
    assert row.dtype == column.dtype == torch.int64
    assert row.shape == column.shape == (layout.slots,)
    if layout.slots and min(layout.shape):
        assert int(row.min()) >= 0 and int(row.max()) < layout.shape[0]
        assert int(column.min()) >= 0 and int(column.max()) < layout.shape[1]
    entry = layout.slot_entry()
    for slot, place in slots.items():
        assert (int(entry[slot]), int(row[slot]), int(column[slot])) == place
    turned = layout.T
    turned.validate()
    assert torch.equal(literal_mask(turned), mask.transpose(-1, -2))
    order = layout.transpose_slots()
    assert order.dtype == torch.int64 and order.shape == (turned.slots,)
    for slot, (e, i, j) in literal_slots(turned).items():
        assert slots[int(order[slot])] == (e, j, i)
    assert turned.T.key == layout.key and turned.key != layout.key
    for one, other in zip(turned.T.tensors(), layout.tensors(), strict=True):
        assert torch.equal(one, other)
