"""What a block row does with positions that hardly fill their blocks.

For every block row the cheapest by ``Costs`` of: the blocks after all; one private panel of the
columns that are left; single entries; a panel of the columns that several rows share beside
entries for the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cells import Cells
from .costs import Costs
from .pattern import Frame
from .runs import prefix_sum, ragged_arange
from .words import count, pair_words, positions, used_columns


@dataclass(frozen=True, eq=False)
class Share:
    """What one chunk of block rows becomes.

    Attributes:
        row: int64 (n,) block rows of the blocks, rising.
        col: int64 (n,) their block columns.
        index: int64 (n,) −1 = full, else a row of words.
        words: int64 (p, size, W).
        panel_row: int64 (g,) block row of each private panel.
        panel_cols: int64 (g,) number of its columns.
        col_list: int64, the columns of all panels.
        panel_bits: bool, rows × pitch of every panel, one after the other.
        entry_row: int64 (e,) rows of single entries, in C order.
        entry_col: int64 (e,) their columns.
        saved: seconds saved over blocks alone.
    """

    row: Tensor
    col: Tensor
    index: Tensor
    words: Tensor
    panel_row: Tensor
    panel_cols: Tensor
    col_list: Tensor
    panel_bits: Tensor
    entry_row: Tensor
    entry_col: Tensor
    saved: float


def sparse_limit(size: int, costs: Costs) -> int:
    """Blocks with at most this many positions are better off as entries, half the cost at most."""
    return int(costs.block_seconds(size) / (2 * costs.entries_seconds(1)))


def share(cells: Cells, frame: Frame, size: int, costs: Costs, allowed: bool) -> Share:
    """Decide for the block rows of one chunk.

    Args:
        cells: the touched blocks.
        frame: the rectangle.
        size: side of a block.
        costs: rates.
        allowed: whether anything but blocks may come out.
    """
    row, col, index, words = cells.row, cells.col, cells.index, cells.words
    none, off = row[:0], torch.zeros(0, dtype=torch.bool, device=row.device)
    entry_row, entry_col = cells.entry_row, cells.entry_col
    if allowed and words.shape[0]:
        entry_row, entry_col, row, col, index, words = _take_out(
            cells, size, costs, entry_row, entry_col
        )
    if not entry_row.numel():
        return Share(row, col, index, words, none, none, none, off, none, none, 0.0)
    rows = cells.last - cells.first
    group = entry_row // size - cells.first
    pair = group * frame.nk + entry_col
    column, where = torch.unique(pair, return_inverse=True)
    counts = torch.bincount(where, minlength=column.numel())
    choice, shared, saved = _choose(
        column // frame.nk, counts, where, group, entry_row, entry_col, rows, frame, size, costs
    )
    back = choice[group] == 0
    if bool(back.any()):
        row, col, index, words = _give_back(
            entry_row[back], entry_col[back], row, col, index, words, size, -(-frame.nk // size)
        )
    in_panel = ~back & shared[where]
    single = ~back & ~shared[where]
    order = torch.argsort(entry_row[single] * frame.nk + entry_col[single])
    used = shared & (choice[column // frame.nk] > 0)
    panel_row, panel_cols, bits = _panels(
        column[used], where[in_panel], used, entry_row[in_panel], rows, cells.first, frame, size
    )
    return Share(
        row, col, index, words,
        panel_row, panel_cols, column[used] % frame.nk, bits,
        entry_row[single][order], entry_col[single][order], saved,
    )  # fmt: skip


def without_few_blocks(shares: list[Share], frame: Frame, size: int, costs: Costs) -> list[Share]:
    """Masked blocks as entries, too, where a part for them costs more than that.

    Args:
        shares: what all chunks of a pattern become.
        frame: the rectangle.
        size: side of a block.
        costs: rates.
    """
    seconds = sum(s.row.numel() for s in shares) * costs.block_seconds(size)
    if not 0 < seconds <= costs.launch_seconds or not any(s.entry_row.numel() for s in shares):
        return shares
    if any(bool((s.index < 0).any()) for s in shares):
        return shares
    made = [_loosened(s, frame, size) for s in shares]
    before, after = (
        sum(
            costs.entries_seconds(s.entry_row.numel())
            + costs.entry_rows_seconds(torch.unique(s.entry_row).numel())
            for s in some
        )
        for some in (shares, made)
    )
    return made if after - before <= costs.launch_seconds + seconds else shares


def _loosened(s: Share, frame: Frame, size: int) -> Share:
    """Masked blocks as single entries among the others."""
    if not s.row.numel():
        return s
    block, r, c = positions(s.words[s.index.long()], size)
    row = torch.cat([s.entry_row, s.row[block] * size + r])
    col = torch.cat([s.entry_col.long(), s.col.long()[block] * size + c])
    order = torch.argsort(row * frame.nk + col)
    return replace(
        s, row=s.row[:0], col=s.col[:0], index=s.index[:0], words=s.words[:0],
        entry_row=row[order], entry_col=col[order].to(s.entry_col.dtype),
    )  # fmt: skip


def _take_out(
    cells: Cells, size: int, costs: Costs, entry_row: Tensor, entry_col: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Move masked blocks that would cost at most half as columns or entries to the entries."""
    block = costs.block_seconds(size)
    per_column = costs.private_column_seconds(size)
    kept = count(cells.words)
    # A block of few columns cannot hold more positions than those columns have.
    light = (kept * costs.entries_seconds(1) <= block / 2) | (kept * per_column <= block / 2 * size)
    light_at = light.nonzero().flatten()
    columns = used_columns(cells.words[light_at])
    cheap = (
        torch.minimum(kept[light_at] * costs.entries_seconds(1), columns * per_column) <= block / 2
    )
    out = torch.zeros_like(light)
    out[light_at[cheap]] = True
    if not bool(out.any()):
        return entry_row, entry_col, cells.row, cells.col, cells.index, cells.words
    masked = (cells.index >= 0).nonzero().flatten()
    gone = torch.zeros_like(cells.row, dtype=torch.bool)
    gone[masked] = out[cells.index[masked]]
    source = torch.empty(out.numel(), dtype=torch.int64, device=out.device)
    source[cells.index[masked]] = masked
    block_of, r, c = positions(cells.words[out], size)
    cell = source[out.nonzero().flatten()][block_of]
    entry_row = torch.cat([entry_row, cells.row[cell] * size + r])
    entry_col = torch.cat([entry_col, cells.col[cell] * size + c])
    stay = ~gone
    renumber = torch.cumsum(~out, 0) - 1
    index = cells.index[stay]
    index = torch.where(index < 0, -1, renumber[index.clamp(min=0)])
    return entry_row, entry_col, cells.row[stay], cells.col[stay], index, cells.words[~out]


def _choose(
    group_of_column: Tensor, counts: Tensor, where: Tensor, group: Tensor, entry_row: Tensor,
    entry_col: Tensor, rows: int, frame: Frame, size: int, costs: Costs,
) -> tuple[Tensor, Tensor, float]:  # fmt: skip
    """Cheapest way of every block row (0 blocks, 1 panel, 2 entries, 3 both) and panel columns."""
    device = counts.device
    zero = torch.zeros(rows, dtype=torch.int64, device=device)
    per_entry = costs.entries_seconds(1)
    common = counts * per_entry > costs.private_column_seconds(size)

    def per_group(of: Tensor, weight: Tensor | None = None) -> Tensor:
        return zero.index_add(0, of, torch.ones_like(of) if weight is None else weight)

    def panel(columns: Tensor) -> Tensor:
        padded, pitch = (columns + 63) // 64 * 64, (columns + 7) // 8 * 8
        unit = costs.private_column_seconds(size)
        memory = costs.private_panel_factor * costs.slots_seconds(size)
        return padded * (unit - memory) + pitch * memory

    def row_costs(chosen: Tensor) -> Tensor:
        there = torch.zeros(rows * size, dtype=torch.bool, device=device)
        there[entry_row[chosen] - entry_row_base] = True
        return there.view(rows, size).sum(1) * costs.entry_rows_seconds(1)

    entry_row_base = (entry_row[:1] // size - group[:1]) * size
    nkb = -(-frame.nk // size)
    cell = torch.unique(group * nkb + entry_col // size)
    single = ~common[where]
    of_blocks = per_group(cell // nkb) * costs.block_seconds(size)
    everything = torch.ones_like(single)
    table = torch.stack(
        [
            of_blocks.double(),
            panel(per_group(group_of_column)).double(),
            (per_group(group) * per_entry + row_costs(everything)).double(),
            (
                panel(per_group(group_of_column[common]))
                + per_group(group[single]) * per_entry
                + row_costs(single)
            ).double(),
        ]
    )
    cost, choice = table.min(0)
    choice[cost >= table[0]] = 0
    saved = float((table[0] - cost).sum())
    mode = choice[group_of_column]
    return choice, (mode == 1) | ((mode == 3) & common), saved


def _give_back(
    entry_row: Tensor, entry_col: Tensor, row: Tensor, col: Tensor, index: Tensor, words: Tensor,
    size: int, nkb: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Make blocks of entries again and put them among the others."""
    key, where = torch.unique(entry_row // size * nkb + entry_col // size, return_inverse=True)
    more = pair_words(where, entry_row % size, entry_col % size, key.numel(), size)
    number = torch.arange(key.numel(), device=key.device) + words.shape[0]
    keys = torch.cat([row * nkb + col, key])
    order = torch.argsort(keys)
    keys = keys[order]
    return keys // nkb, keys % nkb, torch.cat([index, number])[order], torch.cat([words, more])


def _panels(
    columns: Tensor, where: Tensor, used: Tensor, entry_row: Tensor, rows: int, first: int,
    frame: Frame, size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Block row, number of columns and mask bits of the private panels of a chunk."""
    counts = torch.bincount(columns // frame.nk, minlength=rows)
    group = counts.nonzero().flatten()
    widths = counts[group]
    heights = (frame.nq - (group + first) * size).clamp(max=size)
    pitch = (widths + 7) // 8 * 8
    base = prefix_sum(heights * pitch)
    bits = torch.zeros(int(base[-1]), dtype=torch.bool, device=columns.device)
    if columns.numel():
        _, rank = ragged_arange(widths)
        place = rank[(torch.cumsum(used, 0) - 1)[where]]
        panel = torch.cumsum(counts > 0, 0) - 1
        p = panel[entry_row // size - first]
        bits[base[p] + entry_row % size * pitch[p] + place] = True
    return group + first, widths, bits
