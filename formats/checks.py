"""Checks that ``validate()`` is made of: each names the field, what it holds and what it must."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .entries import INT32_LIMIT, transposed_order
from .errors import LayoutError
from .layout import Layout


def fail(layout: Layout, field: str, given: str, expected: str, remedy: str = "") -> LayoutError:
    """The error for one field: what was given, what is expected, what to do."""
    todo = remedy or f"build the layout with {type(layout).__name__}'s own constructors"
    # Fields of many entries would make messages of megabytes.
    return LayoutError(
        f"{type(layout).__name__}.{field}: {given:.400}; expected {expected:.400}; {todo}"
    )


def check_shape(layout: Layout) -> None:
    """Two sides that int32 indices can count."""
    shape = layout.shape
    whole = isinstance(shape, tuple) and all(isinstance(n, int) for n in shape)
    if not whole or len(shape) != 2 or min(shape) < 0 or max(shape) >= INT32_LIMIT:
        raise fail(layout, "shape", f"{shape}", "(nq, nk), two ints, at least 0 and below 2**31")


def check_lead(layout: Layout) -> None:
    """Lead and entry fit each other."""
    lead, entry = layout.lead, layout.entry
    whole = isinstance(lead, tuple) and all(isinstance(n, int) for n in lead)
    if not whole or len(lead) != 2 or min(lead) < 1:
        raise fail(layout, "lead", f"{lead}", "(b, h), two ints, both at least 1")
    b, h = lead
    whole = isinstance(entry, tuple) and all(isinstance(n, int) for n in entry)
    if not whole or len(entry) != b * h:
        raise fail(
            layout, "entry", f"{len(entry)} entries" if whole else f"{entry}",
            f"b * h = {b * h} ints for lead ({b}, {h})",
        )  # fmt: skip


def check_common(layout: Layout) -> None:
    """Shape, lead and entry are what they should be and fit each other."""
    check_shape(layout)
    check_lead(layout)
    used = set(layout.entry)
    if min(used) < 0 or max(used) != len(used) - 1:
        raise fail(
            layout, "entry", f"{layout.entry}", "every distinct pattern from 0 on used somewhere"
        )


def check_slots(layout: Layout, slots_of_distinct: Sequence[int]) -> None:
    """entry_slots are the running sum of the entries' slots."""
    expected = (0, *itertools.accumulate(slots_of_distinct[u] for u in layout.entry))
    if not same_numbers(layout.entry_slots, expected):
        raise fail(layout, "entry_slots", f"{layout.entry_slots}", f"{expected}")


def same_numbers(given: object, expected: tuple[int, ...]) -> bool:
    """Whether a field is this tuple of ints, whatever else may stand there."""
    whole = isinstance(given, tuple) and all(isinstance(n, int) for n in given)
    return whole and given == expected


def check_nnz(layout: Layout, live: int) -> None:
    """Nnz counts the live slots."""
    if not isinstance(layout.nnz, int) or layout.nnz != live:
        raise fail(layout, "nnz", f"{layout.nnz}", f"the number of live slots, {live}")


def check_tensor(
    layout: Layout, field: str, shape: Sequence[int | None], *dtypes: torch.dtype
) -> Tensor:
    """The field is a tensor of this shape (None = any), one of these dtypes, on the device."""
    value = getattr(layout, field)
    if not isinstance(value, Tensor):
        raise fail(layout, field, f"a {type(value).__name__}", "a tensor")
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        given = "nested" if value.is_nested else "quantized" if value.is_quantized else value.layout
        raise fail(layout, field, f"a {given} tensor", "a dense one (torch.strided)")
    sizes = ["any" if n is None else str(n) for n in shape]
    wanted = f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"
    fits = value.dim() == len(shape) and all(
        n is None or n == m for n, m in zip(shape, value.shape, strict=True)
    )
    if not fits:
        raise fail(layout, field, f"shape {tuple(value.shape)}", f"shape {wanted}")
    if value.dtype not in dtypes:
        raise fail(
            layout, field, f"dtype {value.dtype}", " or ".join(str(dtype) for dtype in dtypes)
        )
    if value.device != layout.device:
        raise fail(
            layout, field, f"on {value.device}", f"all index tensors on {layout.device}",
            "move the whole layout with .to(device)",
        )  # fmt: skip
    return value


def check_offsets(layout: Layout, field: str, offsets: Tensor, total: int) -> None:
    """Offsets start at 0, never fall and end at ``total``."""
    if int(offsets[0]) != 0:
        raise fail(layout, field, f"starts at {int(offsets[0])}", "0 first")
    steps = offsets.diff()
    if bool((steps < 0).any()):
        at = int((steps < 0).nonzero()[0]) + 1
        raise fail(
            layout, field, f"falls from {int(offsets[at - 1])} to {int(offsets[at])} at {at}",
            "offsets that never fall",
        )  # fmt: skip
    if int(offsets[-1]) != total:
        raise fail(layout, field, f"ends at {int(offsets[-1])}", f"{total}, what is stored")


def check_range(layout: Layout, field: str, values: Tensor, low: int, high: int) -> None:
    """Every value lies in [low, high)."""
    bad = (values < low) | (values >= high)
    if bool(bad.any()):
        at = int(bad.nonzero()[0, 0])
        raise fail(
            layout, field, f"{int(values.flatten()[at])} at {at}", f"values in [{low}, {high})"
        )


def check_rising(layout: Layout, field: str, offsets: Tensor, values: Tensor, what: str) -> None:
    """Values rise strictly inside every segment of ``offsets``."""
    if values.numel() < 2:
        return
    steps = values.long().diff() <= 0
    # Where a new segment starts the step is free.
    starts = offsets[1:-1].long()
    starts = starts[(starts > 0) & (starts < values.numel())]
    steps[starts - 1] = False
    if bool(steps.any()):
        at = int(steps.nonzero()[0, 0])
        raise fail(
            layout, field, f"{int(values[at])} then {int(values[at + 1])} at {at}",
            f"strictly rising values inside a {what}",
        )  # fmt: skip


def check_transposed(
    layout: Layout,
    offsets: Tensor,
    columns: Tensor,
    grid: tuple[int, int, int],
    types: tuple[torch.dtype, torch.dtype, torch.dtype],
    what: tuple[str, str, str],
) -> None:
    """t_offsets, t_rows and t_order are the column-major order of CSR elements.

    Args:
        layout: where they are fields.
        offsets: where each row starts, checked.
        columns: of each element, checked.
        grid: rows and columns of one distinct pattern, and how many there are.
        types: dtypes of the three.
        what: a row, a column and an element, for messages.
    """
    rows, cols, distinct = grid
    count, (row, column, item) = columns.numel(), what
    sizes = {"t_offsets": distinct * cols + 1, "t_rows": count, "t_order": count}
    # Before anything of the size that the shape claims is allocated.
    given = [
        check_tensor(layout, name, (size,), dtype)
        for (name, size), dtype in zip(sizes.items(), types, strict=True)
    ]
    texts = (
        f"where this {column} starts in column-major order",
        f"the {row} at this place of the column-major order",
        f"the {item} at this place of the column-major order",
    )
    expected = transposed_order(offsets, columns, rows, cols, distinct)
    for name, mine, theirs, text in zip(sizes, given, expected, texts, strict=True):
        check_same(layout, name, mine, theirs, text)


def check_same(layout: Layout, field: str, given: Tensor, expected: Tensor, what: str) -> None:
    """The field equals what the others imply."""
    different = given.long() != expected.long()
    if bool(different.any()):
        at = int(different.nonzero()[0, 0])
        raise fail(layout, field, f"{int(given[at])} at {at}", f"{int(expected[at])}: {what}")
