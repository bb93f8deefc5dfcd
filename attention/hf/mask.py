"""The mask that transformers makes once per forward and kind: a pattern and a key mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixgrain.formats.errors import ShapeError, UnsupportedError
from mixgrain.formats.pattern import Pattern

from .evaluate import MaskFunction
from .mask_functions import translate
from .scope import Scope


class Mask(torch.Tensor):
    """What a layer may see: a bool tensor (B, 1, nq, nk) in name, without storage.

    transformers hands 4-D tensors through to the attention function untouched, and so it does with
    this one. It can be moved to a device; whatever else is done to it raises, because there are no
    elements.

    Attributes:
        pattern: kept (query, key) pairs, the same for all heads.
        key_mask: bool (B, nk), False = padding, or None.
    """

    pattern: Pattern
    key_mask: Tensor | None

    def __new__(cls, pattern: Pattern, key_mask: Tensor | None, scope: Scope) -> Mask:
        shape = (scope.batch, 1, scope.nq, scope.nk)
        return cls._with_shape(pattern, key_mask, shape, scope.device)

    @classmethod
    def _with_shape(
        cls, pattern: Pattern, key_mask: Tensor | None, shape: Sequence[int], device: torch.device
    ) -> Mask:
        made: Mask = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=torch.bool, device=device
        )
        made.pattern, made.key_mask = pattern, key_mask
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        mask, given = args[0] if args else None, kwargs or {}
        if isinstance(mask, cls) and func in _HANDED_ON:
            device = given.get("device") or mask.device
            if given.get("dtype") in (None, torch.bool):
                keys = None if mask.key_mask is None else mask.key_mask.to(device)
                return cls._with_shape(mask.pattern, keys, mask.shape, device)
        raise UnsupportedError(
            f"{func} on a mask of mixgrain: it is a pattern without elements, for the attention "
            "function only; a model that computes with its masks cannot use mixgrain"
        )

    def __deepcopy__(self, memo: object) -> Mask:
        return self._with_shape(self.pattern, self.key_mask, self.shape, self.device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        padding = "" if self.key_mask is None else ", with a key mask"
        return f"Mask({self.pattern!r}, {self.shape[2]} × {self.shape[3]}{padding})"


_HANDED_ON = (
    torch.ops.aten.alias.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.detach.default,
    torch.ops.aten._to_copy.default,
)


# Compiled models call it as it is, between their graphs: it makes Python objects from values.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **rest: Any,
) -> Mask:
    """The function registered with transformers' AttentionMaskInterface; builds no q × kv tensor.

    Args:
        batch_size: B.
        q_length: queries.
        kv_length: keys.
        q_offset: position of the first query, an int or a one-element tensor (static caches).
        kv_offset: position of the first key.
        mask_function: (batch, head, query, key) -> bool over positions; None = causal.
        attention_mask: (B, positions), nonzero = a token, 0 = padding; positions behind its end are
            padding.
        device: where the layers will compute.
        rest: what other implementations need.

    Raises:
        ShapeError: an attention_mask that is not (B, positions).
    """
    where = torch.empty(0, device=device).device
    scope = Scope(batch_size, q_length, kv_length, int(q_offset), int(kv_offset), where)
    if mask_function is None:
        from .requirement import transformers_module

        mask_function = transformers_module("transformers.masking_utils").causal_mask_function
    keys = None if attention_mask is None else _key_mask(attention_mask, scope)
    return Mask(translate(mask_function, scope), keys, scope)


def _key_mask(given: Tensor, scope: Scope) -> Tensor | None:
    if given.ndim != 2 or given.shape[0] not in (1, scope.batch):
        raise ShapeError(
            f"mixgrain in transformers: attention_mask {tuple(given.shape)} given; (batch, tokens) "
            f"with batch {scope.batch} expected, nonzero = a token"
        )
    kept = given[:, scope.kv_offset : scope.kv_offset + scope.nk].to(scope.device) != 0
    short = scope.nk - kept.shape[1]
    if short:
        kept = torch.nn.functional.pad(kept, (0, short))
    # Without padding there is nothing to mask; on a device, looking would mean waiting for it.
    if kept.device.type == "cpu" and bool(kept.all()):
        return None
    return kept.expand(scope.batch, -1)
