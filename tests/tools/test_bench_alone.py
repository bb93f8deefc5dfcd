"""The kernel that reads what a product of blocks reads: it compiles, and its order is read here."""

import pytest
import torch

from mixgrain import patterns as P
from mixgrain.cuda import nvrtc
from mixgrain.cuda.device import pretending
from mixgrain.primitives.cuda.block_sm90 import tile, walks
from mixgrain.primitives.plans import cuda_block
from mixgrain.tools.bench.alone import READS, first_words, options

SIZES = [64, 128]


@pytest.mark.compile
@pytest.mark.parametrize("size", SIZES)
def test_it_compiles(size) -> None:
    flags = ["-arch=sm_90", "--ptxas-options=-v", *options(size, tile(size, 4096))]
    image, log = nvrtc.compile_source(READS, "reads_alone.cu", flags)
    assert image and "0 bytes spill stores, 0 bytes spill loads" in log
    assert tile(size, 4096).depth == 32  # as the kernel has it


@pytest.mark.parametrize("size", SIZES)
def test_what_it_adds_up(size) -> None:
    n, across = 1024, tile(size, 1024).across
    columns = n // across
    kept = torch.rand(n // size, n // size, generator=torch.Generator().manual_seed(0)) < 0.2
    kept[3] = False
    layout = P.blocks(kept, size).to_layout("block", n, n, size=size)
    with pretending("90a"):
        table, records = cuda_block.part(layout).tensors[10:12]
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(1)).half()
    first = x.view(torch.int32)[:, :: across // 2].long().view(-1, size, columns).sum(1)
    found, items = torch.zeros(n // size, columns, dtype=torch.int64), []
    for line, begin, count, at in walks(records, columns, 1, 7).flatten(0, 1).tolist():
        for item, inner, *_ in table[begin : begin + max(count, 0)].tolist():
            found[line, at % columns] += first[inner, at % columns]
            items.append(item)
    found = (found + (1 << 31)) % (1 << 32) - (1 << 31)
    assert torch.equal(found, first_words(layout, x, across))
    assert sorted(items) == sorted([*range(int(kept.sum()))] * columns)
