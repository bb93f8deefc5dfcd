"""What describes positions: a pattern with its shape, a layout, or a SparseTensor's layout."""

from __future__ import annotations

import torch

from ..arguments import SIDE_LIMIT, among, check_pair, kind_of, shown
from ..block import SIZES, BlockLayout
from ..errors import LayoutError, ShapeError
from ..layout import Layout
from ..pattern import Frame, Pattern
from ..pattern_arguments import as_integer
from ..pattern_ragged import from_layout
from ..sparse import SparseTensor
from ..split import to_layout

Positions = Pattern | Layout | SparseTensor


def as_pattern(
    source: Positions, nq: int | None, nk: int | None, who: str
) -> tuple[Pattern, Frame]:
    """The pattern and the rectangle it is asked for.

    Args:
        source: a static pattern, a layout, or a SparseTensor without a key mask.
        nq: number of queries; None = that of the layout.
        nk: number of keys; None = that of the layout.
        who: names the caller in errors.

    Raises:
        LayoutError: something else, P.nm, or a tensor that carries a key mask.
        ShapeError: a pattern without nq and nk, or other ones than the layout's.
    """
    if isinstance(source, SparseTensor):
        if source.keep is not None:
            raise LayoutError(
                f"{who}: the tensor carries a key mask, which is no part of its layout; pass "
                "s.layout and give the mask to the other library"
            )
        source = source.layout
    if isinstance(source, Layout):
        for given, side, name in ((nq, source.shape[0], "nq"), (nk, source.shape[1], "nk")):
            if given is None or among(given, (side,)):
                continue
            raise ShapeError(
                f"{who}: {name} = {shown(given)} given with {source!r}; leave them out"
            )
        return from_layout(source), Frame(*source.shape, source.device)
    if not isinstance(source, Pattern):
        raise LayoutError(f"{who}: {kind_of(source)} given, a pattern or a layout expected")
    if not source._static:
        raise LayoutError(
            f"{who}: {source!r} keeps what scores best as it runs; only static patterns can be "
            "written down"
        )
    if nq is None or nk is None:
        raise ShapeError(f"{who}: nq = {shown(nq)}, nk = {shown(nk)}; a pattern needs both")
    shape = (as_integer(nq, f"{who}(nq)", 0), as_integer(nk, f"{who}(nk)", 0))
    frame = Frame(*shape, source.device)
    for flat in source.distinct:
        flat.check(frame)
    return source, frame


def as_blocks(
    source: Positions, nq: int | None, nk: int | None, size: int, who: str
) -> BlockLayout:
    """The positions as a BlockLayout of one of our block sizes."""
    if isinstance(source, BlockLayout) and source.size == size and nq is None and nk is None:
        return source
    pattern, frame = as_pattern(source, nq, nk, who)
    made = to_layout(pattern, "block", frame.nq, frame.nk, size, frame.device)
    assert isinstance(made, BlockLayout)
    return made


def as_block_size(given: int | tuple[int, int], who: str) -> tuple[int, int, int]:
    """(rows, columns, our size): a block of another library and the largest of ours that tiles it.

    Raises:
        LayoutError: sides that no block of ours divides.
    """
    high, wide = as_sides(given, who)
    fitting = [size for size in SIZES if not (high % size or wide % size)]
    if fitting:
        return high, wide, fitting[-1]
    raise LayoutError(
        f"{who}: blocks of {shown(given)}; rows and columns must be multiples of {SIZES[0]}, e.g. "
        "128 or (256, 128)"
    )


def as_sides(given: object, who: str) -> tuple[int, int]:
    """(rows, columns) of a block, given as both or as one number for both.

    Raises:
        LayoutError: anything else.
    """
    try:
        high, wide = (
            (given, given) if isinstance(given, int) else check_pair(who, "blocks of", given)
        )
    except ShapeError:
        high = wide = 0
    if isinstance(given, bool) or not (0 < high < SIDE_LIMIT and 0 < wide < SIDE_LIMIT):
        raise LayoutError(
            f"{who}: blocks of {shown(given)}; a positive integer below 2**31, or (rows, columns), "
            "expected, e.g. 128 or (256, 128)"
        )
    return high, wide


def entry_table(layout: BlockLayout) -> torch.Tensor:
    """int64 (b, h): the distinct pattern of each leading entry."""
    return torch.tensor(layout.entry, device=layout.device).reshape(layout.lead)
