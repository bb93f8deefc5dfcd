"""What runs around fused attention, and plans it, compiles everywhere without spills; no GPU."""

import pytest
import torch

from mixgrain.attention.cuda import kernel, warm
from mixgrain.attention.cuda.merge import merge_request
from mixgrain.attention.cuda.planner import requests as planning
from mixgrain.attention.cuda.row import row_request
from mixgrain.attention.cuda.tables import walk_request
from mixgrain.attention.cuda.warm import requests as common
from mixgrain.cuda import compile as service
from mixgrain.cuda import nvrtc
from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.device import pretending
from mixgrain.cuda.errors import MissingError

try:
    nvrtc.library()
    nvrtc.header_folder()
except MissingError as missing:
    pytest.skip(str(missing), allow_module_level=True)

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32


def requests() -> list[Request]:
    """Every spread of a row over lanes, short and long items, sinks and masks, dtypes."""
    found = [request("gather_rows", {})]
    found += [merge_request(dtype, width) for dtype in (HALF, BRAIN, FLOAT) for width in (64, 256)]
    for n, width in enumerate((8, 32, 40, 64, 128, 256)):
        for dtype in (BRAIN, FLOAT):
            pieces = width * dtype.itemsize // 16
            for short in (False, True):
                options = n % 2 == 1, n % 3 == 1
                found.append(row_request(dtype, pieces, pieces, *options, short))
    # Values wider than keys.
    found.append(row_request(HALF, 3, 5, True, True, False))
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("arch", service.ARCHITECTURES)
def test_the_common_ones_are_of_every_file(arch) -> None:
    units = {"fused_sm90", "fused_mma"} if arch == "90a" else {"fused_mma"}
    plans = {one.name for one in planning()} | {"plan_walk"}
    always = {"gather_rows", "fused_merge", "fused_row"} | plans
    assert {one.name for one in common(arch)} == always | units


@pytest.mark.parametrize("arch", service.ARCHITECTURES)
@pytest.mark.parametrize("masked", [False, True])
def test_a_first_call_compiles_its_kernels_side_by_side(arch, masked, monkeypatch) -> None:
    together = []
    monkeypatch.setattr(warm, "build_all", lambda wanted, threads: together.append(list(wanted)))
    warm.compile_together.cache_clear()
    with pretending(arch):
        for _ in range(2):
            warm.compile_together(0, BRAIN, 80, masked)
    warm.compile_together.cache_clear()
    (wanted,) = together  # once a process
    names = [one.name for one, _ in wanted]
    assert len(set(names)) == len(names) and {of for _, of in wanted} == {arch}
    units = "fused_sm90" if arch == "90a" else "fused_mma"
    plans = {one.name for one in planning()} | {"plan_walk"}
    assert set(names) == {"gather_rows", "fused_merge", units} | plans
    if arch == "90a":
        assert (kernel.fused_request(BRAIN, kernel.cut(80), masked), arch) in wanted


@pytest.mark.parametrize("arch", service.ARCHITECTURES)
def test_plans_compile_without_spills(arch, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(service, "cache_folder", lambda: tmp_path)
    wanted = [*planning(), walk_request()]
    for one, built in zip(wanted, service.build_all([(r, arch) for r in wanted]), strict=True):
        assert isinstance(built, service.Built), f"{one}: {built}"
        assert not built.faults() and "warning" not in built.log, f"{one} on {arch}: {built.log}"


@pytest.mark.parametrize("arch", ["80", "90a", "120"])
def test_they_compile_without_spills(arch, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(service, "cache_folder", lambda: tmp_path)
    wanted = requests() if arch == "90a" else requests()[::5]
    for one, built in zip(wanted, service.build_all([(r, arch) for r in wanted]), strict=True):
        assert isinstance(built, service.Built), f"{one}: {built}"
        assert not built.faults(), f"{one} on {arch}: {built.faults()}"
