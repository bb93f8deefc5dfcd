"""The attention function that transformers calls in each layer, and what it refuses."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixgrain.formats import patterns as P
from mixgrain.formats.cache import LRU, Reference
from mixgrain.formats.errors import ShapeError, UnsupportedError
from mixgrain.formats.pattern import Pattern

from ..attend import Impl, attend
from .mask import Mask

# Arguments that change the result: what they ask for. Anything not listed is accepted, unless the
# model's own eager attention names it.
REFUSED = {
    "softcap": "a cap on the scores",
    "position_bias": "a bias on the scores",
    "attention_bias": "a bias on the scores",
    "attn_bias": "a bias on the scores",
    "alibi": "a bias on the scores",
    "head_mask": "factors on the heads",
    "sinks": "sinks that are not one logit per head",
    "indices": "keys chosen at run time",
    "block_indices": "blocks chosen at run time",
    "sparse_indices": "keys chosen at run time",
    "output_attentions": "the attention weights, which are never all in memory",
    "cache": "a paged cache",
    "cu_seq_lens_q": "sequences packed by lengths",
    "cu_seq_lens_k": "sequences packed by lengths",
}
HINTS = {
    "softcap": "build it of mg.sddmm, map, mg.softmax and mg.spmm, or ",
    "cu_seq_lens_q": "leave it out and pass position_ids that start again with each sequence, or ",
    "cu_seq_lens_k": "leave it out and pass position_ids that start again with each sequence, or ",
}
# What an eager attention function may name without our taking notice: handled here, or neutral.
KNOWN = {"module", "query", "key", "value", "attention_mask", "scaling", "dropout", "kwargs"}
KNOWN |= {"is_causal", "sliding_window", "s_aux"}

# Values at or below this in an additive mask mean "dropped": float16's lowest number.
DROPPED = -65504.0

_dense: LRU[Pattern] = LRU(16)


# Compiled models call it as it is, between their graphs: masks are no tensors that can be traced.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float | Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    impl: Impl = "auto",
    **rest: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers' AttentionInterface.

    Args:
        module: the layer.
        query: (B, Hq, nq, D).
        key: (B, Hkv, nk, D), Hkv divides Hq.
        value: (B, Hkv, nk, Dv).
        attention_mask: what make_mask returned; or a mask given by the user: bool, or additive with
            0 and the lowest number only, (B or 1, Hq or 1, nq, nk), or a FlexAttention BlockMask;
            or None.
        scaling: multiplies scores; None = 1 / sqrt(D).
        dropout: of the attention weights; must be 0 in training.
        is_causal: without a mask, whether queries see later keys; the module's own if None.
        sliding_window: part of the mask already.
        s_aux: (Hq,) sink logits.
        impl: as for attend.
        rest: everything else that transformers passes.

    Returns:
        (B, nq, Hq, Dv) and None in place of the weights.

    Raises:
        UnsupportedError: an argument that changes the result and that mixgrain does not know.
        ShapeError: a mask made for other lengths.
    """
    refuse(module, dropout, rest)
    nq, nk = query.shape[2], key.shape[2]
    pattern, keys = _mask(attention_mask, module, is_causal, sliding_window, nq, nk)
    if keys is not None:
        keys = keys.to(query.device)
    if isinstance(scaling, Tensor):
        query, scaling = query * scaling, 1.0
    o = attend(
        query, key, value, pattern, scale=scaling, key_mask=keys, sink_logits=s_aux,
        enable_gqa=query.shape[1] != key.shape[1], impl=impl,
    )  # fmt: skip
    assert isinstance(o, Tensor)
    return o.transpose(1, 2).contiguous(), None


def refuse(module: torch.nn.Module, dropout: float, rest: dict[str, Any]) -> None:
    """Raise UnsupportedError for arguments that would silently be left out of the mathematics."""
    who = type(module).__name__
    if dropout and module.training:
        raise UnsupportedError(
            f"{who}: dropout={dropout} of the attention weights; mixgrain has none: set the "
            "model's attention dropout to 0, or call model.eval()"
        )
    for name, given in rest.items():
        if given is None or given is False:
            continue
        if name in REFUSED:
            raise UnsupportedError(
                f"{who}: {name} asks for {REFUSED[name]}, which mixgrain's attention does not "
                f"compute; {HINTS.get(name, '')}use "
                'set_attn_implementation("eager") for this model'
            )
        if name in _named_by_eager(module):
            raise UnsupportedError(
                f"{who}: its eager attention takes {name}, which mixgrain does not know; use "
                'set_attn_implementation("eager") for this model'
            )


def _named_by_eager(module: torch.nn.Module) -> frozenset[str]:
    """Arguments of the eager attention beside a model's layer that we have no meaning for."""
    home = sys.modules.get(type(module).__module__)
    eager = getattr(home, "eager_attention_forward", None)
    return frozenset() if eager is None else _unknown_arguments(eager)


@functools.cache
def _unknown_arguments(eager: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(eager).parameters) - KNOWN


def _mask(
    given: object,
    module: torch.nn.Module,
    is_causal: bool | None,
    sliding_window: int | None,
    nq: int,
    nk: int,
) -> tuple[Pattern, Tensor | None]:
    if isinstance(given, Mask):
        if given.shape[2:] != (nq, nk):
            raise ShapeError(
                f"{type(module).__name__}: {given!r} given for {nq} queries and {nk} keys; masks "
                "are made for the lengths of the cache that the layer reads"
            )
        return given.pattern, given.key_mask
    if given is None:
        return _without_mask(module, is_causal, sliding_window, nq, nk), None
    if isinstance(given, Tensor) and given.ndim == 4:
        return _from_tensor(given), None
    from torch.nn.attention.flex_attention import BlockMask

    if isinstance(given, BlockMask):
        return P.from_block_mask(given), None
    shown = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
    raise UnsupportedError(
        f"{type(module).__name__}: attention_mask {shown} given; what mixgrain's mask function "
        "makes, a 4-D tensor, a BlockMask or None expected"
    )


def _without_mask(
    module: torch.nn.Module, is_causal: bool | None, window: int | None, nq: int, nk: int
) -> Pattern:
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if causal is None or (window is not None and nk > window) or (causal and nq not in (1, nk)):
        raise UnsupportedError(
            f"{type(module).__name__}: no mask given, with is_causal={causal}, sliding_window="
            f"{window}, {nq} queries and {nk} keys, and implementations differ in what that means; "
            "pass a mask"
        )
    return P.causal() if causal else P.full()


def _from_tensor(mask: Tensor) -> Pattern:
    """The pattern of a 4-D mask, remembered as long as the mask does not change."""
    if mask.is_inference():  # no version counter; small masks are named by content further down
        return _from_values(mask)
    return _dense.get((Reference(mask), mask._version), lambda: _from_values(mask))


def _from_values(mask: Tensor) -> Pattern:
    if mask.dtype == torch.bool:
        return P.from_dense(mask)
    kept, dropped = mask == 0, mask <= DROPPED
    if mask.requires_grad or not bool((kept | dropped).all()):
        raise UnsupportedError(
            f"attention_mask {tuple(mask.shape)}, {mask.dtype}: holds other values than 0 (kept) "
            f"and at most {DROPPED:.0f} (dropped), so it is a bias, which mixgrain's attention "
            "does not compute; give bool if you mean a mask"
        )
    return P.from_dense(kept)


__all__ = ["attention_forward", "refuse"]
