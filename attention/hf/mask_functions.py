"""Mask functions of transformers as patterns.

transformers describes a mask by a function (batch, head, query, key) -> bool, composed of closures
that its own factories made. The known ones are read as patterns; any other function is evaluated,
only where the rest of the mask keeps something, a chunk of pairs at a time.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from mixgrain.formats import patterns as P
from mixgrain.formats.pattern import Pattern

from .evaluate import MaskFunction, evaluate
from .kinds import REMAP, known_kinds
from .readers import READERS, RELATIVE, closure
from .scope import Scope

DOCUMENTS = "packed_sequence_mask_function"


def translate(function: MaskFunction, scope: Scope) -> Pattern:
    """The pattern that a mask function of transformers draws within a scope.

    Args:
        function: (batch, head, query, key) -> bool, with positions, not row numbers.
        scope: where queries and keys stand.
    """
    kinds = known_kinds()
    joined = _join(function, scope, kinds)
    return evaluate([function], P.full(), scope) if joined is None else joined


def _join(function: MaskFunction, scope: Scope, kinds: dict[Any, str]) -> Pattern | None:
    """The pattern of a known function or a composition that holds one, else None."""
    name = kinds.get(getattr(function, "__code__", None))
    if name is None or name == REMAP:
        return None
    given = closure(function)
    if name not in ("and_masks", "or_masks"):
        return READERS[name](scope, **given)
    terms = list(given["mask_functions"])
    found: list[Pattern] = []
    unknown: list[MaskFunction] = []
    if name == "and_masks":
        terms = _unpacked(terms, scope, kinds)
    for term in terms:
        made = _join(term, scope, kinds)
        found += [] if made is None else [made]
        unknown += [term] if made is None else []
    if name == "or_masks":
        found += [evaluate([one], P.full(), scope) for one in unknown]
        return functools.reduce(lambda a, b: a | b, found) if found else None
    met = functools.reduce(lambda a, b: a & b, found) if found else P.full()
    return evaluate(unknown, met, scope) if unknown else met


def _unpacked(terms: list[MaskFunction], scope: Scope, kinds: dict[Any, str]) -> list[MaskFunction]:
    """Terms of an intersection with documents; f of positions within each document becomes f.

    transformers intersects "same document" with f at each token's position in its document. Where
    these positions differ from the token's own by a constant per document, and f only compares
    positions by their difference, that is "same document" & f.
    """
    names = [kinds.get(getattr(term, "__code__", None)) for term in terms]
    if DOCUMENTS not in names or REMAP not in names:
        return terms
    ids = closure(terms[names.index(DOCUMENTS)])["packed_sequence_mask"]
    plain = []
    for term, name in zip(terms, names, strict=True):
        if name == REMAP:
            given = closure(term)
            inner, at_positions = given["mask_function"], given["position_ids"]
            if _constant_within(ids, at_positions) and _relative(inner, kinds):
                term = inner
        plain.append(term)
    return plain


def _constant_within(ids: Tensor, positions: Tensor) -> bool:
    """Whether position − index is the same for all tokens of a document, which lie together."""
    if ids.shape != positions.shape:
        return False
    index = torch.arange(ids.shape[1], device=ids.device)
    offset = positions - index
    same = ids[:, 1:] == ids[:, :-1]
    rising = bool((ids[:, 1:] >= ids[:, :-1]).all())
    return rising and bool((offset[:, 1:] == offset[:, :-1])[same].all())


def _relative(function: MaskFunction, kinds: dict[Any, str]) -> bool:
    """Whether a known function depends on the difference of positions only."""
    name = kinds.get(getattr(function, "__code__", None))
    if name in ("and_masks", "or_masks"):
        return all(_relative(term, kinds) for term in closure(function)["mask_functions"])
    return name in RELATIVE
