"""Mask functions that nobody knows: called on the pairs that the rest of a mask keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixgrain.formats import patterns as P
from mixgrain.formats.pattern import Frame, Pattern
from mixgrain.formats.pattern_algebra import at
from mixgrain.formats.pattern_queries import chunked_runs
from mixgrain.formats.runs import Runs, from_sorted_pairs, stacked

from .placed import Listed
from .scope import Scope

MaskFunction = Callable[[Any, Any, Any, Any], Any]

# Pairs for which a function is called at a time.
PAIRS_PER_CHUNK = 1 << 20


def evaluate(functions: list[MaskFunction], within: Pattern, scope: Scope) -> Pattern:
    """Where `within` keeps and every function holds, found by calling them on each such pair."""
    entries = []
    for b in range(scope.batch):
        entries.append(_evaluate_entry(functions, at(within, b, 0), b, scope))
        # What does not depend on the batch entry is one pattern.
        entries[b] = next((e for e in entries if e.digest == entries[b].digest), entries[b])
    same = all(entry is entries[0] for entry in entries)
    return entries[0] if same else P.per_batch(entries)


def _evaluate_entry(functions: list[MaskFunction], flat: Pattern, b: int, scope: Scope) -> Listed:
    frame = Frame(scope.nq, scope.nk, scope.device)
    flat.check(frame)
    none = torch.empty(0, dtype=torch.int64, device=scope.device)
    parts = [Runs(none.new_zeros(1), none, none)]
    entry, head = torch.tensor(b, device=scope.device), torch.tensor(0, device=scope.device)
    rows_each = max(1, PAIRS_PER_CHUNK // max(1, scope.nk))
    for first in range(0, scope.nq, rows_each):
        rows = torch.arange(first, min(first + rows_each, scope.nq), device=scope.device)
        for chunk, runs in chunked_runs(flat, frame, rows):
            line, key = runs.pairs()
            kept = _call(
                functions, entry, head, chunk[line] + scope.q_offset, key + scope.kv_offset
            )
            parts.append(from_sorted_pairs(line[kept], key[kept], chunk.numel()))
    return Listed.of(stacked(parts), scope.nk)


def _call(functions: list[MaskFunction], b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    # Imported here: torch's tracer, which reading a table at a mapped index needs.
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    kept = torch.ones(q.shape, dtype=torch.bool, device=q.device)
    if not q.numel():
        return kept
    for function in functions:
        with TransformGetItemToIndex():
            mapped = torch.vmap(function, in_dims=(None, None, 0, 0))
            kept &= mapped(b, h, q, k).to(device=q.device, dtype=torch.bool)
    return kept
