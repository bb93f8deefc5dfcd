"""Gradients of layers from rows of tokens: blocks in strips, 2:4, and who takes them."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layer_plans import asked, tiles, weight

from mixgrain.formats import patterns as P
from mixgrain.formats.sparse import SparseTensor
from mixgrain.formats.sparsify import sparsify
from mixgrain.primitives.blank import nm_layout
from mixgrain.primitives.cuda import block_weights_sm90, dense_tile_sm90, nm_expand_sm90
from mixgrain.primitives.plans import cuda_block, cuda_strips

SIZES = (16, 32, 64, 128)


def unpacked(made: cuda_strips.Strips, size: int):
    """Of each CTA: first row, half, and of each panel its column and its places (lines, 2)."""
    most, lines = cuda_strips.most_of(size), max(64 // size, 1)
    assert made.table.shape[1] == 4 + most + 2 * most * lines and made.table.shape[1] % 4 == 0
    for row in made.table:
        first, count, half, rest = row[:4].tolist()
        columns, places = row[4 : 4 + most], row[4 + most :].view(most, lines, 2)
        assert rest == 0 and 1 <= count <= most
        assert not columns[count:].any() and (places[count:] == -1).all()
        yield first, half, columns[:count].tolist(), places[:count]


@pytest.mark.parametrize("size", SIZES)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    d=st.sampled_from([0.05, 0.4, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_every_block_once(size, rows, columns, d, seed):
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=g) < d
    layout = P.blocks(kept, size).to_layout("block", rows * size, columns * size, size=size)
    made = cuda_strips.strips(cuda_block.part(layout).tensors[0], size)
    dense = SparseTensor(layout, torch.arange(1.0, layout.slots + 1)).to_dense()
    found, wide, counts = torch.zeros_like(dense), min(size, 64), []
    for first, half, across, places in unpacked(made, size):
        counts.append(len(across))
        assert first % 64 == 0 and half == first % max(size, 64) // 64
        assert across == sorted(across)
        for column, lines in zip(across, places.tolist(), strict=True):
            assert any(slot >= 0 for slot, _ in lines)
            for line, (slot, mask) in enumerate(lines):
                assert mask == -1
                if slot < 0:
                    continue
                at = slot * 64 + torch.arange(wide)[:, None] * size + torch.arange(wide)
                top = first + line * wide
                to = found[top : top + wide, column : column + wide]
                assert not to.any()
                to.copy_(at + 1)
    assert torch.equal(found, dense)
    assert counts == sorted(counts, reverse=True) and made.panels == sum(counts)


def test_cuts_fit():
    """Shared memory of a multiprocessor."""
    assert block_weights_sm90.MEMORY + 1024 <= 228 * 1024 - 1024
    for wide in nm_expand_sm90.STAGES:
        assert nm_expand_sm90.memory(wide) + 1024 <= 228 * 1024 - 1024
    for wide, staged in itertools.product(dense_tile_sm90.STAGES, (False, True)):
        assert dense_tile_sm90.memory(wide, staged) + 1024 <= 228 * 1024 - 1024


@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "chip"),
    [
        # As measured on an H200, microseconds on chip and in memory.
        (4096, 4096, 512, True),  # 34 and 35
        (4096, 4096, 1536, False),  # 103 and 87: in two rounds, the second of half a device
        (4096, 4096, 3072, False),  # 170 and 152
        (2048, 2048, 256, False),  # 16 and 12
        (8192, 8192, 512, True),  # 115 and 149
        (8192, 8192, 2048, False),  # 462 and 416
        (4096, 11008, 256, True),  # 54 and 73
        (11008, 4096, 2048, False),  # 302 and 260
    ],
)
def test_where_24_is_expanded(rows, columns, tokens, chip):
    assert nm_expand_sm90.on_chip(132, rows, columns, tokens) == chip


@pytest.mark.parametrize(
    ("make", "tokens", "hopper", "other"),
    [
        (lambda: weight(1024, 1024, 64, 0.5), 4096, "sddmm_tokens_sm90", "sddmm_block"),
        (lambda: weight(1024, 1024, 128, 0.5), 257, "sddmm_tokens_sm90", "sddmm_block"),
        (lambda: weight(1024, 1024, 64, 0.5), 1, "sddmm_tokens_sm90", "sddmm_block"),
        (lambda: weight(1024, 1024, 32, 0.5), 4096, "sddmm_tokens_sm90", "sddmm_block"),
        # Out of dense tiles when they are many: as measured.
        (lambda: weight(1024, 1024, 16, 0.2), 256, "sddmm_pick_tile_sm90", "sddmm_block"),
        (lambda: weight(4096, 4096, 16, 0.2), 1024, "sddmm_pick_tile_sm90", "sddmm_block"),
        (lambda: weight(4096, 4096, 16, 0.05), 1024, "sddmm_tokens_sm90", "sddmm_block"),
        (lambda: tiles(4096, 4096, 0.2), 16, "sddmm_tile", "sddmm_tile"),
        (lambda: tiles(4096, 4096, 0.03), 64, "sddmm_tile", "sddmm_tile"),
        (lambda: tiles(4096, 4096, 0.2), 1024, "sddmm_pick_tile_sm90", "sddmm_tile"),
        (lambda: tiles(768, 3072, 0.2), 64, "sddmm_pick_tile_sm90", "sddmm_tile"),
        (lambda: tiles(1024, 1024, 0.1), 256, "sddmm_pick_tile_sm90", "sddmm_tile"),
        # Rows that TMA cannot read; nothing kept.
        (lambda: weight(1028, 1024, 32, 0.5), 4096, "sddmm_block", "sddmm_block"),
        (lambda: weight(1024, 1024, 32, 0.0), 1024, "turn", "turn"),
    ],
)
def test_who_takes_the_gradient_of_values(make, tokens, hopper, other):
    layout = make()
    for arch, name in (("90a", hopper), ("80", other)):
        turned = {"sddmm_block": ["turn"] * 2, "turn": ["turn"]}
        found = asked(layout, tokens, arch, "token_gradients", of=0)
        assert found == [*turned.get(name, []), name]


@pytest.mark.parametrize("n", [2, 1])
@pytest.mark.parametrize(
    ("of", "tokens", "hopper", "other"),
    [
        (0, 2, "sddmm_pick_nm_sm90", "sddmm_nm"),
        (0, 64, "sddmm_pick_nm_sm90", "sddmm_nm"),
        (0, 300, "sddmm_pick_nm_sm90", "nm_sample"),
        (1, 1, "spmm_nm_expand_sm90", "spmm_nm_any"),
        (1, 255, "spmm_nm_expand_sm90", "spmm_nm_any"),
        (1, 300, "nm_spread", "nm_spread"),
    ],
)
def test_who_takes_the_gradients_of_24(n, of, tokens, hopper, other):
    g = torch.Generator().manual_seed(0)
    dense = torch.randn(256, 512, generator=g).half()
    layout = sparsify(dense, "nm", prune=True, n=n, m=2 * n).layout
    for arch, name in (("90a", hopper), ("80", other)):
        assert asked(layout, tokens, arch, "token_gradients", of=of) == [name]


@pytest.mark.parametrize("encoding", ["2:4", "1:2-half"])
@pytest.mark.parametrize(
    ("shape", "tokens", "hopper", "other"),
    [
        # The largest that may stand whole in memory; larger ones never do.
        ((16384, 16384), 2048, "nm_spread", "nm_spread"),
        ((16384, 16392), 2048, "spmm_nm_expand_sm90", "spmm_nm_any"),
        ((16384, 65536), 255, "spmm_nm_expand_sm90", "spmm_nm_any"),
        ((16384, 65536), 512, "spmm_nm_expand_sm90", "spmm_nm_any"),
        ((16384, 65536), 8192, "spmm_nm_expand_sm90", "spmm_nm_any"),
        # Rows that 16-byte stores cannot write.
        ((16384, 65532), 8192, "spmm_nm_any", "spmm_nm_any"),
    ],
)
def test_24_too_large_for_memory_is_expanded_on_chip(shape, tokens, hopper, other, encoding):
    n = 2 if encoding == "2:4" else 1
    layout = nm_layout(shape, n, 2 * n, encoding, (1, 1), None)
    for arch, name in (("90a", hopper), ("80", other)):
        assert asked(layout, tokens, arch, "token_gradients") == [name]


@pytest.mark.parametrize("arch", ["90a", "80"])
@pytest.mark.parametrize("n", [2, 1])
def test_who_takes_the_gradients_of_24_in_float32(n, arch):
    """Kernels of halves take none, whatever their metadata look like."""
    dense = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    layout = sparsify(dense, "nm", prune=True, n=n, m=2 * n).layout
    for of, name in ((1, "nm_expand"), (0, "nm_sample")):
        given = asked(layout, 300, arch, "token_gradients", of=of, dtype=torch.float32)
        assert given == [name]
