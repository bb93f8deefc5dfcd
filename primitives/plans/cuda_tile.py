"""Plans for TileLayout on CUDA: the tiles by lines, and what kernels derive from them.

A line is a tile row, or a tile column where the product is with the transpose; the other side is
the inner one, which is summed over. A cell is a tile on its line: (inner tile, number in memory).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixgrain.formats.entries import pack_bits
from mixgrain.formats.tile import SIZE, TileLayout

from .cuda_block import COLUMNS, chunks_of, longest_first, records, running
from .plan import PartPlan, Plan, cached, join


def part(layout: TileLayout) -> PartPlan:
    """What CUDA kernels need of a TileLayout.

    Tensors:

        bounds, cells      int32 (tile rows + 1,) and (tiles, 2): the cells of row r are bounds[r]
                           … bounds[r + 1] − 1
        t_bounds, t_cells  the same of columns

    Scalars: rows, columns of the matrix.
    """
    order = torch.arange(layout.tiles, dtype=torch.int32, device=layout.device)
    cells = torch.stack([layout.tile_columns, order], 1)
    t_cells = torch.stack([layout.t_rows, layout.t_order], 1)
    bounds, t_bounds = layout.tile_offsets.contiguous(), layout.t_offsets.contiguous()
    tensors = [bounds, cells, t_bounds, t_cells]
    return PartPlan("ctile", tensors, list(layout.shape), list(layout.entry_slots))


def cuda(layout: TileLayout) -> Plan:
    """The CUDA plan of a TileLayout, for every operation."""
    return cached(layout, lambda: join(layout, [part(layout)]))


def shares(bounds: Tensor, cells: Tensor, warps: int, ahead: int) -> Tensor:
    """What each of the warps that share a line has to do.

    Args:
        bounds: int32 (lines + 1,), of ``part``.
        cells: int32 (tiles, 2), of ``part``.
        warps: of a line.
        ahead: cells that a warp finds here.

    Returns:
        int32 (lines, warps, 1 + ahead, 2): a warp's first cell and the number of its cells, then
        the first of them.
    """
    first, counts = bounds[:-1].long()[:, None], bounds.diff().long()[:, None]
    cut = counts * torch.arange(warps + 1, device=bounds.device) // warps
    begin, size = (first + cut[:, :-1]).flatten(), cut.diff().flatten()
    made = torch.zeros(len(begin), 1 + ahead, 2, dtype=torch.int32, device=bounds.device)
    made[:, 0, 0], made[:, 0, 1] = begin.int(), size.int()
    if len(cells):
        place = torch.arange(ahead, device=bounds.device)
        which = (begin[:, None] + place).clamp(max=len(cells) - 1)
        made[:, 1:] = torch.where((place < size[:, None])[..., None], cells[which], 0)
    return made.view(-1, warps, 1 + ahead, 2)


def compact(bounds: Tensor, cells: Tensor, numbered: bool) -> NDArray[np.uint8]:
    """The cells of a small matrix in few bytes, which a kernel's parameters have room for.

    Args:
        bounds: int32 (lines + 1,), of ``part``; less than 65,536 tiles.
        cells: int32 (tiles, 2), of ``part``; up to 256 inner tiles.
        numbered: say their numbers in memory, too; else they are in that order.

    Returns:
        uint8, of 16 bits the bounds, and the numbers if they are said; of 8 the inner tiles.
    """
    ends, places = bounds.cpu().numpy().astype(np.uint16), cells.cpu().numpy()
    numbers = places[:, 1].astype(np.uint16) if numbered else ends[:0]
    words = np.concatenate([ends, numbers]).view(np.uint8)
    return np.concatenate([words, places[:, 0].astype(np.uint8)])


def segments(
    bounds: Tensor, cells: Tensor, per: int, split: int, warps: int, inner: int
) -> tuple[Tensor, Tensor, int, int]:
    """Work of CTAs that take some lines and one slab of inner positions each.

    Lines are dealt to groups evenly. Warps share the cells of a CTA evenly; the cells of one line
    with one warp are a segment. The CTAs of a group, one for each slab, finish its lines in turn:
    who does has a place for each segment of the line, by slabs and then warps.

    Args:
        bounds: int32 (lines + 1,), of ``part``.
        cells: int32 (tiles, 2), of ``part``.
        per: lines of a CTA.
        split: slabs.
        warps: of a CTA.
        inner: inner positions of the matrix.

    Returns:
        work int32 (CTAs, pitch), CTA = split * group of lines + slab: for each warp its first
        cell, number of its cells, and the first ``span`` of its cells, up to 32; then for each
        line that the CTA finishes the places before it and which it is, and one more for all.
        cells int32 (tiles, 2): 2**18 * place + 32 * inner tile of the slab + 4 * who of the group
        finishes the line (both where a segment ends) + 2 where it hangs over the edge + 1 where a
        segment ends; number in memory. span. The most places of a CTA.
    """
    count, column, device = bounds.numel() - 1, cells[:, 0].long(), cells.device
    slab, kept = slab_of(inner, split), -(-per // split)
    loads = torch.bincount(lines_of(bounds) * split + column // slab, minlength=count * split)
    dealt = torch.from_numpy(deal(loads.view(count, split).cpu().numpy(), per)).to(device)
    ctas = split * len(dealt)
    where = torch.empty(count + 1, dtype=torch.int64, device=device)
    where[dealt.flatten()] = torch.arange(dealt.numel(), device=device)
    lines = where[lines_of(bounds)]  # per * group + place in it
    key = (lines // per * split + column // slab) * per + lines % per
    order = torch.sort(key, stable=True)
    cta, column, line = order.values // per, column[order.indices], order.values % per
    counts = torch.bincount(cta, minlength=ctas)
    place = torch.arange(len(cta), device=device) - running(counts).long()[cta]
    warp = ((place + 1) * warps - 1) // counts[cta]
    new = torch.ones_like(cta, dtype=torch.bool)
    key = order.values * warps + warp
    new[1:] = key[1:] != key[:-1]
    last = torch.cat([new[1:], new[:1]])  # the first cell is new

    # Segments are in the order of CTAs; who finishes them has them by lines.
    of_line = (cta // split * split + line % split)[last] * kept + line[last] // split
    there = torch.bincount(of_line, minlength=ctas * kept)
    at = torch.empty_like(of_line)
    at[torch.sort(of_line, stable=True).indices] = torch.arange(len(of_line), device=device)
    ends = torch.full((ctas, kept + 1, 2), count, dtype=torch.int64, device=device)
    ends[:, 0, 0], ends[:, 1:, 0] = 0, there.view(ctas, kept).cumsum(1)
    padded = torch.full((len(dealt), kept * split), count, dtype=torch.int64, device=device)
    padded[:, :per] = dealt
    ends[:, :-1, 1] = padded.view(-1, kept, split).mT.flatten(0, 1)
    at -= running(ends[:, -1, 0])[:-1].long()[of_line // kept]

    word = column % slab * 32 + ((column + 1) * SIZE > inner) * 2 + last
    word[last] += (at << 18) + line[last] % split * 4
    made = torch.stack([word.int(), cells[order.indices, 1]], 1)
    sizes = torch.bincount(cta * warps + warp, minlength=ctas * warps)
    first = running(sizes)[:-1].long()
    heads = torch.stack([first, sizes], 1).int()
    span, most = 4, int(sizes.max()) if sizes.numel() else 0
    while span < min(most, 32):
        span *= 2
    early = made.new_zeros(ctas * warps, span, 2)
    if len(made):
        which = (first[:, None] + torch.arange(span, device=device)).clamp(max=len(made) - 1)
        held = torch.arange(span, device=device) < sizes[:, None]
        early = torch.where(held[..., None], made[which], 0)
    records = torch.cat([heads, early.flatten(1)], 1).view(ctas, warps * (2 + 2 * span))
    padding = made.new_zeros(ctas, -2 * (kept + 1) % 4)
    work = torch.cat([records, ends.flatten(1).int(), padding], 1)
    return work, made, span, int(ends[:, -1, 0].max()) if ctas else 0


def deal(loads: NDArray[np.int64], per: int) -> NDArray[np.int64]:
    """Lines dealt to groups whose CTAs, one for each slab, have nearly equal loads.

    The longest first, each to the group whose most loaded CTA it leaves with least.

    Args:
        loads: int64 (lines, slabs), tiles.
        per: lines of a group at most.

    Returns:
        int64 (groups, per): lines, rising; the number of lines where a group has fewer.
    """
    count, split = loads.shape
    groups = -(-count // per)
    made = np.full((groups, per), count)
    has, total = np.zeros(groups, np.int64), np.zeros((groups, split), np.int64)
    most = int(loads.sum()) + 1
    for line in np.argsort(-loads.sum(1), kind="stable"):
        then = total + loads[line]
        cost = then.max(1) * most + then.sum(1)
        cost[has == per] = np.iinfo(np.int64).max
        group = int(cost.argmin())
        made[group, has[group]] = line
        has[group] += 1
        total[group] = then[group]
    return np.sort(made, axis=1)


def slab_of(inner: int, split: int) -> int:
    """Inner tiles of a slab."""
    return max(-(-inner // (SIZE * split)), 1)


def lines_of(bounds: Tensor) -> Tensor:
    """int64 (tiles,): the line of each cell."""
    lines = torch.arange(bounds.numel() - 1, device=bounds.device)
    return torch.repeat_interleave(lines, bounds.diff().long())


def groups(
    bounds: Tensor, cells: Tensor, per: int, grain: int, inner: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The inner positions that groups of lines meet, and where each cell finds its own.

    Args:
        bounds: int32 (lines + 1,), of ``part``.
        cells: int32 (tiles, 2), of ``part``.
        per: lines of a group.
        grain: inner tiles of a union: 1, of which 4 make a stage, or 4, a stage itself.
        inner: inner positions of the matrix.

    Returns:
        links int32 (tiles, 2): 8 * stage + 2 * (tile of the four in a stage), + 1 where the tile
        hangs over the edge; number in memory. unions int32 (U,): inner position / (16 * grain),
        rising within a group. Their ``records``.
    """
    lines, across = bounds.numel() - 1, -(-inner // (SIZE * grain))
    count, column = -(-lines // per), cells[:, 0].long()
    group = lines_of(bounds) // per
    found, which = torch.unique(group * max(across, 1) + column // grain, return_inverse=True)
    counts = torch.bincount(found // max(across, 1), minlength=count)
    first = running(counts)
    place = which - first.long()[group]
    where = place * 2 if grain == 1 else place * 8 + column % 4 * 2
    where += (column + 1) * SIZE > inner
    links = torch.stack([where.int(), cells[:, 1]], 1)
    table = records(first, longest_first(counts))
    return links, (found % max(across, 1)).int(), table.contiguous()


def regions(
    bounds: Tensor, cells: Tensor, side: int, most: int, across: int
) -> tuple[Tensor, Tensor]:
    """Kept tiles by regions of side × side tiles.

    Args:
        bounds: int32 (tile rows + 1,), of ``part``.
        cells: int32 (tiles, 2), of ``part``.
        side: tiles of a region's side, up to 16.
        most: tiles of a chunk.
        across: tile columns of the matrix.

    Returns:
        chunks int32 (n, 4): first in the list, tiles, region, tile rows in use + 65,536 * tile
        columns in use; the longest first. The list, int32 (tiles, 2): 256 * row + column of a tile
        inside its region, number in memory.
    """
    row, column = lines_of(bounds), cells[:, 0].long()
    wide = max(-(-across // side), 1)
    key, order = torch.sort(row // side * wide + column // side, stable=True)
    row, column, item = row[order] % side, column[order] % side, cells[order, 1]
    count = -(-(bounds.numel() - 1) // side) * wide
    counts = torch.bincount(key, minlength=count)
    begins = counts.cumsum(0) - counts
    cuts = (counts + most - 1) // most
    region = torch.repeat_interleave(torch.arange(count, device=bounds.device), cuts)
    at = torch.arange(len(region), device=bounds.device) - (cuts.cumsum(0) - cuts)[region]
    begin = begins[region] + at * counts[region] // cuts[region]
    end = begins[region] + (at + 1) * counts[region] // cuts[region]
    chunk = torch.repeat_interleave(torch.arange(len(region), device=bounds.device), end - begin)
    used = torch.zeros(2, len(region), 16, dtype=torch.int64, device=bounds.device)
    used[0].index_put_((chunk, row), torch.ones_like(row))
    used[1].index_put_((chunk, column), torch.ones_like(row))
    bits = (used << torch.arange(16, device=bounds.device)).sum(-1)
    words = bits[0] + (bits[1] << 16)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words)  # as int32
    chunks = torch.stack([begin, end - begin, region, words], 1).int()
    chunks = chunks[longest_first(chunks[:, 1]).long()]
    return chunks.contiguous(), torch.stack([(row * 256 + column).int(), item], 1)


def as_blocks(
    bounds: Tensor, cells: Tensor, t_bounds: Tensor, t_cells: Tensor, shape: tuple[int, int]
) -> PartPlan:
    """The tiles as a part of 16-blocks, for the kernels that every device and dtype has.

    Their slots are in row order, not in that of fragments. Tables of kernels for one architecture
    are left empty; see ``cuda_block.part``.
    """
    device, tiles = bounds.device, len(cells)
    rows, columns = bounds.numel() - 1, t_bounds.numel() - 1
    row, column = lines_of(bounds), cells[:, 0].long()
    below = torch.arange(SIZE, device=device) < shape[0] - SIZE * (rows - 1)
    right = torch.arange(SIZE, device=device) < shape[1] - SIZE * (columns - 1)
    kind = (row == rows - 1).long() * (not bool(below.all()))
    kind += (column == columns - 1).long() * (2 * (not bool(right.all())))
    low, wide = below[:, None].expand(SIZE, SIZE), right.expand(SIZE, SIZE)
    masks = torch.stack([low, wide, low & wide])
    items = torch.stack([torch.zeros_like(row), row, column, kind - 1], 1).int()
    counts, t_counts = bounds.diff(), t_bounds.diff()
    none = bounds.new_empty(0, 4)
    tensors = [
        items,
        bounds,
        longest_first(counts),
        t_cells[:, 1].contiguous(),
        t_bounds,
        longest_first(t_counts),
        pack_bits(masks),
        pack_bits(masks.any(1)),
        pack_bits(masks.any(2)),
        chunks_of(bounds, COLUMNS // SIZE),
        none[:, :2],
        *[none] * 4,
        pack_bits(masks.mT.contiguous()),
        *[none.view(0, 2, 2)] * 2,
    ]
    return PartPlan("cblock", tensors, [SIZE], [0, tiles * SIZE * SIZE])
