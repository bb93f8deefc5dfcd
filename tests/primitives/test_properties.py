"""Properties that hold for every layout, mostly exactly: small integers in float64 do not round."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis")
from cases import BUILDERS, Case, density, masks_of
from hypothesis import given
from hypothesis import strategies as st

from mixgrain.formats.layout import Layout
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives.sddmm import sddmm
from mixgrain.primitives.softmax import softmax
from mixgrain.primitives.spmm import spmm

KINDS = [kind for kind in BUILDERS if kind != "tile"]
ROWLIKE = ["block", "row", "mixed", "panel"]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, int]:
    """A random matrix of blocks, entries and density, and a seed."""
    lead = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)]))
    entries = lead[0] * lead[1]
    used = draw(st.lists(st.integers(0, entries - 1), min_size=entries, max_size=entries))
    renumber = {u: i for i, u in enumerate(dict.fromkeys(used))}
    case = Case(
        shape=(draw(st.integers(0, 40)), draw(st.integers(0, 40))),
        mask=density(draw(st.sampled_from([0.02, 0.2, 0.5, 0.9, 2.0]))),
        lead=lead,
        entry=tuple(renumber[u] for u in used),
        free=draw(st.sampled_from([(), (2,)])),
        dim=draw(st.integers(1, 9)),
        nm=draw(st.sampled_from([(2, 4), (1, 2), (4, 8), (1, 16)])),
    )
    return case, draw(st.integers(0, 2**20))


def made(kind: str, drawn: tuple[Case, int]) -> tuple[Layout, Case, torch.Generator]:
    case, seed = drawn
    layout = BUILDERS[kind](case, *masks_of(case, seed))
    return layout, case, torch.Generator().manual_seed(seed)


def whole(g: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=g).double()


@pytest.mark.parametrize("kind", KINDS)
@given(drawn=cases())
def test_adjoint(kind: str, drawn: tuple[Case, int]) -> None:
    """<sddmm(q, k), s> = <q, s k> = <k, sᵀ q>, exactly."""
    layout, case, g = made(kind, drawn)
    q, k = (whole(g, *case.lead_shape, n, case.dim) for n in case.shape)
    s = SparseTensor(layout, whole(g, *case.free, layout.slots))
    left = (sddmm(q, k, layout).values * s.values).sum()
    assert left == (q * spmm(s, k)).sum() == (k * spmm(s.T, q)).sum()


@pytest.mark.parametrize("kind", KINDS)
@given(drawn=cases())
def test_equals_dense_exactly(kind: str, drawn: tuple[Case, int]) -> None:
    layout, case, g = made(kind, drawn)
    q, k = (whole(g, *case.lead_shape, n, case.dim) for n in case.shape)
    s = sddmm(q, k, layout, scale=2.0)
    mask = s.with_values(torch.ones_like(s.values)).to_dense()
    assert torch.equal(s.to_dense(), 2 * (q @ k.mT) * mask)
    assert torch.equal(spmm(s, k), s.to_dense() @ k)
    assert torch.equal(spmm(s.T, q), s.to_dense().mT @ q)


@pytest.mark.parametrize("kind", KINDS)
@given(drawn=cases())
def test_linear_in_each_argument(kind: str, drawn: tuple[Case, int]) -> None:
    layout, case, g = made(kind, drawn)
    nq, nk = case.shape
    q, r = (whole(g, *case.lead_shape, nq, case.dim) for _ in range(2))
    k, m = (whole(g, *case.lead_shape, nk, case.dim) for _ in range(2))
    s, t = (SparseTensor(layout, whole(g, *case.free, layout.slots)) for _ in range(2))
    both = sddmm(q + r, k, layout).values
    assert torch.equal(both, sddmm(q, k, layout).values + sddmm(r, k, layout).values)
    assert torch.equal(spmm(s + t, k), spmm(s, k) + spmm(t, k))
    assert torch.equal(spmm(s, k + m), spmm(s, k) + spmm(s, m))


@pytest.mark.parametrize("kind", ROWLIKE)
@given(drawn=cases())
def test_permuting_keys_permutes_nothing_else(kind: str, drawn: tuple[Case, int]) -> None:
    """Keys and values in another order under a mask in that order give the same output."""
    case, seed = drawn
    masks, entry = masks_of(case, seed)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(case.shape[1], generator=g)
    q, k = (whole(g, *case.lead_shape, n, case.dim) for n in case.shape)
    before = BUILDERS[kind](case, masks, entry)
    after = BUILDERS[kind](case, masks[..., order], entry)
    ours = spmm(sddmm(q, k, before), k)
    theirs = spmm(sddmm(q, k[..., order, :], after), k[..., order, :])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@given(drawn=cases())
def test_softmax_sums_to_one_and_ignores_shifts(kind: str, drawn: tuple[Case, int]) -> None:
    layout, case, g = made(kind, drawn)
    s = SparseTensor(layout, torch.randn(*case.free, layout.slots, generator=g).double())
    p, lse = softmax(s, return_lse=True)
    ones = torch.ones(case.shape[1], 1, dtype=torch.float64)
    kept = spmm(s.with_values(torch.ones_like(s.values)), ones)[..., 0] > 0
    torch.testing.assert_close(spmm(p, ones)[..., 0], kept.double(), rtol=1e-12, atol=0)
    assert torch.equal(lse > -torch.inf, kept)
    shifted, more = softmax(s.with_values(s.values + 3), return_lse=True)
    torch.testing.assert_close(shifted.values, p.values, rtol=1e-12, atol=0)
    torch.testing.assert_close(more, lse + 3, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ROWLIKE)
@given(drawn=cases(), extra=st.integers(0, 2**10))
def test_a_further_key_never_lowers_lse(kind: str, drawn: tuple[Case, int], extra: int) -> None:
    case, seed = drawn
    masks, entry = masks_of(case, seed)
    more = masks | masks_of(case, seed + 1 + extra)[0]
    g = torch.Generator().manual_seed(seed)
    q, k = (whole(g, *case.lead_shape, n, case.dim) / 8 for n in case.shape)
    few, many = (
        softmax(sddmm(q, k, BUILDERS[kind](case, m, entry)), return_lse=True)[1]
        for m in (masks, more)
    )
    assert bool((many >= few - 1e-12).all())


@given(drawn=cases())
def test_layouts_agree(drawn: tuple[Case, int]) -> None:
    """Attention does not depend on how the same pattern lies in memory."""
    case, seed = drawn
    masks, entry = masks_of(case, seed)
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(*case.lead_shape, n, case.dim, generator=g).double() for n in case.shape)
    results = []
    for kind in ROWLIKE:
        p, lse = softmax(sddmm(q, k, BUILDERS[kind](case, masks, entry)), return_lse=True)
        results.append((spmm(p, k), lse))
    for o, lse in results[1:]:
        torch.testing.assert_close(o, results[0][0], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(lse, results[0][1], rtol=1e-11, atol=1e-11)
