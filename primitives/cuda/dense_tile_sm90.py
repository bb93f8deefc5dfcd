"""How kernels that keep some of dense tiles of a gradient cut it; see dense_tile.cuh."""

from __future__ import annotations

# Rows of a tile, and threads of a CTA: consumers of all rows, and a warpgroup that produces.
TALL, THREADS = 128, 384
# Stages of 64 tokens, and how many there are where a tile is in shared memory, too; cycles of a
# step, and of a tile beside its steps; by columns of a tile. Cycles until the first is under way.
STAGES, FEWER = {256: 4, 128: 6}, {256: 3, 128: 5}
STEP = {256: 1230, 128: 620}
START = {256: 2000, 128: 1700}
BEGIN = 5000
# Tiles of a call at most, which kernels count in 32 bits.
MOST_TILES = 1 << 30


def memory(wide: int, staged: bool) -> int:
    """Dynamic shared memory of a CTA, bytes: stages, a tile (``staged``), and room to align."""
    stages = (FEWER if staged else STAGES)[wide]
    return stages * (TALL + wide) * 128 + staged * TALL * (2 * wide + 16) + 1024


def wide_of(several: int, rows: int, columns: int, tokens: int) -> int:
    """Columns of a tile, whatever the number of matrices: each sum is the same for any."""
    return min(STEP, key=lambda wide: cycles(wide, several, rows, columns, tokens))


def cycles(wide: int, several: int, rows: int, columns: int, tokens: int) -> float:
    """What one matrix takes that keeps something of every tile, beside its entries."""
    tiles = -(-rows // TALL) * -(-columns // wide)
    return BEGIN + -(-tiles // several) * (START[wide] + STEP[wide] * -(-tokens // 64))
