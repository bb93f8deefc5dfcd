"""Derivatives of higher order, and of every operator in forward mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.formats.errors import UnsupportedError
from mixgrain.primitives import ops
from mixgrain.primitives.affine import affine
from mixgrain.primitives.dispatch import plan_for

N, D = 7, 3
PATTERN = P.causal() & (P.window(2) | P.global_keys([1])) - P.global_queries([4])  # row 4 is empty
DOUBLE = torch.float64


def tensor(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=DOUBLE).requires_grad_()


CASES = {
    "heads": lambda: (P.per_head([PATTERN, P.window(1)]), {}, (2, 2)),
    "grouped": lambda: (PATTERN, {"enable_gqa": True}, (2, 1)),
    "masked": lambda: (PATTERN, {"key_mask": torch.arange(N)[None] % 3 > 0}, (2, 2)),
    "sink": lambda: (PATTERN, {"sink_logits": tensor(2, seed=9)}, (2, 2)),
    "nm": lambda: (P.nm(2, 4) & P.causal(), {}, (1, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_composed_is_differentiable_twice(case: str) -> None:
    pattern, options, (hq, hkv) = CASES[case]()
    sink = options.pop("sink_logits", None)

    def f(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
        o, lse = mg.attend(q, k, v, pattern, impl="composed", return_lse=True, sink_logits=sink,
                           **options)  # fmt: skip
        return o, torch.where(lse == -torch.inf, 0.0, lse)  # a row without keys

    given = [tensor(1, hq, N, D), tensor(1, hkv, N, D, seed=1), tensor(1, hkv, N, 2, seed=2)]
    if sink is not None:
        given.append(sink)
    assert torch.autograd.gradcheck(f, given, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, given, fast_mode=True)


def test_lse_alone_is_differentiable_twice() -> None:
    layout = PATTERN.to_layout("mixed", N, N, 16)

    def f(values: Tensor) -> Tensor:
        lse = mg.softmax(mg.sddmm(q, k, layout).with_values(values), return_lse=True)[1]
        return lse[..., [0, 1, 2, 3, 5, 6]]

    q, k = tensor(N, D).detach(), tensor(N, D, seed=1).detach()
    values = mg.sddmm(q, k, layout).values.requires_grad_()
    assert torch.autograd.gradgradcheck(f, (values,), fast_mode=True)


def test_fused_second_derivative_says_what_to_do() -> None:
    q = tensor(1, 2, N, D)
    o = mg.attend(q, q, q, PATTERN, impl="fused")
    (first,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match=r'second derivative; use attend.*impl="composed"'):
        first.sum().backward()


def operators(kind: str) -> dict:
    """Every differentiable operator on a layout, as a function of its differentiable inputs."""
    layout = P.per_head([PATTERN, P.window(1)]).to_layout(kind, N, N, 16)
    plan, e, slots = plan_for("softmax", layout), layout.entries, layout.slots
    keep = torch.arange(N).expand(2, e, N) % 4 > 0
    mask, live = (keep, False, plan), torch.ones(2, slots, dtype=DOUBLE)
    live = ops.row_expand(torch.ones(2, e, N, dtype=DOUBLE), *mask, DOUBLE)

    def alive(*shape: int, seed: int) -> Tensor:
        return (tensor(*shape, seed=seed).detach() * live).requires_grad_()

    q, x = tensor(2, e, N, D), tensor(2, e, N, D, seed=1)
    v, w = alive(2, slots, seed=2), alive(2, slots, seed=3)
    rows = tensor(2, e, N, seed=4)
    finite = lambda lse: torch.where(lse == -torch.inf, 0.0, lse)  # noqa: E731
    softmax = lambda v: ops.softmax(v, *mask, DOUBLE, True)  # noqa: E731
    return {
        "sddmm": (lambda q, k: ops.sddmm(q, k, *mask, 0.5, DOUBLE), (q, x)),
        "spmm": (lambda v, x: ops.spmm(v * live, x, *mask, 0.5, DOUBLE), (v, x)),
        "spmm_t": (lambda v, x: ops.spmm_t(v * live, x, *mask, 0.5, DOUBLE), (v, x)),
        "affine": (
            lambda v, x, b: affine(v * live, x, b, *mask, DOUBLE),
            (v, x, tensor(N, seed=5)),
        ),
        "softmax": (lambda v: (softmax(v * live)[0], finite(softmax(v * live)[1])), (v,)),
        "softmax_backward": (
            lambda p, g, dl: ops.softmax_backward(p * live, g * live, dl, *mask, DOUBLE),
            (v, w, rows),
        ),
        "row_sum": (lambda v: ops.row_sum(v * live, *mask), (v,)),
        "row_expand": (lambda r: ops.row_expand(r, *mask, DOUBLE), (rows,)),
    }


@pytest.mark.parametrize("kind", ["row", "block", "mixed"])
@pytest.mark.parametrize(
    "op",
    ["sddmm", "spmm", "spmm_t", "affine", "softmax", "softmax_backward", "row_sum", "row_expand"],
)
def test_operators_in_forward_and_reverse_mode(op: str, kind: str) -> None:
    f, given = operators(kind)[op]
    assert torch.autograd.gradcheck(f, given, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(
        f, given, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True
    )
