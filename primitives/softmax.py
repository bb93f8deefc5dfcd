"""softmax over the kept entries of each row, and its gradient."""

from __future__ import annotations

from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from mixgrain.formats.arguments import as_flag
from mixgrain.formats.errors import LayoutError, ShapeError
from mixgrain.formats.layout import same_positions
from mixgrain.formats.sparse import SparseTensor

from . import ops, recorded
from .checks import check_dtype, check_floats, check_sparse
from .dispatch import plan_for
from .fold import fold_mask, fold_values, fold_vector, unfold_vector


@overload
def softmax(
    s: SparseTensor, return_lse: Literal[False] = False, out_dtype: torch.dtype | None = None
) -> SparseTensor: ...
@overload
def softmax(
    s: SparseTensor, return_lse: Literal[True], out_dtype: torch.dtype | None = None
) -> tuple[SparseTensor, Tensor]: ...


def softmax(
    s: SparseTensor, return_lse: bool = False, out_dtype: torch.dtype | None = None
) -> SparseTensor | tuple[SparseTensor, Tensor]:
    """Softmax over the kept entries of each row, all parts of a mixed layout together.

    Args:
        s: scores. Dead slots and slots of dropped keys count as absent, whatever they hold.
        return_lse: return the log-sum-exp of each row as well.
        out_dtype: dtype of the probabilities; None = that of the scores.

    Returns:
        A SparseTensor on the same layout; computed in float32 (float64 for float64) and rounded
        once. With ``return_lse`` also lse (*leading, nq), natural logarithm, float32 (float64 for
        float64). A row without kept entries is zero and its lse −inf. Both are differentiable, any
        order; the gradient of lse with respect to a score is its probability.

    Raises:
        LayoutError: a TileLayout, or the transpose of an NMLayout.
        DtypeError: values that are no floats.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018, for the joint
    maximum and sum over parts.
    """
    seen: Any = recorded.softmax(s, return_lse, out_dtype)
    if seen is not None:
        return cast(SparseTensor, seen)
    check_sparse("softmax", s)
    dtype = s.dtype if out_dtype is None else out_dtype
    check_dtype("softmax", "out_dtype", dtype)
    return_lse = as_flag("softmax", "return_lse", return_lse)
    layout, lead = s.layout, s.lead_shape
    plan = plan_for("softmax", layout, s.values, s.keep)
    seen = recorded.learn_softmax(s, return_lse, out_dtype, plan)
    if seen is not None:
        return cast(SparseTensor, seen)
    p, lse = ops.softmax(
        fold_values(s.values, layout.lead, lead),
        fold_mask(s.keep, layout.lead, lead),
        s.keep_rows,
        plan,
        dtype,
        return_lse,
    )
    made = s.with_values(p.reshape(s.values.shape))
    return (made, unfold_vector(lse, layout.lead, lead)) if return_lse else made


def softmax_backward(
    p: SparseTensor, grad: SparseTensor | Tensor, grad_lse: Tensor | None = None
) -> SparseTensor:
    """Gradient of softmax with respect to the scores: p · (grad − Σ p · grad + grad_lse).

    Autograd uses the same operator; call this to write a backward by hand.

    Args:
        p: probabilities that ``softmax`` returned.
        grad: gradient with respect to p, on the same layout; a SparseTensor or its values.
        grad_lse: gradient with respect to lse, (*leading, nq), or None.

    Returns:
        A SparseTensor of p's dtype on the same layout, zero at dead slots.

    Raises:
        LayoutError: another layout than p's, or one without softmax.
        ShapeError: values or grad_lse of another shape.
    """
    check_sparse("softmax_backward", p)
    if isinstance(grad, SparseTensor):
        if not same_positions(grad.layout, p.layout):
            raise LayoutError(
                f"softmax_backward: p has {p.layout!r}, grad {grad.layout!r}; expected one layout"
            )
        grad = grad.values
    check_floats("softmax_backward", "grad", grad)
    layout, lead = p.layout, p.lead_shape
    if grad.shape != p.values.shape:
        raise ShapeError(
            f"softmax_backward: grad has values {tuple(grad.shape)}, p {tuple(p.values.shape)}; "
            "expected the same"
        )
    if grad_lse is not None:
        check_floats("softmax_backward", "grad_lse", grad_lse)
    plan = plan_for("softmax_backward", layout, p.values, grad, grad_lse, p.keep)
    folded = None
    if grad_lse is not None:
        if tuple(grad_lse.shape) != (*lead, layout.shape[0]):
            raise ShapeError(
                f"softmax_backward: grad_lse has shape {tuple(grad_lse.shape)}, expected "
                f"{(*lead, layout.shape[0])}, one number a row"
            )
        folded = fold_vector(grad_lse, layout.lead)
    ds = ops.softmax_backward(
        fold_values(p.values, layout.lead, lead),
        fold_values(grad, layout.lead, lead),
        folded,
        fold_mask(p.keep, layout.lead, lead),
        p.keep_rows,
        plan,
        p.dtype,
    )
    return p.with_values(ds.reshape(p.values.shape))
