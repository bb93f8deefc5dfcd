"""What PanelLayout's constructors accept; everything else is for ``validate``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import check_dense, check_index, check_inside, check_sequence, kind_of
from .errors import DtypeError, LayoutError, ShapeError


def check_arrays(
    op: str, panel_entry: Any, rows: Any, cols: Any, mask_offset: Any, mask_bits: Any, distinct: int
) -> None:
    """The arrays of ``from_arrays`` are of one length and name patterns and masks that there are.

    Raises:
        DtypeError: no tensor, or of another dtype.
        ShapeError: another length, or another device.
        LayoutError: a number outside of what it counts.
    """
    check_index(op, "panel_entry", panel_entry)
    arrays = {"mask_offset": mask_offset}
    for axis, four in (("rows", rows), ("cols", cols)):
        if len(check_sequence(op, axis, four)) != 4:
            raise LayoutError(f"{op}: {axis} holds {len(four)} arrays; expected start, count, "
                              "list_offset, list")  # fmt: skip
        for name, array in zip(("start", "count", "list_offset"), four, strict=False):
            arrays[f"{axis}: {name}"] = array
        check_index(op, f"{axis}: list", four[3])
    for name, array in arrays.items():
        check_index(op, name, array)
        if array.shape != panel_entry.shape or array.device != panel_entry.device:
            raise ShapeError(
                f"{op}: {name} has {array.numel()} elements on {array.device} for "
                f"{panel_entry.numel()} panels on {panel_entry.device}"
            )
    check_dense(op, "mask_bits", mask_bits)
    if mask_bits.dtype != torch.uint8 or mask_bits.dim() != 1:
        raise DtypeError(
            f"{op}: mask_bits is {mask_bits.dtype} {tuple(mask_bits.shape)}; expected uint8, 1-D"
        )
    check_inside(op, "panel_entry", panel_entry, 0, distinct)
    for axis, four in (("rows", rows), ("cols", cols)):
        check_inside(op, f"{axis}: count", four[1], 0, 2**31)
    size = rows[1].long() * ((cols[1].long() + 7) // 8)
    bad = (mask_offset >= 0) & (mask_offset > mask_bits.numel() - size)
    if bool(bad.any()):
        p = int(bad.nonzero()[0, 0])
        raise LayoutError(
            f"{op}: mask_offset {int(mask_offset[p])} for panel {p}; expected −1, or "
            f"{int(size[p])} bytes inside the {mask_bits.numel()} of mask_bits"
        )


def check_written(op: str, panels: Any) -> None:
    """Panels written out are (rows, columns, mask), of ranges or rising indices, mask bool or None.

    Raises:
        TypeError: neither ranges nor tensors.
        DtypeError: indices that are no integers, a mask that is not bool.
        ShapeError: a mask of another shape.
        LayoutError: a range whose step is not 1.
    """
    for p, panel in enumerate(check_sequence(op, "panels", panels)):
        if len(check_sequence(op, f"panel {p}", panel)) != 3:
            raise LayoutError(f"{op}: panel {p} has {len(panel)} members; expected rows, columns, "
                              "mask or None")  # fmt: skip
        for what, members in (("rows", panel[0]), ("columns", panel[1])):
            if isinstance(members, range):
                if members.step != 1 or members.start < 0:
                    raise LayoutError(
                        f"{op}: {what} of panel {p} are {members}; expected step 1 from 0 on; give "
                        "a tensor of indices instead"
                    )
            elif isinstance(members, Tensor):
                check_index(op, f"{what} of panel {p}", members)
            else:
                raise TypeError(
                    f"{op}: {what} of panel {p} is a {kind_of(members)}; expected a range or a "
                    "tensor of indices"
                )
        mask = panel[2]
        if mask is None:
            continue
        check_dense(op, f"the mask of panel {p}", mask)
        if mask.dtype != torch.bool:
            raise DtypeError(f"{op}: the mask of panel {p} is {mask.dtype}; expected bool")
        if tuple(mask.shape) != (len(panel[0]), len(panel[1])):
            raise ShapeError(
                f"{op}: the mask of panel {p} has shape {tuple(mask.shape)}; expected "
                f"{(len(panel[0]), len(panel[1]))}"
            )
