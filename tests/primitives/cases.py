"""The one list of cases that every cell of the operation × layout table is tested on.

A case says what is kept (bool masks of the distinct patterns); ``build`` makes a layout of any
class from it, without the library's own splitting, so that parts, masks and entries are what the
case wants. A line says why it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixgrain.formats.block import BlockLayout
from mixgrain.formats.entries import pack_bits
from mixgrain.formats.layout import Layout
from mixgrain.formats.mixed import MixedLayout
from mixgrain.formats.nm import NMLayout, choose
from mixgrain.formats.panel import PanelLayout
from mixgrain.formats.row import RowLayout
from mixgrain.formats.tile import TileLayout

Mask = Callable[[int, int, torch.Generator], Tensor]


def density(d: float) -> Mask:
    """Kept at random."""
    return lambda nq, nk, g: torch.rand(nq, nk, generator=g) < d


def band(radius: int) -> Mask:
    """A window."""

    def make(nq: int, nk: int, g: torch.Generator) -> Tensor:
        i, j = torch.arange(nq)[:, None], torch.arange(nk)[None]
        return (i + nk - nq - j).abs() <= radius

    return make


def holes(nq: int, nk: int, g: torch.Generator) -> Tensor:
    """Rows and columns that keep nothing, among others that do."""
    mask = torch.rand(nq, nk, generator=g) < 0.5
    mask[::3], mask[:, ::4] = False, False
    return mask


def lines(nq: int, nk: int, g: torch.Generator) -> Tensor:
    """A global row and a global column in a nearly empty matrix."""
    mask = torch.rand(nq, nk, generator=g) < 0.05
    mask[nq // 2], mask[:, nk // 3] = True, True
    return mask


@dataclass(frozen=True)
class Case:
    """One line of the list.

    Attributes:
        shape: (nq, nk).
        mask: what each distinct pattern keeps.
        lead: (b, h).
        entry: the distinct pattern of each entry; () = all different.
        free: dimensions over which positions are shared, before the layout's own.
        dim: head dimension.
        size: side of blocks.
        nm: n and m where the layout is NMLayout.
    """

    shape: tuple[int, int]
    mask: Mask
    lead: tuple[int, int] = (1, 1)
    entry: tuple[int, ...] = ()
    free: tuple[int, ...] = ()
    dim: int = 5
    size: int = 16
    nm: tuple[int, int] = (2, 4)

    @property
    def lead_shape(self) -> tuple[int, ...]:
        """Leading shape of the dense operands."""
        b, h = self.lead
        if b == 1:
            return self.free if h == 1 else (*self.free, h)
        return (*self.free[:-1], b, *(self.free[-1:] or (1,))) if h == 1 else (*self.free, b, h)


CASES = {
    # nothing overhangs
    "whole blocks": Case((32, 48), density(0.6)),
    # every edge is cut
    "odd sizes": Case((41, 37), density(0.4), dim=7),
    # fewer rows than a block
    "wide": Case((9, 70), density(0.3), free=(2,)),
    # and fewer columns
    "tall": Case((70, 9), density(0.3), free=(1, 2)),
    # no masks but at the edges
    "all kept": Case((33, 40), density(2.0), nm=(1, 2)),
    # no parts, no strips
    "nothing kept": Case((33, 40), density(-1.0)),
    # empty rows and columns
    "holes": Case((50, 45), holes, nm=(4, 8)),
    # one long row, one long column
    "lines": Case((60, 60), lines, nm=(1, 4)),
    # block rows of equal length
    "window": Case((96, 96), band(20), dim=8, nm=(2, 8)),
    # nq < nk, another block size
    "causal window": Case((40, 90), band(9), size=32),
    # entries in order
    "heads differ": Case((34, 35), density(0.4), lead=(1, 3), free=(2,)),
    # equal ones stored once
    "heads shared": Case((34, 35), density(0.4), lead=(1, 3), entry=(0, 1, 0)),
    # heads are free
    "batch differs": Case((20, 35), density(0.4), lead=(2, 1), free=(3,)),
    # nothing is free
    "both differ": Case((20, 35), density(0.4), lead=(2, 2), entry=(1, 0, 0, 1)),
    # five dimensions
    "both, more free": Case((20, 18), density(0.4), lead=(2, 2), free=(2,)),
    # smallest
    "one element": Case((1, 1), density(2.0), dim=1, nm=(1, 2)),
    # decoding
    "one query": Case((1, 65), density(0.5), nm=(1, 16)),
    # empty results
    "no queries": Case((0, 20), density(0.5)),
    # every row is empty
    "no keys": Case((20, 0), density(0.5)),
    # scores are sums of nothing
    "no width": Case((20, 25), density(0.5), dim=0),
}


def masks_of(case: Case, seed: int = 0) -> tuple[Tensor, tuple[int, ...]]:
    """(U, nq, nk) masks of the distinct patterns, and the entries."""
    b, h = case.lead
    entry = case.entry or tuple(range(b * h))
    g = torch.Generator().manual_seed(seed)
    return torch.stack([case.mask(*case.shape, g) for _ in range(max(entry) + 1)]), entry


def block_layout(
    masks: Tensor, entry: Sequence[int], lead: tuple[int, int], size: int
) -> BlockLayout:
    """Blocks that keep anything, with the distinct masks of those that do not keep all."""
    u, nq, nk = masks.shape
    rows, cols = -(-nq // size), -(-nk // size)
    wide = torch.zeros(u, rows * size, cols * size, dtype=torch.bool)
    wide[:, :nq, :nk] = masks
    blocks = wide.view(u, rows, size, cols, size).transpose(2, 3)
    kept = blocks.flatten(3).any(-1)
    which = kept.nonzero()
    counts = kept.sum(-1).flatten()
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    chosen = blocks[which[:, 0], which[:, 1], which[:, 2]]
    bits = pack_bits(chosen).reshape(-1, size * (size // 8))
    distinct, index = torch.unique(bits, dim=0, return_inverse=True)
    full = chosen.flatten(1).all(1) if len(which) else torch.zeros(0, dtype=torch.bool)
    index = torch.where(full, -1, index.flatten())
    return BlockLayout.from_blocks(
        (nq, nk), size, offsets, which[:, 2].int(), index, distinct.view(-1, size, size // 8),
        lead, tuple(entry),
    )  # fmt: skip


def row_layout(masks: Tensor, entry: Sequence[int], lead: tuple[int, int]) -> RowLayout:
    """CSR of the masks."""
    counts = masks.sum(-1).flatten()
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    columns = masks.nonzero()[:, 2].int()
    return RowLayout.from_csr(tuple(masks.shape[1:]), offsets, columns, lead, tuple(entry))


def panel_layout(masks: Tensor, entry: Sequence[int], lead: tuple[int, int]) -> PanelLayout:
    """Four kinds of panels: ranges and lists, masked and not, two that share their rows."""
    u, nq, nk = masks.shape
    panels, of = [], []

    def cut(pattern: int, rows: range | Tensor, cols: range | Tensor) -> None:
        if len(rows) and len(cols):
            at = [torch.as_tensor(list(r) if isinstance(r, range) else r) for r in (rows, cols)]
            mask = masks[pattern][at[0]][:, at[1]]
            if mask.any():
                panels.append((rows, cols, None if mask.all() else mask))
                of.append(pattern)

    for p in range(u):
        used = masks[p].any(0).nonzero()[:, 0]
        half = nq // 2
        even, odd = (torch.arange(nq)[at::2] for at in (half, half + 1))
        cut(p, range(half), range(nk))
        cut(p, even, used)
        cut(p, odd, range(nk // 2))
        cut(p, odd, used[used >= nk // 2])
    return PanelLayout.from_panels((nq, nk), panels, lead, tuple(entry), of)


def mixed_layout(
    masks: Tensor, entry: Sequence[int], lead: tuple[int, int], size: int
) -> MixedLayout:
    """Blocks, panels and single entries, a third of the columns each."""
    _, nq, nk = masks.shape
    third = torch.arange(nk) * 3 // max(nk, 1)
    of = [masks & (third == i) for i in range(3)]
    return MixedLayout.from_parts(
        (nq, nk),
        block_layout(of[0], entry, lead, size),
        panel_layout(of[1], entry, lead),
        row_layout(of[2], entry, lead),
        lead,
        tuple(entry),
    )


def nm_layout(case: Case, masks: Tensor, entry: Sequence[int], within: bool) -> NMLayout:
    """A choice by random scores; its positions differ between all entries."""
    n, m = case.nm
    (nq, nk), (b, h) = case.shape, case.lead
    g = torch.Generator().manual_seed(7)
    if not within:
        choice = choose(torch.rand(b * h, nq, nk, generator=g), None, n, m)
        return NMLayout.from_choice(choice, (nq, nk), n, m, lead=case.lead)
    limits = block_layout(masks, entry, case.lead, case.size)
    live = limits.live()
    live = torch.ones(limits.slots, dtype=torch.bool) if live is None else live
    live = live.view(-1, case.size, case.size)
    choice = choose(torch.rand(live.shape, generator=g), live, n, m)
    return NMLayout.from_choice(choice, (nq, nk), n, m, lead=case.lead, within=limits)


def tile_layout(masks: Tensor) -> TileLayout:
    """Tiles that keep anything."""
    nq, nk = masks.shape[1:]
    rows, cols = -(-nq // 16), -(-nk // 16)
    wide = torch.zeros(rows * 16, cols * 16, dtype=torch.bool)
    wide[:nq, :nk] = masks[0]
    kept = wide.view(rows, 16, cols, 16).transpose(1, 2).flatten(2).any(-1)
    return TileLayout.from_tile_mask(kept, (nq, nk))


#: What stands for each layout class of the table; NMLayout twice, alone and within blocks.
BUILDERS: dict[str, Callable[[Case, Tensor, Sequence[int]], Layout]] = {
    "block": lambda c, m, e: block_layout(m, e, c.lead, c.size),
    "row": lambda c, m, e: row_layout(m, e, c.lead),
    "panel": lambda c, m, e: panel_layout(m, e, c.lead),
    "mixed": lambda c, m, e: mixed_layout(m, e, c.lead, c.size),
    "nm": lambda c, m, e: nm_layout(c, m, e, within=False),
    "nm within": lambda c, m, e: nm_layout(c, m, e, within=True),
    "tile": lambda c, m, e: tile_layout(m),
}


def kinds_of(cls: type[Layout]) -> list[str]:
    """Builders that make this class."""
    return [kind for kind in BUILDERS if kind.split()[0] == cls.kind]


def build(kind: str, name: str, seed: int = 0) -> Layout:
    """The layout of one kind for one case."""
    case = CASES[name]
    return BUILDERS[kind](case, *masks_of(case, seed))


def applies(kind: str, name: str) -> bool:
    """Whether a layout kind can express a case: tiles have no leading dimensions."""
    case = CASES[name]
    if kind == "nm within" and case.size % case.nm[1]:
        return False
    return kind != "tile" or (case.lead == (1, 1) and not case.free)


def cells(op: str, table: dict, names: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """(layout kind, case) for every cell of an operation; a new cell or case joins by itself."""
    return [
        (kind, name)
        for cls in table[op]
        for kind in kinds_of(cls)
        for name in (CASES if names is None else names)
        if applies(kind, name)
    ]


def operands(
    name: str, dtype: torch.dtype = torch.float64, seed: int = 1, integer: bool = False
) -> tuple[Tensor, Tensor]:
    """q (*lead, nq, D) and k (*lead, nk, D) of a case."""
    case = CASES[name]
    g = torch.Generator().manual_seed(seed)
    made = []
    for rows in case.shape:
        shape = (*case.lead_shape, rows, case.dim)
        if integer:
            made.append(torch.randint(-4, 5, shape, generator=g).to(dtype))
        else:
            made.append(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype))
    return made[0], made[1]
