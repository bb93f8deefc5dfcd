"""Dynamic N:M against an oracle that sorts every group."""

from __future__ import annotations

import pytest
import torch

from mixgrain.formats import patterns as P
from mixgrain.formats.errors import LayoutError, ShapeError
from mixgrain.formats.nm import NMLayout
from mixgrain.primitives import reference
from mixgrain.primitives.sddmm import sddmm
from mixgrain.primitives.softmax import softmax
from mixgrain.primitives.spmm import spmm

# (n, m), leading shape, nq, nk, static pattern, why
CASES = {
    "2:4": ((2, 4), (), 33, 64, None),
    "2:4 padded": ((2, 4), (3,), 20, 70, None),  # 20 rows of 32, 70 columns of 128
    "1:2": ((1, 2), (2, 3), 17, 31, None),  # a short last group of one
    "4:8": ((4, 8), (2, 1), 9, 20, None),  # the bytes encoding, a group of four members
    "3:5": ((3, 5), (1, 2), 9, 23, None),  # m that divides nothing
    "2:2": ((2, 2), (1, 1), 9, 23, None),  # keeps everything
    "1:16": ((1, 16), (2, 2), 40, 40, None),
    "2:4 window": ((2, 4), (2, 2), 150, 150, P.window(20)),  # several blocks in a row
    "2:4 causal": ((2, 4), (), 70, 130, P.causal()),  # nq < nk
    "1:2 documents": ((1, 2), (3,), 80, 80, P.documents(torch.arange(80) // 30)),
    "4:8 per head": ((4, 8), (2, 2), 70, 70, P.per_head([P.window(5), P.causal()])),
    "none kept": ((2, 4), (2,), 70, 70, P.from_dense(torch.zeros(70, 70, dtype=torch.bool))),
    "no queries": ((2, 4), (2,), 0, 70, None),
    "no keys": ((2, 4), (2,), 7, 0, None),
}


def operands(name: str, dtype: torch.dtype = torch.float64, seed: int = 0):
    (n, m), lead, nq, nk, static = CASES[name]
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(*lead, nq, 6, generator=g, dtype=torch.float64).to(dtype)
    k = torch.randn(*lead, nk, 6, generator=g, dtype=torch.float64).to(dtype)
    pattern = P.nm(n, m) if static is None else static & P.nm(n, m)
    mask = None
    if static is not None:
        mask = static.dense(nq, nk)
    return q, k, pattern, mask


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("masked", [False, True])
def test_keeps_the_largest_of_each_group(name: str, masked: bool) -> None:
    q, k, pattern, mask = operands(name)
    (n, m), lead, _, nk, _ = CASES[name]
    drop = None
    if masked:
        batch = lead[-2:-1] if len(lead) > 1 else ()
        drop = torch.rand(*batch, nk, generator=torch.Generator().manual_seed(1)) < 0.6
    s = sddmm(q, k, pattern, scale=0.3, key_mask=drop)
    assert isinstance(s.layout, NMLayout)
    if drop is None or mask is None:
        # With both masks a group may hold fewer live positions than its static pattern promises.
        s.layout.validate()
    dense, kept = reference.prune(q, k, n, m, mask, 0.3, drop)
    # The layout's own mask ignores run-time masks: what they drop is dead but still stored.
    live = s.live()
    flags = torch.ones_like(s.values) if live is None else live.double().expand_as(s.values)
    assert torch.equal(s.with_values(flags).to_dense() > 0, kept)
    torch.testing.assert_close(s.to_dense(), torch.where(kept, dense, 0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["2:4", "1:2", "4:8", "2:4 window", "4:8 per head"])
def test_attention_of_pruned_scores(name: str) -> None:
    q, k, pattern, mask = operands(name)
    n, m = CASES[name][0]
    dense, kept = reference.prune(q, k, n, m, mask)
    p, lse = reference.masked_softmax(dense, kept)
    ours, our_lse = softmax(sddmm(q, k, pattern), return_lse=True)
    torch.testing.assert_close(our_lse, lse, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(spmm(ours, k), p @ k, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["2:4 padded", "1:2", "3:5", "2:4 window"])
def test_gradients_flow_to_the_kept_scores(name: str) -> None:
    q, k, pattern, _ = operands(name)
    q, k = q[..., :12, :3].contiguous(), k[..., :12, :3].contiguous()
    pattern = P.nm(*CASES[name][0]) if "window" not in name else P.window(3) & P.nm(2, 4)

    def f(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return spmm(softmax(sddmm(q, k, pattern)), k)

    inputs = (q.requires_grad_(), k.requires_grad_())
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_compares_sums_before_rounding(dtype: torch.dtype) -> None:
    """Scores that agree once rounded are told apart, and ties go to the lower index."""
    step = torch.finfo(dtype).eps / 4 if dtype != torch.float32 else 0.0
    k = torch.zeros(8, 2, dtype=dtype)
    k[:, 0], k[:4, 1] = 1, torch.tensor([0, 1, 2, 3], dtype=dtype)
    q = torch.tensor([[1.0, step]], dtype=dtype)
    s = sddmm(q, k, P.nm(2, 4))
    kept = s.layout.columns().view(s.layout.grid)[0, 0, :2].flatten().tolist()
    assert kept == ([2, 3, 4, 5] if step else [0, 1, 4, 5])
    assert s.dtype == dtype


def test_encoding_follows_the_values() -> None:
    q = torch.randn(32, 8)
    assert sddmm(q, q, P.nm(1, 2)).layout.encoding == "1:2-float32"
    assert sddmm(q, q, P.nm(1, 2), out_dtype=torch.float16).layout.encoding == "1:2-half"
    assert sddmm(q, q, P.nm(2, 4)).layout.encoding == "2:4"


def test_batch_invariant_and_repeatable() -> None:
    q, k = torch.randn(3, 4, 100, 32), torch.randn(3, 4, 128, 32)
    whole, alone = sddmm(q, k, P.nm(2, 4)), sddmm(q[1, 2], k[1, 2], P.nm(2, 4))
    size = alone.layout.slots
    assert torch.equal(whole.values[6 * size : 7 * size], alone.values)
    assert torch.equal(whole.layout.metadata[6], alone.layout.metadata[0])


def test_errors() -> None:
    q = torch.randn(2, 2, 2, 16, 4)
    with pytest.raises(ShapeError, match="at most"):
        sddmm(q, q, P.nm(2, 4))
    with pytest.raises(LayoutError, match="groups of"):
        sddmm(q[0], q[0], P.window(3) & P.nm(1, 3))


def test_a_masked_choice_within_a_pattern_counts_what_it_stores():
    # Keys 2 and 3 of each group are in the window's corner blocks where 0 and 1 are not; dropping
    # some makes groups store positions outside the window.
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 96, 8), torch.randn(2, 1, 96, 8)
    keep = torch.rand(2, 96) < 0.5
    s = sddmm(q, k, P.window(9) & P.nm(2, 4), key_mask=keep)
    s.layout.validate()
    live = s.layout.live()
    assert live is not None
    assert s.layout.nnz == int(live.sum())


def test_devices_are_compared() -> None:
    q, k, there = torch.randn(8, 16), torch.randn(8, 16), torch.empty(8, 16, device="meta")
    with pytest.raises(ShapeError, match="meta"):
        sddmm(q, there, P.nm(2, 4))
    with pytest.raises(ShapeError, match="meta"):
        sddmm(q, k, P.nm(2, 4), key_mask=there[:, 0].bool())
