"""What NMLayout's constructors accept besides numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import as_lead, as_shape, check_dense, check_index, kind_of
from .block import BlockLayout
from .errors import LayoutError
from .nm_metadata import check_encoding
from .nm_within import stored_blocks, used_patterns


def check_within(op: str, within: object) -> None:
    """Raise LayoutError unless ``within`` is a BlockLayout or None."""
    if within is not None and not isinstance(within, BlockLayout):
        raise LayoutError(f"{op}: within is a {kind_of(within)}; expected a BlockLayout or None")


def check_columns(
    op: str,
    columns: Tensor,
    shape: tuple[int, int],
    n: int,
    m: int,
    lead: tuple[int, int],
    within: BlockLayout | None,
) -> None:
    """Absolute columns (…, groups, n) are integers of their own group.

    Raises:
        DtypeError: no tensor of integers.
        LayoutError: a column of another group, which column % m would quietly move to this one.
    """
    check_dense(op, "columns", columns)
    check_index(op, "columns", columns, columns.dim())
    check_encoding(n, m, "bytes")
    check_within(op, within)
    if columns.dim() < 2 or not columns.numel():
        return
    group = torch.arange(columns.shape[-2], device=columns.device)
    if within is not None:
        used = used_patterns(within, as_shape(op, shape), as_lead(op, lead), m)
        block = within.block_columns[stored_blocks(within, used)].long()
        if block.numel() != columns.shape[0]:
            raise LayoutError(
                f"{op}: columns of {columns.shape[0]} blocks; expected {block.numel()}"
            )
        group = (block[:, None] * (within.size // m) + group)[:, None]
    bad = columns.div(m, rounding_mode="floor") != group[..., None]
    if bool(bad.any()):
        at = tuple(bad.nonzero()[0].tolist())
        raise LayoutError(
            f"{op}: column {int(columns[at])} at {at} is not in its group of {m}; expected n "
            "columns of each group, group after group"
        )
