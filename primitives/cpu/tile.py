"""TileLayout on the CPU: blocks of 16 whose slots are put in row-major order first."""

from __future__ import annotations

import torch
from torch import Tensor

from mixgrain.formats.tile import AREA, FRAGMENT

from .block import BlockPart
from .part import Dropped

# Slot that holds each row-major element of a tile.
_SLOT = torch.argsort(FRAGMENT)


class TilePart(BlockPart):
    """A TileLayout's tiles as blocks."""

    def unpack(self, values: Tensor) -> Tensor:
        """Fragment order to row-major order."""
        return values.view(-1, AREA).index_select(1, _SLOT).view(-1)

    def sddmm(
        self, out: Tensor, q: Tensor, k: Tensor, scale: float, dropped: Dropped | None
    ) -> None:
        plain = torch.empty_like(out)
        super().sddmm(plain, q, k, scale, dropped)
        out.view(-1, AREA).copy_(plain.view(-1, AREA).index_select(1, FRAGMENT))
