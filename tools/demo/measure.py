"""What the demo measures of one variant: bits per byte, times, attention mass, and correctness."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.attention.attend import Impl
from mixgrain.formats.pattern import Pattern

from .model import Attend, ByteLM, Linear, byte_bits, causal, dense
from .variants import PRUNED, Variant, masked_linear, matrices, sparse_linear

# Queries, keys and values of one layer, each (B, H, N, head_dim).
Layer = tuple[Tensor, Tensor, Tensor]

# Largest differences allowed. Outputs of attention are averages of values, so a float32 result is a
# few roundings (6e-8 each) of the largest value away from the exact one. N:M is compared in float64
# because a rounding in float32 may choose the other of two nearly equal scores, rightly.
FLOAT32_LIMIT = 1e-5
FLOAT64_LIMIT = 1e-12
# Logits lie some 30 products in float32 behind the weights.
LOGIT_LIMIT = 1e-3


@dataclass
class Times:
    """Seconds of one forward pass.

    Attributes:
        attention: In attention alone, over all layers.
        products: In the products with the blocks' matrices alone.
        forward: In all.
    """

    attention: float = 0.0
    products: float = 0.0
    forward: float = 0.0


@dataclass(frozen=True)
class Check:
    """A comparison with a trusted computation.

    Attributes:
        what: What was compared with what.
        error: The largest difference found; NaN counts as a failure.
        limit: The largest allowed.
    """

    what: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit."""
        return self.error <= self.limit


@dataclass
class Result:
    """What was measured of one variant.

    Attributes:
        variant: Which one.
        kept_causal: Kept scores as a share of the causal ones; of weights for pruned weights.
        kept_full: Kept scores as a share of all N².
        mass: Mean share of the dense softmax that falls on kept positions; None for weights.
        bits: Bits per byte of each context.
        times: Of each context; empty where time means nothing.
        check: The comparison that this variant passed or failed; None for the baseline.
    """

    variant: Variant
    kept_causal: float
    kept_full: float
    mass: float | None = None
    bits: list[float] = field(default_factory=list)
    times: list[Times] = field(default_factory=list)
    check: Check | None = None


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is NaN."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def over_dense(result: Result, baseline: Result) -> tuple[float, float]:
    """Mean and standard error of bits per byte above the baseline's, context by context."""
    pairs = zip(result.bits, baseline.bits, strict=True)
    return mean_and_error([a - b for a, b in pairs])


def median(values: list[float]) -> float:
    """The median; of an even number the upper one of the two."""
    return sorted(values)[len(values) // 2]


class Runner:
    """Runs the model the way one variant says.

    Attributes:
        attend: Its attention.
        linear: Its products.
    """

    def __init__(self, variant: Variant, model: ByteLM, impl: Impl = "auto") -> None:
        """Prunes the weights if the variant asks for it; `impl` as in `mg.attend`.

        With impl="reference" products with pruned weights are torch's own, too.
        """
        self.variant = variant
        self.model = model
        self.attend: Attend = variant.attend(impl)
        self.weights: dict[str, mg.SparseTensor] = {}
        self.linear: Linear = dense
        if variant.pruning is not None:
            self.weights = variant.pruning.apply(model)
            of_weights = masked_linear if impl == "reference" else sparse_linear
            self.linear = of_weights(self.weights)

    def kept(self, n: int) -> tuple[float, float]:
        """Kept shares, as in `Result`: (kept_causal, kept_full)."""
        if not self.weights:
            return self.variant.kept(n)
        held = sum(w.nnz for w in self.weights.values())
        # Values that stand for an element of the matrix; a pruned one may still be 0.
        share = held / sum(w.numel() for w in matrices(self.model).values())
        return share, share

    def score(self, context: Tensor) -> tuple[float, Times]:
        """Bits per byte and times of one context, uint8 (length,)."""
        times = Times()

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            start = time.perf_counter()
            out = self.attend(q, k, v)
            times.attention += time.perf_counter() - start
            return out

        def linear(x: Tensor, name: str, weight: Tensor) -> Tensor:
            start = time.perf_counter()
            out = self.linear(x, name, weight)
            if name.startswith(PRUNED):
                times.products += time.perf_counter() - start
            return out

        start = time.perf_counter()
        bits = byte_bits(self.model, context[None], attend, linear)
        times.forward = time.perf_counter() - start
        return bits.double().mean().item(), times


@torch.no_grad()
def record(model: ByteLM, contexts: Tensor) -> list[Layer]:
    """Queries, keys and values of every layer in a dense run over contexts, uint8 (n, length)."""
    layers: list[Layer] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layers.append((q, k, v))
        return causal(q, k, v)

    model(contexts.to(model.embedding.device, torch.int64)[:, :-1], attend=attend)
    return layers


@torch.no_grad()
def masses(
    layers: list[Layer], variants: list[Variant], impl: Impl, step: Callable[[], object]
) -> list[float]:
    """The share of the dense attention that falls on what each variant keeps.

    exp(lse of the kept scores - lse of all causal scores), the same queries and keys for both; the
    mean over rows, heads, layers and contexts.

    Args:
        layers: As `record` gives them.
        variants: Those with a pattern.
        impl: As in `mg.attend`.
        step: Called after each variant.
    """
    whole = [_lse(layer, P.causal(), impl) for layer in layers]
    found = []
    for variant in variants:
        shares = []
        for layer, every in zip(layers, whole, strict=True):
            kept = _lse(layer, variant.pattern, impl)
            shares.append((kept - every).double().exp().mean().item())
        found.append(math.fsum(shares) / len(shares))
        step()
    return found


def _lse(layer: Layer, pattern: Pattern | None, impl: Impl) -> Tensor:
    kept = P.causal() if pattern is None else pattern
    return mg.attend(*layer, kept, return_lse=True, impl=impl)[1]


@torch.no_grad()
def check_attention(variant: Variant, layer: Layer) -> Check:
    """Compares the fused attention of one layer with the dense masked one in float64.

    The dense variant's own check compares torch with mixgrain's causal pattern.
    """
    q64, k64, v64 = (x.double() for x in layer)
    q, k, v = (q64, k64, v64) if variant.dynamic else layer
    pattern = P.causal() if variant.pattern is None else variant.pattern
    exact = mg.attend(q64, k64, v64, pattern, impl="reference")
    fused = mg.attend(q, k, v, pattern, impl="fused")
    error = (fused.double() - exact).abs().max() / exact.abs().max()
    if variant.pattern is None:
        error = torch.maximum(error, (causal(*layer) - exact).abs().max() / exact.abs().max())
    words = "float64" if variant.dynamic else "float32"
    return Check(
        f"{variant.name}: fused {words} attention and the dense masked one, one layer",
        error.item(),
        FLOAT64_LIMIT if variant.dynamic else FLOAT32_LIMIT,
    )


@torch.no_grad()
def check_weights(runner: Runner, context: Tensor) -> Check:
    """Compares logits through `mg.linear` with those of dense products with the pruned weights."""
    tokens = context[None, :-1].to(runner.model.embedding.device, torch.int64)
    sparse = runner.model(tokens, linear=sparse_linear(runner.weights))
    plain = runner.model(tokens, linear=masked_linear(runner.weights))
    return Check(
        f"{runner.variant.name}: logits by mg.linear and by dense products",
        (sparse - plain).abs().max().item(),
        LOGIT_LIMIT,
    )
