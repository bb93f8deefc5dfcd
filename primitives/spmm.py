"""spmm: a sparse matrix times a dense one."""

from __future__ import annotations

from torch import Tensor

from mixgrain.formats.errors import ShapeError
from mixgrain.formats.sparse import SparseTensor

from . import ops, recorded
from .checks import autocast, check_matrix, check_sparse
from .dispatch import plan_for
from .fold import expand, fold, fold_mask, fold_values, join_lead, unfold


def spmm(s: SparseTensor, x: Tensor) -> Tensor:
    """Sparse times dense: s @ x.

    Leading dimensions broadcast as in ``torch.matmul``; besides, the last one of s may be a
    multiple of dimension −3 of x (grouped-query attention).

    Args:
        s: (*leading, nq, nk), any layout, ``s.T`` included. Dead slots count as absent, whatever
            they hold.
        x: (*leading, nk, D), float16, bfloat16, float32 or float64. Rows that no entry of s meets
            reach no result, NaN or not.

    Returns:
        (*leading, nq, D) in x.dtype, summed over all parts in float32 (float64 if either operand
        is) and rounded once. Differentiable with respect to both, any order. torch.autocast casts
        both operands.

    Raises:
        ShapeError: shapes that do not fit.
        DtypeError: no floats.

    Source: Gale et al., Sparse GPU Kernels for Deep Learning, SC 2020.
    """
    seen = recorded.spmm(s, x)
    if seen is not None:
        return seen
    check_sparse("spmm", s)
    check_matrix("spmm", "x", x)
    layout = s.layout
    values, x = autocast(s.values, x)
    if x.shape[-2] != layout.shape[1]:
        raise ShapeError(
            f"spmm: s is {layout.shape[0]}×{layout.shape[1]} and x has {x.shape[-2]} rows; "
            f"expected x of {layout.shape[1]} rows"
        )
    plan = plan_for("spmm", layout, values, x, s.keep)
    lead = join_lead("spmm", layout.lead, s.lead_shape, x.shape[:-2])
    seen = recorded.learn_spmm(s, x, plan, lead)
    if seen is not None:
        return seen
    out = ops.spmm(
        fold_values(values, layout.lead, lead),
        fold(expand(x, lead), layout.lead),
        fold_mask(s.keep, layout.lead, lead),
        s.keep_rows,
        plan,
        1.0,
        x.dtype,
    )
    return unfold(out, layout.lead, lead)
