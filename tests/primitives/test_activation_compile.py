"""Kernels with an activation: which ones linear asks for, and that they compile; no GPU.

The listing of kernels to compile ahead leaves them to first use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from mixgrain.cuda import compile as service
from mixgrain.cuda import nvrtc
from mixgrain.cuda.device import pretending
from mixgrain.cuda.errors import CompileError, MissingError
from mixgrain.cuda.recording import Recording, recorded
from mixgrain.cuda.steps import Launch
from mixgrain.formats import patterns
from mixgrain.formats.layout import Layout
from mixgrain.formats.nm import NMLayout
from mixgrain.formats.tile import TileLayout
from mixgrain.primitives.activations import CODES
from mixgrain.primitives.blank import nm_layout
from mixgrain.primitives.cuda import launch_code
from mixgrain.primitives.cuda.calls import describe
from mixgrain.primitives.dispatch import TABLE
from mixgrain.primitives.plans import nm as nm_plans

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
ARCHES = ("80", "86", "89", "90", "90a", "100", "120")
EVERYWHERE = {
    "spmm_finish", "spmm_nm_any", "spmm_tile_few", "spmm_block_few", "spmm_row_few",
}  # fmt: skip
ELSEWHERE = {"spmm_nm", "spmm_tile"}
HOPPER = {
    "spmm_nm_sm90", "spmm_nm_thin_sm90", "spmm_tile_sm90", "spmm_tile_thin_sm90",
    "spmm_block_sm90", "spmm_pair_sm90", "spmm_union_sm90", "spmm_strew_sm90",
}  # fmt: skip


@contextlib.contextmanager
def h200(arch: str) -> Iterator[None]:
    """A device of an H200's size of any architecture: listings have one multiprocessor."""
    with pretending(arch, multiprocessors=132):
        yield


def layouts() -> dict[str, Layout]:
    n = 640
    some = patterns.global_tokens(list(range(0, n, 40)))
    pattern = patterns.window(70) | some | patterns.random(0.004, 0)
    mixed = pattern.to_layout("mixed", n, n)
    assert [part.kind for part in mixed.parts] == ["block", "panel", "row"]
    return {
        "tile": TileLayout.from_tile_mask(torch.ones(40, 40, dtype=torch.bool), (n, n)),
        "tile, long": TileLayout.from_tile_mask(
            torch.ones(64, 256, dtype=torch.bool), (1024, 4096)
        ),
        "nm": nm_layout((n, n), 2, 4, "2:4", (1, 1), None),
        "nm, any": nm_layout((n, n), 1, 3, "bytes", (1, 1), None),
        "block": patterns.window(70).to_layout("block", n, n, size=64),
        "block, whole": patterns.full().to_layout("block", n, n, size=64),
        "block, large": patterns.full().to_layout("block", n, n, size=128),
        "block, small": patterns.full().to_layout("block", n, n, size=32),
        "row": patterns.window(70).to_layout("row", n, n),
        "panel": mixed.parts[1],
        "mixed": mixed,
    }


LAYOUTS = layouts()


def asked(kind: str, tokens: int, dtype: torch.dtype, activation: str) -> list[service.Request]:
    """The kernels of one linear."""
    layout = LAYOUTS[kind]
    nm = isinstance(layout, NMLayout)
    plan = nm_plans.plan_of(layout) if nm else TABLE["linear"][type(layout)]["cuda"](layout)
    rows, columns = layout.shape
    values, x, bias = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape in ((1, layout.slots), (1, tokens, columns), (rows,))
    )
    recording = Recording(0)
    described = describe(recording, (values, x, bias, None, False, *plan, activation))
    with recorded(recording):
        out = launch_code("activated")(*described)
    assert out.shape == (1, tokens, rows) and out.dtype == dtype and out.is_contiguous()
    # Torch may lay x out before, as for any product; nothing passes over the result.
    assert isinstance(recording.steps[-1], Launch)
    launches = [step for step in recording.steps if isinstance(step, Launch)]
    return [launch.kernel.wanted for launch in launches]


def activating(wanted: service.Request) -> int:
    return dict(wanted.constants).get("ACTIVATION", 0)


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("tokens", [1, 16, 37, 8192])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_last_kernel_activates(kind: str, tokens: int, arch: str) -> None:
    """One kernel in place of another where a bias joins in a kernel; no step of torch's at all."""
    with h200(arch):
        for dtype in (HALF, FLOAT):
            for name, code in CODES.items():
                found = asked(kind, tokens, dtype, name)
                assert [activating(wanted) for wanted in found[:-1]] == [0] * (len(found) - 1)
                assert activating(found[-1]) == code
                direct = kind.startswith("tile") or (kind == "row" and tokens <= 16)
                direct |= (kind.startswith("block") or kind == "row") and arch == "90a"
                direct |= kind.startswith("block, ") and tokens < 100
                if (direct and dtype == HALF) or kind.startswith("nm"):
                    assert len(found) == 1
                else:
                    assert found[-1].name == "spmm_finish"


def chosen(arch: str) -> list[service.Request]:
    """One request of every kernel file that takes an activation, the function with most code."""
    with h200(arch):
        calls = [(kind, tokens) for kind in ("tile", "nm", "row") for tokens in (1, 8192)]
        calls += [
            ("tile, long", 1),
            ("nm, any", 16),
            ("block, whole", 1),
            ("block, whole", 1 << 16),
        ]
        calls += [("block, large", 8192), ("block, small", 8192), ("panel", 8192)]
        found = [wanted for call in calls for wanted in asked(*call, HALF, "gelu")]
    return list({wanted.name: wanted for wanted in found if activating(wanted)}.values())


@pytest.mark.compile
@pytest.mark.parametrize("arch", ARCHES)
def test_kernels_compile_without_faults(arch, tmp_path, monkeypatch) -> None:
    try:
        nvrtc.library()
        nvrtc.header_folder()
    except MissingError as missing:
        pytest.skip(str(missing))
    some = chosen(arch)
    assert {wanted.name for wanted in some} == EVERYWHERE | (HOPPER if arch == "90a" else ELSEWHERE)
    # A cubin from the cache says nothing of spills.
    monkeypatch.setenv("MIXGRAIN_CACHE_DIR", str(tmp_path))
    service.cache_folder.cache_clear()
    try:
        built = service.build_all([(wanted, arch) for wanted in some])
    finally:
        service.cache_folder.cache_clear()
    for wanted, made in zip(some, built, strict=True):
        assert not isinstance(made, CompileError), (wanted, made)
        assert made.registers and not made.faults() and "warning" not in made.log, (
            wanted,
            made.log,
        )
