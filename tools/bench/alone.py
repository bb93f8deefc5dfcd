"""Calls that move what a work has to move and compute nothing: what bounds it, in the same run."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

import mixgrain as mg
from mixgrain.cuda import nvrtc
from mixgrain.cuda.compile import cache_folder, options, source
from mixgrain.cuda.device import facts
from mixgrain.formats.block import BlockLayout
from mixgrain.primitives.cuda.block_sm90 import (
    Cut,
    operand_map,
    spmm_request,
    tile,
    values_map,
    walks,
)
from mixgrain.primitives.plans import cuda_block

from .work import launched, wrapped

# A call, and what it should return.
Alone = tuple[Callable[[], Tensor], Callable[[], Tensor]]

# What spmm_block_sm90's consumers do with a tile, where they multiply: each warp adds up the first
# word of every row of x, so that what was to be read has been, and writes it all over its part of
# the tile, in the stores of store_result. A warp gives a stage back as soon as it has read it; the
# product keeps it one product longer.
CONSUMERS = r"""
        static_assert(!kPartial && !kTransposed, "two bytes an element, rows of S");
        u32 sum = 0;
#pragma unroll 1
        for (int step = 0; step < tile.z * kHalves; ++step) {
            barrier_wait(full_a + 8 * a, parity_a);
#pragma unroll
            for (int sub = 0; sub < kSubs; ++sub) {
                barrier_wait(full_b + 8 * b, parity_b);
#pragma unroll
                for (int r = lane; r < kDepth; r += 32) {
                    u32 word;
                    asm volatile("ld.shared.b32 %0, [%1];"
                                 : "=r"(word)
                                 : "r"(swizzled(ring_b + b * kStageB, r, 0))
                                 : "memory");
                    sum += word;
                }
                // All lanes have passed both barriers and read, before one of them says so.
                __syncwarp();
                if (lane == 0) {
                    barrier_arrive(empty_b + 8 * b);
                    if (sub == kSubs - 1) barrier_arrive(empty_a + 8 * a);
                }
                if (++b == kStagesB) b = 0, parity_b ^= 1;
            }
            if (++a == kStagesA) a = 0, parity_a ^= 1;
        }
        sum = __reduce_add_sync(0xFFFFFFFFu, sum);

        const int row = (tile.x % lines) * kSize + 64 * group + row16 + lane / 4;
        const int column = tile.w % across * kAcross + group_n * kWide;
        const i64 matrix = static_cast<i64>(tile.w / across) * entries + tile.x / lines;
        u16 *to = static_cast<u16 *>(out) + (matrix * rows + row) * width;
#pragma unroll
        for (int j = 0; j < kWide / 8; j += 4)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int at = column + 8 * (j + lane % 4);
                if (row + 8 * h < rows && at < width)
                    __stcs(reinterpret_cast<uint4 *>(to + 8 * h * width + at),
                           make_uint4(sum, sum, sum, sum));
            }
    }
}
"""


def moves_source() -> str:
    """CUDA text of ``moves_alone``: the product itself, with other consumers.

    Its arguments, rings, barriers and producer are thus the product's own, whatever they become.
    """
    entry, consumers = "spmm_block_sm90(const", "        float acc[kWide / 2];"
    text = source("spmm_block_sm90")
    if text.count(entry) != 1 or text.count(consumers) != 1:
        raise ValueError(f"spmm_block_sm90.cu no longer has {entry!r} and {consumers!r} once each")
    return text.partition(consumers)[0].replace(entry, "moves_alone(const") + CONSUMERS


def compiled(size: int, dtype: torch.dtype, cut: Cut) -> tuple[bytes, str]:
    """Cubin and log of ``moves_alone``, compiled as the product is for these blocks and this x."""
    wanted = spmm_request(size, dtype, cut, False, False)
    flags = [*options(wanted, "90a"), f"-I{nvrtc.header_folder()}"]
    return nvrtc.compile_source(moves_source(), "moves_alone.cu", flags)


@functools.cache
def _moves(size: int, dtype: torch.dtype, cut: Cut) -> Any:
    """The kernel."""
    import cupy

    image, _ = compiled(size, dtype, cut)
    # CuPy keeps modules by path.
    path = cache_folder() / f"moves_alone-{hashlib.sha256(image).hexdigest()[:32]}.cubin"
    path.write_bytes(image)
    made = cupy.RawModule(path=str(path)).get_function("moves_alone")
    made.max_dynamic_shared_size_bytes = cut.shared(size)
    return made


def fill(count: int) -> Alone:
    """Writes so many bytes."""
    to = torch.empty(count // 4, dtype=torch.int32, device="cuda")
    return lambda: to.fill_(1)[:1], lambda: to.new_ones(1)


def copy(count: int) -> Alone:
    """Reads half of so many bytes and writes as many."""
    given = torch.ones(count // 8, dtype=torch.int32, device="cuda")
    to = torch.empty_like(given)
    return lambda: to.copy_(given)[:1], lambda: given[:1]


def moves(weight: mg.SparseTensor, x: Tensor) -> Alone:
    """Reads and writes all that ``spmm`` of a block weight and x does, and multiplies nothing.

    The same copies by the same CTAs in the same order, mostly from L2; for sm_90a.

    Args:
        weight: (rows, inner), one matrix in full blocks of 64 or 128, of x's dtype.
        x: (inner, width), float16 or bfloat16, rows 16-byte aligned, width % 8 == 0.

    Returns:
        The call and what it returns: int32 (rows, width / 2) as ``tile_words`` says.
    """
    layout = weight.layout
    assert isinstance(layout, BlockLayout) and layout.entries == 1
    size, rows, width = layout.size, layout.shape[0], x.shape[1]
    cut, part = tile(size, width), cuda_block.part(layout)
    masks, used = part.tensors[6:8]
    table, records = part.tensors[10:12]
    across = -(-width // cut.across)
    tiles = walks(records, across, 1, facts(x.device.index).multiprocessors if cut.alone else 0)
    # What no call has written is no sum, and no small error either.
    out = torch.full((rows, width // 2), 0x55555555, dtype=torch.int32, device=x.device)

    def call() -> Tensor:
        arguments = (
            values_map(weight.values.view(1, -1), part.starts[0], size, len(table)),
            operand_map(x[None, None], cut.depth),
            table.data_ptr(),
            tiles.data_ptr(),
            np.int32(tiles.shape[1]),
            masks.data_ptr(),
            used.data_ptr(),
            np.int32(len(records)),
            np.int32(1),
            np.int32(across),
            np.float32(1),
            0,  # no bias
            out.data_ptr(),
            np.int32(rows),
            np.int32(width),
            np.int32(0),
        )
        run = _moves(size, x.dtype, cut)
        launched(run, (tiles.shape[0],), cut.threads(size), arguments, cut.shared(size))
        return out

    return call, lambda: tile_words(layout, x, cut.across)


def tile_words(layout: BlockLayout, x: Tensor, across: int) -> Tensor:
    """Every word of an output tile is the sum of x's words at the start of each row it needs.

    Args:
        layout: (rows, inner) in blocks, one entry.
        x: (inner, width), two bytes an element.
        across: columns of a tile, which is as high as a block.

    Returns:
        int32 (rows, width / 2), sums as 32 bits hold them.
    """
    size, (rows, _), width = layout.size, layout.shape, x.shape[1]
    words = x.view(torch.int32)[:, :: across // 2].double()
    words = pad(words, (0, 0, 0, -len(words) % size)).view(-1, size, words.shape[1]).sum(1)
    kept = words.new_zeros(layout.block_shape)
    line = torch.repeat_interleave(layout.block_offsets.long().diff())
    kept[line, layout.block_columns.long()] = 1
    # Whole numbers below 2⁵³ are exact in float64, in any order.
    sums = wrapped((kept @ words).long()).to(torch.int32)
    tall = sums.repeat_interleave(size, 0)[:rows]
    return tall.repeat_interleave(across // 2, 1)[:, : width // 2]
