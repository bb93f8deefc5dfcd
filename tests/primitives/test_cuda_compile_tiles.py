"""Kernels of block and panel parts compile for every architecture without spills; no GPU."""

import itertools

import pytest
import torch
from test_cuda_block import SIZES

from mixgrain.cuda import compile as service
from mixgrain.cuda import nvrtc
from mixgrain.cuda.errors import CompileError, MissingError
from mixgrain.primitives.cuda import block, panel

try:
    nvrtc.library()
    nvrtc.header_folder()
except MissingError as missing:
    pytest.skip(str(missing), allow_module_level=True)

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def requests() -> list[service.Request]:
    """What the launch code asks for, the extremes of every constant."""
    asked: list[service.Request] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (block, panel):
            patch.setattr(module, "kernel", lambda wanted, device: asked.append(wanted))
        for size in SIZES:
            for make in (block._sddmm_kernel, panel._sddmm_kernel):
                if make is panel._sddmm_kernel and size != 64:
                    continue
                start = (0,) if make is panel._sddmm_kernel else (0, size)
                for given in (
                    (16, BRAIN, BRAIN, 0, False),
                    (64, HALF, HALF, 0, False),
                    (128, BRAIN, FLOAT, 1, False),
                    (256, HALF, BRAIN, 2, False),
                    (128, FLOAT, FLOAT, 1, False),
                    (64, FLOAT, HALF, 0, True),
                ):
                    make.__wrapped__(*start, *given)
            for transposed in (False, True):
                for given in (
                    (64, HALF, HALF, HALF, transposed, 0, False, False),
                    (128, BRAIN, BRAIN, BRAIN, transposed, 0, False, False),
                    (128, HALF, FLOAT, FLOAT, transposed, 1, True, False),
                    (64, FLOAT, FLOAT, FLOAT, transposed, 2, False, False),
                    (64, FLOAT, HALF, FLOAT, transposed, 1, True, True),
                ):
                    block._spmm_kernel.__wrapped__(0, size, *given)
        for transposed in (False, True):
            for given in (
                (64, HALF, HALF, transposed, 0, False),
                (128, BRAIN, BRAIN, transposed, 1, False),
                (128, HALF, FLOAT, transposed, 2, False),
                (64, FLOAT, FLOAT, transposed, 2, False),
                (64, FLOAT, BRAIN, transposed, 0, True),
            ):
                panel._spmm_kernel.__wrapped__(0, *given)
        for out, add in itertools.product((HALF, FLOAT), (False, True)):
            if out == FLOAT or not add:
                panel._merge_kernel.__wrapped__(0, out, add)
    return asked


@pytest.mark.compile
@pytest.mark.parametrize("arch", ["80", "86", "89", "90a", "100", "120"])
def test_kernels_compile_without_faults(arch, requests, tmp_path_factory, monkeypatch):
    # A cubin from the cache says nothing of spills.
    monkeypatch.setenv("MIXGRAIN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    service.cache_folder.cache_clear()
    try:
        built = service.build_all([(wanted, arch) for wanted in requests])
    finally:
        service.cache_folder.cache_clear()
    faults = {}
    for wanted, made in zip(requests, built, strict=True):
        if isinstance(made, CompileError):
            faults[wanted] = [str(made)]
        elif made.faults() or "warning" in made.log or not made.registers:
            faults[wanted] = [*made.faults(), made.log]
    assert faults == {}
