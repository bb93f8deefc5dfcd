"""Plans of new patterns made on the host and uploaded at once; the same plans as ``plan.build``.

A device pays microseconds for each of hundreds of small steps, and for each time that the host has
to learn a size. Patterns whose units follow from the ends of intervals are planned in numpy
instead, at the cost of their runs of units, and cross in one copy. Others return None.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np
import torch

from mixgrain.cuda.derived import known
from mixgrain.formats.cache import LRU
from mixgrain.formats.costs import Costs
from mixgrain.formats.direct import Split, split_directly
from mixgrain.formats.errors import LayoutError
from mixgrain.formats.pattern import Frame, Pattern
from mixgrain.formats.units import KEY_BITS, UNIT, Ints, Units, Words, low_bits, sorted_unique

from .cells import PACKED, in_register_order, register_words
from .choice import split_costs
from .host_fill import fill, free_rows
from .host_items import HostItems, HostLines, host_items
from .panels import COPY, LINE, MASKED
from .plan import Plan
from .upload import upload

# Rows beyond which the device is faster.
MOST_ROWS = 1 << 17
# Masks that are put in order here.
FEW_MASKS = 24
# Distinct patterns of a table over heads and batch entries.
MOST_PATTERNS = 16


class Gathers(NamedTuple):
    """Rows of the gathered units of one pattern, −1 behind the last: (n, 64) each."""

    queries: Ints
    keys: Ints


_plans: LRU[Plan | None] = LRU(128)


def plan_pattern(
    pattern: Pattern, nq: int, nk: int, D: int, device: torch.device, groups: int
) -> Plan | None:
    """What ``host_plan`` makes, remembered by the pattern's expression.

    Raises:
        LayoutError: a pattern of another fixed shape, or a new one while a graph is captured.
    """

    def make() -> Plan | None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise LayoutError(
                f"{pattern!r}: no plan for {nq} × {nk} yet, and a graph is being captured; plan "
                "first: run the model once before it"
            )
        return host_plan(pattern, nq, nk, D, device, costs, groups)

    costs = _costs(D)
    return _plans.get((pattern.expression_key(), nq, nk, device, D > 128, costs, groups), make)


@functools.lru_cache(maxsize=512)
def _costs(D: int) -> Costs:
    return split_costs(D)


def host_plan(
    pattern: Pattern,
    nq: int,
    nk: int,
    D: int,
    device: torch.device,
    costs: Costs,
    groups: int = 2,
) -> Plan | None:
    """The plan of a pattern; None where layouts and ``plan.build`` have to be taken.

    Args:
        pattern: any.
        nq: number of queries.
        nk: number of keys.
        D: head dimension.
        device: where the plan goes.
        costs: rates of the split.
        groups: query units of an item, as the kernel takes them; see ``choice.groups``.

    Raises:
        LayoutError: a pattern of another fixed shape.
    """
    if not pattern._static or pattern.device.type != "cpu":
        return None
    if max(nq, nk) > MOST_ROWS or len(pattern.distinct) > MOST_PATTERNS:
        return None
    frame = Frame(nq, nk, torch.device("cpu"))
    patterns, nqu = len(pattern.distinct), -(-nq // UNIT)
    parts: list[Units] = []
    gathers: list[Gathers] = []
    free: list[Words] = []
    before = total = 0
    for u, flat in enumerate(pattern.distinct):
        split = split_directly(flat, frame, costs)
        if split is None or not _gathered(split, frame):
            return None
        gathers.append(Gathers(_in_units(split.queries), _in_units(split.keys)))
        free.append(free_rows(split, frame))
        pieces = [split.units]
        if nq % UNIT or len(split.keys) or len(split.queries):
            pieces = fill(split, free[-1], frame)
        pieces += _whole_lines(split, frame, patterns * nqu + total - u * nqu)
        for piece in pieces:
            mask = np.where(piece.mask < 0, piece.mask, piece.mask + before)
            parts.append(piece._replace(line=piece.line + u * nqu, mask=mask))
            before += len(piece.words)
        total += len(gathers[-1].queries)
    units = _joined(parts)
    many = [len(of.queries) for of in gathers]
    lines = HostLines(
        np.concatenate([np.repeat(np.arange(patterns), nqu), np.repeat(np.arange(patterns), many)]),
        np.concatenate([
            np.tile(np.arange(nqu), patterns), *(PACKED + np.arange(n) for n in many),
        ]),
        np.arange(patterns * nqu + total) >= patterns * nqu,
    )  # fmt: skip
    made = host_items(units, lines, patterns, D, groups)
    queries = np.concatenate([of.queries for of in gathers])
    merge, merged = _merges(made, lines, np.concatenate(free), queries, nq, patterns)
    dead = _dead(units, lines, gathers, (nq, nk))
    tables = [_table([of.keys for of in gathers]), _table([of.queries for of in gathers])]
    few = len(units.words) <= FEW_MASKS
    words = _ordered(units.words) if few else units.words.view(np.int32)
    items, steps, masks, *rest, costs_of = upload(
        [made.items, made.steps, words, *tables, *merge, made.costs], device
    )
    known(items, "costs", made.costs)
    if not few:
        masks = register_words(masks.view(torch.uint8).view(-1, UNIT, 8))
    none = items.new_zeros(0)
    tensors = [
        items, steps, masks, *rest, none.view(0, 4), none.long(), none,
        torch.from_numpy(dead).to(device), costs_of,
    ]  # fmt: skip
    ints = [nq, nk, *pattern.lead, groups, 0, *pattern.entry, patterns, max(made.slot_counts)]
    for sizes in (made.item_counts, merged, [0] * patterns):
        ints += [0, *itertools.accumulate(sizes)]
    ints += [0] * patterns
    return Plan(tensors, tuple(ints))


def _in_units(members: Ints) -> Ints:
    """(n, 64): rising numbers in units, −1 behind the last."""
    padded = np.full(-(-len(members) // UNIT) * UNIT, -1)
    padded[: len(members)] = members
    return padded.reshape(-1, UNIT)


def _table(units: list[Ints]) -> Ints:
    """(U, 64 · n): rows of the gathered units of each pattern."""
    table = np.full((len(units), max(map(len, units)) * UNIT), -1)
    for row, rows in zip(table, units, strict=True):
        row[: rows.size] = rows.ravel()
    return table


def _others(split: Split, frame: Frame) -> tuple[Ints, Ints]:
    """Rows of each line: how many there are, and how many of them are no panel's queries."""
    lines = -(-frame.nq // UNIT)
    there = np.minimum(UNIT, frame.nq - UNIT * np.arange(lines))
    return there, there - np.bincount(split.queries >> 6, minlength=lines)


def _gathered(split: Split, frame: Frame) -> bool:
    """Whether the panels are gathered as ``panels.panel_cells`` would: keys, and rows of queries.

    Anything else is left to it.
    """
    wide = -(-frame.nk // UNIT)
    there, others = _others(split, frame)
    if len(split.queries):
        listed = there - others
        touched, cut = int((listed > 0).sum()), int(((listed > 0) & (listed < there)).sum())
        if not -(-len(split.queries) // UNIT) * (wide + LINE) < (touched + cut / MASKED) * wide:
            return False
    if len(split.keys):
        packed, places = -(-len(split.keys) // UNIT), len(sorted_unique(split.keys >> 6))
        across = min(packed, places)
        # No unit is cut but by gathered queries.
        touched = int((others > 0).sum())
        if -(-int(others.sum()) // UNIT) * (across + LINE) < touched * across:
            return False
        return packed * (touched + COPY) < places * touched
    return True


def _whole_lines(split: Split, frame: Frame, gathered: int) -> list[Units]:
    """Units of the gathered queries; their first line has the number ``gathered``."""
    if not len(split.queries):
        return []
    line = gathered + np.arange(-(-len(split.queries) // UNIT))
    one = np.ones_like(line)
    full, tail = divmod(frame.nk, UNIT)
    parts = []
    if full:
        parts.append(Units(line, one * 0, one * full, -one, np.zeros((0, UNIT), np.uint64)))
    if tail:
        last = np.full((1, UNIT), low_bits()[tail])
        parts.append(Units(line, one * full, one, one * 0, last))
    return [_joined(parts)]


def _joined(parts: list[Units]) -> Units:
    """Parts whose masks are numbered through, by line and key."""
    if len(parts) == 1:
        return parts[0]
    line, key, length, mask, words = (np.concatenate(of) for of in zip(*parts, strict=True))
    order = np.argsort(line << KEY_BITS | key, kind="stable")
    return Units(line[order], key[order], length[order], mask[order], words)


def _merges(
    made: HostItems, lines: HostLines, free: Words, queries: Ints, nq: int, patterns: int
) -> tuple[list[Ints], list[int]]:
    """merge_rows, merge_ptr, merge_from; and the merged rows of each pattern.

    Free rows of neighbours hold anything, and are merged from gathered lines alone.
    """
    line, pattern = made.slot_line, made.slot_pattern
    if not len(line):
        return [line, np.zeros(1, np.int64), line], [0] * patterns
    counts = np.array(made.slot_counts)
    slot = np.arange(len(line)) - (counts.cumsum() - counts)[pattern]
    inside = np.arange(UNIT)
    row = lines.unit[line][:, None] * UNIT + inside
    own = line >= len(free)
    row[own] = queries[line[own] - len(free)]
    lost = free[line[~own], None] >> inside.astype(np.uint64) & np.uint64(1)
    row[~own] = np.where(lost, -1, row[~own])
    kept = (row >= 0) & (row < nq)
    whole = (pattern[:, None] * nq + row)[kept]
    # By row, then by slot: keys that hold both sort faster than a stable order is found.
    key = np.sort(whole * len(whole) + np.arange(len(whole)))
    whole, order = np.divmod(key, len(whole))
    fresh = np.ones(len(whole) + 1, bool)
    fresh[1:-1] = whole[1:] != whole[:-1]
    found = whole[fresh[:-1]]
    of = np.bincount(found // max(nq, 1), minlength=patterns).tolist()
    source = (slot[:, None] * UNIT + inside)[kept]
    return [found % max(nq, 1), fresh.nonzero()[0], source[order]], of


def _dead(
    units: Units, lines: HostLines, gathers: list[Gathers], size: tuple[int, int]
) -> np.typing.NDArray[np.bool_]:
    """Bool (U, nk): keys inside some cell that no query keeps; (0,) if there are none."""
    nothing = np.zeros(0, bool)
    nk, wide = size[1], -(-size[1] // UNIT)
    if not len(units.words):
        return nothing
    near = units.key < PACKED
    at = lines.pattern[units.line] * wide + units.key
    full = near & (units.mask < 0)
    count = len(gathers) * wide + 1
    ends = np.bincount(at[full], minlength=count) - np.bincount(
        (at + units.length)[full], minlength=count
    )
    covered = ends.cumsum() > 0
    open_ = (near & (units.mask >= 0)).nonzero()[0]
    open_ = open_[~covered[at[open_]]]
    if not len(open_):
        return nothing
    columns: Words = np.bitwise_or.reduce(units.words, 1)
    held = np.zeros(count, np.uint64)
    np.bitwise_or.at(held, at[open_], columns[units.mask[open_]])
    for u, of in enumerate(gathers):
        # Keys that are gathered are kept by queries.
        for key in of.keys[of.keys >= 0].tolist():
            held[u * wide + key // UNIT] |= np.uint64(1 << key % UNIT)
    place = sorted_unique(at[open_])
    lost = (held[place][:, None] >> np.arange(UNIT, dtype=np.uint64)) & np.uint64(1) == 0
    position = (place % wide)[:, None] * UNIT + np.arange(UNIT)
    lost &= position < nk
    if not lost.any():
        return nothing
    dead = np.zeros((len(gathers), wide * UNIT), bool)
    dead[np.broadcast_to((place // wide)[:, None], position.shape)[lost], position[lost]] = True
    return np.ascontiguousarray(dead[:, :nk])


def _ordered(words: Words) -> np.typing.NDArray[np.int32]:
    """A few masks (M, 64) in register order, (M, 128)."""
    ready = in_register_order(words.view(np.int64)[..., None], np.arange(0, 8, 2))
    halves: np.typing.NDArray[np.int32] = ready.view(np.int32).reshape(-1, 128, 2)
    return halves[..., 0]
