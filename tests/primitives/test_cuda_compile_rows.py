"""Kernels of row parts and of the operators along rows compile for every architecture; no GPU.

The launch code runs on CPU tensors with a stand-in for the launcher, which notes what is asked for:
so it is real requests that are compiled.
"""

import pytest
import torch
from cases import BUILDERS, Case, band, density, masks_of

from mixgrain.cuda import compile as service
from mixgrain.cuda import nvrtc
from mixgrain.cuda.errors import CompileError, MissingError
from mixgrain.primitives.cuda import row, rowwise, softmax
from mixgrain.primitives.cuda.parts import aligned
from mixgrain.primitives.plans import cuda_row, cuda_rowwise
from mixgrain.primitives.plans.plan import join, split

try:
    nvrtc.library()
    nvrtc.header_folder()
except MissingError as missing:
    pytest.skip(str(missing), allow_module_level=True)

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32


def row_calls() -> None:
    """Products with a row part: every spread of a row over lanes, masks, dtypes."""
    case = Case((3, 700), density(2.0))
    layout = BUILDERS["row"](case, *masks_of(case))
    (part,) = split(join(layout, [cuda_row.part(layout)]))[3]
    for dtype in (HALF, BRAIN, FLOAT):
        for n, width in enumerate((8, 16, 32, 64, 80, 96, 128, 256, 512, 1100)):
            q, k = (aligned(torch.zeros(1, 1, rows, width, dtype=dtype)) for rows in case.shape)
            side = n % 3  # none, over columns, over rows
            keep = torch.ones(1, 1, case.shape[side - 1], dtype=torch.bool) if side else None
            values = torch.zeros(1, layout.slots, dtype=FLOAT if n % 2 else dtype)
            row.sddmm_row(values, q, k, keep, side == 1, part, 1.0)
            for transposed, x, like in ((False, k, q), (True, q, k)):
                out = torch.zeros_like(like, dtype=FLOAT if n % 2 else dtype)
                row.spmm_row(out, values, x, keep, side == 1, part, 1.0, transposed, n % 2 == 1)


def rowwise_calls() -> None:
    """Softmax and its relatives: every kind of part, alone and joint, and every length class."""
    for kind in ("block", "row", "panel", "mixed"):
        for shape, mask, size in (
            ((40, 600), band(300), 16),  # rows of both length classes
            ((200, 260), density(0.5), 64),
            ((128, 256), density(2.0), 128),  # nothing is masked
        ):
            case = Case(shape, mask, size=size)
            plan = cuda_rowwise.cuda(BUILDERS[kind](case, *masks_of(case)))
            mixed = [(HALF, FLOAT)] if kind == "block" else []
            for dtype, out in ((HALF, HALF), (BRAIN, BRAIN), (FLOAT, FLOAT), *mixed):
                for side in (0, 1, 2) if dtype == BRAIN else (0,):
                    n = shape[0 if side == 2 else 1]
                    keep = torch.ones(1, 1, n, dtype=torch.bool) if side else None
                    values = torch.zeros(1, plan.dims[0], dtype=dtype)
                    mask_of = (keep, side == 2)
                    softmax.softmax(values, *mask_of, *plan, out, True)
                    softmax.softmax_backward(values, values.to(out), None, *mask_of, *plan, dtype)
                    softmax.row_sum(values, *mask_of, *plan)
                    softmax.row_expand(torch.zeros(1, 1, shape[0]), *mask_of, *plan, out)


@pytest.fixture(scope="module")
def requests() -> list[service.Request]:
    """What the calls above ask for, each once."""
    asked: dict[service.Request, None] = {}

    def note(wanted, device):
        asked[wanted] = None
        return lambda *arguments: None

    memos = (row._sddmm_kernel, row._spmm_kernel, row._merge_kernel, rowwise._kernel)
    with pytest.MonkeyPatch.context() as patch:
        for module in (row, rowwise):
            patch.setattr(module, "kernel", note)
        for memo in memos:
            memo.cache_clear()
        try:
            row_calls()
            rowwise_calls()
        finally:
            for memo in memos:
                memo.cache_clear()
    return list(asked)


def test_every_kernel_is_asked_for(requests):
    names = {wanted.name for wanted in requests}
    assert names == {
        "sddmm_row", "spmm_row", "spmm_row_merge",
        "rowwise_block", "rowwise_row", "rowwise_panel", "rowwise_merge",
    }  # fmt: skip


@pytest.mark.compile
@pytest.mark.parametrize("arch", ["80", "86", "89", "90a", "100", "120"])
def test_kernels_compile_without_faults(arch, requests, tmp_path_factory, monkeypatch):
    # A cubin from the cache says nothing of spills.
    monkeypatch.setenv("MIXGRAIN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    service.cache_folder.cache_clear()
    try:
        # Spills depend on the architecture a little: all of them where it matters, else some.
        some = requests if arch in ("80", "90a") else requests[::4]
        built = service.build_all([(wanted, arch) for wanted in some])
    finally:
        service.cache_folder.cache_clear()
    faults = {}
    for wanted, made in zip(some, built, strict=True):
        found = [str(made)] if isinstance(made, CompileError) else made.faults()
        if found:
            faults[wanted] = found
    assert not faults
