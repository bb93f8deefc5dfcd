"""The fused kernel of sm_90a by itself: compiled without faults, given plans made by hand."""

import math

import pytest
import torch
from fused_plans import expected, patterns, plan

from mixgrain.attention.cuda import kernel as fused_kernel
from mixgrain.cuda import compile as service
from mixgrain.cuda import nvrtc
from mixgrain.cuda.errors import MissingError

WIDTHS = (32, 64, 96, 128, 192, 256)


def has_compiler() -> bool:
    try:
        nvrtc.library()
        nvrtc.header_folder()
    except MissingError:
        return False
    return True


@pytest.mark.skipif(not has_compiler(), reason="no NVRTC here")
@pytest.mark.parametrize("width", WIDTHS)
def test_it_compiles_without_faults(width, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(service, "cache_folder", lambda: tmp_path)
    dtypes = (torch.float16, torch.bfloat16) if width == 128 else (torch.bfloat16,)
    for dtype in dtypes:
        for masked in (False, True):
            wanted = fused_kernel.fused_request(dtype, fused_kernel.cut(width), masked)
            # Serialised products or spills make it several times slower and still right.
            assert service.build(wanted, "90a").faults() == []


@pytest.mark.parametrize("width", [8, 40, *WIDTHS])
def test_a_cut_fits_into_shared_memory(width) -> None:
    how = fused_kernel.cut(width)
    assert how.dim >= width
    assert how.shared + 1024 <= 232448
    assert how.stages >= 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [40, *WIDTHS])
# Two CTAs: each walks from item to item.
@pytest.mark.parametrize("ctas", [2, 63])
def test_it_computes_attention(dtype, width, ctas) -> None:
    nq, nk, scale = 513, 700, width**-0.5
    torch.manual_seed(0)
    q = (torch.randn(1, nq, 4, width, device="cuda") * 2).to(dtype).transpose(1, 2)
    k, v = (torch.randn(1, 2, nk, width, device="cuda").to(dtype) for _ in range(2))
    for name, mask in patterns(nq, nk).items():
        tensors, masks = plan(mask, 4, ctas, False, fused_kernel.groups(width))
        out = torch.full((1, 4, nq, width), math.nan, dtype=dtype, device="cuda")
        lse = torch.full((1, 4, nq), math.nan, device="cuda")
        fused_kernel.fused(out, lse, q, k, v, **tensors, masks=masks, scale=scale)
        wanted, wanted_lse = expected(q, k, v, mask.cuda(), scale)
        rounding = 6e-3 if dtype == torch.bfloat16 else 1e-3
        assert (out.double() - wanted).norm() <= rounding * wanted.norm(), name
        assert torch.equal(lse == -math.inf, wanted_lse == -math.inf), name
        kept = wanted_lse > -math.inf
        torch.testing.assert_close(lse.double()[kept], wanted_lse[kept], rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_references_that_are_outgrown_again_and_again() -> None:
    torch.manual_seed(0)
    n, width = 640, 64
    q = torch.randn(1, 1, n, width, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 1, n, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k = k * torch.linspace(0.5, 200, n, device="cuda").to(k.dtype)[:, None]
    mask = torch.ones(n, n, dtype=torch.bool)
    # Lone units between pairs, of one warpgroup each.
    mask[0:64, 64:128] = mask[64:128, 256:320] = mask[128:192, 0:64] = False
    tensors, masks = plan(mask, 1, 1, packed=False)
    out, lse = torch.empty_like(q), torch.empty(1, 1, n, device="cuda")
    fused_kernel.fused(out, lse, q, k, v, **tensors, masks=masks, scale=0.125)
    wanted, wanted_lse = expected(q, k, v, mask.cuda(), 0.125)
    assert (out.double() - wanted).norm() <= 6e-3 * wanted.norm()
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
def test_gathered_keys_partial_results_and_sinks() -> None:
    torch.manual_seed(0)
    n, width = 300, 64
    q, k, v = (torch.randn(2, 2, n, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    mask = patterns(n, n)["window"]
    tensors, masks = plan(mask, 4, 2, packed=True)
    out, lse = torch.zeros_like(q), torch.zeros(2, 2, n, device="cuda")
    partial = torch.zeros(4, 2, 64, width, device="cuda"), torch.zeros(4, 2, 64, device="cuda")
    # The gathered keys are those of the units themselves; the tensors' own odd units are spoiled.
    spoiled_k, spoiled_v = k.clone(), v.clone()
    for unit in range(1, -(-n // 64), 2):
        spoiled_k[:, :, 64 * unit : 64 * unit + 64] = 7
        spoiled_v[:, :, 64 * unit : 64 * unit + 64] = 7
    sink = torch.tensor([0.5, -1.0], device="cuda")
    fused_kernel.fused(
        out, lse, q, spoiled_k, spoiled_v, **tensors, masks=masks, scale=0.125, sink=sink,
        packed=(q, k, v), partial=partial,
    )  # fmt: skip
    wanted, wanted_lse = expected(q, k, v, mask.cuda(), 0.125)
    straight = slice(0, 256)
    total = torch.logaddexp(wanted_lse, sink.double()[:, None])
    shrunk = (wanted * torch.exp(wanted_lse - total)[..., None])[:, :, straight]
    total = total[:, :, straight]
    assert (out[:, :, straight].double() - shrunk).norm() <= 6e-3 * shrunk.norm()
    torch.testing.assert_close(
        lse[:, :, straight].double(), total[:, :, straight], rtol=0, atol=1e-4
    )
    # What goes to slots has no sink in it.
    rest = n - 256
    got = partial[0].view(2, 2, 2, 64, width)[:, :, 0, :rest]
    torch.testing.assert_close(got.double(), wanted[:, :, 256:], rtol=0.02, atol=0.02)
    lses = partial[1].view(2, 2, 2, 64)[:, :, 0, :rest]
    torch.testing.assert_close(lses.double(), wanted_lse[:, :, 256:], rtol=0, atol=1e-4)
    assert not out[:, :, 256:].any()
