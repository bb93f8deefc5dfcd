"""Plans of new patterns made on the host and uploaded at once; the same plans as ``plan.build``.

A device pays microseconds for each of hundreds of small steps, and for each time that the host has
to learn a size. Patterns whose units follow from the ends of intervals are planned in numpy
instead, at the cost of their runs of units, and cross in one copy. Others return None.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixgrain.formats.cache import LRU
from mixgrain.formats.costs import Costs
from mixgrain.formats.direct import Split, split_directly
from mixgrain.formats.errors import LayoutError
from mixgrain.formats.pattern import Frame, Pattern
from mixgrain.formats.units import KEY_BITS, UNIT, Ints, Units, Words, low_bits, sorted_unique

from .cells import PACKED, in_register_order, register_words
from .choice import split_costs
from .host_items import HostItems, HostLines, host_items
from .panels import COPY, LINE, MASKED
from .plan import Plan

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


def plan_pattern(pattern: Pattern, nq: int, nk: int, D: int, device: torch.device) -> Plan | None:
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
        return host_plan(pattern, nq, nk, D, device, costs)

    costs = _costs(D)
    return _plans.get((pattern.expression_key(), nq, nk, device, D > 128, costs), make)


@functools.lru_cache(maxsize=512)
def _costs(D: int) -> Costs:
    return split_costs(D)


def host_plan(
    pattern: Pattern, nq: int, nk: int, D: int, device: torch.device, costs: Costs
) -> Plan | None:
    """The plan of a pattern; None where layouts and ``plan.build`` have to be taken.

    Args:
        pattern: any.
        nq: number of queries.
        nk: number of keys.
        D: head dimension.
        device: where the plan goes.
        costs: rates of the split.

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
    words = total = 0
    for u, flat in enumerate(pattern.distinct):
        split = split_directly(flat, frame, costs)
        if split is None or not _gathered(split, frame):
            return None
        gathers.append(Gathers(_in_units(split.queries), _in_units(split.keys)))
        pieces = [split.units, *_panels(split, frame, patterns * nqu + total - u * nqu)]
        for piece in pieces:
            mask = np.where(piece.mask < 0, piece.mask, piece.mask + words) if words else piece.mask
            parts.append(piece._replace(line=piece.line + u * nqu, mask=mask))
            words += len(piece.words)
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
    made = host_items(units, lines, patterns, D)
    queries = np.concatenate([of.queries for of in gathers])
    merge, merged = _merges(made, lines, queries, nq, patterns * nqu, patterns)
    dead = _dead(units, lines, gathers, (nq, nk))
    tables = [_table([of.keys for of in gathers]), _table([of.queries for of in gathers])]
    arrays: list[np.typing.NDArray[Any]] = [
        made.items,
        made.steps,
        units.words,
        *tables,
        *merge,
        made.costs,
    ]
    items, steps, masks, *rest, costs_of = _upload(arrays, device)
    none = items.new_zeros(0)
    tensors = [
        items, steps, masks, *rest, none.view(0, 4), none.long(), none,
        torch.from_numpy(dead).to(device), costs_of,
    ]  # fmt: skip
    ints = [nq, nk, *pattern.lead, 0, 0, *pattern.entry, patterns, max(made.slot_counts)]
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
        touched, cut = int((others > 0).sum()), int(((others > 0) & (others < there)).sum())
        if -(-int(others.sum()) // UNIT) * (across + LINE) < (touched + cut / MASKED) * across:
            return False
        return packed * (touched + COPY) < places * touched
    return True


def _panels(split: Split, frame: Frame, gathered: int) -> list[Units]:
    """Units of the panels; the first gathered line has the number ``gathered``."""
    made = []
    table = low_bits()
    if len(split.keys):
        there, others = _others(split, frame)
        packed = -(-len(split.keys) // UNIT)
        full, tail = divmod(len(split.keys), UNIT)
        open_ = ((others > 0) & (others == there)).nonzero()[0]
        cut = ((others > 0) & (others < there)).nonzero()[0]
        rows = np.ones((len(there), UNIT), bool)
        rows.reshape(-1)[split.queries] = False
        columns = np.append(np.full(full, table[UNIT]), table[tail : tail + bool(tail)])
        # One mask for lines that lose nothing, then those of the lines that do.
        words = np.where(rows[cut][:, None, :, None], columns[:, None, None], np.uint64(0))
        words = words.reshape(-1, UNIT)
        line, key = np.repeat(cut, packed), PACKED + np.tile(np.arange(packed), len(cut))
        parts = [Units(line, key, np.ones_like(key), np.arange(len(key)), words)]
        one = np.ones(len(open_), np.int64)
        nothing = words[:0]
        if full:
            parts.append(Units(open_, one * PACKED, one * full, -one, nothing))
        if tail:
            last = np.full((1, UNIT), table[tail])
            number = one * len(words)
            parts.append(Units(open_, one * (PACKED + full), one, number, last))
        made.append(_joined(parts))
    if len(split.queries):
        line = gathered + np.arange(-(-len(split.queries) // UNIT))
        one = np.ones_like(line)
        full, tail = divmod(frame.nk, UNIT)
        parts = []
        if full:
            parts.append(Units(line, one * 0, one * full, -one, np.zeros((0, UNIT), np.uint64)))
        if tail:
            last = np.full((1, UNIT), table[tail])
            parts.append(Units(line, one * full, one, one * 0, last))
        made.append(_joined(parts))
    return made


def _joined(parts: list[Units]) -> Units:
    """Parts whose masks are numbered through, by line and key."""
    if len(parts) == 1:
        return parts[0]
    line, key, length, mask, words = (np.concatenate(of) for of in zip(*parts, strict=True))
    order = np.argsort(line << KEY_BITS | key, kind="stable")
    return Units(line[order], key[order], length[order], mask[order], words)


def _merges(
    made: HostItems, lines: HostLines, queries: Ints, nq: int, neighbours: int, patterns: int
) -> tuple[list[Ints], list[int]]:
    """merge_rows, merge_ptr, merge_from; and the merged rows of each pattern."""
    line, pattern = made.slot_line, made.slot_pattern
    if not len(line):
        return [line, np.zeros(1, np.int64), line], [0] * patterns
    counts = np.array(made.slot_counts)
    slot = np.arange(len(line)) - (counts.cumsum() - counts)[pattern]
    inside = np.arange(UNIT)
    row = lines.unit[line][:, None] * UNIT + inside
    own = line >= neighbours
    row[own] = queries[line[own] - neighbours]
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


def _upload(arrays: list[np.typing.NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Everything as int32 in one copy; the third one, masks, in register order."""
    starts, total = [], 0
    if 0 < len(arrays[2]) <= FEW_MASKS:
        signed = arrays[2].view(np.int64)[..., None]
        ready = in_register_order(signed, np.arange(0, 8, 2)).view(np.int32)
        arrays = [*arrays[:2], ready.reshape(-1, 128, 2)[..., 0], *arrays[3:]]
    for array in arrays:
        starts.append(total)
        total += -(-array.size * (2 if array.dtype == np.uint64 else 1) // UNIT) * UNIT
    buffer = torch.empty(total, dtype=torch.int32, pin_memory=device.type == "cuda")
    flat = buffer.numpy()
    for start, array in zip(starts, arrays, strict=True):
        plain = array.ravel()
        plain = plain.view(np.int32) if array.dtype == np.uint64 else plain
        flat[start : start + plain.size] = plain
    there = buffer.to(device, non_blocking=True)
    made = []
    for start, array in zip(starts, arrays, strict=True):
        if array.dtype == np.uint64:
            raw = there[start : start + 2 * array.size].view(torch.uint8)
            made.append(register_words(raw.view(-1, UNIT, 8)))
        else:
            made.append(there[start : start + array.size].view(array.shape))
    if device.type == "cuda":
        # Other streams may read the plan at once.
        torch.cuda.current_stream(device).synchronize()
    return made
