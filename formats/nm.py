"""NMLayout: n of every m neighbouring columns, as sparse tensor cores take it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, cast

import torch
from torch import Tensor

from .arguments import as_lead, as_shape, check_dense, check_index, check_inside, kind_of
from .block import BlockLayout
from .checks import check_lead, check_nnz, check_shape, check_tensor, fail
from .errors import DtypeError, LayoutError
from .layout import Layout, entry_slots_of, next_key, register_layout
from .nm_arguments import check_columns, check_within
from .nm_metadata import (
    check_encoding,
    check_metadata,
    encoding_for,
    metadata_shape,
    pack,
    padded,
    unpack,
)
from .nm_within import block_masks, block_starts, live_slots, stored_blocks, used_patterns


def choose(
    scores: Tensor, live: Tensor | None, n: int, m: int, spare: Tensor | None = None
) -> Tensor:
    """Which n of every m neighbours to keep: the largest live ones.

    Args:
        scores: (*lead, columns), float32 or float64 (narrower floats are widened). Compared as they
            are: ties (−0 and +0 too) go to the lower index, NaN counts as +inf.
        live: bool, broadcastable to scores, False = masked; None = all live.
        n: kept per group.
        m: columns per group; the last group may be short.
        spare: bool, broadcastable to scores: columns that fill up a group before its others do;
            those of a static pattern that a run-time mask dropped, so that how many positions of
            the pattern are stored does not depend on the mask.

    Returns:
        uint8 (*lead, ceil(columns / m), n): rising indices within each group. They are the chosen
        live columns and, where a group has fewer than n, the lowest of its other members, spare
        ones first; those beyond ``columns`` (short last group) come last of all.
    """
    wide = scores if scores.dtype == torch.float64 else scores.float()
    integer, sign = (torch.int64, 63) if wide.dtype == torch.float64 else (torch.int32, 31)
    limits = torch.iinfo(integer)
    # Floats as integers of the same order: one compare then decides, whatever is masked or NaN.
    bits = (wide + 0.0).view(integer)
    infinite = torch.tensor(torch.inf, dtype=wide.dtype, device=wide.device).view(integer)
    bits = torch.where(wide.isnan(), infinite, bits ^ ((bits >> sign) & limits.max))
    if live is not None:
        rest = limits.min if spare is None else spare.to(integer) + limits.min
        bits = torch.where(live, bits, rest)
    columns, groups = scores.shape[-1], -(-scores.shape[-1] // m)
    if columns % m:
        bits = torch.nn.functional.pad(bits, (0, groups * m - columns), value=limits.min)
    # Group members first, so that each step below runs over contiguous memory.
    member = bits.unflatten(-1, (groups, m)).movedim(-1, 0).contiguous()
    rank = torch.zeros(member.shape, dtype=torch.uint8, device=scores.device)
    for i, j in itertools.combinations(range(m), 2):
        ahead = member[i] >= member[j]  # the lower index wins ties
        rank[j] += ahead
        rank[i] += ~ahead
    kept = torch.cumsum(rank < n, 0, dtype=torch.uint8)  # kept so far, each member included
    # The p-th kept index is the number of members at which no more than p are kept.
    chosen = [(kept <= p).sum(0, dtype=torch.uint8) for p in range(n)]
    return torch.stack(chosen, dim=-1)


@register_layout
@dataclass(frozen=True, eq=False, repr=False)
class NMLayout(Layout):
    """n of every m neighbours along the last dimension; groups are columns j // m.

    A 2×8 matrix that keeps the elements named, 2:4, and what is stored for it:

        a . b . | . . c d        values    a b c d | e f g h     (slots; two a group, rising)
        . e f . | g . . h        choice    0 2 2 3 | 1 2 0 3     (``choice()``)
                                 metadata  nibbles i0 | i1 << 2:  8 14 | 9 12

    Every entry has its own positions, so ``entry`` is range(b · h). Its slots are a grid:

    - alone: (rows, groups, n), row-major. With a nibble encoding rows are padded to 32 and columns
      to 64, otherwise only the last group may overhang.
    - ``within`` a BlockLayout of 16 … 64: the blocks of its pattern in row order, each
      (size, size / m, n). Only positions of its mask are live.

    A slot is dead iff its column is ≥ nk (or its row padding), or outside the mask of ``within``.
    A group with n live members or fewer keeps them all, so ``nnz`` follows from shapes alone.

    Attributes:
        n: kept per group.
        m: columns per group, at most 16.
        encoding: how ``metadata`` holds the choice: "2:4", "1:2-half", "1:2-float32" or "bytes"
            (nm_metadata.py describes them).
        metadata: int16 (entries or blocks, rows, words), for "bytes" uint8 of shape ``grid``.
        within: the static pattern that limits the choice, or None.
        within_entry: number of ``within``'s distinct pattern that each entry uses.
        transposed: a view of the transposed matrix: ``shape`` and ``indices`` are swapped, all
            else (grid, metadata, within, slots) stays as stored. Its key is the negated key.

    Source: DFSS (PPoPP'23); NVIDIA 2:4 structured sparsity.
    """

    kind: ClassVar[str] = "nm"

    shape: tuple[int, int]
    lead: tuple[int, int]
    entry: tuple[int, ...]
    entry_slots: tuple[int, ...]
    nnz: int
    n: int
    m: int
    encoding: str
    metadata: Tensor
    within: BlockLayout | None = None
    within_entry: tuple[int, ...] = ()
    transposed: bool = False
    key: int = field(default_factory=next_key)

    @classmethod
    def from_choice(
        cls,
        choice: Tensor,
        shape: tuple[int, int],
        n: int,
        m: int,
        *,
        lead: tuple[int, int] = (1, 1),
        dtype: torch.dtype = torch.float32,
        encoding: str | None = None,
        within: BlockLayout | None = None,
    ) -> NMLayout:
        """The layout that keeps the chosen members of each group.

        Args:
            choice: integer (b * h, nq, ceil(nk / m), n), rising indices within each group as
                ``choose`` gives them; with ``within`` (blocks of all entries, size, size / m, n).
            shape: (nq, nk).
            n: kept per group.
            m: columns per group.
            lead: (b, h).
            dtype: of the values it is meant for; picks the encoding of 1:2.
            encoding: given outright, instead of by dtype.
            within: a BlockLayout of the same shape whose lead broadcasts to ``lead``.

        Raises:
            LayoutError: n:m, encoding, block size or lead that cannot be. Of the choice only what a
                byte cannot hold is refused here; ``validate`` reads it.
            DtypeError: a choice that is no tensor of integers.
            ShapeError: a shape or lead that cannot be.
        """
        op = "NMLayout.from_choice"
        shape, lead = as_shape(op, shape), as_lead(op, lead)
        check_dense(op, "choice", choice)
        check_index(op, "choice", choice, choice.dim())
        check_encoding(n, m, "bytes" if encoding is None else encoding)
        if not isinstance(dtype, torch.dtype):
            raise DtypeError(f"{op}: dtype is a {kind_of(dtype)}; expected a torch.dtype")
        if encoding is None:
            encoding = encoding_for(n, m, dtype)
        check_within(op, within)
        if choice.dtype != torch.uint8:  # a wider number would be cut to a byte
            check_inside(op, "choice", choice, 0, m)
        if within is None:
            expected = (lead[0] * lead[1], shape[0], -(-shape[1] // m), n)
        else:
            used_patterns(within, shape, lead, m)
            expected = (*choice.shape[:1], within.size, within.size // m, n)
        if tuple(choice.shape) != expected:
            raise LayoutError(
                f"NMLayout.from_choice: choice {tuple(choice.shape)} for {n}:{m} of {shape}, lead "
                f"{lead}; expected {expected}: n rising indices for each group"
            )
        choice = choice.to(torch.uint8)
        if within is None:
            rows, groups = padded(*shape, m, encoding)
            below, right = rows - choice.shape[1], groups - choice.shape[2]
            if below or right:
                # Padding keeps the first n of each group, which every encoding can say.
                filled = torch.arange(n, dtype=torch.uint8, device=choice.device)
                filled = filled.repeat(choice.shape[0], rows, groups, 1)
                filled[:, : choice.shape[1], : choice.shape[2]] = choice
                choice = filled
        return cls.from_metadata(
            pack(choice, encoding), shape, n, m, encoding=encoding, lead=lead, within=within
        )

    @classmethod
    def from_columns(
        cls,
        columns: Tensor,
        shape: tuple[int, int],
        n: int,
        m: int,
        *,
        lead: tuple[int, int] = (1, 1),
        dtype: torch.dtype = torch.float32,
        encoding: str | None = None,
        within: BlockLayout | None = None,
    ) -> NMLayout:
        """As ``from_choice``, from absolute column numbers: index within the group = column % m.

        Raises:
            LayoutError: as ``from_choice``; a column that is not of its group.
        """
        check_columns("NMLayout.from_columns", columns, shape, n, m, lead, within)
        return cls.from_choice(
            columns % m, shape, n, m, lead=lead, dtype=dtype, encoding=encoding, within=within
        )

    @classmethod
    def from_metadata(
        cls,
        metadata: Tensor,
        shape: tuple[int, int],
        n: int,
        m: int,
        *,
        encoding: str,
        lead: tuple[int, int] = (1, 1),
        within: BlockLayout | None = None,
    ) -> NMLayout:
        """The layout around metadata that is ready, e.g. written by a kernel; not read nor copied.

        Reads no device memory, except for the first count of live positions in a new ``within``.
        """
        check_encoding(n, m, encoding)
        op = "NMLayout.from_metadata"
        check_dense(op, "metadata", metadata)
        shape, lead = as_shape(op, shape), as_lead(op, lead)
        check_within(op, within)
        entries = lead[0] * lead[1]
        if within is None:
            rows, groups = padded(*shape, m, encoding)
            return cls(
                shape=shape,
                lead=lead,
                entry=tuple(range(entries)),
                entry_slots=tuple(e * rows * groups * n for e in range(entries + 1)),
                nnz=entries * shape[0] * (shape[1] // m * n + min(n, shape[1] % m)),
                n=n,
                m=m,
                encoding=encoding,
                metadata=metadata,
            )
        used = used_patterns(within, shape, lead, m)
        live, area = live_slots(within, n, m), within.size**2 // m * n
        blocks = [b - a for a, b in itertools.pairwise(block_starts(within))]
        return cls(
            shape=shape,
            lead=lead,
            entry=tuple(range(entries)),
            entry_slots=entry_slots_of(used, [count * area for count in blocks]),
            nnz=sum(live[u] for u in used),
            n=n,
            m=m,
            encoding=encoding,
            metadata=metadata,
            within=within,
            within_entry=used,
        )

    @property
    def stored_shape(self) -> tuple[int, int]:
        """(rows, columns) as stored: ``shape``, swapped back in a transposed view."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """The slots as a grid, e.g. for ``values.unflatten(-1, layout.grid)``.

        (entries, rows, groups, n), or ``within`` (blocks of all entries, size, size / m, n).
        """
        if self.within is None:
            rows, groups = padded(*self.stored_shape, self.m, self.encoding)
            return self.entries, rows, groups, self.n
        size = self.within.size
        return self.slots // (size * size // self.m * self.n), size, size // self.m, self.n

    def choice(self) -> Tensor:
        """uint8 of shape ``grid``: index within its group of every slot."""
        return unpack(self.metadata, self.encoding)

    def columns(self) -> Tensor:
        """int32 (slots,): stored column of every slot; of dead ones it may be ≥ nk."""
        _, _, groups, _ = self.grid
        first = torch.arange(groups, dtype=torch.int32, device=self.device)[:, None] * self.m
        inside = self.choice().int().add_(first)
        if self.within is not None:
            columns = self.within.block_columns[self.blocks()] * self.within.size
            inside += columns[:, None, None, None]
        return inside.flatten()

    def blocks(self) -> Tensor:
        """int64 (blocks of all entries,): the block of ``within`` that each stored one is."""
        if self.within is None:
            raise LayoutError("NMLayout.blocks: this layout lies within no BlockLayout; use grid")
        return stored_blocks(self.within, self.within_entry)

    def block_rows(self) -> Tensor:
        """int64 (blocks of all entries,): block row of each stored block."""
        blocks = self.blocks()  # raises where there is no ``within``
        return cast(BlockLayout, self.within).block_rows()[blocks]

    def live(self) -> Tensor | None:
        """Bool (slots,): stands for a kept position; None when every slot does."""
        return None if self.nnz == self.slots else self._live()

    def _live(self) -> Tensor:
        choice = self.choice()
        if self.within is not None:
            mask = block_masks(self.within)[self.within.mask_index.long()[self.blocks()]]
            mask = mask.unflatten(-1, (-1, self.m))
            return cast(Tensor, mask.gather(-1, choice.long()).flatten())
        rows, columns = self.stored_shape
        whole, short = divmod(columns, self.m)
        out = torch.zeros(choice.shape, dtype=torch.bool, device=self.device)
        out[:, :rows, :whole] = True
        if short:
            out[:, :rows, whole] = choice[:, :rows, whole] < short
        return out.flatten()

    def indices(self) -> tuple[Tensor, Tensor]:
        """(row, column) of every slot, int64 (slots,); dead ones are moved inside the shape."""
        if not self.slots:  # however many rows there are of nothing
            nothing = torch.empty(0, dtype=torch.int64, device=self.device)
            return nothing, nothing
        grid = self.grid
        row = torch.arange(grid[1], device=self.device)[:, None, None]
        if self.within is not None:
            row = self.block_rows()[:, None, None, None] * self.within.size + row
        height, width = self.stored_shape
        row = row.expand(grid).clamp(max=height - 1).flatten()
        column = self.columns().long().clamp_(max=width - 1)
        return (column, row) if self.transposed else (row, column)

    @cached_property
    def T(self) -> NMLayout:
        """A view of the transposed matrix: the same slots, a flag set."""
        return self.turned()

    def turned(self) -> NMLayout:
        """What ``T`` remembers, made anew; torch.compile can trace this."""
        return replace(self, shape=self.shape[::-1], transposed=not self.transposed, key=-self.key)

    def transpose_slots(self) -> Tensor:
        """int64 (slots,): 0, 1, 2 … since ``T`` is a view."""
        return torch.arange(self.slots, device=self.device)

    def validate(self) -> None:
        """Check every field against the others, and that each group's bits stand for a choice.

        Raises:
            LayoutError: the first field at fault, what it holds and what is expected.
        """
        check_encoding(self.n, self.m, self.encoding)
        check_shape(self)
        check_lead(self)
        if not isinstance(self.transposed, bool):
            raise fail(self, "transposed", f"a {kind_of(self.transposed)}", "True or False")
        shape = self.stored_shape
        check_within("NMLayout.validate", self.within)
        if not isinstance(self.metadata, Tensor):
            raise fail(self, "metadata", f"a {kind_of(self.metadata)}", "a tensor")
        if self.within is not None:
            self.within.validate()
        expected = NMLayout.from_metadata(
            self.metadata,
            shape,
            self.n,
            self.m,
            encoding=self.encoding,
            lead=self.lead,
            within=self.within,
        )
        for name in ("entry", "within_entry", "entry_slots", "nnz"):
            given, wanted = getattr(self, name), getattr(expected, name)
            if type(given) is not type(wanted) or given != wanted:
                raise fail(self, name, f"{given}", f"{wanted} for {self.n}:{self.m} of {shape}")
        check_tensor(self, "metadata", *metadata_shape(self.grid, self.encoding, self.m))
        check_metadata(self.metadata, self.encoding, self.m)
        check_nnz(self, int(self._live().sum()))

    def __repr__(self) -> str:
        view = ", transposed view" if self.transposed else ""
        inside = "" if self.within is None else f", within {self.within.size}×{self.within.size}"
        name = f"{self.n}:{self.m} bytes" if self.encoding == "bytes" else self.encoding
        return f"{super().__repr__()[:-1]}, {name}{inside}{view})"
