"""Calls that move what a work has to move and compute nothing: what bounds it, in the same run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mixgrain as mg
from mixgrain.cuda.device import facts
from mixgrain.formats.block import BlockLayout
from mixgrain.primitives.cuda.block_sm90 import Cut, tile, walks
from mixgrain.primitives.plans import cuda_block

from .work import launched, wrapped

# A call, and what it should return.
Alone = tuple[Callable[[], Tensor], Callable[[], Tensor]]

# What spmm_block_sm90 reads of S and x, by the same CTAs in the same order, into as large rings: 32
# rows of x, a lane each, and as much of the block as belongs to them. The sum of each row's first
# word is returned, so that what was to be read has been.
READS = r"""
typedef unsigned u32;
typedef unsigned long long u64;
constexpr int kSize = MG_SIZE, kDepth = 32, kSubs = kSize / kDepth, kStages = MG_STAGES;
constexpr u32 kRow = 2 * MG_ACROSS, kOfX = kDepth * kRow, kOfS = 2 * kSize * kDepth;
constexpr u32 kStage = kOfX + kOfS;

__device__ void load(u32 to, const char *from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
__device__ void wait(u32 barrier, u32 parity) {
    asm volatile("{.reg .pred p;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@!p bra again;\n}" ::"r"(barrier), "r"(parity)
                 : "memory");
}

struct Place {
    const int4 *tiles;
    int left, block, sub;
    int4 tile;
    __device__ bool next() {
        if (++sub < kSubs && block < tile.z) return true;
        sub = 0;
        if (++block < tile.z) return true;
        for (block = 0; left > 0;) {
            --left;
            tile = *tiles++;
            if (tile.z > 0) return true;
        }
        tile.z = 0;
        return false;
    }
};

extern "C" __global__ void __launch_bounds__(32)
reads_alone(const char *x, u64 pitch, const char *values, const int4 *table, const int4 *tiles,
            int each, int columns, u32 *out) {
    extern __shared__ __align__(128) char memory[];
    __shared__ __align__(8) u64 full[kStages];
    const int lane = threadIdx.x;
    const u32 to = static_cast<u32>(__cvta_generic_to_shared(memory));
    const u32 barrier = static_cast<u32>(__cvta_generic_to_shared(full));
    if (lane < kStages)
        asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier + 8 * lane) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncwarp();
    Place ask{tiles + static_cast<u64>(blockIdx.x) * each, each, 0, 0, make_int4(0, 0, 0, 0)};
    Place have = ask;
    u32 sum = 0;
    bool more = true;
    for (int asked = 0, had = 0;;) {
        while (asked < had + kStages && more && (more = ask.next())) {
            const int4 item = table[ask.tile.y + ask.block];
            const u32 stage = asked % kStages, on = barrier + 8 * stage, at = to + stage * kStage;
            if (lane == 0)
                asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(on),
                             "r"(kStage)
                             : "memory");
            __syncwarp();
            const u64 row = static_cast<u64>(item.y) * kSize + ask.sub * kDepth + lane;
            load(at + lane * kRow, x + row * pitch + ask.tile.w % columns * kRow, kRow, on);
            const u64 part = static_cast<u64>(item.x) * kSubs + ask.sub;
            if (lane == 0) load(at + kOfX, values + part * kOfS, kOfS, on);
            ++asked;
        }
        if (had == asked) break;
        const u32 stage = had % kStages;
        wait(barrier + 8 * stage, had / kStages & 1);
        have.next();
        sum += *reinterpret_cast<const u32 *>(memory + stage * kStage + lane * kRow);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
        ++had;
        if (have.block == have.tile.z - 1 && have.sub == kSubs - 1) {
            for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
            if (lane == 0) out[have.tile.x * columns + have.tile.w % columns] = sum;
            sum = 0;
        }
    }
}
"""


def options(size: int, cut: Cut) -> tuple[str, ...]:
    """What ``READS`` is compiled with, for blocks of this size and the product's own cut."""
    constants = {"SIZE": size, "ACROSS": cut.across, "STAGES": cut.right}
    return "-std=c++17", *(f"-DMG_{name}={value}" for name, value in constants.items())


def _shared(size: int, cut: Cut) -> int:
    """Dynamic shared memory of a CTA, bytes: stages of 32 inner positions."""
    return cut.right * 64 * (cut.across + size)


@functools.cache
def _reads(size: int, cut: Cut) -> Any:
    """The kernel."""
    import cupy

    made = cupy.RawKernel(READS, "reads_alone", options=options(size, cut), backend="nvrtc")
    made.max_dynamic_shared_size_bytes = _shared(size, cut)
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


def reads(weight: mg.SparseTensor, x: Tensor) -> Alone:
    """Reads what ``spmm`` reads of a block weight and of x, mostly from L2."""
    layout = weight.layout
    assert isinstance(layout, BlockLayout)
    size, cut = layout.size, tile(layout.size, x.shape[1])
    columns, lines = x.shape[1] // cut.across, layout.shape[0] // size
    table, records = cuda_block.part(layout).tensors[10:12]
    tiles = walks(records, columns, 1, facts(x.device.index).multiprocessors)
    out = torch.zeros(lines, columns, dtype=torch.int32, device="cuda")

    def call() -> Tensor:
        given = (weight.values.data_ptr(), table.data_ptr(), tiles.data_ptr())
        arguments = (
            x.data_ptr(), np.uint64(x.stride(0) * 2), *given, np.int32(tiles.shape[1]),
            np.int32(columns), out.data_ptr(),
        )  # fmt: skip
        launched(_reads(size, cut), (tiles.shape[0],), 32, arguments, _shared(size, cut))
        return out

    return call, lambda: first_words(layout, x, cut.across)


def first_words(layout: BlockLayout, x: Tensor, across: int) -> Tensor:
    """Int64 (block rows, column tiles): sums of x's words at the start of each row of a tile."""
    size, columns = layout.size, x.shape[1] // across
    words = x.view(torch.int32)[:, :: across // 2].double().view(-1, size, columns).sum(1)
    kept = torch.zeros(layout.shape[0] // size, len(words), dtype=torch.float64, device=x.device)
    line = torch.repeat_interleave(layout.block_offsets.long().diff())
    kept[line, layout.block_columns.long()] = 1
    return wrapped((kept @ words).long())
