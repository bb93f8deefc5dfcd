"""What attend accepts: every check of its arguments, and the error that says what to do."""

from __future__ import annotations

import torch
from torch import Tensor

from mixgrain.formats.arguments import check_dense, shape_of
from mixgrain.formats.errors import DtypeError, LayoutError, ShapeError
from mixgrain.formats.layout import Layout
from mixgrain.formats.pattern import Pattern

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IMPLS = ("auto", "fused", "composed", "reference")


def check_tensors(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> None:
    """Shapes, dtypes and devices of q, k, v.

    Raises:
        ShapeError: not 4-D, or sizes that do not fit each other.
        DtypeError: dtypes that differ or are not floating point.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_dense("attend", name, t)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ShapeError(
            f"attend: {shapes}; give q (B, Hq, Nq, D), k (B, Hkv, Nk, D), v (B, Hkv, Nk, Dv)"
        )
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise DtypeError(
            f"attend: q {q.dtype}, k {k.dtype}, v {v.dtype}; give one dtype of float16, bfloat16, "
            "float32, float64 for all three"
        )
    if not q.device == k.device == v.device:
        raise ShapeError(
            f"attend: q on {q.device}, k on {k.device}, v on {v.device}; move them to one device"
        )
    (b, hq, _, d), (bk, hk, nk, dk), (bv, hv, nv, _) = q.shape, k.shape, v.shape
    if bk != b or bv != b or dk != d or nv != nk or hv != hk:
        raise ShapeError(
            f"attend: {shapes}; batch B, head dimension D (q, k), key heads Hkv and keys Nk (k, v) "
            "must agree"
        )
    if hq != hk and not enable_gqa:
        raise ShapeError(
            f"attend: {hq} query heads, {hk} key heads; pass enable_gqa=True if each key head "
            "serves a group of query heads, else give equally many"
        )
    if hq != hk and (hk == 0 or hq % hk):
        raise ShapeError(
            f"attend: {hq} query heads, {hk} key heads; the first must be a multiple of the second"
        )


def check_kept(kept: object, q: Tensor, nk: int) -> Pattern | Layout:
    """The pattern or layout, once it fits.

    Raises:
        LayoutError: neither a pattern nor a layout with a cell, or one of another shape.
    """
    b, h, nq = q.shape[:3]
    if isinstance(kept, Tensor):
        raise LayoutError(
            f"attend: a tensor {shape_of(kept)} given as the pattern; wrap a bool mask once as "
            "P.from_dense(mask) and pass that"
        )
    if isinstance(kept, Layout):
        if kept.kind == "nm":
            raise LayoutError(
                f"attend: {kept!r} fixes which keys are kept; to choose them by score pass the "
                "pattern P.nm(n, m), alone or & a static pattern"
            )
        if kept.kind not in ("block", "row", "mixed"):
            raise LayoutError(
                f"attend: no attention on {kept!r}; give a pattern, BlockLayout, RowLayout or "
                "MixedLayout"
            )
        if kept.shape != (nq, nk):
            raise LayoutError(
                f"attend: {kept!r} for {nq} queries and {nk} keys; build the layout for that shape"
            )
        if kept.tensors() and kept.device != q.device:
            raise LayoutError(
                f"attend: layout on {kept.device}, q on {q.device}; move it once with "
                f"layout.to({str(q.device)!r})"
            )
    elif not isinstance(kept, Pattern):
        raise LayoutError(
            f"attend: {type(kept).__name__} given as the pattern; give a pattern "
            "(mixgrain.patterns) or a Block-, Row- or MixedLayout"
        )
    if kept.lead[0] not in (1, b) or kept.lead[1] not in (1, h):
        raise LayoutError(
            f"attend: the pattern differs over {kept.lead[0]} batch entries and {kept.lead[1]} "
            f"heads, q has {b} and {h} (query heads count, under GQA too); give one entry for "
            "each, or one for all"
        )
    return kept


def check_key_mask(mask: Tensor | None, q: Tensor, nk: int) -> Tensor | None:
    """The key mask as bool (B, nk), or None.

    Raises:
        DtypeError: not bool.
        ShapeError: another shape, or another device.
    """
    if mask is None:
        return None
    check_dense("attend", "key_mask", mask)
    if mask.dtype != torch.bool:
        raise DtypeError(
            f"attend: key_mask is {mask.dtype}; give bool (B, Nk), True = kept, "
            "e.g. attention_mask.bool()"
        )
    b = q.shape[0]
    if tuple(mask.shape) not in ((b, nk), (1, nk), (nk,)):
        raise ShapeError(
            f"attend: key_mask {tuple(mask.shape)}; give ({b}, {nk}), True = kept. A mask over "
            "queries and keys is a pattern: P.from_dense"
        )
    if mask.device != q.device:
        raise ShapeError(f"attend: key_mask on {mask.device}, q on {q.device}; move it there")
    return mask.expand(b, nk)


def check_sink(sink: Tensor | None, q: Tensor) -> Tensor | None:
    """The sink logits, once they fit.

    Raises:
        DtypeError: not floating point.
        ShapeError: not (Hq,), or on another device.
    """
    if sink is None:
        return None
    check_dense("attend", "sink_logits", sink)
    if sink.dtype not in DTYPES:
        raise DtypeError(
            f"attend: sink_logits is {sink.dtype}; give (Hq,) of float16, bfloat16, float32 or "
            "float64"
        )
    if tuple(sink.shape) != (q.shape[1],) or sink.device != q.device:
        raise ShapeError(
            f"attend: sink_logits {tuple(sink.shape)} on {sink.device}; give ({q.shape[1]},) on "
            f"{q.device}, one logit for each query head"
        )
    return sink
