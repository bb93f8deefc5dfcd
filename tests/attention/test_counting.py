"""The counting test: exact, so it finds one lost or doubled key, which no tolerance does.

With q = 0 every kept key weighs 1 / count: round(exp(lse)) is the number of kept keys of each row,
o is the mean of integers, and with do = count · integer the gradient of v is an exact integer.
"""

import pytest
import torch
from attention_cases import PATTERNS, bernoulli, fixed_shape

import mixgrain as mg
from mixgrain import patterns as P

# (nq, nk, D, Dv) around the block sizes, longer, shorter.
SIZES = [(1, 1, 8, 3), (63, 65, 8, 4), (64, 64, 5, 8), (129, 200, 8, 7), (200, 129, 16, 8)]


def signatures(n: int, width: int, heads: int) -> torch.Tensor:
    """Integers (1, heads, n, width): sums over different sets of keys differ."""
    generator = torch.Generator().manual_seed(n)
    return torch.randint(-512, 512, (1, heads, n, width), generator=generator)


def count(kept, mask, shape, heads, impl="fused", key_mask=None, dtype=torch.float32) -> None:
    nq, nk, d, dv = shape
    hq, hk = heads
    mask = mask.expand(1, hq, nq, nk).long()
    values = signatures(nk, dv, hk)
    q = torch.zeros(1, hq, nq, d, dtype=dtype)
    k = torch.randn(1, hk, nk, d).to(dtype).requires_grad_()
    v = values.to(dtype).requires_grad_()
    o, lse = mg.attend(
        q, k, v, kept, enable_gqa=True, return_lse=True, impl=impl, key_mask=key_mask
    )
    counts = mask.sum(-1)
    assert torch.equal(torch.exp(lse).round().long(), counts)

    spread = values.repeat_interleave(hq // hk, 1)
    total = mask.double() @ spread.double()
    mean = torch.where(counts[..., None] > 0, total / counts[..., None].clamp(min=1), 0.0)
    ulp = torch.finfo(dtype).eps * mean.abs()
    assert ((o.double() - mean).abs() <= ulp).all()

    do = torch.randint(-8, 8, (1, hq, nq, dv), generator=torch.Generator().manual_seed(1))
    (dv_got,) = torch.autograd.grad(o, v, (do * counts[..., None]).to(dtype))
    expected = (mask.double().mT @ do.double()).view(1, hk, hq // hk, nk, dv).sum(2)
    assert torch.equal(dv_got.double().round(), expected)
    assert (dv_got.double() - expected).abs().max() < 0.05


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (4, 2)], ids=["one head", "grouped"])
def test_every_kept_key_counts_once(name, shape, heads) -> None:
    pattern = PATTERNS[name](*shape[:2])
    count(pattern, pattern.dense(*shape[:2]), shape, heads)


@pytest.mark.parametrize("kind", ["block", "row", "mixed"])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("name", PATTERNS)
def test_every_split_counts_the_same(name, kind, size) -> None:
    shape = (170, 300, 8, 4)
    pattern = PATTERNS[name](*shape[:2])
    layout = pattern.to_layout(kind, *shape[:2], size)
    count(layout, pattern.dense(*shape[:2]), shape, (2, 1))


def test_long_rows_are_cut_and_merged() -> None:
    # 9000 keys: more than one step takes, for blocks, panels and single rows alike.
    shape = (70, 9000, 8, 2)
    for kind in ("block", "row", "mixed"):
        pattern = P.full() if kind != "row" else P.full() - P.global_keys([5])
        count(pattern.to_layout(kind, 70, 9000), pattern.dense(70, 9000), shape, (1, 1))


def test_heads_and_batch_entries_count_for_themselves() -> None:
    heads = [P.window(3), P.random(0.1, seed=5), P.window(3), P.longformer(2, [7, 60])]
    pattern = P.per_head(heads)
    count(pattern, pattern.dense(90, 90), (90, 90, 8, 4), (4, 2))


@pytest.mark.parametrize("name", ["longformer", "from_dense", "random", "full"])
def test_dropped_keys_do_not_count(name) -> None:
    shape = (100, 140, 8, 4)
    keep = bernoulli(1, 140, 0.7, 1)
    pattern = PATTERNS[name](100, 140)
    count(pattern, pattern.dense(100, 140) & keep, shape, (2, 2), key_mask=keep)


@pytest.mark.parametrize("nm", [(2, 4), (1, 2), (3, 5), (1, 16)])
@pytest.mark.parametrize("name", [None, "longformer", "causal", "from_dense"])
def test_nm_counts_the_first_n_of_each_group_on_ties(nm, name) -> None:
    n, m = nm
    shape = (130, 150, 8, 4)
    live = torch.ones(130, 150, dtype=torch.bool)
    kept = P.nm(n, m)
    if name:
        live = PATTERNS[name](130, 150).dense(130, 150)
        kept = kept & PATTERNS[name](130, 150)
    groups = torch.nn.functional.pad(live, (0, -150 % m)).view(130, -1, m)
    first = groups & (groups.long().cumsum(-1) <= n)
    count(kept, first.flatten(1)[:, :150], shape, (2, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_counts_powers_of_two(dtype) -> None:
    # Every count a power of two and every sum below 2**8, so that the mean is representable.
    pattern = P.blocks(torch.eye(4, dtype=torch.bool), 16)
    q = torch.zeros(1, 1, 64, 8, dtype=dtype)
    v = torch.randint(-8, 8, (1, 1, 64, 4)).to(dtype).requires_grad_()
    o, lse = mg.attend(q, q, v, pattern, return_lse=True)
    assert torch.equal(torch.exp(lse).round(), torch.full_like(lse, 16.0))
    mask = pattern.dense(64, 64).double()
    assert torch.equal(o.double(), mask @ v.detach().double()[0, 0][None, None] / 16)
    do = torch.randint(-2, 3, o.shape)
    (dv,) = torch.autograd.grad(o, v, (16 * do).to(dtype))
    assert torch.equal(dv.double(), mask.mT @ do.double())


def test_fixed_shapes_are_known() -> None:
    assert [name for name in PATTERNS if fixed_shape(name)] == ["blocks", "from_dense", "from_csr"]
