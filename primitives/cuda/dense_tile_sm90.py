"""How kernels that keep some of dense tiles of a gradient cut it; see dense_tile.cuh."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import Argument, Kernel

from .block_sm90 import operand_map

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


def launch(
    run: Kernel,
    values: Tensor,
    q: Tensor,
    k: Tensor,
    rest: Callable[[Tensor], tuple[Argument, ...]],
    count: int,
    wide: int,
    staged: bool,
) -> None:
    """Launch a kernel that keeps some of dense tiles, for as many matrices at once as it counts.

    Args:
        run: the kernel; takes maps of q and k, then ``rest``.
        values: (F, slots), written.
        q: (F, 1, nq, T), float16 or bfloat16, rows of tokens transposed.
        k: (F, 1, nk, T), likewise.
        rest: what else the kernel takes, from the values of some matrices.
        count: tiles of a matrix.
        wide: columns of a tile.
        staged: a tile is in shared memory, too.
    """
    several = facts(q.device.index).multiprocessors
    for start in range(0, values.shape[0], step := max(1, MOST_TILES // max(1, count))):
        out, left, right = (t[start : start + step] for t in (values, q, k))
        run(
            (min(count * out.shape[0], several),),
            THREADS,
            (operand_map(left.mT, 64), operand_map(right.mT, 64), *rest(out)),
            memory(wide, staged),
        )
