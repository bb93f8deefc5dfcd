"""The operator boundary: schemas, fakes, autograd registration, compilation, overhead of none."""

from __future__ import annotations

import pytest
import torch
from cases import build, operands

from mixgrain.formats import patterns as P
from mixgrain.formats.nm import NMLayout
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives.dispatch import plan_for
from mixgrain.primitives.plans import nm
from mixgrain.primitives.schemas import SCHEMAS
from mixgrain.primitives.sddmm import sddmm
from mixgrain.primitives.softmax import softmax
from mixgrain.primitives.spmm import spmm

NAME = "heads shared"


def arguments(op: str, kind: str) -> tuple:
    """Arguments of one operator on one layout, gradients wanted."""
    layout = build(kind, NAME)
    plan = plan_for("spmm", layout)
    q, k = operands(NAME)
    q, k = q[None].requires_grad_(), k[None].requires_grad_()
    slots = torch.randn(1, layout.slots, dtype=torch.float64)
    rows = torch.randn(1, 3, layout.shape[0], dtype=torch.float64)
    keep = torch.rand(1, 3, layout.shape[1]) < 0.7
    mask = (keep, False, *plan)
    double = torch.float64
    v, w = slots.clone().requires_grad_(), torch.randn_like(slots).requires_grad_()
    return {
        "sddmm": (q, k, *mask, 0.5, double),
        "spmm": (v, k, *mask, 1.0, double),
        "spmm_t": (v, q, *mask, 1.0, double),
        "softmax": (v, *mask, double, True),
        "softmax_backward": (v, w, rows.requires_grad_(), *mask, double),
        "row_sum": (v, *mask),
        "row_expand": (rows.clone().requires_grad_(), *mask, double),
    }[op]


@pytest.mark.parametrize("kind", ["block", "mixed", "nm within"])
@pytest.mark.parametrize("op", [op for op in SCHEMAS if op != "prune"])
def test_opcheck(op: str, kind: str) -> None:
    torch.library.opcheck(getattr(torch.ops.mixgrain, op).default, arguments(op, kind))


def test_opcheck_of_prune() -> None:
    q = torch.randn(1, 1, 40, 8, requires_grad=True)
    blank = NMLayout.from_metadata(torch.empty(0), (40, 40), 2, 4, encoding="2:4")
    plan = nm.plan_of(blank)
    torch.library.opcheck(torch.ops.mixgrain.prune.default, (q, q, None, *plan, 1.0, q.dtype))


def attention(q: torch.Tensor, k: torch.Tensor, layout) -> torch.Tensor:
    return spmm(softmax(sddmm(q, k, layout, scale=0.3)), k)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["block", "mixed"])
def test_compiles_in_one_graph(kind: str) -> None:
    layout = build(kind, NAME)
    q, k = operands(NAME)
    q.requires_grad_()
    eager = attention(q, k, layout)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")(q, k, layout)
    torch.testing.assert_close(compiled, eager, rtol=1e-13, atol=1e-13)
    mine = torch.autograd.grad(compiled.sum(), q)[0]
    torch.testing.assert_close(mine, torch.autograd.grad(eager.sum(), q)[0], rtol=1e-13, atol=1e-13)


def test_layouts_cross_pytrees() -> None:
    """A layout rebuilt from its leaves has the same key, hence the same plan."""
    layout = build("mixed", NAME)
    leaves, spec = torch.utils._pytree.tree_flatten(layout)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert plan_for("spmm", layout) is plan_for("spmm", again)


def test_an_unsaved_pattern_is_a_layout() -> None:
    q = torch.randn(2, 3, 100, 8)
    s = sddmm(q, q, P.window(9))
    assert isinstance(s, SparseTensor) and s.layout.kind == "mixed"
    assert s.shape == (2, 3, 100, 100)
