"""Dynamic N:M on a GPU: pruned scores against the CPU's, bit for bit where sums are exact."""

import math

import pytest
import torch
from test_cuda_block import (
    DEVICE,
    poisoned,  # noqa: F401  # a fixture for all tests here: outputs hold NaN before they are written
    zero_bits,
)
from torch import Tensor

from mixgrain import patterns as P
from mixgrain.formats.cache import clear_caches
from mixgrain.formats.errors import UnsupportedError
from mixgrain.formats.nm import NMLayout
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives import reference
from mixgrain.primitives.cuda import nm_scores
from mixgrain.primitives.sddmm import sddmm
from mixgrain.primitives.softmax import softmax

pytestmark = pytest.mark.gpu
HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
DTYPES = (HALF, BRAIN, FLOAT)
EPSILON = {HALF: 2.0**-11, BRAIN: 2.0**-8, FLOAT: 2.0**-24}


@pytest.fixture(params=[False, True], ids=["best", "portable"])
def portable(request, monkeypatch):
    """The kernels that this device would take, then those that every device can."""
    if not request.param:
        yield False
        return
    clear_caches()  # of calls prepared for the others
    monkeypatch.setattr(nm_scores, "runs_here", lambda *_: False)
    yield True
    clear_caches()


def integers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Few and small ones, so that most groups hold ties."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=g).to(dtype)


# leading dimensions, nq, nk, D, static pattern, why
CASES = {
    "whole tiles": ((), 128, 128, 64, None),
    "padded": ((3,), 20, 70, 24, None),  # 20 rows of 32, 70 columns of 128
    "odd keys": ((2, 3), 33, 131, 40, None),  # a short last group, and keys that come by twos
    "one key": ((2,), 3, 1, 8, None),
    "two keys": ((2,), 3, 2, 8, None),
    "three keys": ((1, 2), 70, 3, 8, None),
    "long rows": ((2,), 200, 2500, 64, None),  # several chunks of columns
    "many matrices": ((3, 51), 256, 200, 64, None),  # CTAs take whole row tiles, then parts of some
    "wide": ((2,), 65, 200, 128, None),  # two panels of the head dimension
    "many wide": ((2, 70), 250, 100, 128, None),
    "widest": ((1, 2), 130, 150, 256, None),
    "beyond": ((1, 2), 70, 90, 320, None),  # no room for Q as a whole
    "narrow": ((), 40, 80, 5, None),  # rows that are no multiple of 16 bytes
    "no width": ((2,), 33, 66, 0, None),
    "no queries": ((2,), 0, 70, 16, None),
    "no keys": ((2,), 7, 0, 16, None),
    "window": ((2, 2), 150, 150, 64, P.window(20)),
    "causal": ((2,), 70, 130, 64, P.causal()),  # nq < nk
    "wide causal": ((1, 2), 300, 300, 128, P.causal()),  # several steps a row, two panels
    "documents": ((3,), 80, 80, 16, P.documents(torch.arange(80) // 30)),
    "per head": ((2, 2), 70, 70, 64, P.per_head([P.window(5), P.causal()])),
    "per batch": ((2, 3), 70, 75, 32, P.per_batch([P.window(5), P.causal()])),
    "none kept": ((2,), 70, 70, 16, P.from_dense(torch.zeros(70, 70, dtype=torch.bool))),
}


def made(name: str, dtype: torch.dtype, nm: tuple[int, int], masked: bool):
    """q, k, pattern and key mask of a case, on the CPU."""
    lead, nq, nk, width, static = CASES[name]
    q = integers(*lead, nq, width, dtype=dtype, seed=0)
    k = integers(*lead, nk, width, dtype=dtype, seed=1)
    pattern = P.nm(*nm) if static is None else static & P.nm(*nm)
    mask = None
    if masked:
        batch = lead[-2:-1] if len(lead) > 1 else ()
        mask = torch.rand(*batch, nk, generator=torch.Generator().manual_seed(2)) < 0.6
    return q, k, pattern, mask


def there(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(DEVICE)


def same(ours: SparseTensor, theirs: SparseTensor) -> None:
    """The same choice and the same values; zeros in dead slots."""
    assert isinstance(ours.layout, NMLayout)
    assert isinstance(theirs.layout, NMLayout)
    assert ours.layout.encoding == theirs.layout.encoding
    assert ours.layout.grid == theirs.layout.grid
    assert torch.equal(ours.layout.metadata.cpu(), theirs.layout.metadata)
    torch.testing.assert_close(ours.values.cpu(), theirs.values, rtol=0, atol=0, equal_nan=True)
    live = theirs.live()
    if live is not None:
        assert zero_bits(ours.values.cpu()[~live.expand_as(theirs.values)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nm", [(2, 4), (1, 2)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_keeps_what_the_definition_keeps(name, nm, dtype, portable):
    for masked in (False, True):
        q, k, pattern, mask = made(name, dtype, nm, masked)
        for scale in (0.5,) if masked else (0.5, -0.25):
            ours = sddmm(q.to(DEVICE), k.to(DEVICE), pattern, scale, there(mask))
            same(ours, sddmm(q, k, pattern, scale, mask))


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_another_dtype(dtype, out):
    for nm in ((2, 4), (1, 2)):
        q, k, pattern, _ = made("padded", dtype, nm, False)
        ours = sddmm(q.to(DEVICE), k.to(DEVICE), pattern, out_dtype=out)
        same(ours, sddmm(q, k, pattern, out_dtype=out))


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-30, math.inf])
def test_scales_at_the_edge(scale, portable):
    q, k, pattern, mask = made("odd keys", FLOAT, (2, 4), True)
    for dtype in (FLOAT, BRAIN):
        ours = sddmm(q.to(DEVICE, dtype), k.to(DEVICE, dtype), pattern, scale, there(mask))
        expected = sddmm(q.to(dtype), k.to(dtype), pattern, scale, mask)
        if scale == 1e-30 or math.isinf(scale):
            assert torch.equal(ours.values.cpu().isnan(), expected.values.isnan())
        same(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["odd keys", "causal"])
def test_scores_that_are_no_numbers(name, dtype, portable):
    """NaN counts as the largest; what stands in dropped keys is never met."""
    q, k, pattern, mask = made(name, dtype, (2, 4), True)
    k[..., 9, :], k[..., 21, 0], k[..., 23, 0], k[..., 40, 1] = math.nan, math.inf, -math.inf, 3
    q[..., 4, :], q[..., 5, 0] = math.nan, math.inf
    for given in (None, mask):
        ours = sddmm(q.to(DEVICE), k.to(DEVICE), pattern, 0.5, there(given))
        same(ours, sddmm(q, k, pattern, 0.5, given))
    dropped = torch.ones_like(mask)
    dropped[..., [9, 21, 23]] = False
    q = q.nan_to_num(0, 1, -1)
    ours = sddmm(q.to(DEVICE), k.to(DEVICE), pattern, 0.5, there(dropped))
    assert ours.values.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nm", [(2, 4), (1, 2)], ids=str)
@pytest.mark.parametrize("size", [(500, 1000, 64), (300, 700, 128)], ids=str)
def test_kept_sets_are_those_of_float64_but_for_ties(size, nm, dtype, portable):
    nq, nk, width = size
    g = torch.Generator(DEVICE).manual_seed(0)
    q, k = (torch.randn(2, n, width, device=DEVICE, generator=g).to(dtype) for n in (nq, nk))
    s = sddmm(q, k, P.nm(*nm), scale=width**-0.5)
    dense, kept = reference.prune(q, k, *nm, scale=width**-0.5)
    mine = s.with_values(torch.ones_like(s.values)).to_dense() > 0
    assert (mine.sum(-1) == kept.sum(-1)).all()
    different = (mine != kept).unflatten(-1, (-1, nm[1]))
    assert different.any(-1).double().mean() <= 0.005
    # What was taken is as large as what was left out.
    groups = dense.unflatten(-1, (-1, nm[1]))
    taken = torch.where(different & mine.unflatten(-1, (-1, nm[1])), groups, 0).sum(-1)
    left = torch.where(different & kept.unflatten(-1, (-1, nm[1])), groups, 0).sum(-1)
    allowed = 1e-5 * groups.abs().amax(-1).clamp(min=1)
    assert ((taken - left).abs() <= allowed).all()
    expected = dense[mine].view_as(s.values[s.values != 0]) if (s.values != 0).all() else None
    if expected is not None:
        torch.testing.assert_close(
            s.values.double(), expected, rtol=1.05 * EPSILON[dtype] + 1e-6, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_torch_takes_values_and_metadata(dtype):
    """They are those of torch's semi-structured tensors, bit for bit."""
    from torch.sparse import _semi_structured_conversions as theirs

    g = torch.Generator(DEVICE).manual_seed(0)
    q, k = (torch.randn(n, 64, device=DEVICE, generator=g).to(dtype) for n in (128, 256))
    s = sddmm(q, k, P.nm(2, 4))
    dense = s.to_dense()
    assert (s.values != 0).all()
    values, metadata = theirs.sparse_semi_structured_from_dense_cutlass(dense)
    assert torch.equal(values, s.values.view(128, 128))
    assert torch.equal(metadata.flatten(), s.layout.metadata.flatten())
    back = theirs.sparse_semi_structured_to_dense_cutlass(
        s.values.view(128, 128), s.layout.metadata.view(128, 16)
    )
    assert torch.equal(back, dense)


@pytest.mark.parametrize("name", ["padded", "causal", "per head"])
def test_repeats_and_does_not_depend_on_what_is_beside_it(name, portable):
    lead, nq, nk, width, static = CASES[name]
    g = torch.Generator(DEVICE).manual_seed(0)
    q, k = (torch.randn(*lead, n, width, device=DEVICE, generator=g).half() for n in (nq, nk))
    pattern = P.nm(2, 4) if static is None else static & P.nm(2, 4)
    a, b = sddmm(q, k, pattern), sddmm(q, k, pattern)
    assert torch.equal(a.values, b.values)
    assert torch.equal(a.layout.metadata, b.layout.metadata)
    assert a.layout.key != b.layout.key
    if name == "per head":
        return
    alone = sddmm(q[1], k[1], pattern)
    size = alone.layout.slots
    assert torch.equal(a.values[size : 2 * size], alone.values)
    p, lse = softmax(a, return_lse=True)
    q_alone, lse_alone = softmax(alone, return_lse=True)
    assert torch.equal(p.values[size : 2 * size], q_alone.values)
    assert torch.equal(lse[1], lse_alone)


def test_strided_and_grouped_operands():
    """(B, N, H, D) in memory, and query heads that share key heads."""
    q = integers(2, 90, 6, 64, dtype=HALF, seed=0)
    k = integers(2, 110, 2, 64, dtype=HALF, seed=1)
    ours = sddmm(q.to(DEVICE).transpose(1, 2), k.to(DEVICE).transpose(1, 2), P.nm(2, 4))
    same(ours, sddmm(q.transpose(1, 2), k.transpose(1, 2), P.nm(2, 4)))


def test_calls_prepared_once_take_new_metadata_and_keep_none():
    g = torch.Generator(DEVICE).manual_seed(0)
    before = None
    for n in range(40):
        q, k = (torch.randn(4, 256, 64, device=DEVICE, generator=g).half() for _ in range(2))
        s = sddmm(q, k, P.nm(2, 4))
        again = sddmm(q, k, s.layout)
        assert torch.equal(again.values, s.values)
        p = softmax(s)
        dense = torch.where(s.to_dense() == 0, -math.inf, s.to_dense().double()).softmax(-1)
        torch.testing.assert_close(p.to_dense().double(), dense, rtol=2e-3, atol=1e-4)
        del q, k, s, again, p, dense
        if n == 10:
            before = torch.cuda.memory_allocated()
    assert torch.cuda.memory_allocated() == before


def test_captures_into_a_graph():
    q, k = (torch.randn(2, 128, 64, device=DEVICE).half() for _ in range(2))

    def call() -> Tensor:
        return softmax(sddmm(q, k, P.causal() & P.nm(2, 4))).to_dense()

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = softmax(sddmm(q, k, P.causal() & P.nm(2, 4))).values
    q.copy_(torch.randn_like(q))
    graph.replay()
    s = sddmm(q, k, P.causal() & P.nm(2, 4))
    assert torch.equal(out, softmax(s).values)


@pytest.mark.parametrize("nm, expected", [((2, 4), 0.797), ((1, 2), 0.760)])
def test_kept_mass_of_normal_scores(nm, expected):
    g = torch.Generator(DEVICE).manual_seed(0)
    q = torch.randn(1024, 64, device=DEVICE, generator=g)
    q = q / q.norm(dim=1, keepdim=True)  # scores of variance 1
    k = torch.randn(4096, 64, device=DEVICE, generator=g)
    s = sddmm(q, k, P.nm(*nm))
    _, lse = softmax(s, return_lse=True)
    mass = (lse - (q @ k.T).logsumexp(-1)).exp().mean()
    assert abs(mass.item() - expected) < 0.004


def test_other_groups_are_refused():
    q = torch.randn(32, 16, device=DEVICE)
    with pytest.raises(UnsupportedError, match="4:8"):
        sddmm(q, q, P.nm(4, 8))
