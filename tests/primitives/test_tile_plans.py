"""What CUDA kernels derive from a TileLayout's plan; no GPU."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mixgrain.cuda.device import facts, pretending
from mixgrain.cuda.recording import Launch, Operand, Recording, recorded
from mixgrain.formats.tile import TileLayout
from mixgrain.primitives.cuda import launch_code, tile, tile_mma, tile_thin
from mixgrain.primitives.plans import cuda_tile

SHAPES = [(203, 331), (16, 16), (700, 5), (1040, 264), (0, 40), (40, 0)]


def layout_of(shape: tuple[int, int], d: float = 0.4) -> TileLayout:
    g = torch.Generator().manual_seed(0)
    kept = torch.rand(-(-shape[0] // 16), -(-shape[1] // 16), generator=g) < d
    kept[1::7] = False
    return TileLayout.from_tile_mask(kept, shape)


def sides(layout: TileLayout) -> list[tuple[Tensor, Tensor, int, set[tuple[int, int, int]]]]:
    """Both directions: bounds, cells, inner positions, and every (line, inner tile, number)."""
    part = cuda_tile.part(layout)
    rows, columns = layout.tile_rows().tolist(), layout.tile_columns.tolist()
    tiles = {(r, c, n) for n, (r, c) in enumerate(zip(rows, columns, strict=True))}
    turned = {(c, r, n) for r, c, n in tiles}
    a, b, c, d = part.tensors
    return [(a, b, layout.shape[1], tiles), (c, d, layout.shape[0], turned)]


@pytest.mark.parametrize("shape", SHAPES)
def test_cells_are_the_tiles_of_their_lines(shape):
    for bounds, cells, _, tiles in sides(layout_of(shape)):
        line = cuda_tile.lines_of(bounds)
        assert set(zip(line.tolist(), *cells.T.tolist(), strict=True)) == tiles


@pytest.mark.parametrize("per", [3, 16])
@pytest.mark.parametrize("grain", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_links_lead_to_what_the_union_holds(shape, grain, per):
    for bounds, cells, inner, tiles in sides(layout_of(shape)):
        links, unions, records = cuda_tile.groups(bounds, cells, per, grain, inner)
        first = {group: (start, count) for group, start, count in records.tolist()}
        assert len(first) == -(-(len(bounds) - 1) // per)
        assert sum(count for _, count in first.values()) == len(unions)
        found = set()
        lines = cuda_tile.lines_of(bounds).tolist()
        for line, (where, number) in zip(lines, links.tolist(), strict=True):
            start, count = first[line // per]
            stage, quarter = where // 8, where // 2 % 4
            place = stage if grain == 4 else 4 * stage + quarter
            assert place < count
            at = int(unions[start + place]) * grain + (quarter if grain == 4 else 0)
            assert where % 2 == (at * 16 + 16 > inner)
            found.add((line, at, number))
        assert found == tiles
        for start, count in first.values():  # rising, so that a walk along a line only goes on
            assert (unions[start : start + count].diff() > 0).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_few_bytes_say_where_tiles_are(shape, transposed):
    layout = layout_of(shape)
    bounds, cells, inner, tiles = sides(layout)[transposed]
    made, lines = cuda_tile.compact(bounds, cells, transposed), len(bounds) - 1
    assert made.dtype == np.uint8
    words, count = made[: 2 * (lines + 1)].view(np.uint16), len(cells)
    assert words.tolist() == bounds.tolist()
    rest = made[2 * (lines + 1) :]
    numbers = rest[: 2 * count].copy().view(np.uint16) if transposed else np.arange(count)
    places = rest[2 * count :] if transposed else rest
    line = cuda_tile.lines_of(bounds).tolist()
    assert set(zip(line, places.tolist(), numbers.tolist(), strict=True)) == tiles
    ahead = 5
    room, size = tile.room_for(lines, count + ahead, inner, transposed), made.size + ahead
    assert room >= size if room else size + 2 * ahead * transposed > max(tile.ROOMS)
    assert not tile.room_for(lines, count, 4097, transposed)  # a byte says which inner tile


@pytest.mark.parametrize("warps, ahead", [(4, 2), (4, 5), (8, 4)])
@pytest.mark.parametrize("d", [0.4, 2.0])
@pytest.mark.parametrize("shape", [*SHAPES, (32, 9000)])
def test_shares_of_a_line_are_all_of_it(shape, d, warps, ahead):
    for bounds, cells, _, _ in sides(layout_of(shape, d)):
        shares = cuda_tile.shares(bounds, cells, warps, ahead)
        assert shares.shape[1:] == (warps, 1 + ahead, 2)
        at = 0
        for line, of_line in enumerate(shares.tolist()):
            assert at == bounds[line]
            sizes = [count for (_, count), *_ in of_line]
            assert max(sizes) - min(sizes) <= 1
            for (first, count), *held in of_line:
                assert first == at
                here = held[:count]
                assert here == cells[first : first + len(here)].tolist()
                assert here == held or held[count:] == [[0, 0]] * (ahead - count)
                at += count
        assert at == len(cells)


@pytest.mark.parametrize("per, split", [(1, 1), (1, 2), (3, 2), (20, 4)])
@pytest.mark.parametrize("d", [0.02, 0.4, 2.0])
@pytest.mark.parametrize("shape", [*SHAPES, (32, 9000)])
def test_segments_of_a_line_are_all_of_it(shape, d, per, split):
    how, warps = tile_thin.Thin(1, split, per, 4), tile_thin.WARPS
    for bounds, cells, inner, tiles in sides(layout_of(shape, d)):
        work, made, span, most = cuda_tile.segments(bounds, cells, per, split, warps, inner)
        slab, lines = cuda_tile.slab_of(inner, split), bounds.numel() - 1
        assert len(work) == split * -(-lines // per) and not work.shape[1] % 4
        assert most <= how.most_places
        at, sums, finished = 0, {}, {}  # by CTA that finishes and place
        for cta, record in enumerate(work.tolist()):
            heads = [record[w * (2 + 2 * span) :][: 2 + 2 * span] for w in range(warps)]
            counts = [head[1] for head in heads]
            assert max(counts) - min(counts) <= 1  # evenly
            for warp, (first, count, *early) in enumerate(heads):
                some = made[first : first + min(count, 32)].flatten().tolist()
                assert first == at
                assert early[: len(some)] == some and not any(early[len(some) :])
                segment = []
                for word, number in made[first : first + count].tolist():
                    column = cta % split * slab + word // 32 % 2**13
                    assert word // 32 % 2**13 < slab and not word & 16
                    assert (word & 2 > 0) == (16 * column + 16 > inner)
                    segment.append((column, number))
                    if word & 1:
                        key = (cta - cta % split + (word >> 2 & 3), word >> 18)
                        assert key not in sums
                        sums[key] = ((cta % split, warp), segment)
                        segment = []
                    else:
                        assert not word & 12 and not word >> 18
                assert not segment  # a warp's last cell ends one
                at += count
            of_lines = record[warps * (2 + 2 * span) :][: 2 * (how.kept + 1)]
            before, which = of_lines[::2], of_lines[1::2]
            assert before[0] == 0 and which[-1] == lines and which == sorted(which)
            for line, first, end in zip(which, before, before[1:], strict=False):
                assert line not in finished or line == lines
                finished[line] = [(cta, place) for place in range(first, end)]
                assert line < lines or first == end
        assert at == len(tiles) and sorted(finished)[:lines] == list(range(lines))
        places = [place for some in finished.values() for place in some]
        assert len(places) == len(set(places)) and set(places) == set(sums)
        assert most == max((place + 1 for _, place in places), default=0)
        found = set()
        for line, some in finished.items():
            order = [sums[place][0] for place in some]
            assert order == sorted(set(order))  # by slabs, then by warps
            found |= {(line, *cell) for place in some for cell in sums[place][1]}
        assert found == tiles


def test_places_are_what_even_lines_take():
    """Of a line longer than all others a CTA may have more, and never more than it is sure of."""
    rng = np.random.default_rng(0)
    for per, split in [(8, 2), (4, 1), (37, 4), (5, 4)]:
        how = tile_thin.Thin(2, split, per, 4)
        for long in (1.0, 0.02):  # the share of the other lines' tiles
            lengths = rng.binomial(512, 0.2 * long, 120)
            lengths[60] = 300
            bounds = torch.tensor([0, *lengths.cumsum()], dtype=torch.int32)
            columns = [np.sort(rng.choice(512, n, replace=False)) for n in lengths]
            column = torch.from_numpy(np.concatenate(columns)).int()
            cells = torch.stack([column, torch.arange(len(column), dtype=torch.int32)], 1)
            places = cuda_tile.segments(bounds, cells, per, split, tile_thin.WARPS, 8192)[3]
            assert places <= how.most_places
            if long == 1.0:
                assert places <= how.usual_places
        assert split == 1 or how.usual_places < how.most_places


@pytest.mark.parametrize("slabs", [1, 2, 4])
def test_lines_are_dealt_evenly(slabs):
    loads = np.random.default_rng(slabs).binomial(512 // slabs, 0.2, (510, slabs))
    groups = cuda_tile.deal(loads, 5 * slabs)
    padded = np.concatenate([loads, np.zeros((1, slabs), int)])
    most = padded[groups].sum(1).max()
    assert most <= 1.05 * loads.sum() / len(groups) / slabs
    assert most < np.add.reduceat(loads, np.arange(0, 510, 5 * slabs)).max()


@pytest.mark.parametrize("width", [1, 8, 16, 40, 128, 256])
@pytest.mark.parametrize("shape", [*SHAPES, (8192, 8192), (64, 200_000), (200_000, 64)])
def test_few_columns_fit_shared_memory(shape, width):
    lines, tiles = -(-shape[0] // 16), -(-shape[0] // 16) * -(-shape[1] // 16) // 5
    with pretending("90a", multiprocessors=132):
        found = tile_thin.cut(facts(0), lines, tiles, shape[1], width)
        certain = tile_thin.cut(facts(0), lines, tiles, shape[1], width, sure=True)
        room = tile_thin.room_of(facts(0))
    if found is None:
        assert shape[1] == 200_000
    else:
        us, how = found
        assert us >= 512 * tiles / 4.8e6
        assert how.shared(shape[1], width, how.usual_places) <= room <= 232_448 - 2048
        assert 8 * how.blocks * -(-width // (8 * how.blocks)) >= width
        us, how = certain
        assert us >= found[0]
        assert how.shared(shape[1], width, how.most_places) <= room


@pytest.mark.parametrize("side, most", [(16, 96), (4, 16), (16, 5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_regions_hold_every_tile_once(shape, side, most):
    layout = layout_of(shape)
    bounds, cells, inner, tiles = sides(layout)[0]
    across = -(-inner // 16)
    chunks, listed = cuda_tile.regions(bounds, cells, side, most, across)
    wide = max(-(-across // side), 1)
    found = []
    for first, count, region, used in chunks.tolist():
        assert 0 < count <= most
        rows = columns = 0
        for place, number in listed[first : first + count].tolist():
            row, column = place // 256, place % 256
            assert row < side and column < side
            rows, columns = rows | 1 << row, columns | 1 << column
            found.append((region // wide * side + row, region % wide * side + column, number))
        assert used & 0xFFFFFFFF == rows | columns << 16
    assert len(found) == len(tiles) and set(found) == tiles


@pytest.mark.parametrize("shape", SHAPES)
def test_as_blocks_masks_what_hangs_over(shape):
    layout = layout_of(shape, 2.0)
    part = cuda_tile.part(layout)
    blocks = cuda_tile.as_blocks(*part.tensors, layout.shape)
    items, masks = blocks.tensors[0], blocks.tensors[6]
    for entry, row, column, mask in items.tolist():
        i, j = torch.arange(16)[:, None] + 16 * row, torch.arange(16) + 16 * column
        inside = (i < shape[0]) & (j < shape[1])
        assert entry == 0 and (mask < 0) == bool(inside.all())
        if mask >= 0:
            bits = masks[mask][:, :, None].int() >> torch.arange(8) & 1
            assert torch.equal(bits.flatten(1).bool(), inside)


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("tokens", [1, 16, 64, 300])
@pytest.mark.parametrize("shape", [(208, 336), (5120, 336)])
def test_a_layer_with_a_bias_is_one_kernel(shape, tokens, arch):
    """Rows of tokens in, rows of tokens out: nothing is copied, turned or added by torch."""
    layout = layout_of(shape)
    with pretending(arch):
        plan = cuda_tile.cuda(layout)
        for name in ("affine", "spmm"):
            recording = Recording(0)

            def given(*n: int, into: Recording = recording) -> Operand:
                return into.given(torch.empty(*n, dtype=torch.half, device="meta"), 0)

            values, x, bias = (
                given(1, layout.slots),
                given(1, 1, tokens, shape[1]).mT,
                given(shape[0]),
            )
            with recorded(recording):
                if name == "affine":
                    out = launch_code(name)(values, x, bias, None, False, *plan, torch.half)
                else:
                    out = launch_code(name)(values, x, None, False, *plan, 1.0, torch.half)
            assert [type(step) for step in recording.steps] == [Launch]
            assert out.shape == (1, 1, shape[0], tokens) and out.mT.is_contiguous()


def launch_of(arch: str, layout: TileLayout, columns: int, across: bool, free: int) -> Launch:
    """The one launch of a product with so many columns, in rows of tokens or across."""
    inner = layout.shape[1]
    with pretending(arch, multiprocessors=132):
        recording, plan = Recording(0), cuda_tile.cuda(layout)
        shape = (free, 1, inner, columns) if across else (free, 1, columns, inner)
        values, x = (
            recording.given(torch.empty(*n, dtype=torch.half, device="meta"), 0)
            for n in ((free, layout.slots), shape)
        )
        with recorded(recording):
            x = x if across else x.mT
            launch_code("spmm")(values, x, None, False, *plan, 1.0, torch.half)
    (step,) = recording.steps
    assert isinstance(step, Launch)
    return step


def kernel_of(arch: str, layout: TileLayout, columns: int, across: bool, free: int) -> str:
    """Its name."""
    return launch_of(arch, layout, columns, across, free).kernel.wanted.name


def test_segments_without_room_are_cut_otherwise():
    """A few lines longer than all others end in more segments than there is room for."""
    kept = torch.zeros(256, 512, dtype=torch.bool)
    kept[::16], kept[:, ::20] = True, True
    layout = TileLayout.from_tile_mask(kept, (4096, 8192))
    bounds, cells = cuda_tile.part(layout).tensors[:2]
    size = (256, len(cells), 8192, 64)
    with pretending("90a", multiprocessors=132):
        usual, sure = (tile_thin.cut(facts(0), *size, sure=s)[1] for s in (False, True))
        room = tile_thin.room_of(facts(0))
        places = cuda_tile.segments(bounds, cells, usual.per, usual.split, tile_thin.WARPS, 8192)[3]
        assert usual.shared(8192, 64, usual.usual_places) <= room
        assert usual.shared(8192, 64, places) > room
    step = launch_of("90a", layout, 64, False, 1)
    assert step.kernel.wanted == tile_thin.thin_request(sure, torch.half, torch.half, False)
    assert step.shared <= room


FEW, THIN, MMA, WGMMA = "spmm_tile_few", "spmm_tile_thin_sm90", "spmm_tile", "spmm_tile_sm90"


@pytest.mark.parametrize("free", [1, 5])
@pytest.mark.parametrize(
    "shape, d, columns, across, name, elsewhere",
    [  # what was measured to be faster on an H200; elsewhere, where TMA is not, by the same rule
        ((768, 768), 0.2, 128, False, FEW, FEW),
        ((2048, 2048), 0.2, 1, False, FEW, FEW),
        ((8192, 2048), 0.2, 64, False, THIN, FEW),
        ((8192, 2048), 0.2, 256, False, WGMMA, MMA),
        ((2048, 2048), 0.2, 1024, False, WGMMA, MMA),
        ((768, 3072), 0.2, 256, False, THIN, FEW),
        ((768, 3072), 0.2, 1024, False, THIN, FEW),
        ((768, 3072), 0.2, 1600, False, WGMMA, FEW),
        ((4096, 4096), 0.2, 32, False, THIN, FEW),
        ((4096, 4096), 0.2, 256, False, WGMMA, FEW),
        ((4096, 4096), 0.1, 256, False, THIN, FEW),
        ((4096, 4096), 0.1, 512, False, WGMMA, MMA),
        ((4096, 4096), 0.03, 1024, False, MMA, MMA),
        ((4096, 4096), 0.2, 32, True, FEW, FEW),
        ((4096, 4096), 0.2, 256, True, WGMMA, MMA),
        ((4096, 4096), 0.03, 512, True, MMA, MMA),
        ((8192, 8192), 0.2, 64, False, THIN, FEW),
        ((8192, 8192), 0.2, 128, False, WGMMA, FEW),
        # Rows of x that bulk copies cannot read, of the result that 16-byte stores cannot write.
        ((4096, 4094), 0.2, 32, False, FEW, FEW),
        ((4100, 4096), 0.2, 1024, False, MMA, MMA),
        # A grid counts tiles of columns in 16 bits.
        ((32, 32), 2.0, 600_000, False, WGMMA, MMA),
        ((32, 32), 2.0, 600_000, True, WGMMA, MMA),
    ],
)
def test_the_kernel_is_the_fastest_whatever_the_number_of_matrices(
    shape, d, columns, across, name, elsewhere, free
):
    layout = layout_of(shape, d * 7 / 6)  # of every seven lines one is empty
    assert kernel_of("90a", layout, columns, across, free) == name
    assert kernel_of("80", layout, columns, across, free) == elsewhere


@pytest.mark.parametrize("dtype", [torch.half, torch.float32])
def test_columns_with_a_bias_are_turned_first(dtype):
    layout = layout_of((208, 336))
    with pretending("90a"):
        recording, plan = Recording(0), cuda_tile.cuda(layout)
        values, x, bias = (
            recording.given(torch.empty(*n, dtype=dtype, device="meta"), 0)
            for n in ((1, layout.slots), (1, 1, 336, 24), (208,))
        )
        with recorded(recording):
            out = launch_code("affine")(values, x, bias, None, False, *plan, dtype)
    assert out.shape == (1, 1, 208, 24) and out.is_contiguous()


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("bulk, room", [(True, 228 * 1024), (False, 100 * 1024)])
def test_as_many_ctas_fit_a_multiprocessor_as_are_counted_on(bulk, room, tokens):
    for how in tile_mma.cuts(bulk, tokens):
        # Barriers besides, and what the driver keeps for each.
        assert how.each * (how.shared + 16 * how.stages + 1024) <= room
        assert how.threads * how.each <= 1024


@pytest.mark.parametrize("width", [8, 300])
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_a_layout_and_its_transpose_share_no_tables(arch, width, monkeypatch):
    """Numbers of tiles differ between them, whoever is planned first."""
    monkeypatch.setattr(tile, "ROOMS", ())
    layout = layout_of((320, 480))

    def pointers(of: TileLayout, name: str) -> set[int]:
        recording = Recording(0)
        values = torch.empty(1, of.slots, dtype=torch.half, device="meta")
        x = torch.empty(1, 1, width, 320, dtype=torch.half, device="meta")
        given = [recording.given(t, 0) for t in (values, x)]
        with recorded(recording):
            launch_code(name)(
                given[0], given[1].mT, None, False, *cuda_tile.cuda(of), 1.0, torch.half
            )
        launches = [step for step in recording.steps if isinstance(step, Launch)]
        return {a for a in launches[-1].arguments if type(a) is int and a}

    with pretending(arch):
        ours, theirs = pointers(layout.T, "spmm"), pointers(layout, "spmm_t")
    assert ours and theirs
    # The bounds are the same numbers; what links tiles to their values is not.
    assert not (ours & theirs) - {layout.t_offsets.data_ptr()}
