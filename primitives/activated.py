"""The operator of linear layers with an activation: one kernel where nothing is recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops, ops_linear
from .activations import ACTIVATIONS
from .affine import affine
from .keys import differentiable, without_autocast
from .plans.plan import Plan
from .schemas import LIB

_op_activated = torch.ops.mixgrain.activated.default


def activated(
    values: Tensor,
    x: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    rows: bool,
    plan: Plan,
    activation: str,
) -> Tensor:
    """Act(x Sᵀ + bias), rounded once: (F, slots), (F, T, n), (m,) -> (F, T, m)."""
    made: Tensor = _op_activated(values, x, bias, keep, rows, *plan, activation)
    return made


class _Recorded:
    """The same of operators that know their derivatives, which need what is activated."""

    @staticmethod
    def apply(
        values: Tensor, x: Tensor, bias: Tensor | None, keep: Tensor | None, rows: bool, *rest: Any
    ) -> Tensor:
        plan, activation = Plan(*rest[:3]), rest[3]
        return ACTIVATIONS[activation](_product(values, x, bias, keep, rows, plan))


def _product(
    values: Tensor, x: Tensor, bias: Tensor | None, keep: Tensor | None, rows: bool, plan: Plan
) -> Tensor:
    """What ``linear`` computes without an activation."""
    if keep is None and ops_linear.by_rows(plan):
        return ops_linear.linear(values, x, bias, plan, False)
    columns = x.mT[:, None]
    if bias is None:
        out = ops.spmm(values, columns, keep, rows, plan, 1.0, x.dtype)
    else:
        out = affine(values, columns, bias, keep, rows, plan, x.dtype)
    return out[:, 0].mT.contiguous()


LIB.impl("activated", differentiable(_Recorded, _op_activated, 3), "Autograd")
for _key in ("AutocastCPU", "AutocastCUDA"):
    LIB.impl("activated", without_autocast(_op_activated), _key)
