"""sddmm and spmm of blocks, panels and mixtures on a GPU, against dense float64."""

import dataclasses

import pytest
import torch
from cases import BUILDERS, CASES, Case, band, density, masks_of, operands
from torch import Tensor

from mixgrain.cuda import prepared
from mixgrain.formats.cache import clear_caches
from mixgrain.formats.errors import UnsupportedError
from mixgrain.formats.layout import Layout
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives import reference
from mixgrain.primitives.cuda import block
from mixgrain.primitives.sddmm import sddmm
from mixgrain.primitives.spmm import spmm

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

SIZES = (16, 32, 64, 128)
KINDS = ("block", "panel", "mixed")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Rounding of the inputs is not counted: the oracle sees the rounded ones. What is left is the one
# rounding of the result and float32 sums.
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


def build(kind: str, case: Case, seed: int = 0) -> tuple[Layout, Layout]:
    """The layout of a case, on the CPU and on the device."""
    layout = BUILDERS[kind](case, *masks_of(case, seed))
    return layout, layout.to(DEVICE)


def integers(*shape: int, seed: int = 0, most: int = 2) -> Tensor:
    """Small integers as float32 on the CPU."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=g).float()


def key_mask(case: Case, seed: int = 5) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    batch = case.lead_shape[-2:-1] if len(case.lead_shape) > 1 else ()
    return torch.rand(*batch, case.shape[1], generator=g) < 0.7


def close(ours: Tensor, theirs: Tensor, inner: int, *dtypes: torch.dtype) -> None:
    """Compare with float64, allowing one rounding and float32 sums of ``inner`` terms."""
    assert ours.shape == theirs.shape
    rounding = max(EPSILON[d] for d in dtypes)
    allowed = 1.01 * rounding + 4 * EPSILON[torch.float32] * max(inner, 1)
    torch.testing.assert_close(
        ours.cpu().double(), theirs.double(), rtol=allowed, atol=allowed * max(inner, 1) ** 0.5
    )


def dead_of(s: SparseTensor) -> Tensor:
    live = s.live()
    if live is None:
        return torch.zeros_like(s.values, dtype=torch.bool)
    return (~live).expand_as(s.values)


def zero_bits(t: Tensor) -> bool:
    """All +0."""
    word = torch.int32 if t.element_size() == 4 else torch.int16
    return not t.numel() or bool((t.contiguous().view(word) == 0).all())


def adjoint(s: SparseTensor, x: Tensor) -> Tensor:
    """Sᵀ x through the gradient of spmm, which is the operator spmm_t."""
    zeros = torch.zeros(
        *s.lead_shape, s.shape[-1], x.shape[-1], dtype=x.dtype, device=x.device, requires_grad=True
    )
    (made,) = torch.autograd.grad(spmm(s, zeros), zeros, x)
    return made


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What kernels are given to write holds NaN before, so that a slot left out shows."""
    plain = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        made = plain(self, *args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    empty = prepared._empty

    def poison(shape, strides, dtype):
        made = empty(shape, strides, dtype)  # bytes are scratch: all ones are NaN in any float
        return made.fill_(torch.nan if made.is_floating_point() else 255)

    monkeypatch.setattr(prepared, "_empty", poison)


@pytest.fixture(params=[False, True], ids=["best", "portable"])
def portable(request, monkeypatch):
    """The kernels that this device would take, then those that every device can."""
    if not request.param:
        yield False
        return
    clear_caches()  # of calls prepared for the others
    monkeypatch.setattr(block, "_hopper", lambda *_: False)
    yield True
    clear_caches()


# Every case of the table's list


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_cases(name, kind, dtype, portable):
    case = CASES[name]
    layout, there = build(kind, case)
    q, k = operands(name, dtype)
    for mask in (None, key_mask(case)):
        moved = None if mask is None else mask.to(DEVICE)
        ours = sddmm(q.to(DEVICE), k.to(DEVICE), there, 0.5, moved)
        expected = reference.sddmm(q.double(), k.double(), layout, 0.5, mask)
        close(ours.values, expected.values, case.dim, dtype)
        dead = dead_of(expected)
        assert zero_bits(ours.values.cpu()[dead])
        # Dead slots hold NaN from here on.
        values = torch.randn(ours.values.shape, generator=torch.Generator().manual_seed(2)).to(
            dtype
        )
        values[dead] = torch.nan
        s, t = SparseTensor(layout, values, mask), SparseTensor(there, values.to(DEVICE), moved)
        close(spmm(t, k.to(DEVICE)), reference.spmm(s, k), case.shape[1], dtype)
        dense = reference.dense_of(s)
        expected_t = dense.mT @ q.double()
        close(spmm(t.T, q.to(DEVICE)), expected_t, case.shape[0], dtype)
        close(adjoint(t, q.to(DEVICE)), expected_t, case.shape[0], dtype)


# Exactness: small integers, all sizes, widths and dtypes

WIDTHS = (8, 24, 64, 72, 128, 136, 256)
ODD = Case((150, 203), density(0.1), free=(2,), lead=(1, 2))


def exact(kind: str, size: int, width: int, dtype: torch.dtype, out: torch.dtype) -> None:
    case = dataclasses.replace(ODD, size=size, dim=width)
    layout, there = build(kind, case, seed=size + width)
    nq, nk = case.shape
    q, k = integers(2, 2, nq, width, seed=1), integers(2, 2, nk, width, seed=2)
    mask = key_mask(case)
    ours = sddmm(
        q.to(DEVICE, dtype), k.to(DEVICE, dtype), there, 1.0, mask.to(DEVICE), out_dtype=out
    )
    theirs = sddmm(q, k, layout, 1.0, mask)
    assert torch.equal(ours.values.cpu(), theirs.values.to(out))

    values = integers(*theirs.values.shape, seed=3)
    for keep in (None, mask):
        s = SparseTensor(layout, values, keep)
        t = SparseTensor(there, values.to(DEVICE, dtype), None if keep is None else keep.to(DEVICE))
        assert torch.equal(spmm(t, k.to(DEVICE, dtype)).cpu(), spmm(s, k).to(dtype))
        # The transpose by its own operator: the same values, columns summed.
        assert torch.equal(adjoint(t, q.to(DEVICE, dtype)).cpu(), adjoint(s, q).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("size", SIZES)
def test_integers_are_exact_in_blocks(size, width, dtype, portable):
    exact("block", size, width, dtype, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["panel", "mixed"])
def test_integers_are_exact_in_panels(kind, width, dtype):
    exact(kind, 32, width, dtype, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, out", [(torch.half, torch.float32), (torch.float32, torch.half)])
def test_values_of_another_dtype(kind, dtype, out):
    exact(kind, 64, 64, dtype, out)
    case = dataclasses.replace(ODD, size=64)
    layout, there = build(kind, case)
    values, k = integers(2, layout.slots, seed=3), integers(2, 2, case.shape[1], 40, seed=2)
    ours = spmm(SparseTensor(there, values.to(DEVICE, out)), k.to(DEVICE, dtype))
    assert torch.equal(ours.cpu(), spmm(SparseTensor(layout, values), k).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_long_rows_are_exact(kind, portable):
    """More blocks than a chunk, more columns than a segment, several tiles of a wide x."""
    case = Case((140, 5000), density(2.0), size=128)
    layout, there = build(kind, case)
    q, k = integers(140, 64, seed=1, most=1), integers(5000, 64, seed=2, most=1)
    ours = sddmm(q.to(DEVICE).half(), k.to(DEVICE).half(), there)
    assert torch.equal(ours.values.cpu(), sddmm(q, k, layout).values.half())
    values, x = integers(layout.slots, most=1), integers(5000, 328, seed=4, most=1)
    s, t = SparseTensor(layout, values), SparseTensor(there, values.to(DEVICE).half())
    assert torch.equal(spmm(t, x.to(DEVICE).half()).cpu(), spmm(s, x).half())
    y = integers(140, 328, seed=5, most=1)
    assert torch.equal(adjoint(t, y.to(DEVICE).half()).cpu(), adjoint(s, y).half())


# What must not depend on anything else


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_results_repeat_and_do_not_depend_on_the_batch(kind, dtype, portable):
    case = Case((300, 280), band(40), free=(5,), size=32)
    _, there = build(kind, case)
    q = torch.randn(5, 300, 64, device=DEVICE, dtype=dtype)
    k = torch.randn(5, 280, 64, device=DEVICE, dtype=dtype)
    s, again = sddmm(q, k, there), sddmm(q, k, there)
    assert torch.equal(s.values, again.values)
    o, t = spmm(s, k), adjoint(s, q)
    assert torch.equal(o, spmm(s, k)) and torch.equal(t, adjoint(s, q))
    alone = sddmm(q[3], k[3], there)
    assert torch.equal(alone.values, s.values[3])
    assert torch.equal(spmm(alone, k[3]), o[3]) and torch.equal(adjoint(alone, q[3]), t[3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_of_dropped_keys_reaches_nothing(kind, dtype, portable):
    case = Case((100, 120), density(0.3), size=16)
    layout, there = build(kind, case)
    mask = key_mask(case)
    q, k = operands_of(case, 40, dtype)
    hurt = k.clone()
    hurt[~mask] = torch.nan
    unused = ~layout.mask()[0, 0].any(0)
    hurt[unused] = torch.nan
    args = (there, 1.0, mask.to(DEVICE))
    clean, ours = (sddmm(q.to(DEVICE), t.to(DEVICE), *args) for t in (k, hurt))
    assert torch.equal(ours.values, clean.values)
    assert torch.equal(spmm(clean, hurt.to(DEVICE)), spmm(clean, k.to(DEVICE)))
    # Values at dead slots, rows dropped instead of columns.
    dead = dead_of(clean)
    spoilt = clean.with_values(clean.values.masked_fill(dead, torch.nan))
    assert torch.equal(spmm(spoilt, k.to(DEVICE)), spmm(clean, k.to(DEVICE)))
    assert torch.equal(adjoint(spoilt, q.to(DEVICE)), adjoint(clean, q.to(DEVICE)))
    assert torch.equal(spmm(spoilt.T, q.to(DEVICE)), spmm(clean.T, q.to(DEVICE)))


def operands_of(case: Case, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(11)
    q, k = (torch.randn(n, width, generator=g).to(dtype) for n in case.shape)
    return q, k


@pytest.mark.parametrize("kind", KINDS)
def test_views_of_any_stride(kind):
    case = Case((70, 90), density(0.4), free=(2,), lead=(1, 3), size=32)
    layout, there = build(kind, case)
    q, k = integers(2, 3, 70, 40, seed=1), integers(2, 3, 90, 40, seed=2)
    theirs = sddmm(q, k, layout).values.half()
    x = spmm(SparseTensor(layout, theirs.float()), k).half()
    plain = (q.to(DEVICE).half(), k.to(DEVICE).half())
    views = {
        "heads last": [t.transpose(1, 2).contiguous().transpose(1, 2) for t in plain],
        "columns first": [t.mT.contiguous().mT for t in plain],
        "odd start": [torch.cat([t[..., :1], t], -1)[..., 1:] for t in plain],
        "wide rows": [torch.cat([t, t], -1)[..., :40] for t in plain],
    }
    for what, (left, right) in views.items():
        s = sddmm(left, right, there)
        assert torch.equal(s.values.cpu(), theirs), what
        assert torch.equal(spmm(s, right).cpu(), x), what
    one = sddmm(plain[0], plain[1][:1, :1].expand(2, 3, 90, 40), there)
    expected = sddmm(q, k[:1, :1].expand(2, 3, 90, 40), layout)
    assert torch.equal(one.values.cpu(), expected.values.half())
    shifted = torch.cat([theirs[:, :1], theirs], 1).to(DEVICE)[:, 1:]
    assert torch.equal(spmm(SparseTensor(there, shifted), plain[1]).cpu(), x)


# Gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_agree_with_the_cpu(kind, masked):
    case = dataclasses.replace(CASES["heads shared"], dim=24)
    mask = key_mask(case) if masked else None
    results = []
    for device, layout in zip(("cpu", DEVICE), build(kind, case), strict=True):
        g = torch.Generator().manual_seed(3)
        q, k, v = (
            torch.randn(*case.lead_shape, n, 24, generator=g).to(device).requires_grad_()
            for n in (case.shape[0], case.shape[1], case.shape[1])
        )
        s = sddmm(q, k, layout, 0.3, None if mask is None else mask.to(device))
        o = spmm(s, v)
        first = torch.autograd.grad((o**2).sum(), (q, k, v), create_graph=True)
        second = torch.autograd.grad(sum((t**2).sum() for t in first), (q, k, v))
        results.append([t.detach().cpu() for t in (o, *first, *second)])
    for theirs, ours in zip(*results, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * scale)


def test_tf32_follows_torch():
    case = Case((64, 64), density(2.0), size=64)
    layout, there = build("block", case)
    q, k = (torch.randn(64, 64, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    exactly = reference.sddmm(q, k, layout).values
    errors = []
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            ours = sddmm(q.to(DEVICE), k.to(DEVICE), there).values.cpu().double()
            errors.append(float((ours - exactly).abs().max()))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors[0] < 2e-5
    assert 1e-4 < errors[1] < 3e-2


def test_float64_says_what_to_do():
    _, there = build("block", CASES["window"])
    q = torch.zeros(96, 8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(UnsupportedError, match="float"):
        sddmm(q, q, there)


# The device's own


@pytest.mark.parametrize("kind", KINDS)
def test_capture_and_replay(kind):
    case = Case((256, 256), band(50), size=64)
    _, there = build(kind, case)
    q = torch.randn(256, 64, device=DEVICE, dtype=torch.half)
    for _ in range(2):
        expected = spmm(sddmm(q, q, there), q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = spmm(sddmm(q, q, there), q)
    made.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(made, expected)


@pytest.mark.slow
def test_more_than_two_to_the_31_values(monkeypatch):
    monkeypatch.undo()  # no poison: this takes gigabytes
    n = 8192
    case = Case((n, n), density(2.0), size=128, free=(33,))
    there = BUILDERS["block"](case, torch.ones(1, n, n, dtype=torch.bool), (0,)).to(DEVICE)
    q = torch.randint(-1, 2, (33, n, 16), device=DEVICE).half()
    s = sddmm(q, q, there)
    assert s.values.numel() > 2**31
    blocks = s.values[-1].view(n // 128, n // 128, 128, 128).transpose(1, 2).reshape(n, n)
    assert torch.equal(blocks, q[-1] @ q[-1].mT)
    expected = (blocks.float() @ q[-1].float()).half()
    assert torch.equal(spmm(s, q)[-1], expected)
