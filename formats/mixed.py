"""MixedLayout: disjoint parts whose union is the pattern — blocks, panels, single entries.

An 8 × 8 matrix; every letter a part:

          0 1 2 3 4 5 6 7
        0 b b · p · · · ·    blocks   b: dense 2 × 2 on the diagonal (16 … 128 in earnest)
        1 b b · p · · · r    panels   p: column 3 for rows 0, 1, 4 … 7: a key all rows share
        2 · · b b · · · ·    rest     r: a single entry
        3 · · b b · · · ·
        4 · · · p b b · ·    slots    every part holds all its entries' slots in its own order;
        5 · · · p b b · ·             parts start at multiples of 128, gaps are dead
        6 · · · p · · b b             part_offsets [0, 128, 256, 384]
        7 · · · p · · b b
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from .arguments import as_entry, as_lead, as_shape, kind_of
from .block import BlockLayout
from .checks import check_common, check_nnz, fail, same_numbers
from .errors import LayoutError
from .layout import Layout, next_key, register_layout
from .panel import PanelLayout
from .panel_checks import validate_panels
from .row import RowLayout

ALIGN = 128


@register_layout
@dataclass(frozen=True, eq=False, repr=False)
class MixedLayout(Layout):
    """Up to three disjoint layouts over the same matrix, each for the grain it is cheapest at.

    Slots are part-major: part i has the slots ``part_offsets[i] … part_offsets[i] +
    parts[i].slots``, in its own order, entries inside it; what is left up to the next part is
    dead. So ``entry_slots`` is just (0, slots) and ``slot_entry`` asks the parts. A pattern that
    keeps nothing has no parts and no slots.

    Attributes:
        blocks: the coarse part, or None.
        panels: shared and private panels, or None.
        rest: single entries, or None.
        starts: where each part's slots start, multiples of 128, and the end, rounded up likewise.
    """

    shape: tuple[int, int]
    lead: tuple[int, int]
    entry: tuple[int, ...]
    entry_slots: tuple[int, ...]
    nnz: int
    blocks: BlockLayout | None
    panels: PanelLayout | None
    rest: RowLayout | None
    starts: tuple[int, ...]
    key: int = field(default_factory=next_key)
    kind: ClassVar[str] = "mixed"

    @classmethod
    def from_parts(
        cls,
        shape: tuple[int, int],
        blocks: BlockLayout | None = None,
        panels: PanelLayout | None = None,
        rest: RowLayout | None = None,
        lead: tuple[int, int] = (1, 1),
        entry: tuple[int, ...] | None = None,
        key: int | None = None,
    ) -> MixedLayout:
        """A layout from disjoint parts of the same shape, lead and entry; empty ones are left out.

        Args:
            shape: (nq, nk) of one entry.
            blocks: the coarse part, or None.
            panels: the panels, or None.
            rest: the single entries, or None.
            lead: (b, h).
            entry: the distinct pattern of each entry; None = one for all.
            key: identity; None = a new one.

        Raises:
            LayoutError: parts that are something else, or of another shape, lead or entry.
            ShapeError: a shape or lead that cannot be.
        """
        op = "MixedLayout.from_parts"
        shape, lead = as_shape(op, shape), as_lead(op, lead)
        entry = as_entry(op, lead, entry)
        kinds = (("blocks", blocks, BlockLayout), ("panels", panels, PanelLayout),
                 ("rest", rest, RowLayout))  # fmt: skip
        for name, part, cls_of in kinds:
            if part is not None and not isinstance(part, cls_of):
                raise LayoutError(
                    f"{op}: {name} is a {kind_of(part)}; expected a {cls_of.__name__} or None"
                )
            if part is not None and (part.shape, part.lead, part.entry) != (shape, lead, entry):
                raise LayoutError(
                    f"{op}: {name} has shape {part.shape}, lead {part.lead} and entry "
                    f"{part.entry!r:.80}; expected {shape}, {lead} and {entry!r:.80}, those of the "
                    "whole"
                )
        blocks = blocks if blocks is not None and blocks.slots else None
        panels = panels if panels is not None and panels.slots else None
        rest = rest if rest is not None and rest.slots else None
        starts, nnz = [0], 0
        for part in (blocks, panels, rest):
            if part is not None:
                starts.append(starts[-1] + -(-part.slots // ALIGN) * ALIGN)
                nnz += part.nnz
        return cls(
            shape=shape,
            lead=lead,
            entry=entry,
            entry_slots=(0, starts[-1]),
            nnz=nnz,
            blocks=blocks,
            panels=panels,
            rest=rest,
            starts=tuple(starts),
            key=next_key() if key is None else key,
        )

    @property
    def parts(self) -> tuple[Layout, ...]:
        """The parts there are, in the order blocks, panels, rest."""
        return tuple(p for p in (self.blocks, self.panels, self.rest) if p is not None)

    @property
    def part_offsets(self) -> tuple[int, ...]:
        """Where each part's slots start in the last axis of ``values``, and the end."""
        return self.starts

    def _joined(self, of_part: Callable[[Layout], Tensor], gap: int) -> Tensor:
        """A per-slot tensor of every part, end to end, with ``gap`` in the gaps."""
        pieces: list[Tensor] = []
        for part, start, stop in zip(self.parts, self.starts[:-1], self.starts[1:], strict=True):
            piece = of_part(part)
            pieces.append(piece)
            if piece.numel() < stop - start:
                pieces.append(piece.new_full((stop - start - piece.numel(),), gap))
        if not pieces:
            return torch.zeros(0, dtype=torch.int64, device=self.device)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def live(self) -> Tensor | None:
        """Bool (slots,): kept positions, gaps excluded; None when every slot is one."""
        if self.nnz == self.slots:
            return None

        def of_part(part: Layout) -> Tensor:
            live = part.live()
            if live is not None:
                return live
            return torch.ones(part.slots, dtype=torch.bool, device=self.device)

        return self._joined(of_part, False)

    def indices(self) -> tuple[Tensor, Tensor]:
        """(row, column) of every slot within its entry, int64 (slots,); (0, 0) in gaps."""
        pairs = {id(part): part.indices() for part in self.parts}
        return (
            self._joined(lambda part: pairs[id(part)][0], 0),
            self._joined(lambda part: pairs[id(part)][1], 0),
        )

    def slot_entry(self) -> Tensor:
        """int64 (slots,): the entry each slot belongs to; 0 in gaps."""
        return self._joined(lambda part: part.slot_entry(), 0)

    @cached_property
    def T(self) -> MixedLayout:
        """The transposed layout: every part transposed; key negated."""
        return MixedLayout.from_parts(
            (self.shape[1], self.shape[0]),
            None if self.blocks is None else self.blocks.T,
            None if self.panels is None else self.panels.T,
            None if self.rest is None else self.rest.T,
            self.lead,
            self.entry,
            key=-self.key,
        )

    def transpose_slots(self) -> Tensor:
        """Where each slot of ``T`` takes its value from: int64 (slots of ``T``,), −1 in gaps."""
        shift = {id(part): start for part, start in zip(self.parts, self.starts, strict=False)}
        turned = dict(zip(map(id, self.T.parts), self.parts, strict=True))

        def of_part(part: Layout) -> Tensor:
            source = turned[id(part)]
            order = source.transpose_slots()
            return torch.where(order < 0, order, order + shift[id(source)])

        return self.T._joined(of_part, -1)

    def validate(self) -> None:
        """Validate every part, that they fit each other, and that no position is held twice.

        Raises:
            LayoutError: the first field at fault, what it holds and what is expected.
        """
        check_common(self)
        expected = [0]
        for name, kind in (("blocks", BlockLayout), ("panels", PanelLayout), ("rest", RowLayout)):
            part = getattr(self, name)
            if part is None:
                continue
            if not isinstance(part, kind):
                raise fail(self, name, f"a {type(part).__name__}", f"a {kind.__name__} or None")
            for common in ("shape", "lead", "entry"):
                if getattr(part, common) != getattr(self, common):
                    raise fail(
                        self, name, f"{common} {getattr(part, common)}",
                        f"that of the whole, {getattr(self, common)}",
                    )  # fmt: skip
            if part.device != self.device:
                raise fail(self, name, f"on {part.device}", f"all parts on {self.device}")
            if isinstance(part, PanelLayout):
                validate_panels(part, alone=False)
            else:
                part.validate()
            expected.append(expected[-1] + -(-part.slots // ALIGN) * ALIGN)
        if not same_numbers(self.starts, tuple(expected)):
            raise fail(
                self, "starts", f"{self.starts}",
                f"{tuple(expected)}: the parts' slots, each rounded up to {ALIGN}",
            )  # fmt: skip
        if not same_numbers(self.entry_slots, (0, expected[-1])):
            raise fail(self, "entry_slots", f"{self.entry_slots}", f"(0, {expected[-1]})")
        check_nnz(self, sum(part.nnz for part in self.parts))
        from .overlap import find_overlap

        where = find_overlap(self)
        if where is not None:
            raise fail(
                self, where[0], f"{where[1]}", "parts that share no position",
                "drop the position from one of the two parts",
            )  # fmt: skip
