"""What the laws draw: descriptions small enough to print, and what is made of them.

An example is a handful of names and numbers; masks and operands follow from its seed. Whole numbers
in float64 make sums exact, so that most laws can ask for equality.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from cases import BUILDERS, Case
from hypothesis import strategies as st
from torch import Tensor

from mixgrain.formats.layout import Layout
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives.plans.plan import trust

KINDS = ("row", "block", "nm", "panel", "mixed", "nm within")
#: Kinds that hold any mask to the element.
EXACT = ("row", "block", "panel", "mixed")
#: Kinds that attention and the constructors of patterns make.
PUBLIC = ("row", "block", "mixed")

SIDES = (5, 0, 1, 2, 3, 8, 13, 16, 17, 24, 33)
TINY = (3, 0, 1, 2, 4)

#: (b, h) and the distinct pattern of each entry.
LEADS = (
    ((1, 1), (0,)),
    ((1, 2), (0, 1)),
    ((1, 2), (0, 0)),
    ((2, 1), (0, 1)),
    ((2, 2), (0, 1, 1, 0)),
    ((1, 3), (0, 1, 0)),
    ((2, 2), (0, 1, 2, 3)),
)
FREE: tuple[tuple[int, ...], ...] = ((), (2,), (1, 2), (0,))
NM = ((2, 4), (1, 2), (1, 4), (4, 8), (3, 4), (1, 16), (4, 4), (1, 1))

#: Integers as wide as a float, to see its bits.
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Mask = Callable[[int, int, torch.Generator], Tensor]


def _some(d: float) -> Mask:
    return lambda nq, nk, g: torch.rand(nq, nk, generator=g) < d


def _window(nq: int, nk: int, g: torch.Generator) -> Tensor:
    i, j = torch.arange(nq)[:, None], torch.arange(nk)[None]
    return (i + nk - nq - j).abs() <= 2


def _holes(nq: int, nk: int, g: torch.Generator) -> Tensor:
    mask = torch.rand(nq, nk, generator=g) < 0.7
    mask[::3], mask[:, ::4] = False, False
    return mask


def _lines(nq: int, nk: int, g: torch.Generator) -> Tensor:
    mask = torch.rand(nq, nk, generator=g) < 0.05
    mask[nq // 2 : nq // 2 + 1] = True
    mask[:, nk // 3 : nk // 3 + 1] = True
    return mask


MASKS: dict[str, Mask] = {
    "half": _some(0.5),
    "some": _some(0.2),
    "few": _some(0.03),
    "all": _some(2.0),
    "none": _some(-1.0),
    "window": _window,
    "empty rows and columns": _holes,
    "a long row and column": _lines,
}


@dataclass(frozen=True)
class Example:
    """A sparse matrix, or several.

    Attributes:
        kind: what it is stored as, a key of BUILDERS.
        shape: (nq, nk).
        mask: a key of MASKS.
        lead: (b, h), and with ``entry`` which entries share a pattern.
        free: leading dimensions over which positions are shared.
        dim: width of dense operands.
        nm: n and m of an NMLayout.
        size: side of blocks.
        seed: of masks and operands.
    """

    kind: str
    shape: tuple[int, int]
    mask: str = "half"
    lead: tuple[int, int] = (1, 1)
    entry: tuple[int, ...] = (0,)
    free: tuple[int, ...] = ()
    dim: int = 3
    nm: tuple[int, int] = (2, 4)
    size: int = 16
    seed: int = 0

    @property
    def case(self) -> Case:
        return Case(
            self.shape, MASKS[self.mask], self.lead, self.entry, self.free, self.dim, self.size,
            self.nm,
        )  # fmt: skip

    @property
    def lead_shape(self) -> tuple[int, ...]:
        """Leading shape of dense operands."""
        return self.case.lead_shape

    def generator(self, stream: int = 0) -> torch.Generator:
        """Numbers of this example; another stream gives others."""
        return torch.Generator().manual_seed(self.seed * 8 + stream)

    def masks(self, stream: int = 0) -> Tensor:
        """bool (U, nq, nk), the distinct patterns."""
        g = self.generator(stream)
        make = MASKS[self.mask]
        return torch.stack([make(*self.shape, g) for _ in range(max(self.entry) + 1)])

    def layout(self, masks: Tensor | None = None) -> Layout:
        """The layout of its masks, or of others; a law of its own says that it validates."""
        masks = self.masks() if masks is None else masks
        made = BUILDERS[self.kind](self.case, masks, self.entry)
        trust(made)
        return made

    def full_mask(self, masks: Tensor | None = None) -> Tensor:
        """bool (b or 1, h or 1, nq, nk): what exact kinds keep."""
        masks = self.masks() if masks is None else masks
        return masks[list(self.entry)].unflatten(0, self.lead)

    def operands(self, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Whole q (*lead, nq, D) and k (*lead, nk, D)."""
        nq, nk = self.shape
        return whole(g, *self.lead_shape, nq, self.dim), whole(g, *self.lead_shape, nk, self.dim)

    def sparse(self, layout: Layout, g: torch.Generator) -> SparseTensor:
        """A SparseTensor of whole numbers, anything but zero at dead slots too."""
        return SparseTensor(layout, whole(g, *self.free, layout.slots))

    def turned(self) -> Example:
        """The same with rows and columns exchanged."""
        return replace(self, shape=self.shape[::-1])


def whole(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Integers from −8 to 8 as floats."""
    return torch.randint(-8, 9, shape, generator=g).to(dtype)


def real(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def hostile(dtype: torch.dtype, shape: tuple[int, ...], seed: int, zeros: float) -> Tensor:
    """Random bits, with special values among them and a share of +0."""
    g = torch.Generator().manual_seed(seed)
    integer = INTEGER[dtype.itemsize]
    limits = torch.iinfo(integer)
    bits = torch.randint(limits.min, limits.max, shape, generator=g, dtype=integer)
    tiny = torch.finfo(dtype).smallest_normal / 2
    special = torch.tensor(
        [-0.0, torch.inf, -torch.inf, torch.nan, tiny, torch.finfo(dtype).max], dtype=dtype
    ).view(integer)
    # NaN with payloads, quiet and signalling, of both signs.
    infinite = torch.tensor([torch.inf], dtype=dtype).view(integer)
    special = torch.cat([special, infinite + 1, (infinite + 3) ^ limits.min, infinite | 5])
    which = torch.randint(0, 2 * len(special), shape, generator=g)
    bits = torch.where(which < len(special), special[which % len(special)], bits)
    return torch.where(torch.rand(shape, generator=g) < zeros, bits.new_zeros(()), bits).view(dtype)


#: Any 32 bits, drawn evenly: integers() prefers small ones, so that long runs would repeat them.
seeds = st.binary(min_size=4, max_size=4).map(lambda raw: int.from_bytes(raw, "big"))


@st.composite
def examples(
    draw: st.DrawFn,
    kinds: Sequence[str] = KINDS,
    sides: Sequence[int] = SIDES,
    leads: Sequence[tuple[tuple[int, int], tuple[int, ...]]] = LEADS,
    free: Sequence[tuple[int, ...]] = FREE,
    dims: Sequence[int] = (3, 0, 1, 2, 5, 8, 9),
) -> Example:
    """Any sparse matrix of the kinds, small."""
    kind = draw(st.sampled_from(kinds))
    lead, entry = draw(st.sampled_from(leads)) if kind != "tile" else LEADS[0]
    return Example(
        kind,
        (draw(st.sampled_from(sides)), draw(st.sampled_from(sides))),
        draw(st.sampled_from(list(MASKS))),
        lead,
        entry,
        draw(st.sampled_from(free)) if kind != "tile" else (),
        draw(st.sampled_from(dims)),
        draw(st.sampled_from(NM)) if kind.startswith("nm") else (2, 4),
        draw(st.sampled_from((16, 32))) if kind in ("block", "mixed", "nm within") else 16,
        draw(seeds),
    )


def held(layout: Layout) -> Tensor:
    """bool (b, h, nq, nk): what a layout keeps, by its definition."""
    return layout.mask()


def spread(mask: Tensor, example: Example) -> Tensor:
    """A mask (b, h, nq, nk) as it stands in dense tensors (*lead_shape, nq, nk)."""
    b, h = example.lead
    if b == 1:
        mask = mask[0] if h > 1 else mask[0, 0]
    return mask.expand(*example.lead_shape, *example.shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shapes, dtypes and bits; NaN payloads and signs of zero count."""
    integer = INTEGER[a.element_size()]
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
    )


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    """Equal up to rounding; infinities agree."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def entries_of(example: Example) -> int:
    """b · h."""
    return math.prod(example.lead)
