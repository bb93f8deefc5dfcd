"""The wgmma kernels compile for sm_90a without spills and without serialised products."""

import itertools

import pytest
import torch

from mixgrain.cuda import nvrtc
from mixgrain.cuda.compile import build
from mixgrain.cuda.errors import MissingError
from mixgrain.primitives.cuda import (
    block_sm90,
    expand_sm90,
    nm_scores_sm90,
    nm_sm90,
    pair_sm90,
    tile_sm90,
    tile_thin,
    union_sm90,
)

try:
    nvrtc.library()
    nvrtc.header_folder()
except MissingError as missing:
    pytest.skip(str(missing), allow_module_level=True)

HALVES = (torch.float16, torch.bfloat16)


def half(*which: int) -> torch.dtype:
    """One of the two: kernels differ by dtype in one instruction, so that each has either."""
    return HALVES[sum(which) % 2]


def requests():
    for size, dtype in itertools.product((64, 128), HALVES):
        for panels, stages in block_sm90.SDDMM_STAGES.items():
            yield block_sm90.sddmm_request(size, dtype, panels, stages)
    flags = list(itertools.product((False, True), repeat=2))
    for size, width, (transposed, partial) in itertools.product((64, 128), (64, 128, 256), flags):
        dtype, cut = half(size // 64, transposed, partial), block_sm90.tile(size, width)
        yield block_sm90.spmm_request(size, dtype, cut, transposed, partial)
    for transposed, partial in flags:
        yield pair_sm90.spmm_request(half(transposed, partial), transposed, partial)
    for size, wide, (transposed, partial) in itertools.product((16, 32), union_sm90.STAGES, flags):
        dtype = half(size // 16, transposed, partial)
        yield union_sm90.spmm_request(size, dtype, wide, transposed, partial)
    for tall, wide, (transposed, partial) in itertools.product(
        (64, 128), expand_sm90.STAGES, flags
    ):
        dtype = half(tall // 64, transposed, partial)
        yield expand_sm90.spmm_request(dtype, tall, wide, transposed, partial)
    flags = itertools.product((False, True), (False, True), (0, 1, 2))
    for (given, keep, scaled), (groups, panels) in itertools.product(flags, nm_scores_sm90.CUTS):
        # What differs by dtype and by n:m is one instruction, or a few left out.
        dtype, code = HALVES[1] if scaled == 2 else half(panels, groups), int(panels == 2)
        if scaled < 2 or (groups == 4 and not given):
            yield nm_scores_sm90.sm90_request(
                dtype, code, groups == 1, given, keep, scaled, groups, panels
            )

    for (groups, wide), major, turned in itertools.product(nm_sm90.STAGE_US, (0, 1), (0, 1)):
        for cluster in (1, 2) if wide > 64 else (1,):
            cut = nm_sm90.Cut(groups, wide, cluster, 4)
            dtype = half(major, turned, cluster)
            yield nm_sm90.spmm_request(dtype, cut, bool(major), bool(turned), False)
        cut = nm_sm90.Cut(groups, wide, 1, 4)
        yield nm_sm90.spmm_request(torch.float32, cut, False, bool(turned), False)
        yield nm_sm90.spmm_request(torch.float16, cut, bool(major), False, True)
    for wide, split in itertools.product((8, 16, 32, 64, 128), (1, 2, 4)):
        for dtype in (half(wide // 8, split // 2), torch.float32):
            yield nm_sm90.thin_request(dtype, nm_sm90.Thin(1, wide, split, 4))
    for (n, how), tokens, transposed in itertools.product(
        enumerate(tile_sm90.CUTS), (False, True), (False, True)
    ):
        rest = HALVES[(n + transposed) % 2], transposed, tokens
        yield tile_sm90.spmm_request(how, 64 if how.groups == 4 else 16, *rest, False)
        yield tile_sm90.spmm_request(how, 32, *rest, not tokens)
    for blocks, split in itertools.product((1, 2, 4), tile_thin.SPLITS):
        for transposed, group in itertools.product((False, True), (2, 4)):
            how = tile_thin.Thin(blocks, split, 4, group)
            yield tile_thin.thin_request(how, HALVES[0], HALVES[0], transposed)
        yield tile_thin.thin_request(how, HALVES[1], torch.float32, False)


@pytest.mark.compile
@pytest.mark.parametrize("wanted", dict.fromkeys(requests()), ids=str)  # each once
def test_no_spills_and_nothing_serialised(wanted, tmp_path, monkeypatch):
    from mixgrain.cuda import compile as service

    monkeypatch.setenv("MIXGRAIN_CACHE_DIR", str(tmp_path / "cache"))
    service.cache_folder.cache_clear()
    try:
        built = build(wanted, "90a")
    finally:
        service.cache_folder.cache_clear()
    assert built.faults() == []
    assert 0 < built.registers <= 255


@pytest.mark.parametrize("width", [8, 64, 96, 128, 200, 256, 4096])
@pytest.mark.parametrize("size", [64, 128])
def test_shared_memory_fits_a_multiprocessor(size, width):
    cut = block_sm90.tile(size, width)
    assert cut.shared(size) <= 232_448 - 1024  # the static barriers besides
    assert pair_sm90.MEMORY <= 232_448 - 1024
    assert union_sm90.spmm_shared(union_sm90.wide_of(width)) <= 232_448 - 1024
    # Its static memory: barriers, and 8 bytes of every entry under way.
    assert expand_sm90.shared(128, expand_sm90.wide_of(width)) <= 232_448 - 1024 - 4 * 512 * 8
    panels = -(-min(width, 256) // 64)
    for (_, depth), cut in nm_scores_sm90.CUTS.items():
        if depth == panels:  # as many CTAs as the registers are cut for
            assert (cut.shared(panels) + 1024) * cut.ctas <= 233_472
    assert block_sm90.sddmm_shared(size, panels, block_sm90.SDDMM_STAGES[panels]) <= 232_448 - 1024


@pytest.mark.parametrize("rows, inner", [(64, 64), (768, 3072), (8192, 8192), (10**6, 32)])
@pytest.mark.parametrize("width", [1, 9, 64, 65, 128, 500, 16384])
def test_shared_memory_of_sparse_products_fits(rows, inner, width):
    for matrices in (1, 700):
        cut = nm_sm90.cut_of(rows, width, matrices, 132)
        assert cut.stages >= 3
        assert cut.shared(True) <= 232_448 - 1024
        thin = nm_sm90.thin_of(rows, width, inner, matrices, 132)
        assert thin.stages >= 3
        assert thin.stages * thin.stage + 1024 <= 232_448 - 1024
        # The sums of a split product take the ring's place.
        assert thin.wide // 2 * 128 * thin.groups * 4 <= thin.stages * thin.stage


@pytest.mark.parametrize("several", [0, 16, 1000])
@pytest.mark.parametrize("matrices", [1, 3, 500])
def test_walks_take_every_tile_once_and_evenly(matrices, several):
    counts = torch.tensor([9, 8, 8, 5, 5, 4, 2, 1, 1, 0])
    records = torch.stack([counts.argsort(), counts.cumsum(0), counts], 1).int()
    tiles = block_sm90.walks(records, 7, matrices, several)
    total = 70 * matrices
    assert len(tiles) == (min(several, total) or total)
    kept = tiles[..., 2] >= 0
    assert not (kept[:, 1:] & ~kept[:, :-1]).any()  # none after the last
    assert sorted(map(tuple, tiles[kept].tolist())) == sorted(
        (*record, repeat) for record in records.tolist() for repeat in range(7 * matrices)
    )
    loads = ((tiles[..., 2] + 1) * kept).sum(1)
    # Dealt by length: close to the mean. By strides: lengths even out.
    few = total <= block_sm90.SCHEDULED * len(loads)
    assert loads.max() <= loads.double().mean() * (1 if few else 1.1) + (1 if several == 16 else 10)
    assert block_sm90.walks(records, 7, matrices, several) is tiles


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("units", [1, 2, 3, 7, 32, 64, 1000])
@pytest.mark.parametrize("tiles", [1, 5, 192, 1536, 10**6])
def test_row_tiles_are_shared_out_evenly(tiles, units, step):
    ctas, turns, share = nm_scores_sm90.shares(tiles, units, step, 132)
    line = -(-units // step) * step
    assert 0 < ctas <= 132
    assert share % step == 0
    done = [
        turns * line + max(0, min(share, (tiles - turns * ctas) * line - n * share))
        for n in range(ctas)
    ]
    assert sum(done) == tiles * line
    assert max(done) - sum(done) / 132 < step  # no CTA could do a step less
    assert min(done) > 0


def test_rows_that_are_not_there_take_no_warpgroups():
    def groups(nq):
        return nm_scores_sm90.groups_of(False, 1, nq)

    assert [groups(n) for n in (64, 128, 129, 256, 384, 512, 4096, 4100)] == [
        2,
        2,
        4,
        4,
        2,
        4,
        4,
        4,
    ]
    assert nm_scores_sm90.groups_of(True, 1, 4096) == 1
    assert nm_scores_sm90.groups_of(False, 4, 4096) == 2


def test_only_what_is_exact_goes_to_the_queries():
    half, brain = HALVES
    by = nm_scores_sm90.scaled_by
    assert [by(s, brain, True) for s in (0.125, 1.0, 2.0**-8)] == [2, 2, 2]
    assert [by(s, brain, True) for s in (0.1, 2.0, 2.0**-9, 3.0)] == [0, 0, 0, 0]
    assert [by(s, brain, True) for s in (0.0, -0.125, float("inf"), float("nan"))] == [1, 1, 1, 1]
    assert by(0.125, half, True) == by(0.125, brain, False) == 0
