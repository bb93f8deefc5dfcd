"""Attention over the positions a pattern keeps: the public function."""

from __future__ import annotations

import math
import operator
from typing import Literal, overload

import torch
from torch import Tensor

from mixgrain.formats.arguments import as_flag, as_number
from mixgrain.formats.costs import Costs
from mixgrain.formats.errors import UnsupportedError
from mixgrain.formats.layout import Layout
from mixgrain.formats.pattern import Pattern
from mixgrain.formats.pattern_nm import NM
from mixgrain.formats.tracing import constant
from mixgrain.primitives.checks import autocast
from mixgrain.primitives.plans.plan import trust

from . import dense, folded
from .arguments import IMPLS, check_kept, check_key_mask, check_sink, check_tensors
from .cpu import in_stride_order
from .cuda.plan import Plan as CudaPlan
from .cuda.plan import plan as plan_on_cuda
from .cuda.planner import plan_pattern
from .eager import find, learn, run, signature
from .plan import Plan, plan, plan_nm

_CPU = torch.device("cpu")

Impl = Literal["auto", "fused", "composed", "reference"]


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern_or_layout: Pattern | Layout,
    scale: float | None = ...,
    key_mask: Tensor | None = ...,
    enable_gqa: bool = ...,
    sink_logits: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    impl: Impl = ...,
) -> Tensor: ...
@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern_or_layout: Pattern | Layout,
    scale: float | None = ...,
    key_mask: Tensor | None = ...,
    enable_gqa: bool = ...,
    sink_logits: Tensor | None = ...,
    *,
    return_lse: Literal[True],
    impl: Impl = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern_or_layout: Pattern | Layout,
    scale: float | None = ...,
    key_mask: Tensor | None = ...,
    enable_gqa: bool = ...,
    sink_logits: Tensor | None = ...,
    return_lse: bool = ...,
    impl: Impl = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern_or_layout: Pattern | Layout,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    enable_gqa: bool = False,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v over the kept positions, exact to the element.

    Args:
        q: (B, Hq, Nq, D), float16, bfloat16, float32 or float64; any strides.
        k: (B, Hkv, Nk, D), same dtype.
        v: (B, Hkv, Nk, Dv), same dtype.
        pattern_or_layout: a pattern, P.nm(n, m) alone or & a static pattern included; or a
            BlockLayout, RowLayout or MixedLayout. Query i stands at key position i + Nk − Nq.
        scale: multiplies scores; None = 1 / sqrt(D).
        key_mask: bool (B, Nk), True = kept; a dropped key is absent for every query.
        enable_gqa: allow Hq to be a multiple of Hkv.
        sink_logits: (Hq,), an extra term exp(sink) in each denominator.
        return_lse: return the log-sum-exp, too.
        impl: "fused" one pass with online softmax, O(N · D) memory (on CUDA without gradients for
            now, and no float64); "composed" the three primitives, differentiable
            twice; "reference" dense in float64, O(Nq · Nk); "auto" chooses: "fused" where its
            kernels take the call, else "composed". On Hopper it hands eager calls to torch's own
            attention where every query keeps the same keys, one after the other, no gradient is
            asked for, and torch was measured to be the faster (`dense-*` in benchmarks/h200.json).
            An explicit choice runs or raises.

    Returns:
        o (B, Hq, Nq, Dv) in q's dtype and stride order; with return_lse also lse (B, Hq, Nq),
        natural log, float32 (float64 for float64), differentiable, the sink included. A row without
        keys is 0 with lse −inf and zero gradients (with a sink: 0 and the sink). float16 and
        bfloat16 are computed in float32 and rounded once ("composed": after each primitive).

    torch.autocast casts q, k and v as it does for torch's scaled_dot_product_attention.

    Under torch.compile and torch.export the positions are constants of the graph, made when it is
    traced. Another pattern or length compiles once more, and so does another head dimension unless
    ``scale`` is given. A pattern of tensors is made outside the compiled function, and a change of
    such a tensor in place is not seen.

    "fused" has first derivatives in reverse mode, "composed" those of any order in both modes.

    Raises:
        LayoutError: a pattern or layout that does not fit, or has no attention.
        ShapeError: shapes that do not fit each other.
        DtypeError: dtypes that differ or are not floating point.
        UnsupportedError: no kernel for this device, or an unknown ``impl``.
    """
    seen = signature(
        q, k, v, pattern_or_layout, scale, key_mask, enable_gqa, sink_logits, return_lse, impl
    )
    again = None if seen is None else find(seen)
    if again is not None:
        o, found = run(*again, q, k, v, key_mask, sink_logits)
        return (o, found) if return_lse and found is not None else o
    q, k, v = autocast(q, k, v)
    check_tensors(q, k, v, enable_gqa)
    nq, nk = q.shape[2], k.shape[2]
    kept = check_kept(pattern_or_layout, q, nk)
    keep = check_key_mask(key_mask, q, nk)
    sink = check_sink(sink_logits, q)
    enable_gqa = as_flag("attend", "enable_gqa", enable_gqa)
    return_lse = as_flag("attend", "return_lse", return_lse)
    if scale is None:
        scale = 1.0 / math.sqrt(max(q.shape[3], 1))
    scale = as_number("attend", "scale", scale)
    chosen = choose_impl(impl, q.device)
    if impl == "auto" and keep is None and sink is None and not return_lse:
        handed = dense.handed_over(kept, q, k, v, scale)
        if handed is not None:
            if seen is not None:
                learn(seen, lambda: dense.Call(scale, handed))
            return dense.run(q, k, v, scale, handed)
    if chosen == "fused" and q.device.type == "cuda":
        chosen = _fused_or(impl, kept, q, k, v, sink)
        keys = folded.shared_keys(kept, q, k, v, sink) if chosen == "fused" else None
        if keys is not None:
            call = folded.Call(attend, keys, scale, return_lse)
            if seen is not None:
                learn(seen, lambda: call)
            o, lse = call([q, k, v] if keep is None else [q, k, v, keep], [])
            return o if lse is None else (o, lse)
    if chosen == "fused":
        from .ops import attention

        width, masked = max(q.shape[3], v.shape[3]), keep is not None
        made = plan_for(kept, nq, nk, q.device, width, q.dtype, masked)
        o, lse = attention(q, k, v, keep, sink, scale, made.tensors, made.ints)
        if seen is not None:
            from .cuda.forward import direct

            learn(seen, lambda: direct(q, k, v, keep, sink, scale, made.tensors, made.ints))
    elif chosen == "composed":
        from .composed import attend_composed

        source = kept if isinstance(kept, NM) else static_layout(kept, nq, nk, q.device)
        o, lse = attend_composed(q, k, v, source, scale, keep, sink)
        o = in_stride_order(o, q)
    else:
        from .reference import attend_reference

        o, lse = attend_reference(q, k, v, kept, scale, keep, sink)
        o = in_stride_order(o.to(q.dtype), q)
        lse = lse if q.dtype == torch.float64 else lse.float()
    return (o, lse) if return_lse else o


def choose_impl(impl: str, device: torch.device) -> str:
    """What ``impl`` runs on a device.

    Raises:
        UnsupportedError: an unknown name, or no kernel for the device.
    """
    if not isinstance(impl, str) or impl not in IMPLS:
        raise UnsupportedError(f"attend: impl={impl!r:.80}; give one of {', '.join(IMPLS)}")
    exist = ("fused", "composed") if device.type in ("cpu", "cuda") else ()
    if impl == "auto" and exist:
        return exist[0]
    if impl in exist or impl == "reference":
        return impl
    has = f"there exist {', '.join(map(repr, exist))} and" if exist else "there exists"
    raise UnsupportedError(
        f'attend: no impl={impl!r} on {device}; {has} impl="reference" (dense, float64), or move '
        "q, k, v with .cpu()"
    )


def _fused_or(
    impl: str,
    kept: Pattern | Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
) -> str:
    """What runs on CUDA: "fused" where its kernels take the call, "composed" else if "auto"."""
    from .cuda.choice import lacking

    lack = lacking(kept, q, k, v, sink)
    if lack is None:
        return "fused"
    if impl == "auto":
        return "composed"
    raise UnsupportedError(f'attend: impl="fused" on CUDA {lack}; use impl="composed"')


def static_layout(
    kept: Pattern | Layout,
    nq: int,
    nk: int,
    device: torch.device,
    costs: Costs | None = None,
) -> Layout:
    """A given layout as it is, a static pattern as its mixed layout (remembered)."""
    if isinstance(kept, Layout):
        return kept
    made: Layout = kept.to_layout("mixed", nq, nk, device=device, costs=costs)
    _trust(made)
    return made


def plan_for(
    kept: Pattern | Layout,
    nq: int,
    nk: int,
    device: torch.device = _CPU,
    D: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    masked: bool = False,
) -> Plan | CudaPlan:
    """The fused plan of a pattern or layout; on CUDA also by what kernels take at once."""
    if device.type == "cuda":
        from .cuda.choice import groups, split_costs

        units = groups(device, dtype, D)
        if isinstance(kept, Pattern) and not torch.compiler.is_dynamo_compiling():
            from .cuda.warm import compile_together

            index = torch.cuda.current_device() if device.index is None else device.index
            compile_together(index, dtype, D, masked)
            made = plan_pattern(kept, nq, nk, D, device, units)
            if made is not None:
                return made
        layout = static_layout(kept, nq, nk, device, split_costs(D))
        return _plan_cuda(layout, D, str(device), units)
    if isinstance(kept, Layout):
        return _plan(kept)
    if not isinstance(kept, NM):
        return _plan(static_layout(kept, nq, nk, torch.device("cpu")))
    # index: what torch.compile takes for dynamic sizes are the numbers they are now.
    n, m = operator.index(kept.n), operator.index(kept.m)
    if kept.within is None:
        return _plan_nm(operator.index(nq), operator.index(nk), n, m)
    blocks = kept.within.to_layout("block", nq, nk, 64, device="cpu")
    _trust(blocks)
    return _plan(blocks, (n, m))


# torch.compile runs these when it traces a call.


@constant
def _trust(layout: Layout) -> None:
    trust(layout)


@constant
def _plan(layout: Layout, nm: tuple[int, int] = (0, 0)) -> Plan:
    return plan(layout, nm)


@constant
def _plan_cuda(layout: Layout, D: int, device: str, groups: int) -> CudaPlan:
    return plan_on_cuda(layout, D, torch.device(device), groups)


@constant
def _plan_nm(nq: int, nk: int, n: int, m: int) -> Plan:
    return plan_nm(nq, nk, n, m)


__all__ = ["attend", "choose_impl", "plan_for", "static_layout"]
