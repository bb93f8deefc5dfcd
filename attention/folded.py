"""One query of grouped heads: the heads of a group become the queries of one head.

Where the query of every head keeps the first keys and no others, nothing tells the heads of a group
from queries of the head that they share keys with, and the keys are read once for all of them
(grouped-query attention: Ainslie et al., GQA, EMNLP 2023). Only where the plan cuts the keys as it
does for a head alone: one unit of queries, units of keys counted from the first one on. A group is
whole in every call, so that its result depends on no other group or batch entry, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixgrain.formats.layout import Layout
from mixgrain.formats.pattern import Pattern
from mixgrain.formats.patterns import full
from mixgrain.primitives.looks import plain

from .cuda.cells import UNIT
from .dense import same_keys


def shared_keys(
    kept: Pattern | Layout, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None
) -> int | None:
    """The end of the keys that an eager call reads once for a group; None: it is none such.

    Arguments as of ``attend``, checked. Sinks differ among the heads of a group.
    """
    if q.shape[2] != 1 or not k.shape[1] < q.shape[1] <= UNIT * k.shape[1] or sink is not None:
        return None
    if isinstance(kept, Layout) or torch.compiler.is_dynamo_compiling() or not plain():
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        return None
    first, end = same_keys(kept, 1, k.shape[2]) or (1, 0)
    return None if first else end


class Call:
    """Calls of one signature, as the short way of ``attend`` keeps them.

    Args:
        attend: the function.
        keys: how many are read.
        scale: multiplies scores.
        lse: return it.
    """

    def __init__(self, attend: Callable[..., Any], keys: int, scale: float, lse: bool) -> None:
        self._attend, self._keys, self._scale, self._lse = attend, keys, scale, lse

    def __call__(self, given: list[Tensor], addresses: list[int]) -> tuple[Tensor, Tensor | None]:
        """Output (B, Hq, 1, Dv) and lse (B, Hq, 1) of q, k, v and perhaps a mask (B, Nk)."""
        q, k, v = given[:3]
        mask = given[3] if len(given) > 3 else None
        if self._keys < k.shape[2]:
            k, v = k[:, :, : self._keys], v[:, :, : self._keys]
            mask = None if mask is None else mask[:, : self._keys]
        heads = q[:, :, 0].unflatten(1, (k.shape[1], q.shape[1] // k.shape[1]))
        made = self._attend(
            heads, k, v, full(), self._scale, mask, return_lse=self._lse, impl="fused"
        )
        o, lse = made if self._lse else (made, None)
        return o.flatten(1, 2).unsqueeze(2), None if lse is None else lse.flatten(1, 2).unsqueeze(2)
