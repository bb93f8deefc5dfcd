"""Layers of blocks and rows on rows of tokens: plans, and which kernels they ask for."""

import pytest
import torch

from mixgrain.cuda import device
from mixgrain.cuda.device import pretending
from mixgrain.cuda.recording import Recording, recorded
from mixgrain.cuda.steps import Launch
from mixgrain.formats import patterns as P
from mixgrain.formats.block import BlockLayout
from mixgrain.formats.layout import Layout
from mixgrain.formats.nm import NMLayout
from mixgrain.formats.sparse import SparseTensor
from mixgrain.formats.sparsify import sparsify
from mixgrain.formats.tile import TileLayout
from mixgrain.primitives.cuda import block_few, block_sm90, launch_code, row_few, strew_sm90
from mixgrain.primitives.cuda.calls import describe
from mixgrain.primitives.dispatch import TABLE
from mixgrain.primitives.plans import cuda_block, cuda_row, nm

HALF = torch.float16


def weight(rows: int, columns: int, size: int, d: float) -> BlockLayout:
    g = torch.Generator().manual_seed(0)
    kept = torch.rand(-(-rows // size), -(-columns // size), generator=g) < d
    return P.blocks(kept, size).to_layout("block", rows, columns, size=size)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", block_few.SIZES)
def test_pieces_are_all_blocks(size, transposed):
    """Every element once, in the order of inner positions."""
    layout = weight(4 * size, 6 * size, size, 0.5)
    part = cuda_block.part(layout)
    items, row_ptr, _, t_items, col_ptr = part.tensors[:5]
    ends, order = (col_ptr, t_items) if transposed else (row_ptr, None)
    bounds, cells = cuda_block.pieces(items, ends, order, size)
    deep = min(size, 32)
    values = torch.arange(1.0, layout.slots + 1)
    dense = SparseTensor(layout, values).to_dense()
    dense = dense.T if transposed else dense
    found = torch.zeros_like(dense)
    for line in range(len(bounds) - 1):
        mine = cells[bounds[line] : bounds[line + 1]]
        assert (mine[1:, 0] > mine[:-1, 0]).all()
        for inner, first in mine.tolist():
            at = torch.arange(deep)[None] * (size if transposed else 1)
            at = first * 16 + at + torch.arange(size)[:, None] * (1 if transposed else size)
            to = found[line * size : (line + 1) * size, inner * deep : (inner + 1) * deep]
            assert not to.any()
            to.copy_(values[at])
    assert torch.equal(found, dense)


def tiles(rows: int, columns: int, d: float) -> TileLayout:
    g = torch.Generator().manual_seed(0)
    kept = torch.rand(rows // 16, columns // 16, generator=g) < d
    return TileLayout.from_tile_mask(kept, (rows, columns))


def entries(rows: int, columns: int, d: float) -> SparseTensor:
    g = torch.Generator().manual_seed(0)
    kept = torch.rand(rows, columns, generator=g) < d
    kept[::5], kept[rows // 2] = False, True
    return sparsify(kept.double(), "row")


@pytest.mark.parametrize("ctas", [1, 3, 16])
def test_rows_are_dealt(ctas):
    """Each to one warp, the longest first and to different CTAs, with its own entries."""
    w = entries(300, 1500, 0.3)
    part = cuda_row.part(w.layout)
    dealt = cuda_row.dealt_rows(part.tensors[1], 300, ctas, 8)
    assert dealt.shape == (-(-300 // (8 * ctas)), ctas, 8, 4)
    in_turn = dealt.transpose(1, 2).reshape(-1, 4)
    assert (in_turn[300:, 0] == -1).all() and (in_turn[300:, 1:] == 0).all()
    records = in_turn[:300].tolist()
    assert sorted(row for row, *_ in records) == list(range(300))
    lengths = [length for *_, length in records]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] == 1500
    columns, dense = part.tensors[0], w.to_dense()
    for row, eight, rest, length in records:
        start = 8 * eight + rest
        assert 0 <= rest < 8
        assert torch.equal(columns[start : start + length], dense[row].nonzero()[:, 0].int())


def test_places_exchange_eight():
    for count in (1, 8, 1003):
        columns = torch.arange(65_528, dtype=torch.int32)[-count:]
        places = cuda_row.places(columns)
        assert places.dtype == torch.int16 and len(places) % 8 == 0
        found = places[:count].int() & 0xFFFF
        assert torch.equal(found // 8, columns // 8)
        assert torch.equal(found ^ (found // 8 % 8), columns)


def asked(*given, **named) -> list[str]:
    """Names of the kernels of ``launched``."""
    return [step.kernel.wanted.name for step in launched(*given, **named)]


def launched(
    layout: Layout,
    tokens: int,
    arch: str,
    name: str = "tokens",
    of: int = 1,
    dtype: torch.dtype = HALF,
) -> list[Launch]:
    """The kernels of one layer, or of one gradient, on an H200."""
    rows, columns = layout.shape
    values, x, y = (
        torch.empty(*n, dtype=dtype, device="meta")
        for n in ((layout.slots,), (tokens, columns), (tokens, rows))
    )
    with pretending(arch, multiprocessors=132):
        blank = isinstance(layout, NMLayout) and not layout.metadata.numel()
        plan = nm.plan_of(layout) if blank else TABLE["linear"][type(layout)]["cuda"](layout)
        recording = Recording(0)
        given = (values, x, None, *plan, None, False, None)
        if name == "token_gradients":
            given = (values, x, y, *plan, None, False, tuple(n == of for n in range(3)), dtype)
        if name == "linear":  # the operator, which torch.compile traces
            given = (values[None], x[None], None, *plan, False)
        with recorded(recording):
            launch_code(name)(*describe(recording, given))
    return [step for step in recording.steps if isinstance(step, Launch)]


TURNED = ["turn", "spmm_block", "spmm_finish"]


@pytest.mark.parametrize("name", ["tokens", "token_gradients"])
@pytest.mark.parametrize(
    ("shape", "size", "d", "tokens", "hopper", "other"),
    [
        ((4096, 4096), 64, 0.2, 1, ["spmm_block_few"], ["spmm_block_few"]),
        ((4096, 4096), 64, 0.2, 64, ["spmm_block_few"], ["spmm_block_few"]),
        ((4096, 4096), 64, 0.2, 256, ["spmm_block_sm90"], TURNED),
        ((4096, 4096), 64, 0.2, 4096, ["spmm_pair_sm90"], TURNED),
        ((4096, 4096), 64, 0.05, 4096, ["spmm_block_sm90"], TURNED),
        ((8192, 8192), 64, 0.2, 16, ["spmm_block_few"], ["spmm_block_few"]),
        ((8192, 8192), 64, 0.2, 128, ["spmm_block_sm90"], ["spmm_block_few"]),
        ((4096, 4096), 128, 0.2, 16, ["spmm_block_few"], ["spmm_block_few"]),
        ((4096, 4096), 128, 0.2, 512, ["spmm_block_sm90"], TURNED),
        ((4096, 4096), 32, 0.2, 128, ["spmm_block_few"], ["spmm_block_few"]),
        ((4096, 4096), 32, 0.2, 1024, ["spmm_union_sm90"], TURNED),
        ((2048, 2048), 16, 0.2, 16, ["spmm_block_few"], ["spmm_block_few"]),
        ((2048, 2048), 16, 0.2, 1024, ["turn", "spmm_union_sm90", "spmm_finish"], TURNED),
        # A grid counts tiles of columns in 16 bits.
        ((128, 128), 64, 1.0, 600_000, ["spmm_block_sm90"], TURNED),
        ((32, 32), 16, 1.0, 600_000, ["turn", "spmm_union_sm90", "spmm_finish"], TURNED),
        # Blocks that hang over the edge have dead elements.
        ((1000, 1000), 64, 0.5, 16, ["spmm_block_sm90"], TURNED),
        # Rows that 16-byte copies cannot read or write.
        ((1001, 1001), 64, 0.5, 16, ["turn", "spmm_block_sm90", "spmm_finish"], TURNED),
    ],
)
def test_the_kernels_of_a_layer(shape, size, d, tokens, hopper, other, name):
    layout = weight(*shape, size, d)
    for arch, expected in (("90a", hopper), ("80", other)):
        found = asked(layout, tokens, arch, name)
        if name == "token_gradients":  # torch writes rows of tokens
            expected = expected[:-1] if expected[-1] == "spmm_finish" else expected
        assert found == expected, arch


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("columns", [1024, 20_000, 1020])
def test_few_tokens_of_rows(columns, arch, monkeypatch):
    """Up to 16 that shared memory holds in two turns; rows that 16-byte loads read."""
    layout = entries(64, columns, 0.1).layout
    monkeypatch.setattr(strew_sm90, "faster", lambda *_: False)
    for tokens in (1, 2, 4, 8, 9, 16, 17):
        found = asked(layout, tokens, arch)
        with pretending(arch):
            room = device.facts(0).shared_bytes - 2048
        fits = [n for n in row_few.TOKENS if row_few.shared(columns, n) <= room]
        if columns % 8 == 0 and tokens <= 16 and 2 * fits[-1] >= tokens:
            assert found == ["spmm_row_few"]
        else:
            assert "spmm_row_few" not in found


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("tokens", [1, 16, 64, 4096])
def test_the_operator_takes_the_kernels_of_a_layer(tokens, arch):
    """But for turns in, which are torch's copies."""
    blocks = [weight(1024, 1024, size, 0.3) for size in block_few.SIZES]
    for layout in (*blocks, weight(1000, 1000, 64, 0.5), entries(64, 1024, 0.1).layout):
        found = asked(layout, tokens, arch, "linear")
        expected = asked(layout, tokens, arch)
        assert found == [name for name in expected if name != "turn"]


def test_cuts_are_known():
    """What is chosen is in the list that is compiled ahead."""
    for size in block_few.SIZES:
        known = block_few.cuts(size)
        found = {
            block_few.cut(132, size, lines, width)
            for lines in (1, 40, 128, 1000)
            for width in (1, 8, 9, 16, 17, 64, 65, 500)
        }
        assert found == set(known)


@pytest.mark.parametrize("size", [64, 128])
def test_large_tiles_where_there_are_many(size):
    widths = [block_sm90.token_tile(132, size, 64, width).across for width in (8, 64, 256, 8192)]
    assert widths == sorted(widths) and widths[0] == 64 and widths[-1] == 256
    # The number of matrices counts: it changes nothing of the sums.
    assert block_sm90.token_tile(132, size, 64 * 1000, 256).across == 256
