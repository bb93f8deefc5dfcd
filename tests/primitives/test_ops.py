"""The operator boundary: what reaches an operator (tests/torch_citizen: what torch makes of it)."""

from __future__ import annotations

import torch
from cases import build

from mixgrain.formats import patterns as P
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives.dispatch import plan_for
from mixgrain.primitives.sddmm import sddmm

NAME = "heads shared"


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
