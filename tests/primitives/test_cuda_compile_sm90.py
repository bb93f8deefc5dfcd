"""The wgmma kernels compile for sm_90a without spills and without serialised products."""

import itertools

import pytest
import torch

from mixgrain.cuda import nvrtc
from mixgrain.cuda.compile import build
from mixgrain.cuda.errors import MissingError
from mixgrain.primitives.cuda import block_sm90

try:
    nvrtc.library()
    nvrtc.header_folder()
except MissingError as missing:
    pytest.skip(str(missing), allow_module_level=True)

HALVES = (torch.float16, torch.bfloat16)


def requests():
    for size, dtype in itertools.product((64, 128), HALVES):
        for panels, stages in block_sm90.SDDMM_STAGES.items():
            yield block_sm90.sddmm_request(size, dtype, panels, stages)
        for width, transposed, partial in itertools.product((64, 128, 256), (0, 1), (0, 1)):
            cut = block_sm90.tile(size, width)
            yield block_sm90.spmm_request(size, dtype, cut, bool(transposed), bool(partial))


@pytest.mark.compile
@pytest.mark.parametrize("wanted", list(requests()), ids=str)
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
    panels = -(-min(width, 256) // 64)
    assert block_sm90.sddmm_shared(size, panels, block_sm90.SDDMM_STAGES[panels]) <= 232_448 - 1024
