"""The short way of N:M chosen by score, on the CPU: a stand-in runs for prepared calls."""

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mixgrain.formats import patterns as P
from mixgrain.formats.errors import DtypeError, LayoutError
from mixgrain.formats.nm import NMLayout
from mixgrain.primitives import lately, recorded_nm
from mixgrain.primitives.sddmm import sddmm
from mixgrain.primitives.softmax import softmax
from mixgrain.primitives.spmm import spmm

PATTERNS = {"alone": P.nm(2, 4), "pairs": P.nm(1, 2), "within": P.nm(2, 4) & P.window(9)}
LEADS = {"plain": (), "heads": (3,), "both": (2, 3), "one batch": (1, 3)}
NQ, NK = 20, 28


def operands(lead: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*lead, n, 8, generator=g, dtype=torch.float64).requires_grad_()
        for n in (NQ, NK, NK)
    ]


def attention(q, k, v, pattern, mask=None):
    p, lse = softmax(sddmm(q, k, pattern, 0.3, mask), return_lse=True)
    return spmm(p, v), lse


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("name", PATTERNS)
def test_the_short_way_equals_the_long_way(name, lead, masked, runs):
    mask = torch.rand(NK, generator=torch.Generator().manual_seed(9)) < 0.8 if masked else None
    if masked and lead == "both":
        mask = torch.stack([mask, ~mask])
    for seed in range(3):  # other scores, other positions
        given = operands(LEADS[lead], seed)
        with torch.device("cpu"):  # something watches: the operators
            runs.clear()
            o, lse = attention(*given, PATTERNS[name], mask)
            right = [o, lse, *torch.autograd.grad(o.square().sum(), given)]
            assert runs == []
        runs.clear()
        o, lse = attention(*given, PATTERNS[name], mask)
        assert runs == ["prune", "softmax", "spmm"]
        runs.clear()
        found = [o, lse, *torch.autograd.grad(o.square().sum(), given)]
        assert runs == ["sddmm+spmm_t", "softmax_backward", "spmm+spmm_t"]
        assert runs.prepared == 6
        assert all(map(torch.equal, found, right))


def test_every_call_has_a_layout_of_its_own(runs):
    q, k, v = (t.detach() for t in operands((3,)))
    a, b = sddmm(q, k, P.nm(2, 4)), sddmm(q, k, P.nm(2, 4))
    assert runs == ["prune", "prune"]
    assert runs.prepared == 1
    assert a.layout != b.layout
    assert a.layout.home == torch.device("cpu")
    for s in (a, b):
        s.layout.validate()
        assert torch.equal(s.to_dense(), a.to_dense())
    turned = spmm(a.T, q), spmm(b.T, q)
    assert runs == ["prune", "prune", "spmm", "spmm"]
    assert runs.prepared == 2
    assert torch.equal(*turned)
    assert torch.equal(spmm(b, v), a.to_dense() @ v) or torch.allclose(spmm(b, v), a.to_dense() @ v)


def test_what_was_not_validated_is(runs):
    q, k, v = (t.detach() for t in operands(()))
    s = sddmm(q, k, P.nm(2, 4))
    spmm(s, v)
    spmm(s, v)
    assert runs == ["prune", "spmm", "spmm"]
    layout = s.layout
    wrong = NMLayout.from_metadata(
        torch.full_like(layout.metadata, -1), layout.shape, 2, 4, encoding="2:4"
    )
    with pytest.raises(LayoutError):
        spmm(type(s)(wrong, s.values), v)
    same = NMLayout.from_metadata(layout.metadata.clone(), layout.shape, 2, 4, encoding="2:4")
    given = type(s)(same, s.values)
    prepared = runs.prepared
    assert torch.equal(spmm(given, v), spmm(given, v))
    assert runs.prepared == prepared


def test_nothing_holds_the_positions_of_a_call(runs):
    given = [t.detach() for t in operands((2,))]
    s = sddmm(*given[:2], P.nm(2, 4))
    p = softmax(s)
    spmm(p, given[2])
    held = [weakref.ref(s.layout.metadata), weakref.ref(s.layout)]
    del s, p
    gc.collect()
    assert [ref() for ref in held] == [None, None]


def test_every_part_of_a_signature_counts(runs):
    q, k, _ = (t.detach() for t in operands((2,)))
    sddmm(q, k, P.nm(2, 4))
    sddmm(q, k, P.nm(2, 4))
    assert runs == ["prune", "prune"]
    others = {
        "pattern": lambda: sddmm(q, k, P.nm(1, 2)),
        "scale": lambda: sddmm(q, k, P.nm(2, 4), 2.0),
        "dtype": lambda: sddmm(q, k, P.nm(2, 4), out_dtype=torch.float32),
        "mask": lambda: sddmm(q, k, P.nm(2, 4), key_mask=torch.ones(NK, dtype=torch.bool)),
        "shape": lambda: sddmm(q[:1], k[:1], P.nm(2, 4)),
        "strides": lambda: sddmm(q.mT.contiguous().mT, k, P.nm(2, 4)),
    }
    for count, (name, call) in enumerate(others.items()):
        call()
        assert runs.prepared == count + 2, name
    runs.clear()
    for _ in range(2):
        sddmm(q, k, P.nm(2, 4), 0.0)
    with pytest.raises(DtypeError):
        sddmm(q, k, P.nm(2, 4), out_dtype=["float32"])
    with pytest.raises(DtypeError):
        sddmm(q, k.float(), P.nm(2, 4))
    with torch.autocast("cpu", torch.bfloat16):
        sddmm(q, k, P.nm(2, 4))
    torch.func.vmap(lambda a, b: sddmm(a, b, P.nm(2, 4)).values)(q, k)
    single = k[:1].requires_grad_()  # broadcast: not recorded
    for _ in range(2):
        assert sddmm(q, single, P.nm(2, 4)).values.requires_grad
    assert runs == []


def test_double_backward(runs):
    found = []
    for _ in range(3):
        given = operands((2,))
        o, _ = attention(*given, P.nm(2, 4))
        (first,) = torch.autograd.grad(o.square().sum(), given[0], create_graph=True)
        found.append([first, *torch.autograd.grad(first.square().sum(), given)])
    assert runs.count("prune") == 3
    for made in found[1:]:
        for a, b in zip(made, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("warm", [False, True])
def test_checkpoints(warm, runs):
    given = operands((2,))
    if not warm:
        o = checkpoint(lambda *t: attention(*t, P.nm(2, 4))[0], *given, use_reentrant=False)
        o.square().sum().backward()
    right = torch.autograd.grad(attention(*given, P.nm(2, 4))[0].square().sum(), given)
    o = checkpoint(lambda *t: attention(*t, P.nm(2, 4))[0], *given, use_reentrant=False)
    found = torch.autograd.grad(o.square().sum(), given)
    assert all(map(torch.equal, found, right))


def test_caches_are_bounded_and_cleared(runs):
    from mixgrain.formats.cache import clear_caches

    q, k, _ = (t.detach() for t in operands(()))
    for n in range(1, lately.SIGNATURES + 5):
        sddmm(q[:, :1].expand(NQ, n).contiguous(), k[:, :1].expand(NK, n).contiguous(), P.nm(2, 4))
    assert max(map(len, recorded_nm._choices._values.values())) <= lately.SIGNATURES
    clear_caches()
    assert len(recorded_nm._choices) == 0
