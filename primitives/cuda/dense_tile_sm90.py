"""How kernels that keep some of dense tiles of a gradient cut it; see dense_tile.cuh."""

from __future__ import annotations

# Rows of a tile, and threads of a CTA: consumers of all rows, and a warpgroup that produces.
TALL, THREADS = 128, 384
# Stages of 64 tokens; cycles of a step, and of a tile beside its steps, by columns of a tile.
STAGES = {256: 4, 128: 6}
STEP = {256: 1280, 128: 770}
START = {256: 5600, 128: 4000}


def memory(wide: int) -> int:
    """Dynamic shared memory of a CTA, bytes: stages, and room to align."""
    return STAGES[wide] * (TALL + wide) * 128 + 1024


def wide_of(several: int, rows: int, columns: int, tokens: int) -> int:
    """Columns of a tile, whatever the number of matrices: each sum is the same for any."""
    return min(STEP, key=lambda wide: cycles(wide, several, rows, columns, tokens))


def cycles(wide: int, several: int, rows: int, columns: int, tokens: int) -> float:
    """What one matrix takes that keeps something of every tile, beside its entries."""
    tiles = -(-rows // TALL) * -(-columns // wide)
    return -(-tiles // several) * (START[wide] + STEP[wide] * -(-tokens // 64))
