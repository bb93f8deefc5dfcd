"""The operator sddmm on CUDA: one kernel per part of the layout, fine beside coarse."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plans.plan import PartPlan, Plan, split
from . import block, block_weights_sm90, nm, nm_scores, panel, row, row_weights_sm90, tile_sddmm
from .parts import aligned, at_once, check_dtypes, gaps

_KINDS = {
    "cblock": block.sddmm,
    "cpanel": panel.sddmm,
    "crow": row.sddmm_row,
    "nm": nm_scores.sddmm,
    "nm_t": nm_scores.sddmm,
}
#: Of layers, from rows of tokens as they are: what says whether it does, and what does it.
BY_TOKENS = {
    "cblock": (block_weights_sm90.takes, block_weights_sm90.sddmm),
    "crow": (row_weights_sm90.takes, row_weights_sm90.sddmm),
}


def sddmm(
    q: Tensor,
    k: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    tensors: list[Tensor],
    dims: list[int],
    name: str,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Scale · q kᵀ at every slot: (F, E, nq, D), (F, E, nk, D) -> (F, slots)."""
    check_dtypes("sddmm", q.dtype, k.dtype, dtype)
    slots, shape, _, parts = split(Plan(tensors, dims, name))
    values = q.new_empty(q.shape[0], slots, dtype=dtype)
    if not values.numel():
        return values
    if not q.shape[3]:
        return values.zero_()
    if q.dtype != k.dtype:
        wide = torch.promote_types(q.dtype, k.dtype)
        q, k = q.to(wide), k.to(wide)
    if parts and parts[0].kind in nm.KINDS and not nm_scores.takes(parts[0], q, k):
        return nm.sddmm(q, k, keep, keep_rows, parts[0], shape, slots, scale, dtype)
    if parts and parts[0].kind == "ctile":
        return tile_sddmm.sddmm(q, k, keep, keep_rows, parts[0], scale, dtype)
    tokens = by_tokens(parts, q, k, keep, dtype)
    for start, stop in gaps(parts, slots, cleared=not tokens):
        values[:, start:stop].zero_()
    if tokens:
        BY_TOKENS[parts[0].kind][1](values, q, k, parts[0], scale)
        return values
    q, k = aligned(q), aligned(k)

    def write(part: PartPlan) -> None:
        _KINDS[part.kind](values, q, k, keep, keep_rows, part, scale)

    at_once(parts, write, values.shape[0])
    return values


def by_tokens(
    parts: list[PartPlan], q: Tensor, k: Tensor, keep: Tensor | None, dtype: torch.dtype
) -> bool:
    """Whether a product is best made from rows of tokens as they are, which q and k view."""
    if len(parts) != 1 or parts[0].kind not in BY_TOKENS or 0 in (*q.shape, *k.shape):
        return False
    return BY_TOKENS[parts[0].kind][0](parts[0], q, k, keep, dtype)
