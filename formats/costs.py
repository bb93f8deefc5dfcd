"""Costs: the device rates by which a mixed layout is split.

The unit is seconds of a whole device. A block of size × size costs its two products (scores and
output) at the matrix rate, plus moving its slots; a panel costs the same per 64 × 64 unit, more
when it gathers its columns for itself; a single entry costs two gathers of one D-vector, plus what
every row pays for a partial result that has to be merged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .arguments import as_number, kind_of
from .errors import LayoutError

UNIT = 64


@dataclass(frozen=True)
class Costs:
    """Rates of a device, an argument of ``to_layout``; hashable, so that layouts are remembered.

    Attributes:
        dense_flops: FLOP/s of a dense product in small tiles.
        copy_bytes: bytes/s of streaming memory, read and written.
        gather_bytes: bytes/s of gathering single rows of K or V, mostly from cache.
        private_panel_factor: a panel gathered by one group of rows over one packed for all rows.
        launch_seconds: what one more part costs whatever its size.
        element_bytes: bytes of a value.
        slot_passes: how often a stored slot travels to or from memory.
        head_dim: D of the products, where the caller of the split does not know it.
        row_seconds: what a row that holds single entries costs beside its bytes.
    """

    dense_flops: float
    copy_bytes: float
    gather_bytes: float
    private_panel_factor: float = 1.3
    launch_seconds: float = 3e-6
    element_bytes: int = 2
    slot_passes: float = 2.0
    head_dim: int = 64
    row_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = as_number("Costs", name, getattr(self, name))
            rate = name in ("dense_flops", "copy_bytes", "gather_bytes")
            if not 0 <= value < math.inf or (rate and not value):
                more = "more than 0" if rate else "at least 0"
                raise LayoutError(f"Costs: {name} = {value} given, a finite number {more} expected")

    @classmethod
    def h200(cls) -> Costs:
        """One H200: 600 TFLOP/s in tiles, 4.2 TB/s copied, 8.9 TB/s gathered from L2."""
        return cls(dense_flops=6e14, copy_bytes=4.2e12, gather_bytes=8.9e12)

    @classmethod
    def cpu(cls) -> Costs:
        """Two cores of a server CPU in float32, products batched by torch."""
        return cls(
            dense_flops=1e11,
            copy_bytes=1e10,
            gather_bytes=1e10,
            launch_seconds=2e-4,
            element_bytes=4,
        )

    def block_seconds(self, size: int, D: int | None = None) -> float:
        """One size × size block, full or partial.

        Args:
            size: side of the block.
            D: head dimension; None = ``head_dim``.
        """
        return self._unit_seconds(size, size, size, D)

    def panel_seconds(
        self, rows: int, cols: int, D: int | None = None, private: bool = False
    ) -> float:
        """One panel of rows × cols, its columns padded to 64 for the products and 8 in memory.

        Args:
            rows: number of rows.
            cols: number of columns.
            D: head dimension; None = ``head_dim``.
            private: its columns are gathered by one group of rows, not packed for all.
        """
        if not rows or not cols:
            return 0.0
        D = self.head_dim if D is None else D
        padded, pitch = -(-cols // UNIT) * UNIT, -(-cols // 8) * 8
        seconds = self._unit_seconds(-(-rows // UNIT) * UNIT, padded, pitch, D)
        if private:
            return seconds * self.private_panel_factor
        # K and V are packed once: read and written.
        return seconds + 4 * cols * D * self.element_bytes / self.copy_bytes

    def private_column_seconds(self, rows: int, D: int | None = None) -> float:
        """What one more column adds to a private panel, padding spread evenly."""
        return self.private_panel_factor * self._unit_seconds(rows, 1, 1, D)

    def entries_seconds(self, nnz: int | float, D: int | None = None) -> float:
        """Single entries: K and V gathered, the value and its column index moved."""
        D = self.head_dim if D is None else D
        moved = 4 + self.slot_passes * self.element_bytes
        return nnz * (2 * D * self.element_bytes / self.gather_bytes + moved / self.copy_bytes)

    def entry_rows_seconds(self, rows: int | float, D: int | None = None) -> float:
        """What rows that hold single entries pay: q read, a float32 partial written and merged."""
        D = self.head_dim if D is None else D
        moved = D * self.element_bytes + 2 * (4 * D + 4)
        return rows * (moved / self.copy_bytes + self.row_seconds)

    def slots_seconds(self, slots: int) -> float:
        """Moving stored slots to and from memory."""
        return self.slot_passes * self.element_bytes * slots / self.copy_bytes

    def _unit_seconds(self, rows: int, cols: int, stored_cols: int, D: int | None) -> float:
        D = self.head_dim if D is None else D
        return 4 * rows * cols * D / self.dense_flops + self.slots_seconds(rows * stored_cols)


def check_costs(op: str, costs: object) -> None:
    """Raise TypeError unless the rates are a ``Costs`` or None."""
    if costs is not None and not isinstance(costs, Costs):
        raise TypeError(f"{op}: costs is a {kind_of(costs)}; expected a mixgrain.Costs or None")
