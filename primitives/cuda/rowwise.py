"""How the operators along rows run on CUDA: which kernel looks at which rows, in which phase."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import request
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import Argument, Kernel, kernel

from ..plans.plan import PartPlan, Plan, split
from . import nm_rows
from .parts import CODES, MOST_MATRICES, aligned_values, at_once, gaps, mask_side, together

SOFTMAX, BACKWARD, SUM, EXPAND = range(4)  # rowwise.cuh: OP
ONCE, ROWS, SLOTS, LAST = range(4)  # PHASE
WARPS, TEAM = 4, 8
# Pieces that a lane holds where it looks at a row once or twice, and where it looks once and keeps
# nothing; where no slot may be dead, and where some may. There a warp waits for item, mask and
# values one after the other: many warps that hold little, and find the row in L1 again, are ahead
# of few that hold all of it.
HOLDS = {False: (4, 8), True: (2,)}
STREAM = {False: 4, True: 1}
# Entries per lane of a row part.
ROW_HOLDS = {SOFTMAX: 16, BACKWARD: 8, SUM: 16, EXPAND: 16}
# CTAs of short rows for every multiprocessor: several times what runs at once, so that all end
# together. Where there are more, each takes its rows of several matrices.
SHORT_CTAS = 30

Constants = tuple[tuple[str, int], ...]


@functools.lru_cache(maxsize=4096)
def _kernel(device: int, name: str, constants: Constants) -> Kernel:
    return kernel(request(f"rowwise_{name}", dict(constants)), device)


class Vectors(NamedTuple):
    """Numbers of rows: statistics or joint numbers, and what only the last step sees."""

    numbers: Tensor | None = None  # (F, places), float32; pairs of them for softmax
    at: int = 0  # first place of a part
    joint: Tensor | None = None  # (F, E · nq) float32, pairs for softmax, that LAST writes
    lse: Tensor | None = None  # (F, E, nq) float32
    grad_lse: Tensor | None = None  # (F, E, nq) float32


class Call:
    """One call of an operator, its tensors ready for the kernels.

    Attributes:
        op: SOFTMAX, BACKWARD, SUM or EXPAND.
        parts: of the layout.
        rows: nq.
        columns: nk.
        entries: E.
        lines: E · nq.
        free: F.
        values: (F, slots), p for the backward; None when expanding.
        grad: (F, slots) of the backward, or None.
        out: (F, slots) or None.
        device: torch's index.
    """

    def __init__(
        self,
        op: int,
        plan: Plan,
        like: Tensor,
        keep: Tensor | None,
        keep_rows: bool,
        values: Tensor | None = None,
        grad: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        slots, (self.rows, self.columns), entry, self.parts = split(plan)
        self.op, self.free, self.entries = op, like.shape[0], len(entry)
        self.lines = self.entries * self.rows
        self.device, self.like = like.device.index, like
        self.values = None if values is None else aligned_values(values)
        self.grad = None if grad is None else aligned_values(grad)
        self.keep = None if keep is None else kept(keep)
        self.side = mask_side(keep, not keep_rows)
        self.out: Tensor | None = None
        if out_dtype is not None:
            self.out = like.new_empty(self.free, slots, dtype=out_dtype)
            for start, stop in gaps(self.parts, slots):
                self.out[:, start:stop].zero_()

    @property
    def once(self) -> bool:
        """Whether all rows lie in one part, and there in one piece."""
        return len(self.parts) == 1 and self.parts[0].kind != "cpanel"

    def numbers(self, places: int) -> Tensor:
        """Room for the numbers of rows: (F, places), pairs for softmax."""
        pair = 2 if self.op == SOFTMAX else 1
        return self.like.new_empty(self.free, places * pair, dtype=torch.float32)

    def vector(self) -> Tensor:
        """Room for a number per row, (F, E, nq)."""
        return self.like.new_empty(self.free, self.entries, self.rows, dtype=torch.float32)

    def constants(self, phase: int, piece: int, hold: int, team: int, masked: bool) -> Constants:
        """Constants of the three kernels that look at slots."""
        given = [t for t in (self.values, self.grad, self.out) if t is not None]
        value = given[0] if self.values is None else self.values
        out = value.dtype if self.out is None else self.out.dtype
        exact = torch.float32 in (out, *(t.dtype for t in given))
        return (
            ("OP", self.op),
            ("PHASE", phase),
            ("KEEP", self.side),
            ("PIECE", piece),
            ("HOLD", hold),
            ("TEAM", team),
            ("MASKED", int(masked)),
            ("VALUES", CODES[value.dtype]),
            ("DTYPE", CODES[(value if self.grad is None else self.grad).dtype]),
            ("OUT", CODES[out]),
            ("EXACT", int(exact)),
        )

    def piece(self) -> int:
        """Slots that a lane takes together: 16 bytes of the widest tensor it reads."""
        given = [t for t in (self.values, self.grad) if t is not None]
        read = given or [t for t in (self.out,) if t is not None]
        return 16 // max(t.element_size() for t in read)

    def slots(self, part: PartPlan, start: int, phase: int) -> tuple[Argument, ...]:
        """Pointers to the part's slots from free index ``start`` on, and distances of matrices."""
        made: list[Argument] = []
        for t in (self.values, self.grad, self.out if phase != ROWS else None):
            made += [_pointer(t, start, part.starts[0]), np.int64(0 if t is None else t.shape[1])]
        return tuple(made)

    def mask(self, start: int) -> tuple[Argument, ...]:
        """Pointer to the run-time mask and its strides."""
        if self.keep is None:
            return 0, np.int64(0), np.int64(0)
        free, entry, _ = self.keep.stride()
        return self.keep.data_ptr() + start * free, np.int64(free), np.int64(entry)

    def vectors(self, v: Vectors, start: int, dense: bool) -> tuple[Argument, ...]:
        """Pointers and distances of the rows' numbers; lse and grad_lse where a kernel has them."""
        pair = 2 if self.op == SOFTMAX else 1
        line = 0 if v.numbers is None else v.numbers.shape[1] // pair
        numbers = (_pointer(v.numbers, start, v.at * pair), np.int64(line))
        if not dense:
            return numbers
        ends = (_pointer(v.lse, start), _pointer(v.grad_lse, start), np.int64(self.lines))
        return (*numbers, *ends)

    def run(self, phase: int, part: PartPlan, v: Vectors) -> None:
        """Queue one phase of one part."""
        if part.kind == "nm":
            nm_rows.run(self, phase, part, v)
            return
        for start in range(0, self.free, MOST_MATRICES):
            many = min(MOST_MATRICES, self.free - start)
            if part.kind == "cblock":
                self._block(phase, part, v, start, many)
            elif part.kind == "crow":
                self._row(phase, part, v, start, many)
            else:
                self._panel(phase, part, v, start, many)

    def _block(self, phase: int, part: PartPlan, v: Vectors, start: int, many: int) -> None:
        items, row_ptr, row_order, masks = part.tensors
        size, long, longest = part.scalars
        piece, masked = self.piece(), masks.shape[0] > 0
        dead = masked or self.side > 0
        runs = size * size // (32 * piece)  # warps that share a block row
        for first, stop, team in ((0, long, TEAM), (long, row_order.shape[0], 1)):
            if stop == first:
                continue
            hold = STREAM[dead]
            if phase in (ONCE, LAST):
                holds = HOLDS[dead]
                fits = [h for h in holds if h >= longest] if team == 1 else []
                hold = fits[0] if fits else holds[-1]
            constants = self.constants(phase, piece, hold, team, masked)
            others = len(self.parts) - 1 if phase == LAST else 0
            units = (stop - first) * runs
            _kernel(self.device, "block", (*constants, ("SIZE", size), ("OTHERS", others)))(
                (units if team > 1 else -(-units // WARPS), many),
                32 * (team if team > 1 else WARPS),
                (
                    *self.slots(part, start, phase),
                    *self.vectors(v, start, dense=True),
                    _pointer(v.joint, start),
                    *self.mask(start),
                    items.data_ptr(),
                    row_ptr.data_ptr(),
                    row_order.data_ptr() + 4 * first,
                    masks.data_ptr(),
                    np.int32(stop - first),
                    np.int32(self.rows),
                    np.int32(row_order.shape[0] // self.entries),
                ),
            )

    def _row(self, phase: int, part: PartPlan, v: Vectors, start: int, many: int) -> None:
        offsets, columns, row_order = part.tensors
        long, longest, gap = part.scalars
        lines = row_order.shape[0]
        behind = part.starts[-1] - part.starts[0]
        # The last of the launches clears the gap.
        for first, stop, team, clear in (
            (0, long, TEAM, 0 if long < lines else gap),
            (long, lines, 1, gap),
        ):
            if stop == first:
                continue
            # Short rows share a warp: each would leave most of its lanes idle.
            lanes = 32 if team > 1 or longest > 128 else 16 if longest > 64 else 8
            hold = ROW_HOLDS[self.op] if lanes == 32 else 4 if longest <= 32 else 8
            constants = self.constants(phase, 1, hold, team, True)
            rows = WARPS * 32 // lanes if team == 1 else 1
            ctas = -(-(stop - first) // rows)
            room = SHORT_CTAS * facts(self.device).multiprocessors
            each = max(1, ctas * many // room) if lanes == 8 else 1
            _kernel(self.device, "row", (*constants, ("LANES", lanes)))(
                (ctas, -(-many // each)),
                32 * (team if team > 1 else WARPS),
                (
                    *self.slots(part, start, phase),
                    *self.vectors(v, start, dense=True),
                    *self.mask(start),
                    offsets.data_ptr(),
                    columns.data_ptr(),
                    row_order.data_ptr() + 4 * first,
                    np.int32(stop - first),
                    np.int32(self.rows),
                    np.int64(behind),
                    np.int32(clear),
                    np.int32(many),
                    np.int32(each),
                ),
            )

    def _panel(self, phase: int, part: PartPlan, v: Vectors, start: int, many: int) -> None:
        items, row_list, col_list, mask_bits = part.tensors[:4]
        if not items.shape[0]:
            return
        constants = self.constants(phase, self.piece(), STREAM[True], 1, True)
        # Items hold slots of the whole layout.
        origin = part._replace(starts=[0])
        _kernel(self.device, "panel", constants)(
            (-(-items.shape[0] // WARPS), many),
            32 * WARPS,
            (
                *self.slots(origin, start, phase),
                *self.vectors(v, start, dense=False),
                *self.mask(start),
                items.data_ptr(),
                row_list.data_ptr(),
                col_list.data_ptr(),
                mask_bits.data_ptr(),
                np.int32(items.shape[0]),
                np.int32(self.rows),
            ),
        )

    def found(self) -> tuple[Tensor, int, Tensor | None, Tensor | None]:
        """Statistics of every part: (F, places), parts with a place per row, places of panels."""
        dense = [p for p in self.parts if p.kind != "cpanel"]
        panels = [p for p in self.parts if p.kind == "cpanel"]
        piece_ptr, piece_list = panels[0].tensors[4:6] if panels else (None, None)
        places = len(dense) * self.lines + (0 if piece_list is None else piece_list.shape[0])
        numbers = self.numbers(places)
        starts = {id(part): n * self.lines for n, part in enumerate(dense)}
        starts |= {id(part): len(dense) * self.lines for part in panels}
        at_once(
            self.parts,
            lambda part: self.run(ROWS, part, Vectors(numbers, starts[id(part)])),
            self.free,
        )
        return numbers, len(dense), piece_ptr, piece_list

    def joined(self, lse: Tensor | None = None, grad_lse: Tensor | None = None) -> Tensor:
        """Numbers of every row over all parts, (F, lines), pairs for softmax."""
        numbers, dense, piece_ptr, piece_list = self.found()
        made = self.numbers(self.lines)
        constants = (
            ("OP", self.op),
            ("PHASE", ROWS if self.op == SUM else ONCE),
            ("DENSE", dense),
            ("KEEP", 0),
            ("PIECE", 1),
            ("HOLD", 1),
            ("TEAM", 1),
            ("MASKED", 0),
            ("EXACT", 1),
        )
        pair = 2 if self.op == SOFTMAX else 1
        with together():
            for start in range(0, self.free, MOST_MATRICES):
                _kernel(self.device, "merge", constants)(
                    (-(-self.lines // 128), min(MOST_MATRICES, self.free - start)),
                    128,
                    (
                        _pointer(numbers, start),
                        np.int64(numbers.shape[1] // pair),
                        _pointer(made, start),
                        _pointer(lse, start),
                        _pointer(grad_lse, start),
                        _pointer(piece_ptr, 0),
                        _pointer(piece_list, 0),
                        np.int32(self.lines),
                    ),
                )
        return made

    @property
    def last(self) -> PartPlan | None:
        """The part of blocks that may take one look after all others; None: there is none such.

        Its rows must lie in one piece, and so must those of the others.
        """
        if any(part.kind not in ("cblock", "crow") for part in self.parts):
            return None
        blocks = [part for part in self.parts if part.kind == "cblock"]
        return max(blocks, key=lambda part: part.starts[-1] - part.starts[0], default=None)

    def jointly(self, lse: Tensor | None = None, grad_lse: Tensor | None = None) -> None:
        """Write the slots of every part, rows taken over all parts."""
        last = self.last
        if last is None:
            self.everywhere(self.joined(lse, grad_lse))
            return
        others = [part for part in self.parts if part is not last]
        found, made = self.numbers(len(others) * self.lines), self.numbers(self.lines)
        starts = {id(part): n * self.lines for n, part in enumerate(others)}

        def besides(phase: int, v: Callable[[PartPlan], Vectors]) -> None:
            at_once(
                self.parts,
                lambda part: None if part is last else self.run(phase, part, v(part)),
                self.free,
            )

        besides(ROWS, lambda part: Vectors(found, starts[id(part)]))
        with together():
            self.run(LAST, last, Vectors(found, 0, made, lse, grad_lse))
        besides(SLOTS, lambda _: Vectors(made))

    def everywhere(self, numbers: Tensor) -> None:
        """Write the slots of every part, given the numbers of the rows."""
        at_once(self.parts, lambda part: self.run(SLOTS, part, Vectors(numbers)), self.free)


def _pointer(t: Tensor | None, start: int, offset: int = 0) -> int:
    """Address of element ``offset`` of the matrix at free index ``start``; 0 for None."""
    if t is None:
        return 0
    return t.data_ptr() + (start * t.stride(0) + offset) * t.element_size()


def kept(keep: Tensor) -> Tensor:
    """A run-time mask (F, E, n) whose rows are contiguous, aligned, and padded to whole blocks.

    Dimensions that are only expanded stay so: the copy is as small as the mask the user gave.
    """
    free, entries, n = keep.shape
    small = keep[: 1 if keep.stride(0) == 0 else free, : 1 if keep.stride(1) == 0 else entries]
    strides = small.stride()
    even = strides[2] == 1 and not (n % 128 or strides[0] % 8 or strides[1] % 8)
    if not even or small.data_ptr() % 8:
        small = torch.nn.functional.pad(small, (0, -n % 128 or 128))
    return small.expand(free, entries, -1)
