"""From a pattern to a layout: blocks, rows, or the mixture that the costs make cheapest.

A mixed split works in two steps. Keys that every row sees and queries that see every key are
factored out of the pattern and become one shared panel each, unless the blocks they would touch are
there already. What remains, the core, is cut into blocks; where a block row has blocks with little
in them, ``leftovers`` turns those into a private panel or single entries.

        . . | . . . g . .        g  shared panel: key 4, rows all but 2
        . . | . . . g . .        G  shared panel: query 2, all keys
        G G G G G G G G G        B  blocks of the core
        B B . . . . g . .        x  single entries
        B B . . . . g x .
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import among, shown
from .block import SIZES, BlockLayout
from .cells import Extra, cells_of
from .costs import Costs
from .entries import pack_bits
from .errors import LayoutError
from .layout import Layout
from .leftovers import Share, share, sparse_limit, without_few_blocks
from .mixed import MixedLayout
from .panel import PanelLayout
from .panel_tools import arrays_of, mask_table
from .pattern import Frame, Pattern
from .pattern_queries import chunked_runs
from .row import RowLayout
from .runs import prefix_sum
from .words import bit_words, distinct, to_masks, words_per_row

KINDS = ("block", "row", "mixed")


def to_layout(
    pattern: Pattern,
    kind: str,
    nq: int,
    nk: int,
    size: int = 64,
    device: torch.device | str = "cpu",
    costs: Costs | None = None,
) -> Layout:
    """The kept positions of a pattern encoded as a layout.

    Args:
        pattern: flat, or one pattern per head or batch entry; equal ones are split once.
        kind: "block", "row" or "mixed".
        nq: number of queries.
        nk: number of keys.
        size: side of the blocks of "block" and "mixed": 16, 32, 64 or 128.
        device: where the index tensors go.
        costs: rates that "mixed" minimises; None = those of an H200 on a CUDA device, else of a
            CPU.

    Returns:
        BlockLayout, RowLayout or MixedLayout; index tensors int32 where they fit.

    Raises:
        LayoutError: an unknown kind or size, or a pattern of another fixed shape.
    """
    if not among(kind, KINDS):
        raise LayoutError(
            f"to_layout: kind {shown(kind)}; choose one of {', '.join(map(repr, KINDS))}"
        )
    if kind != "row" and not among(size, SIZES):
        raise LayoutError(f"to_layout: size {shown(size)}; choose one of {SIZES}")
    frame = Frame(nq, nk, torch.device(device))
    costs = costs or (Costs.h200() if frame.device.type == "cuda" else Costs.cpu())
    lead, entry = pattern.lead, pattern.entry
    for flat in pattern.distinct:
        flat.check(frame)
    if kind == "row":
        return _rows([_csr(flat, frame) for flat in pattern.distinct], frame, lead, entry)
    pieces = [_pieces(flat, frame, size, costs, kind == "mixed") for flat in pattern.distinct]
    blocks = _blocks([p.blocks for p in pieces], frame, size, lead, entry)
    if kind == "block":
        return blocks
    rest = _rows([p.rest for p in pieces], frame, lead, entry)
    return MixedLayout.from_parts(
        (nq, nk), blocks, _join_panels(pieces, frame, lead, entry), rest, lead, entry
    )


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of one distinct pattern: blocks per block row, columns, masks."""

    counts: Tensor
    columns: Tensor
    mask_index: Tensor
    masks: Tensor


@dataclass(frozen=True, eq=False)
class Panels:
    """Panels of one distinct pattern, the arrays of PanelLayout."""

    rows: tuple[Tensor, Tensor, Tensor, Tensor]
    cols: tuple[Tensor, Tensor, Tensor, Tensor]
    mask_offset: Tensor
    mask_bits: Tensor


Csr = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Pieces:
    """One distinct pattern, split."""

    blocks: Blocks
    panels: list[Panels]
    rest: Csr


def _csr(flat: Pattern, frame: Frame) -> Csr:
    """(entries of each row, columns) of a flat pattern."""
    counts = [torch.zeros(0, dtype=torch.int64, device=frame.device)]
    columns = [torch.zeros(0, dtype=torch.int32, device=frame.device)]
    for _, runs in chunked_runs(flat, frame):
        offsets, found = runs.expand()
        counts.append(offsets.diff())
        columns.append(found.to(torch.int32))
    return torch.cat(counts), torch.cat(columns)


def _rows(
    parts: Sequence[Csr], frame: Frame, lead: tuple[int, int], entry: tuple[int, ...]
) -> RowLayout:
    offsets = prefix_sum(torch.cat([counts for counts, _ in parts]))
    columns = torch.cat([columns for _, columns in parts])
    return RowLayout.from_csr((frame.nq, frame.nk), offsets, columns, lead, entry)


def _blocks(
    parts: Sequence[Blocks], frame: Frame, size: int, lead: tuple[int, int], entry: tuple[int, ...]
) -> BlockLayout:
    index, masks, total = [], [], 0
    for part in parts:
        index.append(torch.where(part.mask_index < 0, -1, part.mask_index + total))
        masks.append(part.masks)
        total += part.masks.shape[0]
    table, which = torch.cat(masks), torch.cat(index)
    if len(parts) > 1 and total:
        # Heads with different patterns often have the same edges.
        table, kind = torch.unique(table.flatten(1), dim=0, return_inverse=True)
        table = table.view(-1, size, size // 8)
        which = torch.where(which < 0, -1, kind[which.clamp(min=0)])
    return BlockLayout.from_blocks(
        (frame.nq, frame.nk), size,
        prefix_sum(torch.cat([part.counts for part in parts])),
        torch.cat([part.columns for part in parts]),
        which, table, lead, entry,
    )  # fmt: skip


def _pieces(flat: Pattern, frame: Frame, size: int, costs: Costs, mixed: bool) -> Pieces:
    """Split one flat pattern."""
    found = flat.factor(frame)
    core, queries, keys = found.core, found.queries, found.keys
    panel_keys, panel_queries = keys[:0], queries[:0]
    if mixed and (keys.numel() or queries.numel()):
        as_panel = _worth_sharing(core, queries, keys, frame, size, costs)
        panel_keys = keys if as_panel[0] else keys[:0]
        panel_queries = queries if as_panel[1] else queries[:0]
    nkb = -(-frame.nk // size)
    block_keys = keys[panel_keys.numel() :]
    extra = Extra(
        full_rows=queries[panel_queries.numel() :],
        dropped_rows=panel_queries,
        full_cols=bit_words(block_keys, nkb, size) if block_keys.numel() else None,
        dropped_cols=bit_words(panel_keys, nkb, size) if panel_keys.numel() else None,
    )
    shares, saved = _shares(core, frame, size, extra, costs, mixed)
    if mixed and 0 < saved < costs.launch_seconds:
        shares, _ = _shares(core, frame, size, extra, costs, False)
    if mixed:
        shares = without_few_blocks(shares, frame, size, costs)
    panels = _shared_panels(panel_queries, panel_keys, frame)
    panels += [p for s in shares if (p := _private_panels(s, frame, size)) is not None]
    return Pieces(_gather_blocks(shares, frame, size), panels, _gather_rest(shares, frame))


def _worth_sharing(
    core: Pattern | None, queries: Tensor, keys: Tensor, frame: Frame, size: int, costs: Costs
) -> tuple[bool, bool]:
    """Whether the keys, and the queries, cost less as a shared panel than as blocks."""
    nqb, nkb = -(-frame.nq // size), -(-frame.nk // size)
    key_cols = torch.unique(keys // size)
    query_rows = torch.unique(queries // size)
    covered_keys = covered_queries = 0.0
    if core is not None:
        sample = torch.arange(0, nqb, max(1, nqb // 32), device=frame.device) * size
        covered_keys = _covered(core, frame, size, sample, key_cols)
        step = max(1, query_rows.numel() // 32)
        everything = torch.arange(nkb, device=frame.device)
        covered_queries = _covered(core, frame, size, query_rows[::step] * size, everything)
    return cheaper_shared(
        (keys.numel(), queries.numel()), (key_cols.numel(), query_rows.numel()),
        (covered_keys, covered_queries), frame, size, costs,
    )  # fmt: skip


def cheaper_shared(
    members: tuple[int, int],
    lines: tuple[int, int],
    covered: tuple[float, float],
    frame: Frame,
    size: int,
    costs: Costs,
) -> tuple[bool, bool]:
    """Whether keys, and queries, are cheaper shared, which is worth it for both together only.

    Args:
        members: keys, and queries, that are listed.
        lines: block columns, and block rows, that hold them.
        covered: what part of those the core touches anyway.
        frame: the rectangle.
        size: side of a block.
        costs: rates.
    """
    nkb = -(-frame.nk // size)
    block = costs.block_seconds(size)
    keys, queries = members
    others = frame.nq - queries
    as_blocks = (
        lines[0] * -(-others // size) * block * (1 - covered[0]),
        lines[1] * nkb * block * (1 - covered[1]),
    )
    as_panels = costs.panel_seconds(others, keys), costs.panel_seconds(queries, frame.nk)
    saved = [max(0.0, b - p) for b, p in zip(as_blocks, as_panels, strict=True)]
    if sum(saved) <= costs.launch_seconds:
        return False, False
    return saved[0] > 0 and others > 0, saved[1] > 0


def _covered(core: Pattern, frame: Frame, size: int, rows: Tensor, columns: Tensor) -> float:
    """The part of some block columns that the core touches anyway, seen from a few rows."""
    if not rows.numel() or not columns.numel():
        return 0.0
    touched, total = 0, rows.numel() * columns.numel()
    for _, runs in chunked_runs(core, frame, rows):
        low = torch.searchsorted(columns, runs.lo // size)
        high = torch.searchsorted(columns, (runs.hi - 1) // size, right=True)
        # Runs of one row may end in the block where the next one starts.
        same = torch.zeros_like(low, dtype=torch.bool)
        row = runs.row_of_run()
        same[1:] = (row[1:] == row[:-1]) & (low[1:] < high[:-1])
        touched += int((high - low - same.long()).clamp(min=0).sum())
    return min(1.0, touched / total)


def _shares(
    core: Pattern | None, frame: Frame, size: int, extra: Extra, costs: Costs, mixed: bool
) -> tuple[list[Share], float]:
    """The core split chunk by chunk, with masks already deduplicated, and what that saves."""
    shares, saved = [], 0.0
    if core is None and extra.full_cols is None and not extra.full_rows.numel():
        return [], 0.0
    for cells in cells_of(core, frame, size, extra, sparse_limit(size, costs) if mixed else 0):
        made = share(cells, frame, size, costs, mixed)
        saved += made.saved
        first, kind = distinct(made.words)
        index = torch.where(made.index < 0, -1, kind[made.index.clamp(min=0)]) if (
            made.words.shape[0]
        ) else made.index  # fmt: skip
        shares.append(
            Share(
                made.row, made.col.to(torch.int32), index.to(torch.int32), made.words[first],
                made.panel_row, made.panel_cols, made.col_list.to(torch.int32),
                pack_bits(made.panel_bits), made.entry_row, made.entry_col.to(torch.int32),
                made.saved,
            )
        )  # fmt: skip
    return shares, saved


def _gather_blocks(shares: list[Share], frame: Frame, size: int) -> Blocks:
    nqb = -(-frame.nq // size)
    device = frame.device
    counts = torch.zeros(nqb, dtype=torch.int64, device=device)
    int32 = torch.zeros(0, dtype=torch.int32, device=device)
    columns, index, total = [int32], [int32], 0
    words = [torch.zeros(0, size, words_per_row(size), dtype=torch.int64, device=device)]
    for s in shares:
        counts += torch.bincount(s.row, minlength=nqb)
        columns.append(s.col)
        index.append(torch.where(s.index < 0, -1, s.index + total))
        words.append(s.words)
        total += s.words.shape[0]
    table = torch.cat(words)
    first, kind = distinct(table)
    which = torch.cat(index)
    if total:
        which = torch.where(which < 0, -1, kind[which.clamp(min=0).long()].to(torch.int32))
    return Blocks(counts, torch.cat(columns), which, to_masks(table[first], size))


def _gather_rest(shares: list[Share], frame: Frame) -> Csr:
    counts = torch.zeros(frame.nq, dtype=torch.int64, device=frame.device)
    columns = [torch.zeros(0, dtype=torch.int32, device=frame.device)]
    for s in shares:
        if s.entry_row.numel():
            counts.index_add_(0, s.entry_row, torch.ones_like(s.entry_row))
            columns.append(s.entry_col)
    return counts, torch.cat(columns)


def _shared_panels(queries: Tensor, keys: Tensor, frame: Frame) -> list[Panels]:
    """The panel of keys for all other rows, and that of queries over all keys."""
    panels: list[tuple[range | Tensor, range | Tensor, Tensor | None]] = []
    if keys.numel() and queries.numel() < frame.nq:
        rows: range | Tensor = range(frame.nq)
        if queries.numel():
            others = torch.ones(frame.nq, dtype=torch.bool, device=frame.device)
            others[queries] = False
            rows = _as_range(others.nonzero().flatten())
        panels.append((rows, _as_range(keys), None))
    if queries.numel() and frame.nk:
        panels.append((_as_range(queries), range(frame.nk), None))
    return [Panels(*arrays_of(panels, frame.device))] if panels else []


def _as_range(members: Tensor) -> range | Tensor:
    """A range where rising members follow each other without gaps."""
    first, last = int(members[0]), int(members[-1])
    return range(first, last + 1) if last - first + 1 == members.numel() else members


def _private_panels(made: Share, frame: Frame, size: int) -> Panels | None:
    """The private panels of one chunk of block rows."""
    if not made.panel_row.numel():
        return None
    zero = torch.zeros_like(made.panel_row)
    heights = (frame.nq - made.panel_row * size).clamp(max=size)
    offsets = prefix_sum(made.panel_cols)[:-1]
    ends = offsets + made.panel_cols
    lists = made.col_list.long()
    ranged = lists[ends - 1] - lists[offsets] + 1 == made.panel_cols
    masked = torch.ones_like(ranged)
    mask_offset, _ = mask_table(heights, made.panel_cols, masked)
    rows = (made.panel_row * size, heights, zero, made.col_list[:0])
    cols = (
        torch.where(ranged, lists[offsets], -1), made.panel_cols,
        torch.where(ranged, 0, offsets), made.col_list,
    )  # fmt: skip
    return Panels(rows, cols, mask_offset, made.panel_bits)


def _join_panels(
    pieces: Sequence[Pieces], frame: Frame, lead: tuple[int, int], entry: tuple[int, ...]
) -> PanelLayout | None:
    """All panels of all distinct patterns in one layout."""
    parts = [(u, panels) for u, piece in enumerate(pieces) for panels in piece.panels]
    if not parts:
        return None

    def axis(of: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> tuple[Tensor, ...]:
        offsets, total = [], 0
        for start, _, offset, listed in of:
            offsets.append(torch.where(start < 0, offset + total, 0))
            total += listed.numel()
        return (
            torch.cat([a[0] for a in of]), torch.cat([a[1] for a in of]),
            torch.cat(offsets), torch.cat([a[3] for a in of]),
        )  # fmt: skip

    mask_offset, bytes_before = [], 0
    for _, panels in parts:
        at = panels.mask_offset
        mask_offset.append(torch.where(at < 0, -1, at + bytes_before))
        bytes_before += panels.mask_bits.numel()
    counts = torch.tensor([p.mask_offset.numel() for _, p in parts], device=frame.device)
    of = torch.repeat_interleave(torch.tensor([u for u, _ in parts], device=frame.device), counts)
    rows, cols = axis([p.rows for _, p in parts]), axis([p.cols for _, p in parts])
    return PanelLayout.from_arrays(
        (frame.nq, frame.nk), of, (rows[0], rows[1], rows[2], rows[3]),
        (cols[0], cols[1], cols[2], cols[3]), torch.cat(mask_offset),
        torch.cat([p.mask_bits for _, p in parts]), lead, entry,
    )  # fmt: skip
