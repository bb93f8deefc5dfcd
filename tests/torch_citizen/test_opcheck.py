"""torch.library.opcheck of every operator: schema, autograd, fake tensors, dynamic AOT."""

from __future__ import annotations

import pytest
import torch

import mixgrain.attention.ops as fused
import mixgrain.primitives.affine
import mixgrain.primitives.ops_linear  # noqa: F401  # they register derivatives
from mixgrain.attention.plan import plan, plan_nm
from mixgrain.formats import patterns as P
from mixgrain.formats.sparsify import sparsify
from mixgrain.primitives.blank import nm_plan
from mixgrain.primitives.dispatch import plan_for
from mixgrain.primitives.schemas import SCHEMAS
from mixgrain.primitives.sddmm import sddmm

PATTERN = P.per_head([P.window(3), P.causal() | P.global_tokens([2])])
ROWS, COLS, DIM = 20, 24, 4


def layout_of(kind: str):
    """A layout over two heads, or a weight."""
    if kind == "tile":
        return sparsify(torch.randn(ROWS, COLS), "tile", prune=True, density=0.5).layout
    if kind == "nm":
        return sparsify(torch.randn(2, ROWS, COLS), "nm", prune=True).layout
    if kind == "nm within":
        q, k = torch.randn(1, 2, ROWS, DIM), torch.randn(1, 2, COLS, DIM)
        return sddmm(q, k, P.nm(2, 4) & PATTERN).layout
    return PATTERN.to_layout(kind, ROWS, COLS, 16)


def arguments(op: str, kind: str) -> tuple:
    layout = layout_of(kind)
    spread = plan_for("linear", layout)
    g = torch.Generator().manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        made = torch.randn(2, *shape, generator=g, dtype=torch.float64)
        return made.requires_grad_()

    e, slots, double = layout.entries, layout.slots, torch.float64
    q, k, rows = make(e, ROWS, DIM), make(e, COLS, DIM), make(e, ROWS)
    keep = torch.rand(2, e, COLS, generator=g) < 0.7
    mask = (keep, False, *spread)
    return {
        "sddmm": lambda: (q, k, *mask, 0.5, double),
        "spmm": lambda: (make(slots), k, *mask, 1.0, double),
        "spmm_t": lambda: (make(slots), q, *mask, 1.0, double),
        "affine": lambda: (make(slots), k, rows[0, 0].detach().requires_grad_(), *mask, double),
        "softmax": lambda: (make(slots), *mask, double, True),
        "softmax_backward": lambda: (make(slots), make(slots), rows, *mask, double),
        "row_sum": lambda: (make(slots), *mask),
        "row_expand": lambda: (rows, *mask, double),
    }[op]()


KINDS = ("row", "block", "mixed", "nm", "nm within")
# Those of weights have tests of their own.
APART = ("prune", "linear", "activated")
CASES = [(op, kind) for op in SCHEMAS if op not in APART for kind in KINDS]
# A weight and its gradients.
CASES += [(op, "tile") for op in ("spmm", "spmm_t", "sddmm", "affine")]


@pytest.mark.parametrize("op, kind", CASES)
def test_opcheck(op: str, kind: str) -> None:
    torch.library.opcheck(getattr(torch.ops.mixgrain, op).default, arguments(op, kind))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_opcheck_of_linear(biased: bool, transposed: bool) -> None:
    w = sparsify(torch.randn(24, 32), "nm", prune=True)
    inner, outer = (24, 32) if transposed else (32, 24)
    x = torch.randn(2, 5, inner, requires_grad=True)
    bias = torch.randn(outer, requires_grad=True) if biased else None
    values = w.values.expand(2, -1).clone().requires_grad_()
    arguments = (values, x, bias, *plan_for("linear", w.layout), transposed)
    torch.library.opcheck(torch.ops.mixgrain.linear.default, arguments)


@pytest.mark.parametrize("within", [False, True])
def test_opcheck_of_prune(within: bool) -> None:
    limits = PATTERN.to_layout("block", ROWS, COLS, 16) if within else None
    q = torch.randn(1, 2, ROWS, DIM, requires_grad=True)
    k = torch.randn(1, 2, COLS, DIM, requires_grad=True)
    spread = nm_plan((ROWS, COLS), 2, 4, "2:4", (1, 2), limits)
    torch.library.opcheck(torch.ops.mixgrain.prune.default, (q, k, None, *spread, 1.0, q.dtype))


def fused_arguments(kind: str, sink: bool, dtype: torch.dtype = torch.float64) -> tuple:
    g = torch.Generator().manual_seed(1)
    made = plan_nm(ROWS, COLS, 2, 4) if kind == "nm" else plan(layout_of(kind))

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype).requires_grad_()

    return (
        make(3, 2, ROWS, DIM), make(3, 2, COLS, DIM), make(3, 2, COLS, 5),
        torch.rand(3, COLS, generator=g) < 0.7, make(2) if sink else None, 0.5, made.tensors,
        made.ints,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["row", "block", "mixed", "nm"])
def test_opcheck_of_the_fused_attention(kind: str) -> None:
    torch.library.opcheck(fused.attention, fused_arguments(kind, sink=kind != "row"))


@pytest.mark.parametrize("kind", ["mixed", "nm"])
def test_opcheck_of_its_backward(kind: str) -> None:
    given = tuple(
        t.detach() if isinstance(t, torch.Tensor) else t for t in fused_arguments(kind, sink=True)
    )
    out, lse = fused.attention(*given)
    torch.library.opcheck(fused.attention_backward, (out, lse, *given[:5], out, lse, *given[5:]))
