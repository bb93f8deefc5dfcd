"""Patterns, shapes and comparisons that the attention tests share."""

from collections.abc import Callable

import torch
from torch import Tensor

import mixgrain as mg
from mixgrain import patterns as P


def _from_csr(nq: int, nk: int) -> object:
    mask = bernoulli(nq, nk, 0.2, 11)
    offsets = torch.zeros(nq + 1, dtype=torch.int64)
    offsets[1:] = mask.sum(1).cumsum(0)
    return P.from_csr(offsets, mask.nonzero()[:, 1], (nq, nk))


def bernoulli(nq: int, nk: int, density: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(nq, nk, generator=generator) < density


def blocks_of(nq: int, nk: int, size: int, seed: int, heads: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    lead = (heads,) if heads else ()
    return torch.rand(*lead, -(-nq // size), -(-nk // size), generator=generator) < 0.5


# Every constructor, as a function of the shape; the comment says what it is there for.
PATTERNS: dict[str, Callable[[int, int], object]] = {
    "full": lambda nq, nk: P.full(),
    "causal": lambda nq, nk: P.causal(),  # rows of every length
    "window": lambda nq, nk: P.window(5),  # partial blocks only
    "one-sided window": lambda nq, nk: P.window(9, 0),
    "dilated": lambda nq, nk: P.dilated(4, 3),  # nothing contiguous
    "global tokens": lambda nq, nk: P.global_tokens([0, 3, nk // 2]),
    "global keys": lambda nq, nk: P.global_keys([1, nk - 1]),
    "global queries": lambda nq, nk: P.global_queries([nk - 1, nk // 2]),  # most rows are empty
    "sinks": lambda nq, nk: P.sinks(3) | P.window(2, 0),
    "documents": lambda nq, nk: P.documents(torch.arange(nk) * 4 // max(nk, 1)),
    "scattered documents": lambda nq, nk: P.documents(torch.arange(nk) % 3),
    "blocks": lambda nq, nk: P.blocks(blocks_of(nq, nk, 16, 5), 16),
    "random": lambda nq, nk: P.random(0.1, seed=3),  # single entries
    "random blocks": lambda nq, nk: P.random_blocks(2, 16, seed=4),
    "longformer": lambda nq, nk: P.longformer(6, [0, nk // 3]),  # blocks and both shared panels
    "bigbird": lambda nq, nk: P.bigbird(16, 1, 1, 1, seed=2),
    "from_dense": lambda nq, nk: P.from_dense(bernoulli(nq, nk, 0.3, 7)),
    "from_csr": _from_csr,
    "expression": lambda nq, nk: (P.window(20) - P.dilated(6, 2)) | P.global_keys([2]),
    "nothing": lambda nq, nk: P.window(3) & ~P.window(4),
}

# (nq, nk, D, Dv): odd, equal, longer, shorter, one, none.
SHAPES = [(70, 70, 8, 8), (33, 130, 16, 5), (129, 65, 3, 7), (1, 64, 8, 8), (64, 1, 8, 4)]


def fixed_shape(name: str) -> bool:
    return name in ("blocks", "from_dense", "from_csr")


def operands(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    seed: int = 0,
    grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of (nq, nk, D, Dv); values are those of ``dtype`` whatever it is converted to."""
    nq, nk, d, dv = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads[0], nq, d, generator=generator)
    k = torch.randn(batch, heads[1], nk, d, generator=generator)
    v = torch.randn(batch, heads[1], nk, dv, generator=generator)
    made = (x.to(dtype).requires_grad_(grad) for x in (q, k, v))
    return tuple(made)  # type: ignore[return-value]


def run(
    impl: str, q: Tensor, k: Tensor, v: Tensor, kept: object, sink: Tensor | None = None, **rest
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """o, lse, and the gradients of a fixed scalar of both to q, k, v (and the sink)."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    if sink is not None:
        inputs.append(sink.detach().requires_grad_())
        rest["sink_logits"] = inputs[-1]
    o, lse = mg.attend(*inputs[:3], kept, enable_gqa=True, return_lse=True, impl=impl, **rest)
    generator = torch.Generator().manual_seed(99)
    do = torch.randn(o.shape, generator=generator).to(o.dtype)
    dlse = torch.randn(lse.shape, generator=generator).to(lse.dtype)
    grads = torch.autograd.grad([o, lse], inputs, [do, dlse], allow_unused=True)
    return (
        o.detach(),
        lse.detach(),
        [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)],
    )


def wide(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().double() for x in tensors]


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected magnitude; infinities must agree."""
    got, expected = got.detach().double(), expected.detach().double()
    assert got.shape == expected.shape
    infinite = torch.isinf(expected)
    assert torch.equal(torch.isinf(got), infinite)
    assert torch.equal(got[infinite], expected[infinite])
    got, expected = got[~infinite], expected[~infinite]
    if not got.numel():
        return 0.0
    assert torch.isfinite(got).all()
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1.0))


# Around the units of 64: (nq, nk).
UNIT_SIZES = [(1, 1), (63, 65), (64, 64), (170, 300), (300, 129), (1, 200)]


def drawn(n: int, count: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(1))[:count]


def block_mask(n: int) -> Tensor:
    kept = torch.rand(n // 64, n // 64, generator=torch.Generator().manual_seed(2)) < 0.2
    kept[:1] = True
    return kept


# Square patterns that are planned from a few terms at multiples of 64; what each is there for.
DIRECT: dict[str, Callable[[int], object]] = {
    "causal": lambda n: P.causal(),  # ends that rise
    "window": lambda n: P.window(256),  # both ends, runs of full units between
    "front": lambda n: P.longformer(256, range(64)),  # whole units beside an interval
    "ragged front": lambda n: P.longformer(256, range(10, 75)),  # keys that are a second interval
    "scattered": lambda n: P.longformer(256, drawn(n, 64)),  # gathered keys and queries
    "keys": lambda n: P.window(70) | P.global_keys(drawn(n, 90)),  # two gathered units, one ragged
    "queries": lambda n: P.causal() | P.global_queries(drawn(n, 90)),  # queries alone
    "sinks": lambda n: P.causal() & (P.window(300, 0) | P.sinks(4)),  # two intervals a row
    "documents": lambda n: P.causal() & P.documents(torch.arange(n) // 300),  # ends in steps
    "far apart": lambda n: P.window(3) | P.documents(torch.arange(n) % 2 * 0),  # all in one
    "blocks": lambda n: P.blocks(block_mask(n), 64),  # whole units, long lines
    "bigbird": lambda n: P.bigbird(64, 1, 3, 2, 0),  # whole units, drawn and joined
    "wide blocks": lambda n: P.bigbird(128, 1, 1, 1, 3),  # two units each
    "full": lambda n: P.full(),
}
