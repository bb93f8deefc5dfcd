"""linear: a dense input times the transpose of a sparse weight."""

from __future__ import annotations

import math

from torch import Tensor

from mixgrain.formats.errors import ShapeError
from mixgrain.formats.sparse import SparseTensor

from . import ops, ops_linear, recorded_linear
from .activated import activated
from .activations import check_activation
from .affine import affine
from .checks import autocast, check_floats, check_same_dtype, check_sparse
from .dispatch import plan_for
from .fold import fold_mask


def linear(
    x: Tensor, w: SparseTensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Product x @ w.T + bias with a sparse weight; otherwise ``torch.nn.functional.linear``.

    With an activation it is that function of the sums and the bias, rounded once. On CUDA tiles,
    N:M, mostly blocks, and single entries on Hopper or for few tokens need no other kernel for it;
    all others have one that adds the bias, too. Where gradients are recorded it is torch's own
    function of linear(x, w, bias), which is rounded and kept for them. The two agree within
    rounding.

    Args:
        x: (..., n_in), float16, bfloat16, float32 or float64.
        w: (n_out, n_in), any layout without leading dimensions, x's dtype.
        bias: (n_out,) of x's dtype, or None.
        activation: None, "gelu" (exact, by erf), "gelu_tanh" (torch's approximate="tanh"), "silu"
            or "relu".

    Returns:
        (..., n_out) in x.dtype, summed in float32 (float64 for float64). Differentiable with
        respect to x, the values of w, and bias. torch.autocast casts all three.

    Raises:
        ShapeError: sizes that do not fit; a weight with leading dimensions.
        DtypeError: dtypes that differ or are no floats.
        UnsupportedError: another activation.

    Source: Chen et al., E.T.: Re-Thinking Self-Attention for Transformer Models on GPUs, SC 2021,
    for tiles; Mishra et al., Accelerating Sparse Deep Neural Networks, 2021, for 2:4.
    """
    seen = recorded_linear.linear(x, w, bias, activation)
    if seen is not None:
        return seen
    check_sparse("linear", w)
    check_floats("linear", "x", x)
    if not x.dim():
        raise ShapeError(f"linear: x is a single number; expected (..., {w.layout.shape[1]})")
    x, values = autocast(x, w.values)
    check_same_dtype("linear", "x", "w", x, values)
    layout = w.layout
    n_out, n_in = layout.shape
    if layout.lead != (1, 1) or w.values.dim() != 1:
        raise ShapeError(
            f"linear: w is {tuple(w.shape)}; expected a weight (n_out, n_in) without leading "
            "dimensions; spmm takes batches"
        )
    if x.shape[-1] != n_in:
        raise ShapeError(f"linear: x has {x.shape[-1]} columns; expected {n_in}, those of w")
    if bias is not None:
        check_floats("linear", "bias", bias)
        (bias,) = autocast(bias)
        check_same_dtype("linear", "x", "bias", x, bias)
        if tuple(bias.shape) != (n_out,):
            raise ShapeError(f"linear: bias has shape {tuple(bias.shape)}; expected ({n_out},)")
    check_activation("linear", activation)
    keep = fold_mask(w.keep, layout.lead, ())
    plan = plan_for("linear", layout, values, x, bias, w.keep)
    seen = recorded_linear.learn(x, w, bias, activation, plan)
    if seen is not None:
        return seen
    tokens = x.reshape(math.prod(x.shape[:-1]), n_in)
    if activation is not None:
        made = activated(values[None], tokens[None], bias, keep, w.keep_rows, plan, activation)
        return made.reshape(*x.shape[:-1], n_out)
    if w.keep is None and ops_linear.by_rows(plan):
        made = ops_linear.linear(values[None], tokens[None], bias, plan, False)
        return made.reshape(*x.shape[:-1], n_out)
    columns = tokens.T[None, None]
    if bias is None:
        out = ops.spmm(values[None], columns, keep, w.keep_rows, plan, 1.0, x.dtype)
    else:
        out = affine(values[None], columns, bias, keep, w.keep_rows, plan, x.dtype)
    # Kernels that write rows of tokens leave nothing to copy.
    return out.mT.contiguous().reshape(*x.shape[:-1], n_out)
