"""Derivatives of the operators, as operators: one table for all that is differentiated.

ops.py uses it for products that go through torch's dispatcher, eager.py for what goes past it.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch


class Work(NamedTuple):
    """One operator on some of the tensors of a call.

    Attributes:
        op: the operator.
        operands: which of the tensors it takes, in its order.
        scalars: what it takes besides, behind the mask and the plan.
        results: kinds of what is wanted of its results (see ``KINDS``).
    """

    op: str
    operands: tuple[int, ...]
    scalars: tuple[Any, ...]
    results: tuple[str, ...]


class Gradient(NamedTuple):
    """What computes the gradient of one input.

    Attributes:
        op: the operator; it takes the scale of the call, if there is one, and the input's dtype.
        operands: its operands among the tensors saved and, behind them, the gradients of the
            results.
    """

    op: str
    operands: tuple[int, ...]


#: How users hold operands and results: dense (*lead, N, D), values (*free, slots), a vector of
#: numbers of rows (*lead, N).
KINDS: Final = {
    "sddmm": (("dense", "dense"), ("values",)),
    "spmm": (("values", "dense"), ("dense",)),
    "spmm_t": (("values", "dense"), ("dense",)),
    "softmax": (("values",), ("values", "vector")),
    "softmax_backward": (("values", "values", "vector"), ("values",)),
}

#: Of products a and b are saved, and g is the gradient of the result; of softmax p is saved, and
#: the gradients are those of p and of lse.
_A, _B, _G = range(3)
_P, _GP, _GL = range(3)
GRADIENTS: Final = {
    "sddmm": (Gradient("spmm", (_G, _B)), Gradient("spmm_t", (_G, _A))),
    "spmm": (Gradient("sddmm", (_G, _B)), Gradient("spmm_t", (_A, _G))),
    "spmm_t": (Gradient("sddmm", (_B, _G)), Gradient("spmm", (_A, _G))),
    "softmax": (Gradient("softmax_backward", (_P, _GP, _GL)),),
}


def gradients(
    op: str, dtypes: tuple[torch.dtype, ...], scale: tuple[float, ...] = ()
) -> tuple[Work, ...]:
    """What computes the gradients of an operator's inputs, in their order.

    Args:
        op: what is differentiated.
        dtypes: of the inputs.
        scale: of the call, where the operator has one.
    """
    pairs = zip(GRADIENTS[op], dtypes, strict=True)
    return tuple(Work(g.op, g.operands, (*scale, dtype), KINDS[g.op][1]) for g, dtype in pairs)
