"""Plans of the fused CUDA kernels: work items over units of 64 queries × 64 keys, and what is left.

    tensors             of all distinct patterns, one after the other
      items, steps      int32 (I, 8) and (S, 4): see ``items``
      masks             int32 (M, 128), distinct masks in register order: see ``cells``
      key_rows          int32 (U, 64 · n), keys to gather for the packed key units, −1 = a zero row
      query_rows        int32 (U, 64 · m), likewise
      merge_rows        int32 (R,), rows of the output that are merged
      merge_ptr         int32 (R + 1,) into
      merge_from        int32: their partial results in order; row r of slot s is 64 · s + r
      row_items         int32 (NI, 4): see ``rows``
      row_offsets       int64 (U · nq + 1,), columns int32: the single entries
      dead              bool (U, nk): keys nobody keeps inside kept units, or empty
      costs             int32 (I,)
    ints                nq, nk, b, h, query units of an item, 0, entry …, U, slots, then for items,
                        merge_rows and row_items U + 1 starts each, and the longer row items of
                        each pattern

A plan depends on the layout and the head dimension alone: results depend on no other batch entry or
head.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixgrain.cuda.derived import at_hand
from mixgrain.formats.block import BlockLayout
from mixgrain.formats.cache import LRU
from mixgrain.formats.errors import LayoutError
from mixgrain.formats.layout import Layout
from mixgrain.formats.panel import PanelLayout
from mixgrain.formats.row import RowLayout
from mixgrain.primitives.plans.plan import validate_once

from .cells import PACKED, UNIT, Cells, block_cells, columns_of, join, none, register_words
from .fill import filled, flag
from .items import Items, Lines, make_items
from .panels import Gathered, panel_cells
from .rows import Rows, row_items

NAMES = (
    "items", "steps", "masks", "key_rows", "query_rows", "merge_rows", "merge_ptr", "merge_from",
    "row_items", "row_offsets", "columns", "dead", "costs",
)  # fmt: skip


# What is derived of the items where a plan is written by kernels: the event behind the last one.
WRITTEN = "written"


class Plan(NamedTuple):
    """What crosses the operator boundary; see the module.

    Attributes:
        tensors: index tensors in the order of ``NAMES``.
        ints: sizes and starts.
    """

    tensors: list[Tensor]
    ints: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Device memory that the plan takes."""
        return sum(t.numel() * t.element_size() for t in self.tensors)


class Work(NamedTuple):
    """A plan taken apart: its tensors by name, and the ints."""

    items: Tensor
    steps: Tensor
    masks: Tensor
    key_rows: Tensor
    query_rows: Tensor
    merge_rows: Tensor
    merge_ptr: Tensor
    merge_from: Tensor
    row_items: Tensor
    row_offsets: Tensor
    columns: Tensor
    dead: Tensor
    costs: Tensor
    shape: tuple[int, int]
    lead: tuple[int, int]
    entry: tuple[int, ...]
    groups: int
    patterns: int
    slots: int
    item_starts: tuple[int, ...]
    merge_starts: tuple[int, ...]
    row_starts: tuple[int, ...]
    row_longer: tuple[int, ...]


def unpack(tensors: list[Tensor], ints: tuple[int, ...]) -> Work:
    """The inverse of what ``plan`` packs."""
    entries = ints[2] * ints[3]
    entry = tuple(ints[6 : 6 + entries])
    patterns, slots = ints[6 + entries : 8 + entries]
    rest = ints[8 + entries :]
    n = patterns + 1
    starts = [tuple(rest[i * n : (i + 1) * n]) for i in range(3)]
    starts.append(tuple(rest[3 * n :]))
    named: dict[str, Any] = dict(zip(NAMES, tensors, strict=True))
    sizes = ((ints[0], ints[1]), (ints[2], ints[3]), entry, ints[4], patterns, slots, *starts)
    named.update(zip(Work._fields[len(NAMES) :], sizes, strict=True))
    return Work(**named)


def wait(items: Tensor) -> None:
    """Let the current stream wait for a plan, of which these are the items, that is being written.

    Nothing reads a plan before that: kernels have its tables, which are made after it.
    """
    event = at_hand(items, WRITTEN)
    if event is not None:
        torch.cuda.current_stream(items.device).wait_event(event)


def count_work(made: Plan) -> tuple[int, int, int]:
    """Of all entries together: steps of items, scores computed by them and by rows; plan bytes."""
    work = unpack(*made)
    wait(work.items)
    times = torch.bincount(torch.tensor(work.entry), minlength=work.patterns)

    def total(each: Tensor, starts: tuple[int, ...]) -> int:
        of = torch.repeat_interleave(times, torch.tensor(starts).diff())
        return int((each.cpu().long() * of).sum())

    running = torch.zeros(len(work.steps) + 1, dtype=torch.int64)
    torch.cumsum((work.steps[:, 1:] != -2).sum(1).cpu(), 0, out=running[1:])
    first, steps = work.items[:, 3].cpu().long(), work.items[:, 4].cpu().long()
    units = total(running[first + steps] - running[first], work.item_starts)
    entries = total(work.row_items[:, 1], work.row_starts)
    return total(steps, work.item_starts), units * UNIT * UNIT + entries, made.bytes


_plans: LRU[Plan] = LRU(128)


def plan(layout: Layout, D: int, device: torch.device | None = None, groups: int = 2) -> Plan:
    """The plan of a Block, Row or Mixed layout on its device, remembered by the layout's key.

    Args:
        layout: kept positions; validated when its first plan is made.
        D: head dimension.
        device: of the plan of a layout that keeps nothing, which has no tensors and so no device.
        groups: query units of an item, as the kernel takes them; see ``choice.groups``.

    Raises:
        LayoutError: another layout, or indices at fault.
    """
    if layout.kind not in ("block", "row", "mixed"):
        raise LayoutError(
            f"no fused attention plan for {layout!r}; BlockLayout, RowLayout and MixedLayout have "
            "one"
        )

    def make() -> Plan:
        validate_once(layout)
        return build(layout, D, where, groups)

    where = layout.device if device is None or layout.tensors() else device
    return _plans.get((layout.key, where, D > 128, groups), make)


def build(layout: Layout, D: int, device: torch.device | None = None, groups: int = 2) -> Plan:
    """A plan, made anew; see ``plan``."""
    nq, nk = layout.shape
    device = layout.device if device is None else device
    patterns = max(layout.entry, default=0) + 1
    nqu, nku = -(-nq // UNIT), -(-nk // UNIT)
    cells, gathered, rest = [none(device)], None, None
    for part in layout.parts:
        if isinstance(part, BlockLayout):
            cells = [block_cells(part)]
        elif isinstance(part, PanelLayout):
            gathered = panel_cells(part)
            cells.append(gathered.cells)
        elif isinstance(part, RowLayout):
            rest = part
    found = join([c for c in cells if c.line.numel()] or cells[:1])
    lines = _lines(nqu, patterns, gathered, device)
    counts = torch.bincount(found.line, minlength=lines.pattern.numel())
    query_rows, local_query = _by_pattern(gathered, "query", patterns, device)
    key_rows, _ = _by_pattern(gathered, "key", patterns, device)
    if gathered is not None:
        lines.unit[patterns * nqu :] = PACKED + local_query
        lines.to_slot[patterns * nqu :] = True
    free = flag(lines, found, counts, gathered, nq, nqu)
    if nq % UNIT or query_rows.numel() or key_rows.numel():
        found = filled(found, lines, free, key_rows, patterns * nqu, nku)
        counts = torch.bincount(found.line, minlength=len(counts))
    if rest is not None:
        lines = _leave(lines, counts, rest, nqu)
    made = make_items(found, lines, counts, patterns, D, groups)
    rows = row_items(rest, counts, made.slot_counts, gathered, patterns, (nq, nqu), device)
    merge, merged = _merges(made, rows, lines, free, gathered, (nq, nqu), patterns)
    slots = [n + -(-r // UNIT) for n, r in zip(made.slot_counts, rows.partials, strict=True)]
    empty = torch.zeros(0, dtype=torch.int32, device=device)
    tensors = [
        made.items, made.steps, register_words(found.masks), key_rows, query_rows, *merge,
        rows.items, empty.long() if rest is None else rest.row_offsets,
        empty if rest is None else rest.columns, _dead(found, nku, nk, key_rows, patterns, lines),
        made.costs,
    ]  # fmt: skip
    ints = [nq, nk, *layout.lead, groups, 0, *layout.entry, patterns, max(slots)]
    for sizes in (made.item_counts, merged, rows.counts):
        ints += [0, *itertools.accumulate(sizes)]
    ints += rows.longer
    return Plan([t.contiguous() for t in tensors], tuple(ints))


def _lines(nqu: int, patterns: int, gathered: Gathered | None, device: torch.device) -> Lines:
    """All lines, none of them flagged; the units of gathered ones are set later."""
    pattern = torch.arange(patterns * nqu, device=device)
    unit = pattern % max(nqu, 1)
    pattern = pattern // max(nqu, 1)
    if gathered is not None and gathered.query_pattern.numel():
        pattern = torch.cat([pattern, gathered.query_pattern])
        unit = torch.cat([unit, gathered.query_pattern])
    return Lines(pattern, unit, torch.zeros_like(unit, dtype=torch.bool), None)


def _by_pattern(
    gathered: Gathered | None, axis: str, patterns: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """int32 (U, 64 · n): rows of the gathered units of each pattern; the number of each in it."""
    if gathered is None:
        none = torch.zeros(patterns, 0, dtype=torch.int32, device=device)
        return none, none[0].long()
    rows, of = getattr(gathered, f"{axis}_rows"), getattr(gathered, f"{axis}_pattern")
    sizes = torch.bincount(of, minlength=patterns)
    local = torch.arange(len(of), device=device) - (sizes.cumsum(0) - sizes)[of]
    table = torch.full((patterns, int(sizes.max()), UNIT), -1, dtype=torch.int32, device=device)
    table[of, local] = rows.to(torch.int32)
    return table.flatten(1), local


def _leave(lines: Lines, counts: Tensor, rest: RowLayout, nqu: int) -> Lines:
    """Single entries: lines that have cells too are merged, lines without cells have no item."""
    ours = torch.arange(len(counts), device=counts.device) < rest.distinct * nqu
    line = torch.arange(rest.distinct * rest.shape[0], device=counts.device)
    line = line // rest.shape[0] * nqu + line % rest.shape[0] // UNIT
    touched = torch.zeros_like(ours)
    touched[line[rest.row_offsets.diff() > 0]] = True
    return lines._replace(
        to_slot=lines.to_slot | touched & (counts > 0), left_out=ours & (counts == 0)
    )


def _merges(
    made: Items,
    rows: Rows,
    lines: Lines,
    free: Tensor,
    gathered: Gathered | None,
    size: tuple[int, int],
    patterns: int,
) -> tuple[list[Tensor], list[int]]:
    """merge_rows, merge_ptr, merge_from; and the merged rows of each pattern.

    Free rows of neighbours hold anything, and are merged from gathered lines alone.
    """
    nq, nqu = size
    line, pattern = made.slot_line, made.slot_pattern
    counts = torch.bincount(pattern, minlength=patterns)
    slot = torch.arange(len(line), device=line.device) - (counts.cumsum(0) - counts)[pattern]
    inside = torch.arange(UNIT, device=line.device)
    row = lines.unit[line][:, None] * UNIT + inside
    if gathered is not None and gathered.query_rows.numel():
        own = line >= patterns * nqu
        listed = gathered.query_rows[torch.where(own, line - patterns * nqu, 0)]
        row = torch.where(own[:, None], listed, row)
    source = slot[:, None] * UNIT + inside
    kept = (row >= 0) & (row < nq) & (free[line][:, None] >> inside & 1 == 0)
    whole = torch.cat([(pattern[:, None] * nq + row)[kept], rows.merged])
    source = torch.cat([source[kept], rows.source])
    whole, order = torch.sort(whole, stable=True)
    found, sizes = torch.unique_consecutive(whole, return_counts=True)
    ptr = torch.zeros(len(found) + 1, dtype=torch.int32, device=line.device)
    ptr[1:] = sizes.cumsum(0)
    of = torch.bincount(found // max(nq, 1), minlength=patterns).tolist()
    merge_rows = (found % max(nq, 1)).to(torch.int32)
    return [merge_rows, ptr, source[order].to(torch.int32)], of


def _dead(cells: Cells, nku: int, nk: int, key_rows: Tensor, patterns: int, lines: Lines) -> Tensor:
    """Bool (U, nk): keys inside some cell that no query keeps; (0,) if there are none."""
    device = cells.line.device
    nothing = torch.zeros(0, dtype=torch.bool, device=device)
    if not cells.masks.numel():
        return nothing
    size = patterns * nku
    there = cells.key < PACKED
    at = torch.where(there, lines.pattern[cells.line] * nku + cells.key, size)
    state = torch.zeros(size + 1, dtype=torch.bool, device=device)
    full = state.clone()
    state[at] = True
    full[torch.where(cells.mask < 0, at, size)] = True
    # Most units have a cell with nothing masked.
    open_ = (there & (cells.mask >= 0) & ~full[at]).nonzero()[:, 0]
    if not open_.numel():
        return nothing
    columns = _columns(cells.masks)
    units, which = torch.unique(at[open_], return_inverse=True)
    held = torch.zeros(len(units), UNIT, dtype=torch.int32, device=device)
    held.index_add_(0, which, columns[cells.mask[open_]])
    lost = held == 0
    position = (units % nku)[:, None] * UNIT + torch.arange(UNIT, device=device)
    lost &= position < nk
    if not bool(lost.any()):
        return nothing
    dead = torch.zeros(patterns, nku * UNIT, dtype=torch.bool, device=device)
    pattern = (units // nku)[:, None].expand_as(position)
    dead[pattern[lost], position[lost]] = True
    if key_rows.numel():
        # Keys that are gathered are kept by queries.
        of, at = (key_rows >= 0).nonzero(as_tuple=True)
        dead[of, key_rows[of, at].long()] = False
        if not bool(dead.any()):
            return nothing
    return dead[:, :nk]


def _columns(masks: Tensor) -> Tensor:
    """int32 (M, 64): which columns of each mask have a kept position."""
    words = columns_of(masks.contiguous().view(torch.int64)[..., 0])
    return ((words[:, None] >> torch.arange(UNIT, device=masks.device)) & 1).to(torch.int32)
