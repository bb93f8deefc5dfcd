"""A call's key mask as bits of key units, for the kernel of units."""

from __future__ import annotations

import torch
from torch import Tensor

from .cells import UNIT


def unit_bits(keep: Tensor) -> Tensor:
    """Int32 (…, ceil(n / 64), 2) of bool (…, n): bit c % 32 of word c // 32 for key c of a unit."""
    keep = torch.nn.functional.pad(keep, (0, -keep.shape[-1] % UNIT))
    words: Tensor = keep.unflatten(-1, (-1, 2, 32)).long()
    words = (words << torch.arange(32, device=keep.device)).sum(-1)
    # The lower halves.
    return words.view(torch.int32)[..., ::2].contiguous()


def gathered_bits(keep: Tensor, key_rows: Tensor, patterns: Tensor) -> Tensor:
    """The bits of gathered key units, int32 (B, Hp, n / 64, 2).

    Args:
        keep: bool (B, nk).
        key_rows: int32 (U, n), keys of each pattern's gathered units, −1 = none.
        patterns: int32 (B, Hp), the distinct pattern of each matrix.
    """
    key_rows, patterns = (t.to(keep.device) for t in (key_rows, patterns))  # while recording
    rows = key_rows[patterns.long()].long()
    kept = keep[:, None].expand(-1, rows.shape[1], -1).gather(2, rows.clamp(min=0))
    return unit_bits(kept & (rows >= 0))
