"""The kernel that moves what a product of blocks moves: its source, its launch, what it writes."""

from pathlib import Path

import numpy as np
import pytest
import torch

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.cuda.compile import Built, source
from mixgrain.cuda.device import pretending
from mixgrain.primitives.cuda import block_sm90
from mixgrain.primitives.cuda.block_sm90 import tile, walks
from mixgrain.primitives.plans import cuda_block
from mixgrain.tools.bench import alone
from mixgrain.tools.bench.alone import CONSUMERS, compiled, moves, moves_source, tile_words

SIZES = [64, 128]
OUT = 12  # which argument the output is


def layout_of(size: int, n: int):
    """A fifth of the blocks, and a line without any."""
    side = -(-n // size)
    kept = torch.rand(side, side, generator=torch.Generator().manual_seed(0)) < 0.2
    kept[3] = False
    return P.blocks(kept, size).to_layout("block", n, n, size=size)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).half()


@pytest.mark.compile
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("width", [64, 128, 4096])
def test_it_compiles(size, width) -> None:
    cut = tile(size, width)
    image, log = compiled(size, torch.float16, cut)
    built = Built(Path(), log)
    assert b"moves_alone" in image and built.faults() == []
    # What setmaxnreg hands out is taken from as many registers as the product starts with.
    fair = 65536 // cut.threads(size) // 8 * 8
    assert "0 bytes spill stores, 0 bytes spill loads" in log and 0 < built.registers <= fair


def test_it_is_the_product_up_to_what_consumers_do() -> None:
    mine, product = moves_source(), source("spmm_block_sm90")
    head = mine.removesuffix(CONSUMERS).replace("moves_alone(", "spmm_block_sm90(")
    assert mine.endswith(CONSUMERS) and product.startswith(head)
    # Of S, of x in rows of features or of tokens.
    assert head.count("tma_load(ring_") == 3 and head.count("walk.next(tile)") == 2
    assert "tma_load(ring_" not in product[len(head) :]
    assert "Wgmma" not in CONSUMERS


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("width", [64, 1024])
def test_it_is_launched_as_the_product(monkeypatch, size, width) -> None:
    launches: list[tuple] = []
    layout, x = layout_of(size, 1024), random(1024, width)
    weight = mg.sparsify(random(1024, 1024), layout=layout)
    with pretending("90a"):
        part = cuda_block.part(layout)
        monkeypatch.setattr(cuda_block, "part", lambda *_: part)
        monkeypatch.setattr(block_sm90, "descriptor", lambda *given: given)
        monkeypatch.setattr(block_sm90, "kernel", lambda *_: lambda *how: launches.append(how))
        monkeypatch.setattr(alone, "_moves", lambda *given: given)
        monkeypatch.setattr(alone, "launched", lambda _, *how: launches.append(how))
        out = moves(weight, x)[0]()
        shaped = torch.empty(1, 1, 1024, width, dtype=x.dtype)
        tables, masks = part.tensors[10:12], part.tensors[6:8]
        given = (part.tensors[0].shape[0], *tables, *masks)
        values = weight.values[None]
        block_sm90.spmm(shaped, values, x[None, None], 0, size, *given, False, 1.0)
    (grid, threads, mine, shared), product = launches
    assert (grid, threads, shared) == (product[0], product[1], product[3])
    assert mine[OUT] == out.data_ptr() and product[2][OUT] == shaped.data_ptr()
    assert out.nbytes == shaped.nbytes
    for at, (a, b) in enumerate(zip(mine, product[2], strict=True)):
        assert at == OUT or (type(a) is type(b) and a == b)
        assert isinstance(a, (int, tuple, np.int32, np.float32))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("n", [1024, 1000])
def test_what_it_writes(size, n) -> None:
    across = tile(size, n).across
    columns, layout, x = -(-n // across), layout_of(size, n), random(n, n)
    with pretending("90a"):
        table, records = cuda_block.part(layout).tensors[10:12]
    words = torch.zeros(-(-n // size) * size, columns, dtype=torch.int64)
    words[:n] = x.view(torch.int32)[:, :: across // 2]  # the copies bring zeros beyond the edge
    first = words.view(-1, size, columns).sum(1)
    found, items = torch.full((n, n // 2), 1 << 40), []
    for line, begin, count, at in walks(records, columns, 1, 7).flatten(0, 1).tolist():
        if count < 0:
            continue
        total = 0
        for item, inner, *_ in table[begin : begin + count].tolist():
            total += int(first[inner, at % columns])
            items.append(item)
        left = at % columns * across // 2
        part = found[line * size : (line + 1) * size, left : left + across // 2]
        assert (part == 1 << 40).all()  # nobody else's
        part[:] = (total + (1 << 31)) % (1 << 32) - (1 << 31)
    expected = tile_words(layout, x, across)
    assert expected.dtype == torch.int32 and torch.equal(found, expected.long())
    assert not expected[3 * size : 4 * size].any()  # a line without blocks is written too
    assert sorted(items) == sorted([*range(len(table))] * columns)
