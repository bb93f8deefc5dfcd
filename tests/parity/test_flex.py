"""attend and the primitives against torch's FlexAttention, evaluated eagerly.

Always with a real mask_mod: without one the eager path ignores which blocks are listed.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
    or_masks,
)

import mixgrain as mg
from mixgrain import patterns as P

B, H, HKV, N, D = 2, 4, 2, 150, 16
IDS = torch.tensor([[0] * 40 + [1] * 70 + [2] * 40, [0] * 10 + [5] * 140])
GENERATOR = torch.Generator().manual_seed(0)
TABLE = torch.randn(H, 2 * N, generator=GENERATOR, dtype=torch.float64)
SLOPES = 2.0 ** -torch.arange(1, H + 1, dtype=torch.float64)


def causal(b, h, i, j):
    return i >= j


def near(b, h, i, j):
    return (i - j).abs() <= 9


def documents(b, h, i, j):
    return IDS[b, i] == IDS[b, j]


def strided(b, h, i, j):
    return (i + 2 * j + h) % 5 == 0


MASKS = {
    "causal": causal,
    "window": near,
    "documents": documents,  # reads a table; differs between batch entries
    "strides": strided,  # differs between heads; no block is full or empty
    "composed": or_masks(and_masks(causal, documents), near),
}
SAME = {"causal": P.causal(), "window": P.window(9), "documents": P.documents(IDS)}
SCORES = {
    "ALiBi": (
        lambda s, b, h, i, j: s - SLOPES[h] * (i - j).abs(),
        lambda s: s.map(lambda v, i, j, h: v - SLOPES[h] * (i - j).abs()),
    ),
    "soft cap": (
        lambda s, b, h, i, j: 3 * torch.tanh(s / 3),
        lambda s: s.map(lambda v, i, j: 3 * torch.tanh(v / 3)),
    ),
    "relative bias from a table": (
        lambda s, b, h, i, j: s + TABLE[h, i - j + N],
        lambda s: s.map(lambda v, i, j, h: v + TABLE[h, i - j + N]),
    ),
    "two of them": (
        lambda s, b, h, i, j: 3 * torch.tanh((s - SLOPES[h] * (i - j).abs()) / 3),
        lambda s: s.map(lambda v, i, j, h: v - SLOPES[h] * (i - j).abs()).map(
            lambda v, i, j: 3 * torch.tanh(v / 3)
        ),
    ),
}


def qkv(heads: int = HKV) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(B, H, N, D), (B, heads, N, D), (B, heads, N, D)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, score=None) -> tuple[Tensor, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        o, aux = flex_attention(
            q, k, v, score_mod=score, block_mask=mask, enable_gqa=True,
            return_aux=AuxRequest(lse=True),
        )  # fmt: skip
    return o, aux.lse


def blocks(name: str, size: int = 32) -> BlockMask:
    return create_block_mask(MASKS[name], B, H, N, N, device="cpu", BLOCK_SIZE=size)


def near_to(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert got.shape == expected.shape
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(got), finite)
    assert (got[finite].double() - expected[finite].double()).abs().max() < tolerance


@pytest.mark.parametrize("impl", ["fused", "composed", "reference"])
@pytest.mark.parametrize("size", [16, 64, (32, 128)])
@pytest.mark.parametrize("name", MASKS)
def test_block_masks(name, size, impl) -> None:
    q, k, v = qkv()
    mask = blocks(name, size)
    expected, lse = flex(q, k, v, mask)
    o, ours = mg.attend(
        q, k, v, P.from_block_mask(mask), enable_gqa=True, return_lse=True, impl=impl
    )
    near_to(o, expected)
    near_to(ours, lse, 1e-5)  # torch keeps lse in float32
    if name in SAME:
        near_to(mg.attend(q, k, v, SAME[name], enable_gqa=True, impl=impl), expected)


@pytest.mark.parametrize("name", MASKS)
def test_elements(name) -> None:
    """The pattern keeps what the function says, element by element."""
    i, j = torch.arange(N)[:, None], torch.arange(N)[None]
    kept = P.from_block_mask(blocks(name)).dense(N, N).expand(B, H, N, N)
    for b in range(B):
        for h in range(H):
            assert torch.equal(kept[b, h], MASKS[name](*map(torch.tensor, (b, h)), i, j))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", ["causal", "window", "documents"])
def test_score_functions(name, score) -> None:
    """score_mod is map between sddmm and softmax, with the same arguments."""
    q, k, v = qkv()
    theirs, ours = SCORES[score]
    expected, lse = flex(q, k, v, blocks(name), theirs)
    for kind in ("mixed", "block", "row"):
        layout = SAME[name].to_layout(kind, N, N, 16)
        p, sums = mg.softmax(ours(mg.sddmm(q, k, layout, scale=D**-0.5)), return_lse=True)
        near_to(mg.spmm(p, v), expected)
        near_to(sums, lse, 1e-5)


def test_gradients_through_score_functions() -> None:
    """Against the definition: FlexAttention has no backward on the CPU."""
    theirs, ours = SCORES["two of them"]
    i, j, h = torch.arange(N)[:, None], torch.arange(N)[None], torch.arange(H)[:, None, None]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = theirs(q @ k.transpose(-1, -2) * D**-0.5, None, h, i, j)
        return s.masked_fill(~near(None, h, i, j), -torch.inf).softmax(-1) @ v

    with torch.no_grad():
        near_to(dense(*qkv(heads=H)), flex(*qkv(heads=H), blocks("window"), theirs)[0])
    weight = torch.randn(B, H, N, D, generator=torch.Generator().manual_seed(2)).double()
    found = []
    for attention in (
        dense,
        lambda q, k, v: mg.spmm(
            mg.softmax(ours(mg.sddmm(q, k, P.window(9).to_layout("mixed", N, N), scale=D**-0.5))), v
        ),
    ):
        inputs = [x.requires_grad_() for x in qkv(heads=H)]
        found.append(torch.autograd.grad(attention(*inputs), inputs, weight))
    for got, expected in zip(found[1], found[0], strict=True):
        near_to(got, expected)


def test_listed_blocks() -> None:
    """One full block, two partial ones, the rest empty; a row of blocks sees nothing."""
    size, n = 32, 96
    count = torch.tensor([[[1, 1, 0]]], dtype=torch.int32)
    index = torch.tensor([[[[1, 0, 2], [2, 0, 1], [0, 1, 2]]]], dtype=torch.int32)
    full = torch.tensor([[[1, 0, 0]]], dtype=torch.int32)
    full_index = torch.tensor([[[[0, 1, 2], [0, 1, 2], [0, 1, 2]]]], dtype=torch.int32)

    def inside(b, h, i, j):
        listed = (i < 32) & (j < 32) | (i < 32) & (j >= 32) & (j < 64) & ((i + j) % 3 == 0)
        return listed | (i >= 32) & (i < 64) & (j >= 64) & ((i + j) % 3 == 0)

    mask = BlockMask.from_kv_blocks(
        count, index, full, full_index, BLOCK_SIZE=size, mask_mod=inside, seq_lengths=(n, n)
    )
    q, k, v = (x[:, :, :n] for x in qkv())
    expected, lse = flex(q, k, v, mask)
    o, ours = mg.attend(q, k, v, P.from_block_mask(mask), enable_gqa=True, return_lse=True)
    near_to(o[:, :, :64], expected[:, :, :64])
    near_to(ours[:, :, :64], lse[:, :, :64], 1e-5)
    assert not o[:, :, 64:].any() and bool((ours[:, :, 64:] == -torch.inf).all())


def test_decoding() -> None:
    """Queries fewer than keys: FlexAttention counts them from 0, so its function adds the shift."""
    q, k, v = qkv()
    nq = 7
    shifted = create_block_mask(
        lambda b, h, i, j: near(b, h, i + N - nq, j) & causal(b, h, i + N - nq, j),
        B, H, nq, N, device="cpu", BLOCK_SIZE=32,
    )  # fmt: skip
    expected = flex(q[:, :, -nq:], k, v, shifted)[0]
    near_to(mg.attend(q[:, :, -nq:], k, v, P.window(9, 0), enable_gqa=True), expected)
