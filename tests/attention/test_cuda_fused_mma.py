"""The fused kernel on mma.sync by itself: every cut, also those of devices with less memory."""

import math

import pytest
import torch
from fused_plans import expected, patterns, plan

from mixgrain.attention.cuda import mma
from mixgrain.attention.cuda.keep import gathered_bits, unit_bits
from mixgrain.cuda import compile as service
from mixgrain.cuda import nvrtc
from mixgrain.cuda.errors import MissingError

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
# (what multiplies, which column of the table)
KINDS = [(kind, small) for kind in mma.CUTS for small in (0, 1)]
# Shared memory of a CTA and of an SM, bytes: sm_80, sm_90 and 100; sm_86, 89 and 120.
ROOM = {0: (163 * 1024, 164 * 1024), 1: (99 * 1024, 100 * 1024)}
ARCHES = {"80": 0, "86": 1, "89": 1, "90a": 0, "100": 0, "120": 1}


@pytest.mark.parametrize(("kind", "small"), KINDS)
def test_cuts_fit_into_shared_memory(kind, small) -> None:
    size = 2 if kind == "half" else 4
    dtype, rounded = (BRAIN if kind == "half" else FLOAT), kind == "tf32"
    cta, sm = ROOM[small]
    for width in range(8, 257, 8):
        how = mma.cut(dtype, width, rounded, cta)
        assert how.dim >= width
        assert how in [pair[small] for pair in mma.CUTS[kind].values()]
        assert how.shared(size) <= cta
        resident = how.resident(size, cta)
        assert 1 <= resident <= 2
        assert resident * (how.shared(size) + mma.RESERVED) <= sm
    # Two CTAs hide each other's waits where halves are multiplied.
    assert kind != "half" or mma.cut(dtype, 128, False, cta).resident(size, cta) == 2


def has_compiler() -> bool:
    try:
        nvrtc.library()
        nvrtc.header_folder()
    except MissingError:
        return False
    return True


@pytest.mark.compile
@pytest.mark.skipif(not has_compiler(), reason="no NVRTC here")
@pytest.mark.parametrize("arch", ARCHES)
def test_they_compile_without_faults(arch, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(service, "cache_folder", lambda: tmp_path)
    wanted = [
        mma.fused_request(BRAIN if kind == "half" else FLOAT, pair[ARCHES[arch]], kind == "tf32")
        for kind, table in mma.CUTS.items()
        for pair in table.values()
    ]
    # Of the others a few: they take the same cuts.
    wanted = wanted if arch in ("80", "86") else wanted[::3]
    wanted.append(mma.fused_request(HALF, mma.CUTS["half"][128][ARCHES[arch]], False))
    for one, built in zip(wanted, service.build_all([(r, arch) for r in wanted]), strict=True):
        assert isinstance(built, service.Built), f"{one}: {built}"
        assert not built.faults(), f"{one} on {arch}: {built.faults()}"
        assert built.registers and "warning" not in built.log


def test_bits_of_a_key_mask() -> None:
    keep = torch.rand(2, 150, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = unit_bits(keep)
    assert bits.shape == (2, 3, 2) and bits.dtype == torch.int32
    key = torch.arange(192)
    found = bits.flatten(1)[:, key // 32] >> (key % 32) & 1
    assert torch.equal(found[:, :150].bool(), keep) and not found[:, 150:].any()
    rows = torch.full((2, 64), -1, dtype=torch.int32)
    rows[0, 3], rows[1, 40] = 7, 149
    gathered = gathered_bits(keep, rows, torch.tensor([[0, 1], [1, 0]], dtype=torch.int32))
    assert gathered.shape == (2, 2, 1, 2)
    for b, h, pattern in ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)):
        at, row = ((3, 7), (40, 149))[pattern]
        word = gathered[b, h, 0].long() & 0xFFFFFFFF
        assert int(word[0] + (word[1] << 32)) == int(keep[b, row]) << at


@pytest.fixture
def tf32(monkeypatch):
    def allow(rounded: bool) -> None:
        name = "tf32" if rounded else "ieee"
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", name)

    return allow


def rounding(kind: str, dtype: torch.dtype) -> float:
    return {"full": 1e-6, "tf32": 1e-3}.get(kind, 6e-3 if dtype == BRAIN else 1e-3)


CASES = [
    (kind, small, width, ctas)
    for kind, small in KINDS
    for width in mma.CUTS[kind]
    # Two CTAs: each walks from item to item.
    for ctas in (2, 64)
]


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "small", "width", "ctas"), CASES)
def test_every_cut_computes_attention(kind, small, width, ctas, tf32) -> None:
    tf32(kind == "tf32")
    dtype = FLOAT if kind != "half" else HALF if ctas == 2 else BRAIN
    how = mma.CUTS[kind][width][small]
    nq, nk, width = 513, 700, width - 8 * (ctas == 2)
    scale = width**-0.5
    torch.manual_seed(0)
    q = (torch.randn(1, nq, 4, width, device="cuda") * 2).to(dtype).transpose(1, 2)
    k, v = (torch.randn(1, 2, nk, width, device="cuda").to(dtype) for _ in range(2))
    keep = torch.rand(1, nk, device="cuda") < 0.7
    for name, mask in patterns(nq, nk).items():
        for kept in (None, keep) if name in ("window", "holes") else (None,):
            tensors, masks = plan(mask, 4, ctas, packed=False)
            out = torch.full((1, 4, nq, width), math.nan, dtype=dtype, device="cuda")
            lse = torch.full((1, 4, nq), math.nan, device="cuda")
            bits = None if kept is None else (unit_bits(kept), None)
            mma.fused(
                out, lse, q, k, v, **tensors, masks=masks, scale=scale, keep=bits, how=how
            )  # fmt: skip
            mask = mask.cuda() if kept is None else mask.cuda() & kept
            wanted, wanted_lse = expected(q, k, v, mask, scale)
            error = (out.double() - wanted).norm() / wanted.norm().clamp(min=1e-9)
            assert error <= rounding(kind, dtype), (name, kept is None)
            assert torch.equal(lse == -math.inf, wanted_lse == -math.inf), name
            there = wanted_lse > -math.inf
            near = 4e-3 if kind == "tf32" else 1e-4 if kind == "half" else 5e-6
            torch.testing.assert_close(lse.double()[there], wanted_lse[there], rtol=0, atol=near)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", mma.CUTS)
@pytest.mark.parametrize("small", [0, 1])
@pytest.mark.parametrize("width", [64, 256])
def test_gathered_keys_partial_results_and_sinks(kind, small, width, tf32) -> None:
    tf32(kind == "tf32")
    dtype, how = (BRAIN if kind == "half" else FLOAT), mma.CUTS[kind][width][small]
    torch.manual_seed(0)
    n, scale = 300, 0.1
    q, k, v = (torch.randn(2, 2, n, width, device="cuda").to(dtype) for _ in range(3))
    mask, keep = patterns(n, n)["window"], torch.rand(2, n, device="cuda") < 0.8
    tensors, masks = plan(mask, 4, 2, packed=True)
    out, lse = torch.zeros_like(q), torch.zeros(2, 2, n, device="cuda")
    partial = torch.zeros(4, 2, 64, width, device="cuda"), torch.zeros(4, 2, 64, device="cuda")
    # The gathered keys are those of the units themselves; the tensors' own odd units are spoiled.
    spoiled_k, spoiled_v, spoiled = k.clone(), v.clone(), keep.clone()
    for unit in range(1, -(-n // 64), 2):
        spoiled_k[:, :, 64 * unit : 64 * unit + 64] = 7
        spoiled_v[:, :, 64 * unit : 64 * unit + 64] = 7
        spoiled[:, 64 * unit : 64 * unit + 64] ^= True
    rows = torch.arange(320, device="cuda", dtype=torch.int32)[None]
    rows = torch.where(rows < n, rows, -1)
    gathered = gathered_bits(keep, rows, torch.zeros(2, 2, dtype=torch.int32, device="cuda"))
    pk, pv = (torch.nn.functional.pad(t, (0, 0, 0, 20)) for t in (k, v))
    sink = torch.tensor([0.5, -1.0], device="cuda")
    mma.fused(
        out, lse, q, spoiled_k, spoiled_v, **tensors, masks=masks, scale=scale, sink=sink,
        packed=(q, pk, pv), partial=partial, keep=(unit_bits(spoiled), gathered), how=how,
    )  # fmt: skip
    wanted, wanted_lse = expected(q, k, v, mask.cuda() & keep[:, None, None], scale)
    straight = slice(0, 256)
    total = torch.logaddexp(wanted_lse, sink.double()[:, None])
    shrunk = (wanted * torch.exp(wanted_lse - total)[..., None])[:, :, straight]
    total, most = total[:, :, straight], rounding(kind, dtype)
    assert (out[:, :, straight].double() - shrunk).norm() <= most * shrunk.norm()
    torch.testing.assert_close(lse[:, :, straight].double(), total, rtol=0, atol=2e-3)
    # What goes to slots has no sink in it.
    rest = n - 256
    got = partial[0].view(2, 2, 2, 64, width)[:, :, 0, :rest].double()
    assert (got - wanted[:, :, 256:]).norm() <= most * wanted[:, :, 256:].norm()
    lses = partial[1].view(2, 2, 2, 64)[:, :, 0, :rest]
    torch.testing.assert_close(lses.double(), wanted_lse[:, :, 256:], rtol=0, atol=2e-3)
    assert not out[:, :, 256:].any()
