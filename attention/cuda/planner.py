"""Plans of new patterns made on the device; the same plans as ``plan.build`` makes from layouts.

Patterns that are intervals of every row, whole units, and keys and queries that are shared cross as
``formats.sketch`` has them. Five kernels find the cells of every line, share lines out over items,
cut those, learn the sizes and write the tensors; the host waits once, for the sizes. Whoever reads
a plan on another stream waits for it first (``plan.wait``). Other patterns return None.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, build_all, request
from mixgrain.cuda.derived import known
from mixgrain.cuda.device import facts
from mixgrain.cuda.errors import CudaError
from mixgrain.cuda.launch import Kernel, kernel
from mixgrain.formats.cache import LRU
from mixgrain.formats.costs import Costs
from mixgrain.formats.errors import BackendUnavailableError, LayoutError
from mixgrain.formats.leftovers import sparse_limit
from mixgrain.formats.pattern import Frame, Pattern
from mixgrain.formats.sketch import Ints, Sketch, sketch

from . import items
from .cells import UNIT
from .choice import split_costs
from .panels import COPY, LINE, MASKED
from .plan import WRITTEN, Plan
from .room import Struct, room

# Units that intervals may touch, all patterns together, beyond which layouts take less memory;
# rows or keys.
MOST_UNITS, MOST_ROWS = 1 << 24, 1 << 20
# Units of the matrix, all patterns together, beyond which none is looked at by itself; and at most.
LARGE, MOST = 1 << 24, 1 << 31
# Distinct patterns of a table over heads and batch entries; bits of masked cells of one pattern.
MOST_PATTERNS, MASKED_BITS = 16, 14
# Intervals of a row, ints that tell of one and of a pattern: plan.cuh, Band and Pattern.
BANDS, BAND, PATTERN = 6, 9, 64
# The head: plan.cuh, kEach and kCosts.
EACH, COSTS = 8, 56

#: plan.cuh: PlanWork.
WORK = Struct(
    ("given", "pattern", "counters", "shared", "taken", "held", "part", "whole", "kind", "members",
     "cell", "segment", "number", "first", "slot", "words", "counts", "place", "slots", "merge",
     "item", "begin", "piece", "rows", "head"),
    ("nq", "nk", "nqu", "nku", "patterns", "packed", "lines", "room", "groups", "shortest",
     "light_positions", "light_columns", "masked"),
)  # fmt: skip
#: plan_write.cu: PlanOut.
OUT = Struct(
    ("steps", "items", "masks", "costs", "merge_rows", "merge_ptr", "merge_from", "key_rows",
     "query_rows", "dead"),
    ("key_units", "query_units", "most_items", "pieces"),
)  # fmt: skip

_plans: LRU[Plan | None] = LRU(128)


def plan_pattern(
    pattern: Pattern, nq: int, nk: int, D: int, device: torch.device, groups: int
) -> Plan | None:
    """What ``device_plan`` makes, remembered by the pattern's expression.

    Raises:
        LayoutError: a pattern of another fixed shape, or a new one while a graph is captured.
    """

    def make() -> Plan | None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise LayoutError(
                f"{pattern!r}: no plan for {nq} × {nk} yet, and a graph is being captured; plan "
                "first: run the model once before it"
            )
        try:
            return device_plan(pattern, nq, nk, D, device, costs, groups)
        except CudaError as error:
            raise BackendUnavailableError(f"attend: {error}") from error

    costs = _costs(D)
    return _plans.get((pattern.expression_key(), nq, nk, device, D > 128, costs, groups), make)


@functools.lru_cache(maxsize=512)
def _costs(D: int) -> Costs:
    return split_costs(D)


def requests() -> list[Request]:
    """The five kernels in their order."""
    return [
        request("plan_cells", {"BANDS": BANDS, "PATTERN": PATTERN}),
        request("plan_lines", {"LONG": items.LONG, "FEW": items.FEW}),
        request("plan_lengths", {"TURN": items.TURN}),
        request(
            "plan_items",
            {name: getattr(items, name) for name in ("COST_UNIT", "COST_STEP", "COST_ITEM")},
        ),
        request("plan_write", {"TURN": items.TURN, "MOST_TURNED": items.MOST_TURNED}),
    ]


@functools.cache
def _kernels(index: int) -> list[Kernel]:
    wanted = requests()
    build_all([(each, facts(index).arch) for each in wanted])  # side by side, if not yet built
    return [kernel(each, index) for each in wanted]


def sketches(pattern: Pattern, nq: int, nk: int, costs: Costs) -> list[Sketch] | None:
    """All distinct patterns, if they are among those that are planned here.

    Tensors of theirs that lie on a device are brought here: a wait, but a short one.

    Raises:
        LayoutError: a pattern of another fixed shape.
    """
    if not pattern._static:
        return None
    flats = pattern.distinct
    units = len(flats) * -(-nq // UNIT) * -(-nk // UNIT)
    if len(flats) > MOST_PATTERNS or units >= MOST or max(nq, nk) > MOST_ROWS:
        return None
    frame = Frame(nq, nk, torch.device("cpu"))
    found: list[Sketch] = []
    for flat in flats:
        one = sketch(flat, frame, costs, units > LARGE)
        if one is None or not _gathered(one, nq, nk):
            return None
        found.append(one)
    lines = sum(-(-nq // UNIT) + -(-len(one.queries) // UNIT) for one in found)
    return None if lines * _padded(nk) >= MOST else found  # gathered queries may touch all of them


def _padded(nk: int) -> int:
    """Units of a line as the planner's table counts them: whole words."""
    return -(-nk // UNIT) + 31 & -32


def device_plan(
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
        device: a CUDA device.
        costs: rates of the split.
        groups: query units of an item, as the kernel takes them; see ``choice.groups``.

    Raises:
        LayoutError: a pattern of another fixed shape.
        CudaError: the kernels cannot be had.
    """
    found = sketches(pattern, nq, nk, costs)
    if found is None:
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        return _planned(pattern, found, (nq, nk), D, index, costs, groups)


def _planned(
    pattern: Pattern,
    found: list[Sketch],
    size: tuple[int, int],
    D: int,
    index: int,
    costs: Costs,
    groups: int,
) -> Plan | None:
    nq, nk = size
    patterns, nqu, nku = len(found), -(-nq // UNIT), -(-nk // UNIT)
    keys = [-(-len(s.keys) // UNIT) for s in found]
    queries = [-(-len(s.queries) // UNIT) for s in found]
    packed, lines = max(keys), patterns * nqu + sum(queries)
    most = lines // groups + 2 * patterns
    pieces = 2 * most + lines + UNIT * patterns
    device = torch.device("cuda", index)
    # Patterns are much alike where there are many; a window has two cells a line that are masked.
    bits = MASKED_BITS + min(2, (patterns - 1).bit_length())
    cells = 1 << max(bits, (3 * lines - 1).bit_length())
    units = min(lines * _padded(nk), MOST_UNITS)
    given = _bring(found, nqu, nku, device)
    zero = room(
        {
            "counters": 4 + MOST_PATTERNS, "shared": lines * packed,
            "taken": 2 * patterns * nqu * packed, "held": 2 * patterns * nku,
            "part": patterns * nku, "whole": patterns * nku, "kind": 4 * cells,
            "members": 4 * most,
        },
        device, True,
    )  # fmt: skip
    scratch = room(
        {
            "cell": units, "segment": 4 * BANDS * lines, "number": 2 * cells, "first": 2 * cells,
            "slot": cells, "words": 2 * UNIT * cells, "counts": lines, "place": lines,
            "slots": lines, "merge": 2 * lines, "item": 4 * most, "begin": 2 * most,
            "piece": 4 * pieces, "rows": 8 * pieces, "head": COSTS + pieces,
        },
        device,
    )  # fmt: skip
    shortest = items.SHORTEST if D <= 128 else items.SHORTEST_WIDE
    block = costs.block_seconds(UNIT)
    address = given.data_ptr()
    work = WORK.value(
        {"given": address, "pattern": address, **zero.at, **scratch.at},
        (nq, nk, nqu, nku, patterns, packed, lines, units, groups, shortest,
         sparse_limit(UNIT, costs), int(block / 2 / costs.private_column_seconds(UNIT)), cells),
    )  # fmt: skip
    find_cells, share_lines, find_lengths, cut_items, write = _kernels(index)
    find_cells((-(-lines // 4),), 128, (work,))
    share_lines((1,), 1024, (work,))
    find_lengths((-(-most // 4), 2), 128, (work,))
    cut_items((1,), 1024, (work,))
    head = scratch.part("head", COSTS).tolist()
    count, steps, masks, merged, sources, wrong, dead, light = head[:EACH]
    if wrong or light * block >= costs.launch_seconds:
        return None
    made = room(
        {
            "steps": 4 * steps, "items": 8 * count, "masks": 128 * masks, "costs": count,
            "merge_rows": merged, "merge_ptr": merged + 1, "merge_from": sources,
            "key_rows": patterns * packed * UNIT, "query_rows": patterns * max(queries) * UNIT,
        },
        device,
    )  # fmt: skip
    lost = torch.empty((patterns, nk) if dead else 0, dtype=torch.bool, device=device)
    places = {**made.at, "dead": lost.data_ptr() if dead else 0}
    out = OUT.value(places, (packed, max(queries), most, count))
    write((64, 5), 128, (work, out))
    parts = made.parts()
    none = torch.empty(0, dtype=torch.int32, device=device)
    tensors = [
        parts["items"].view(count, 8), parts["steps"].view(steps, 4),
        parts["masks"].view(masks, 128), parts["key_rows"].view(patterns, packed * UNIT),
        parts["query_rows"].view(patterns, max(queries) * UNIT), parts["merge_rows"],
        parts["merge_ptr"], parts["merge_from"], none.view(0, 4), none.long(), none, lost,
        parts["costs"],
    ]  # fmt: skip
    each = [head[EACH + n : EACH + 3 * patterns : 3] for n in range(3)]
    sizes = [nq, nk, *pattern.lead, groups, 0, *pattern.entry, patterns, max(each[1])]
    for counts in (each[0], each[2], [0] * patterns):
        sizes += [0, *itertools.accumulate(counts)]
    event = torch.cuda.Event()
    event.record()
    known(tensors[0], WRITTEN, event)
    return Plan(tensors, (*sizes, *[0] * patterns))


def _bring(found: list[Sketch], nqu: int, nku: int, device: torch.device) -> Tensor:
    """Int32: what plan.cuh's ``Pattern`` says of each, and the arrays it names."""
    arrays: list[np.typing.NDArray[np.generic]] = []
    at = PATTERN * len(found)

    def place(array: np.typing.NDArray[np.generic]) -> int:
        nonlocal at
        arrays.append(array)
        at += array.size
        return at - array.size

    table: list[int] = []
    gathered = 0
    for s in found:
        table.append(len(s.bands))
        for band in s.bands:
            stretches = 0 if band.rows is None else len(band.rows)
            places = (-1 if a is None else place(a) for a in (band.low, band.high, band.rows))
            table += (*places, stretches, band.shift, *band.cut)
        table += [0] * (BAND * (BANDS - len(s.bands)))
        words = -(-nku // 32)
        table += (-1 if s.units is None else place(_bits(s.units, words)), words)
        for ranges, size in ((s.lines, nqu), (s.columns, nku)):
            table.append(place(_flags(ranges, size)) if len(ranges) else -1)
        table += (len(s.queries), place(s.queries), len(s.keys), place(s.keys), gathered)
        gathered += -(-len(s.queries) // UNIT)
    buffer = torch.empty(at, dtype=torch.int32, pin_memory=True)
    flat = buffer.numpy()
    flat[: len(table)] = table
    at = len(table)
    for array in arrays:
        flat[at : at + array.size] = array.reshape(-1)
        at += array.size
    return buffer.to(device, non_blocking=True)


def _bits(units: np.typing.NDArray[np.bool_], words: int) -> np.typing.NDArray[np.int32]:
    """(lines, words): flags of each line as words."""
    padded = np.zeros((len(units), 4 * words), np.uint8)
    packed = np.packbits(units, 1, "little")
    padded[:, : packed.shape[1]] = packed
    return padded.view(np.int32)


def _flags(ranges: Ints, size: int) -> Ints:
    found = np.zeros(size, np.int64)
    for first, last in ranges.tolist():
        found[first:last] = 1
    return found


def _gathered(found: Sketch, nq: int, nk: int) -> bool:
    """Whether the panels are gathered as ``panels.panel_cells`` would: keys, and rows of queries.

    Anything else is left to it.
    """
    queries, keys = found.queries, found.keys
    if not (len(queries) or len(keys)):
        return True
    lines, wide = -(-nq // UNIT), -(-nk // UNIT)
    listed = np.bincount(queries >> 6, minlength=lines)
    # Lines that have gathered queries, and those that have others; no unit is cut but by those.
    taken = int(np.count_nonzero(listed))
    left = lines - int(np.count_nonzero(listed == UNIT))
    if nq % UNIT and listed[-1] == nq % UNIT:
        left -= 1
    if len(queries):
        touched, cut = taken, taken + left - lines
        if not -(-len(queries) // UNIT) * (wide + LINE) < (touched + cut / MASKED) * wide:
            return False
    if len(keys):
        packed = -(-len(keys) // UNIT)
        places = taken if keys is queries else len(np.flatnonzero(np.bincount(keys >> 6)))
        across = min(packed, places)
        if -(-(nq - len(queries)) // UNIT) * (across + LINE) < left * across:
            return False
        return packed * (left + COPY) < places * left
    return True
