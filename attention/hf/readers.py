"""What the mask factories of transformers mean: their arguments read as patterns.

A reader takes a scope and the variables that the factory's closure holds. It returns None where it
cannot say what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from mixgrain.formats import patterns as P
from mixgrain.formats.pattern import Pattern

from .evaluate import MaskFunction
from .scope import Scope


def closure(function: MaskFunction) -> dict[str, Any]:
    """The variables of its factory that a closure holds, by name."""
    code: CodeType = function.__code__
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}


def _causal(scope: Scope) -> Pattern:
    return scope.place(P.causal())


def _everything(scope: Scope) -> Pattern:
    return P.full()


def _behind(scope: Scope, sliding_window: object) -> Pattern | None:
    if not isinstance(sliding_window, int) or sliding_window < 1:
        return None
    return scope.place(P.window(sliding_window - 1, math.inf))


def _around(scope: Scope, sliding_window: object) -> Pattern | None:
    if not isinstance(sliding_window, int) or sliding_window < 0:
        return None
    return scope.place(P.window(sliding_window))


def _chunks(scope: Scope, chunk_size: object, left_padding: object) -> Pattern | None:
    if not isinstance(chunk_size, int) or not isinstance(left_padding, Tensor):
        return None
    if chunk_size < 1 or left_padding.shape != (scope.batch,) or scope.first < 0:
        return None
    at_keys = torch.arange(scope.kv_offset, scope.kv_offset + scope.reach)
    ids = (at_keys - left_padding.cpu().long()[:, None]).div(chunk_size, rounding_mode="floor")
    return scope.documents(ids[:1] if bool((ids == ids[:1]).all()) else ids)


def _same_block(scope: Scope, block_sequence_ids: object) -> Pattern | None:
    ids = scope.table(block_sequence_ids)
    if ids is None:
        return None
    # A negative id is no block: such a key is seen by nobody, not even by itself.
    seen = [P.global_keys(torch.nonzero(row >= 0).flatten()) for row in ids]
    return scope.documents(ids) & (seen[0] if len(seen) == 1 else P.per_batch(seen))


def _same_sequence(scope: Scope, packed_sequence_mask: object) -> Pattern | None:
    ids = scope.table(packed_sequence_mask)
    return None if ids is None else scope.documents(ids)


READERS: dict[str, Callable[..., Pattern | None]] = {
    "causal_mask_function": _causal,
    "bidirectional_mask_function": _everything,
    "sliding_window_overlay": _behind,
    "sliding_window_bidirectional_overlay": _around,
    "chunked_overlay": _chunks,
    "blockwise_overlay": _same_block,
    "packed_sequence_mask_function": _same_sequence,
}
# Depend on query − key only.
RELATIVE = frozenset(
    {
        "causal_mask_function",
        "bidirectional_mask_function",
        "sliding_window_overlay",
        "sliding_window_bidirectional_overlay",
    }
)
