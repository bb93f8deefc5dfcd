"""NMLayout on CUDA: which kernel takes a product of a batch of N:M matrices, and its launch.

Every function sees one part, kind "nm" or (the flagged transpose) "nm_t", as ``plans.nm`` has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixgrain.cuda.device import facts

from ..plans.plan import PartPlan
from . import nm_any, nm_dense, nm_expand_sm90, nm_mma, nm_sm90, nm_weights_sm90
from .nm_stored import Stored, stored
from .parts import aligned, aligned_values, ready, tf32

#: Kinds of parts that are N:M.
KINDS = ("nm", "nm_t")


def _oriented(x: Tensor, even: bool) -> tuple[Tensor, bool]:
    """A right operand (F, E, inner, N) as kernels read it, and whether N lies contiguous.

    Args:
        x: any strides.
        even: N has to be a multiple of 8.

    Returns:
        Itself or a copy; else the rows of the contiguous dimension are at multiples of 16 bytes.
    """
    if not (even and x.shape[3] % 8):
        if ready(x, 2, 3):
            return x, False
        if x.shape[3] % 8 == 0 and ready(x, 3, 2):
            return x, True
    if not even and x.stride(2) == 1:
        # Tokens by features of a linear, in rows of odd length: stay so.
        turned = torch.nn.functional.pad(x.transpose(2, 3), (0, -x.shape[2] % 8)).contiguous()
        return turned.transpose(2, 3)[:, :, : x.shape[2]], False
    return aligned(x.contiguous()), True


def product(
    values: Tensor,
    x: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    part: PartPlan,
    shape: tuple[int, int],
    scale: float,
    dtype: torch.dtype,
    transposed: bool,
    turned: bool = False,
    bias: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    """Scale · S x, or Sᵀ x when transposed.

    Args:
        values: (F, slots).
        x: (F, E, inner, N), any strides.
        keep: bool (F, E, n) or None.
        keep_rows: the mask is over rows of S.
        part: kind "nm" or "nm_t".
        shape: of S.
        scale: multiplies the product.
        dtype: of the result.
        transposed: multiply by the transpose.
        turned: return the product's transpose; dtype is x's and there is no mask.
        bias: (F, outer), added to each column before rounding; turned only, F = 1.
        activation: a code of ``activations``, applied before rounding; 0 = none; turned only.

    Returns:
        (F, E, outer, N), contiguous, or (F, E, N, outer).
    """
    s = stored(part, shape, x.shape[1])
    flipped = part.kind == "nm_t"
    transposed = transposed != flipped
    outer = s.columns if transposed else s.rows
    width = x.shape[3]
    x, major = _oriented(x, not turned)
    values = aligned_values(values)
    free, entries, _, wide = x.shape
    if turned:
        out = x.new_empty(free, entries, wide, outer + -outer % 8, dtype=dtype)
    else:
        out = x.new_empty(free, entries, outer, wide, dtype=dtype)
    if turned and bias is not None:
        bias = bias.contiguous()
    if _sparse_cores(s, values, x, keep, dtype, transposed):
        # TF32 has no wgmma for an x whose columns lie side by side.
        fits = x.dtype != torch.float32 or not major
        engine = nm_sm90 if fits and _hopper(x.device.index) else nm_mma
        engine.spmm(out, values, s, x, major, scale, turned, bias, activation=activation)
        return out[..., : outer if turned else width].contiguous()
    if turned:
        out = x.new_empty(free, entries, wide, outer, dtype=dtype)
    side = 0 if keep is None else 1 if keep_rows == flipped else 2
    nm_any.spmm(out, values, s, x, keep, side, scale, transposed, major, turned, bias, activation)
    return out if turned else out[..., :width].contiguous()


def linear(
    values: Tensor,
    x: Tensor,
    bias: Tensor | None,
    part: PartPlan,
    shape: tuple[int, int],
    transposed: bool,
    activation: int = 0,
) -> Tensor:
    """Product x Sᵀ + bias, or x S + bias when transposed, activated; see `product`.

    Args:
        values: (F, slots).
        x: (F, T, inner), any strides.
        bias: (outer,) or None.
        part: kind "nm" or "nm_t".
        shape: of S.
        transposed: multiply by S itself.
        activation: a code of ``activations``; 0 = none.

    Returns:
        (F, T, outer) of x's dtype.
    """
    free, tokens, inner = x.shape
    step = x.stride()
    backwards = transposed != (part.kind == "nm_t")
    plain = bias is None and not activation
    right = x.as_strided((free, 1, inner, tokens), (step[0], step[0], step[2], step[1]))
    if backwards and plain and free == 1:
        s = stored(part, shape, 1)
        made = None
        if nm_expand_sm90.takes(s, values, right):
            made = nm_expand_sm90.product(aligned_values(values), s, right)
        elif tokens >= nm_dense.TOKENS and values.dtype == x.dtype and s.fits:
            rows = x.as_strided((tokens, inner), step[1:])
            made = nm_dense.product(aligned_values(values), s, rows)
        if made is not None:
            return made.view(1, tokens, s.columns)
    out = product(
        values, right, None, False, part, shape, 1.0, x.dtype, transposed, True, bias, activation
    )  # fmt: skip
    return out.view(free, tokens, out.shape[3])


def _sparse_cores(
    s: Stored,
    values: Tensor,
    x: Tensor,
    keep: Tensor | None,
    dtype: torch.dtype,
    transposed: bool,
) -> bool:
    """Whether sparse tensor cores take this product."""
    if transposed or keep is not None or values.dtype != x.dtype:
        return False
    if x.dtype == torch.float32:
        return s.encoding == 2 and tf32(x.dtype) and dtype == torch.float32
    return s.encoding in (0, 1) and dtype in (x.dtype, torch.float32)


def _hopper(device: int) -> bool:
    """Whether this is one of sm_90a; tests put the portable kernels in its place."""
    return facts(device).hopper


def sddmm(
    q: Tensor,
    k: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    part: PartPlan,
    shape: tuple[int, int],
    slots: int,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Scale · q kᵀ at every slot; zero at dead ones.

    Args:
        q: (F, E, nq, D), any strides.
        k: (F, E, nk, D), any strides, q's dtype.
        keep: bool (F, E, n) or None.
        keep_rows: the mask is over rows of S.
        part: kind "nm" or "nm_t".
        shape: of S.
        slots: of all entries.
        scale: multiplies the scores.
        dtype: of the result.

    Returns:
        (F, slots).
    """
    s = stored(part, shape, q.shape[1])
    flipped = part.kind == "nm_t"
    if flipped:
        q, k = k, q
    free, entries, _, depth = q.shape
    values = q.new_empty(free, slots, dtype=dtype)
    if nm_weights_sm90.takes(s, q, k, keep, dtype):
        nm_weights_sm90.sddmm(values, s, q, k, scale)
        return values
    plain = keep is None and scale == 1.0 and dtype == q.dtype and free * entries == 1
    if plain and depth >= nm_dense.TOKENS and s.fits:
        flat = (t.as_strided(t.shape[2:], t.stride()[2:]) for t in (q, k))
        nm_dense.sddmm(values, s, *flat)
        return values
    side = 0 if keep is None else 1 if keep_rows == flipped else 2
    nm_any.sddmm(values, s, q, k, keep, side, scale)
    return values
