"""How blocks, panels and single entries become steps of a plan; see ``plan``."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import torch
from torch import Tensor

from mixgrain.formats.block import BlockLayout
from mixgrain.formats.entries import unpack_bits
from mixgrain.formats.panel import PanelLayout
from mixgrain.formats.row import RowLayout

from .plan_steps import BUDGET, Builder, pack_columns

# Columns of one step at most: a longer row is cut, and its pieces are merged online.
LONGEST = 4096
# Keys that a step of single rows gathers, each for itself: 4 MiB of float32 at D = 64.
GATHERED = 1 << 14
# Rows of a step hold at least this share of the longest one's entries, the rest is padding.
FILL = 0.75


def add_blocks(made: Builder, layout: BlockLayout) -> None:
    """Block rows with equally many blocks, at most ``LONGEST`` columns at once, side by side."""
    made.set_masks(layout.masks)
    size, nqb = layout.size, layout.block_shape[0]
    full = layout.masks.shape[0]
    longest = max(1, LONGEST // size)
    columns = layout.block_columns.long()
    masks = torch.where(layout.mask_index < 0, full, layout.mask_index).long()
    look = _fingerprints(layout, masks)
    for u in range(made.distinct):
        offsets = layout.block_offsets[u * nqb : (u + 1) * nqb + 1].long()
        row, start, length, segment = _pieces(offsets, longest)
        # Equal rows of masks side by side, so that a step can unpack one for all its tiles.
        mark = look[start + length - 1] - torch.where(start > 0, look[start - 1], 0)
        mark = torch.where(segment > 0, 0, mark)
        for bucket in _buckets(segment, length, mark):
            width = int(length[bucket[0]])
            at = start[bucket, None] + torch.arange(width)
            cols, ids = columns[at], masks[at]
            per_step = max(1, BUDGET // (size * size * width))
            for piece in _cuts(ids, per_step):
                mine = ids[piece]
                if bool((mine == full).all()):
                    mask = (0, 0, 0)
                elif bool((mine == mine[:1]).all()):
                    mask = (1, made.add_ids(mine[:1]), 1)
                else:
                    mask = (1, made.add_ids(mine), mine.shape[0])
                made.add_step(
                    u, mine.shape[0], (size, row[bucket[piece]]), (size, cols[piece]),
                    (size, size * width), mask=mask,
                )  # fmt: skip


def add_panels(made: Builder, layout: PanelLayout) -> None:
    """Small panels of one shape side by side, large ones cut along rows and columns."""
    size = torch.stack([layout.panel_entry.long(), layout.row_start, layout.row_count,
                        layout.col_count, layout.mask_offset], 1).tolist()  # fmt: skip
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for p, (u, first, rows, cols, masked) in enumerate(size):
        pitch = -(-cols // 8) * 8
        if first >= 0 and first % rows == 0 and 2 * rows * pitch <= BUDGET:
            # Ranges that start at different multiples of their length do not overlap.
            seen = (u, rows, pitch, masked >= 0)
            turn = 0
            while any(size[o][1] == first for o in alike[(*seen, turn)][-1:]):
                turn += 1
            alike[(*seen, turn)].append(p)
            continue
        columns = _members(layout.col_start, layout.col_list_offset, layout.col_list, p, cols)
        members = _members(layout.row_start, layout.row_list_offset, layout.row_list, p, rows)
        bits = None
        if masked >= 0:
            bits = layout.mask_bits[masked : masked + rows * pitch // 8].view(rows, pitch // 8)
        add_panel(made, u, members, columns, bits)
    for (u, rows, pitch, masked_too, _), panels in alike.items():
        _add_alike(made, layout, u, rows, pitch, bool(masked_too), panels)


def _add_alike(
    made: Builder,
    layout: PanelLayout,
    u: int,
    rows: int,
    pitch: int,
    masked: bool,
    panels: list[int],
) -> None:
    """Panels over different ranges of equally many rows, columns filled up to ``pitch``."""
    which = torch.tensor(panels)
    lane = torch.arange(pitch)
    count = layout.col_count[which][:, None]
    listed = (layout.col_list_offset[which][:, None] + lane).clamp(
        max=max(layout.col_list.numel() - 1, 0)
    )
    start = layout.col_start[which][:, None]
    cols = start + lane
    if layout.col_list.numel():
        cols = torch.where(start >= 0, cols, layout.col_list.long()[listed])
    cols = torch.where(lane < count, cols, made.shape[1])
    first = layout.row_start[which][:, None] + torch.arange(rows)
    per_step = max(1, min(BUDGET // (rows * pitch), 4 * GATHERED // (rows + pitch)))
    for a in range(0, len(panels), per_step):
        b = min(a + per_step, len(panels))
        mask = (0, 0, 0)
        if masked:
            row_bytes = rows * pitch // 8
            at = layout.mask_offset[which[a:b]][:, None] + torch.arange(row_bytes)
            mask = (2, made.add_bits(layout.mask_bits[at]), b - a)
        made.add_step(
            u, b - a, (1, first[a:b]), (1, cols[a:b]), (rows, pitch),
            pads=bool((count[a:b] < pitch).any()), mask=mask,
        )  # fmt: skip


def add_panel(
    made: Builder, u: int, rows: range | Tensor, cols: range | Tensor, bits: Tensor | None
) -> None:
    """One panel, cut into steps of about ``BUDGET`` scores.

    Args:
        made: the plan.
        u: the distinct pattern.
        rows: a range or int tensor.
        cols: the same.
        bits: None or uint8 (rows, ceil(cols / 8)).
    """
    nk, group = made.shape[1], made.nm[1]
    unit = group or 8
    width = min(max(LONGEST // 4, BUDGET // max(len(rows), 1)), BUDGET) // unit * unit
    height = max(1, BUDGET // min(width, len(cols)))
    for c in range(0, len(cols), width):
        piece = cols[c : c + width]
        # Whole groups of m, whole bytes of mask.
        spare = -len(piece) % unit if group or bits is not None else 0
        if spare:
            listed = piece if isinstance(piece, Tensor) else torch.arange(piece.start, piece.stop)
            piece = torch.nn.functional.pad(listed, (0, spare), value=nk)
        total = len(piece)
        for r in range(0, len(rows), height):
            part = rows[r : r + height]
            mask = (0, 0, 0)
            if bits is not None:
                mine = bits[r : r + height, c // 8 : (c + total) // 8]
                mask = (2, made.add_bits(mine), 1)
            made.add_step(
                u, 1, (1, part.start if isinstance(part, range) else part),
                (1, piece.start if isinstance(piece, range) else piece), (len(part), total),
                pads=spare > 0, mask=mask,
            )  # fmt: skip


def add_rest(made: Builder, layout: RowLayout) -> None:
    """Single rows of about equal length side by side, filled up with the index nk."""
    nq, nk = layout.shape
    columns = layout.columns
    for u in range(made.distinct):
        offsets = layout.row_offsets[u * nq : (u + 1) * nq + 1]
        row, start, length, segment = _pieces(offsets, LONGEST)
        for turn in range(int(segment.max()) + 1 if row.numel() else 0):
            mine = (segment == turn).nonzero().flatten()
            order = mine[torch.argsort(length[mine], descending=True, stable=True)]
            _add_rows(made, u, row[order], start[order], length[order], columns, nk)


def _add_rows(
    made: Builder, u: int, row: Tensor, start: Tensor, length: Tensor, columns: Tensor, nk: int
) -> None:
    """Rows in falling order of length."""
    falling = -length
    a = 0
    while a < row.numel():
        width = int(length[a])
        enough = int(torch.searchsorted(falling, -math.ceil(FILL * width), right=True))
        b = min(enough, a + max(1, GATHERED // width))
        # Rows of a step in rising order: their queries lie side by side where all are present.
        here = torch.argsort(row[a:b]) + a
        lane = torch.arange(width)
        at = (start[here, None] + lane).clamp(max=columns.numel() - 1)
        cols = torch.where(lane < length[here, None], columns[at].long(), nk)
        made.add_step(
            u, b - a, (1, row[here]), (1, cols), (1, width), pads=int(length[b - 1]) < width
        )
        a = b


def block_groups(made: Builder, layout: BlockLayout) -> None:
    """Blocks whose size is no multiple of m: per block row one panel of whole groups.

    Columns are rounded out to the groups of m that the blocks touch; what is beyond a block is
    masked out, so a group holds exactly the kept keys among its own.
    """
    size, m = layout.size, made.nm[1]
    nq, nk = layout.shape
    nqb = layout.block_shape[0]
    table = unpack_bits(layout.masks)
    table = torch.cat([table, table.new_ones(1, size, size)])
    masks = layout.mask_index.long()
    for block_row in range(made.distinct * nqb):
        a, b = layout.block_offsets[block_row : block_row + 2].tolist()
        if a == b:
            continue
        first = block_row % nqb * size
        rows = range(first, min(first + size, nq))
        here = (layout.block_columns[a:b].long()[:, None] * size + torch.arange(size)).flatten()
        live = table[masks[a:b], : len(rows)].transpose(0, 1).flatten(1)
        inside = here < nk
        here, live = here[inside], live[:, inside]
        cols = (torch.unique(here // m)[:, None] * m + torch.arange(m)).flatten()
        kept = live.new_zeros(len(rows), cols.numel())
        kept[:, torch.searchsorted(cols, here)] = live
        cols = torch.where(cols < nk, cols, nk)
        per_step = max(1, LONGEST // m) * m
        for c in range(0, cols.numel(), per_step):
            piece, bits = cols[c : c + per_step], kept[:, c : c + per_step]
            # Rows of bits are whole bytes, so the columns of a step are a multiple of m and of 8.
            made.add_step(
                block_row // nqb, 1, (1, rows.start), (1, piece), (len(rows), piece.numel()),
                pads=bool((piece == nk).any()), mask=(2, made.add_bits(pack_columns(bits)), 1),
            )  # fmt: skip


def _members(start: Tensor, offset: Tensor, listed: Tensor, p: int, n: int) -> range | Tensor:
    first = int(start[p])
    if first >= 0:
        return range(first, first + n)
    return listed[int(offset[p]) : int(offset[p]) + n].long()


def _pieces(offsets: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows cut into pieces of at most ``longest``: row, start, length, number in its row."""
    counts = offsets.diff()
    pieces = (counts + (longest - 1)) // longest
    row = torch.repeat_interleave(torch.arange(counts.numel()), pieces)
    segment = torch.arange(row.numel()) - (torch.cumsum(pieces, 0) - pieces)[row]
    start = offsets[:-1][row] + segment * longest
    length = torch.minimum(offsets[1:][row] - start, torch.tensor(longest))
    return row, start, length, segment


def _fingerprints(layout: BlockLayout, masks: Tensor) -> Tensor:
    """Running sums of hashes of (place in its row, mask): differences tell rows of masks apart."""
    offsets = layout.block_offsets.long()
    place = torch.arange(masks.numel()) - torch.repeat_interleave(offsets[:-1], offsets.diff())
    # Any odd multipliers; wrapping is meant, and a collision only costs a step its shared mask.
    mixed = (masks + 1) * 0x9E3779B97F4A7C1 + (place + 1) * 0x2545F4914F6CDD1D
    mixed = (mixed ^ (mixed >> 29)) * 0x1B873593CC9E2D51
    return torch.cumsum(mixed ^ (mixed >> 32), 0)


def _buckets(segment: Tensor, length: Tensor, mark: Tensor) -> list[Tensor]:
    """Indices of pieces with the same (segment, length), sorted by mark, then by row."""
    order = torch.argsort(mark, stable=True)
    order = order[torch.argsort(length[order], stable=True)]
    order = order[torch.argsort(segment[order], stable=True)]
    pair = torch.stack([segment[order], length[order]], 1)
    if not order.numel():
        return []
    _, counts = torch.unique_consecutive(pair, dim=0, return_counts=True)
    return list(torch.split(order, counts.tolist()))


def _cuts(ids: Tensor, per_step: int) -> list[slice]:
    """Pieces of at most ``per_step`` tiles; cut where the masks change, if that is seldom."""
    n = ids.shape[0]
    change = (ids[1:] != ids[:-1]).any(1).nonzero().flatten() + 1
    edges = [0, *change.tolist(), n] if 8 * (change.numel() + 1) <= n else [0, n]
    return [
        slice(a, min(a + per_step, b))
        for first, b in itertools.pairwise(edges)
        for a in range(first, b, per_step)
    ]
