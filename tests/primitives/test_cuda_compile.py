"""Every kernel that calls ask for compiles, for every architecture, without spills; no GPU.

What is compiled is what launch code asks for when it is recorded, so it is real requests.
"""

import itertools

import pytest
import torch
from covering import covering, met

from mixgrain.cuda import compile as service
from mixgrain.cuda import nvrtc
from mixgrain.cuda.errors import CompileError, MissingError
from mixgrain.primitives.cuda import tile, tile_mma, tile_sddmm, tiles
from mixgrain.primitives.cuda.warm import (
    BRAIN,
    DTYPES,
    FLOAT,
    HALF,
    MASKS,
    MIXED_DTYPES,
    WIDTHS,
    requests,
)

try:
    nvrtc.library()
    nvrtc.header_folder()
except MissingError as missing:
    pytest.skip(str(missing), allow_module_level=True)

ARCHES = ("80", "86", "89", "90", "90a", "100", "120")
EVERYWHERE = {
    "sddmm_block", "sddmm_panel", "sddmm_row", "spmm_block", "spmm_panel", "spmm_row",
    "spmm_row_merge", "spmm_merge", "spmm_join",
    "rowwise_block", "rowwise_row", "rowwise_panel", "rowwise_merge",
    "prune_nm", "rowwise_nm", "nm_blocks",
    "spmm_nm_any", "sddmm_nm", "nm_expand", "nm_spread", "nm_sample",
    "spmm_tile_few", "sddmm_tile", "tile_order", "turn", "spmm_finish",
    "spmm_block_few", "spmm_row_few",
}  # fmt: skip
# Asked for where there is nothing better.
ELSEWHERE = {"spmm_nm", "spmm_tile"}
HOPPER = {
    "sddmm_block_sm90", "spmm_block_sm90", "spmm_pair_sm90", "spmm_union_sm90", "spmm_nm_sm90",
    "spmm_nm_thin_sm90", "sddmm_nm_sm90", "spmm_tile_thin_sm90", "spmm_expand_sm90",
    "sddmm_tokens_sm90", "sddmm_pick_sm90", "sddmm_pick_nm_sm90", "sddmm_pick_tile_sm90",
    "spmm_strew_sm90", "spmm_tile_sm90", "spmm_nm_expand_sm90",
}  # fmt: skip
#: Of the floor above, whose own tests compile them.
FUSED = {
    "fused_sm90", "fused_mma", "fused_row", "fused_merge", "gather_rows",
    "plan_cells", "plan_lines", "plan_lengths", "plan_items", "plan_write", "plan_walk",
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHES)
def test_every_kernel_file_is_asked_for(arch):
    names = {wanted.name for wanted in requests(arch)}  # the common ones are of every file
    assert names == EVERYWHERE | (HOPPER if arch == "90a" else ELSEWHERE)
    known = EVERYWHERE | ELSEWHERE | HOPPER | FUSED
    assert {path.stem for path in service.KERNELS.glob("*.cu")} == known


def everything(arch: str) -> list[service.Request]:
    return requests(arch, DTYPES + MIXED_DTYPES, WIDTHS, MASKS)


def test_a_choice_is_a_part_of_all():
    all_of_them = set(everything("90a"))
    for dtype in DTYPES:
        for width in (64, 128):
            some = requests("90a", [dtype], [width], [0])
            assert 0 < len(some) < len(all_of_them)
            assert set(some) <= all_of_them


def rounded() -> list[service.Request]:
    """Products that torch lets round to TF32, which the listing leaves to first use."""
    sizes = (16, 32, 64, 128)
    sddmm, spmm = tiles.sddmm_kernel, tiles.spmm_kernel
    made = [sddmm(0, "block", min(size, 64), 64, FLOAT, FLOAT, 0, True, size)[0] for size in sizes]
    made.append(sddmm(0, "panel", 64, 64, FLOAT, HALF, 0, True)[0])
    for transposed in (False, True):
        for size in sizes:
            more = (FLOAT, HALF, FLOAT, transposed, 1, True, size, True)
            made.append(spmm(0, "block", min(size, 64), 64, *more)[0])
        made.append(spmm(0, "panel", 64, 64, FLOAT, BRAIN, FLOAT, transposed, 0, True)[0])
    return [kernel.wanted for kernel in made]


def tile_cuts(arch: str) -> list[service.Request]:
    """Ways to cut products of tiles that the listing, which knows no device's size, leaves out."""
    bulk = arch == "90a"
    made = [
        tile_mma.wide_request(how, dtype, transposed, tokens, partial)
        for tokens in (False, True)
        for how in tile_mma.cuts(bulk, tokens)
        for dtype, transposed, partial in ((HALF, False, False), (BRAIN, True, True))
    ]
    for shared in (101_376, 166_912, 232_448):
        side, warps, each, span = tile_sddmm.sampling(True, shared)
        made += [
            tile_sddmm.sddmm_request(side, HALF, FLOAT, deep, warps, each, span)
            for deep in (False, True)
        ]
        assert all(tile_sddmm.sddmm_shared(side, span, deep) <= shared for deep in (False, True))
    made += [tile_sddmm.sddmm_request(4, BRAIN, BRAIN, True, *tile_sddmm.sampling(False, 0)[1:])]
    few = [
        tile.few_request(blocks, HALF, out, transposed, wide, room=room, edge=edge)
        for blocks in tile.FEW_CUTS
        for out in (HALF, torch.float32)
        for transposed, wide, edge in itertools.product((False, True), repeat=3)
        for room in (0, tile.ROOMS[0])
    ]
    return made + covering(few, 3)


# Of these every two values of constants that are asked for at once; of others every value. Spills
# hardly depend on the architecture, and the others take them from different requests.
WHOLE = ("80", "90a")
OTHERS = ("86", "89", "100", "120")


def chosen(arch: str) -> list[service.Request]:
    """Of every kernel those that meet all dtypes, masks and cuts; all of them would take hours."""
    found = [wanted for wanted in everything(arch) if wanted.name not in HOPPER]
    more = rounded() + tile_cuts(arch)
    if arch in WHOLE:
        # What is laid out in shared memory depends on no architecture.
        some = covering(found, 2, shared=arch == "80") + more
    else:
        n = OTHERS.index(arch)
        some = covering(found, 1, n / len(OTHERS)) + more[n % 2 :: 2]
    return list(dict.fromkeys(some))  # what is built twice comes from the cache


def test_what_is_chosen_meets_all() -> None:
    values = {"A": range(4), "B": range(3), "C": range(2), "D": range(3)}
    listed = [
        service.request(name, dict(zip(values, of, strict=True)) | {"SHARED": sum(of)})
        for name in ("one", "other")
        for of in itertools.product(*values.values())
        if of[0] != of[1]  # a pair that nobody asks for
    ]
    for together in (1, 2):
        for shared in (False, True):
            some = covering(listed, together, 0.3, shared)
            assert set(some) <= set(listed) and len(set(some)) == len(some)
            for name in ("one", "other"):
                wanted, got = (
                    set().union(*(met(w, together, shared) for w in those if w.name == name))
                    for those in (listed, some)
                )
                assert got == wanted
                assert 4 <= sum(w.name == name for w in some) < 18  # of 54
    sizes = {dict(w.constants)["SHARED"] for w in covering(listed, 1, shared=True)}
    assert sizes == {dict(w.constants)["SHARED"] for w in listed}
    assert covering(listed, 1) != covering(listed, 1, 0.5)


def _warned(wanted: service.Request, log: str) -> bool:
    # rowwise.cuh names more than each of its operators and phases uses.
    return "warning" in log and not wanted.name.startswith("rowwise")


@pytest.mark.compile
@pytest.mark.parametrize("arch", [*WHOLE, *OTHERS])
def test_kernels_compile_without_faults(arch, tmp_path_factory, monkeypatch):
    # A cubin from the cache says nothing of spills.
    monkeypatch.setenv("MIXGRAIN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    service.cache_folder.cache_clear()
    some = chosen(arch)
    try:
        built = service.build_all([(wanted, arch) for wanted in some])
    finally:
        service.cache_folder.cache_clear()
    faults = {}
    for wanted, made in zip(some, built, strict=True):
        if isinstance(made, CompileError):
            faults[wanted] = [str(made)]
        elif made.faults() or not made.registers or _warned(wanted, made.log):
            faults[wanted] = [*made.faults(), made.log]
    assert faults == {}


def test_listing_needs_no_device():
    assert not torch.cuda.is_available() or requests("80")
    assert requests("80") != requests("90a")
