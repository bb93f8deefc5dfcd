"""The compile service, with no GPU: what it compiles, refuses, caches, and what it says."""

import os
import stat

import pytest

from mixgrain.cuda import compile as service
from mixgrain.cuda import nvrtc
from mixgrain.cuda.errors import CompileError, MissingError

try:
    nvrtc.library()
    nvrtc.header_folder()
except MissingError as missing:
    pytest.skip(str(missing), allow_module_level=True)

KERNEL = """
#include "half.cuh"
#include "half.cuh"
constexpr int kWidth = MG_WIDTH;
static_assert(kWidth % 2 == 0, "WIDTH must be even");
extern "C" __global__ void sample(float* out) { out[threadIdx.x] = two() * kWidth; }
"""
HEADER = "#pragma once\n__device__ float two() { return 2.0f; }\n"


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A folder with one kernel and one header, and a cache folder of its own."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "include").mkdir()
    (tmp_path / "kernels" / "sample.cu").write_text(KERNEL)
    (tmp_path / "include" / "half.cuh").write_text(HEADER)
    monkeypatch.setattr(service, "KERNELS", tmp_path / "kernels")
    monkeypatch.setattr(service, "INCLUDE", tmp_path / "include")
    monkeypatch.setenv("MIXGRAIN_CACHE_DIR", str(tmp_path / "cache"))
    service.source.cache_clear()
    service.cache_folder.cache_clear()
    yield tmp_path
    service.source.cache_clear()
    service.cache_folder.cache_clear()


@pytest.mark.parametrize("arch", service.ARCHITECTURES)
def test_compiles_for_every_architecture(kernels, arch):
    built = service.build(service.request("sample", {"WIDTH": 4}), arch)
    assert built.path.read_bytes()[:4] == b"\x7fELF"
    assert built.registers > 0
    assert built.faults() == []


def test_second_build_reads_the_disk(kernels):
    wanted = service.request("sample", {"WIDTH": 4})
    first = service.build(wanted, "90")
    before = first.path.stat().st_mtime_ns
    again = service.build(wanted, "90")
    assert again.path == first.path
    assert again.log == ""
    assert again.path.stat().st_mtime_ns == before
    assert sorted(p.name for p in first.path.parent.iterdir()) == [first.path.name]


def test_an_edited_header_is_seen(kernels):
    wanted = service.request("sample", {"WIDTH": 4})
    before = service.digest(wanted, "90")
    (kernels / "include" / "half.cuh").write_text(HEADER.replace("2.0f", "3.0f"))
    service.source.cache_clear()
    assert service.digest(wanted, "90") != before


@pytest.mark.parametrize(
    "other",
    [
        lambda: (service.request("sample", {"WIDTH": 6}), "90"),
        lambda: (service.request("sample", {"WIDTH": 4}, flush=True), "90"),
        lambda: (service.request("sample", {"WIDTH": 4}), "90a"),
    ],
)
def test_constants_flags_and_architecture_are_in_the_digest(kernels, other):
    assert service.digest(*other()) != service.digest(service.request("sample", {"WIDTH": 4}), "90")


def test_refusals_say_why(kernels):
    with pytest.raises(CompileError, match="WIDTH must be even"):
        service.build(service.request("sample", {"WIDTH": 3}), "90")
    with pytest.raises(MissingError, match="there are: sample"):
        service.build(service.request("nothing", {}), "90")
    with pytest.raises(MissingError, match="there are 80"):
        service.build(service.request("sample", {"WIDTH": 4}), "75")
    with pytest.raises(ValueError, match="upper-case"):
        service.request("sample", {"X=1 -I/": 1})
    with pytest.raises(ValueError, match="int or bool"):
        service.request("sample", {"WIDTH": "4"})


def test_build_all_keeps_failures_in_place(kernels):
    good, bad = service.request("sample", {"WIDTH": 2}), service.request("sample", {"WIDTH": 1})
    built = service.build_all([(good, "80"), (bad, "80"), (good, "90")], threads=2)
    assert [isinstance(item, service.Built) for item in built] == [True, False, True]


def test_the_cache_is_private(kernels, monkeypatch):
    folder = service.cache_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    service.cache_folder.cache_clear()
    with pytest.raises(MissingError, match="written by others"):
        service.cache_folder()
    monkeypatch.setenv("MIXGRAIN_CACHE_DIR", os.devnull + "/no")
    service.cache_folder.cache_clear()
    with pytest.raises(MissingError, match="cannot be made"):
        service.cache_folder()


def test_spills_and_serialised_wgmma_are_faults():
    log = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are\n"
        "    0 bytes stack frame, 8 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers\n"
    )
    built = service.Built(service.HERE, log)
    assert len(built.faults()) == 2
    assert built.registers == 168
    assert service.Built(service.HERE, log.replace("8 bytes", "0 bytes")).faults() == [
        "(C7510) Potential Performance Loss: wgmma.mma_async instructions are"
    ]
