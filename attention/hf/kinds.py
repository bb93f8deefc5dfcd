"""Which mask functions of the installed transformers are known: proven on small rectangles.

Closures of one factory share one code object, so a known factory is recognised by that. Nothing is
taken on trust: each kind is compared, element by element, with what its reader says. A kind that
means something else in another version is left out, and such functions are evaluated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixgrain.formats import patterns as P
from mixgrain.formats.pattern import Pattern

from .evaluate import MaskFunction, evaluate
from .readers import READERS, closure
from .requirement import transformers_module
from .scope import Scope

REMAP = "remap_positions_for_packed_sequence"


@functools.cache
def known_kinds() -> dict[Any, str]:
    """The code objects of the installed transformers that were found to mean what we read."""
    module = transformers_module("transformers.masking_utils")
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    spans = torch.where(ids == 1, -1, ids)
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, *range(10)]])
    given: dict[str, tuple[Any, ...]] = {
        "sliding_window_overlay": (3,),
        "sliding_window_bidirectional_overlay": (2,),
        "chunked_overlay": (4, torch.tensor([0, 3])),
        "blockwise_overlay": (spans,),
        "packed_sequence_mask_function": (ids,),
    }
    samples: dict[str, MaskFunction] = {}
    for name in READERS:
        factory = getattr(module, name, None)
        if factory is not None:
            samples[name] = factory(*given[name]) if name in given else factory
    kinds: dict[Any, str] = {
        function.__code__: name for name, function in samples.items() if _agrees(function, name)
    }
    # Compositions: their parts are read, so a sample of each tells whether they still compose.
    left, right = module.causal_mask_function, module.sliding_window_overlay(3)
    for name, joined in (("and_masks", all), ("or_masks", any)):
        function = getattr(module, name)(left, right)
        if _composes(function, left, right, joined):
            kinds[function.__code__] = name
    if (make := getattr(module, REMAP, None)) is not None:
        remap = make(left, places)
        if _remaps(remap, left, places):
            kinds[remap.__code__] = REMAP
    return kinds


SCOPES = (
    Scope(2, 12, 12, 0, 0, torch.device("cpu")),
    Scope(2, 2, 7, 8, 3, torch.device("cpu")),  # a sliding cache
    Scope(2, 3, 12, 4, 0, torch.device("cpu")),  # a static cache
)


def _agrees(function: MaskFunction, name: str) -> bool:
    for scope in SCOPES:
        try:
            read = READERS[name](scope, **closure(function))
        except TypeError:  # the factory names its arguments otherwise
            return False
        called = evaluate([function], P.full(), scope)
        shape = (scope.batch, 1, scope.nq, scope.nk)
        if read is None or not torch.equal(*(_dense(p, shape) for p in (read, called))):
            return False
    return True


def _dense(pattern: Pattern, shape: tuple[int, int, int, int]) -> Tensor:
    found = pattern.dense(*shape[2:]).reshape(*pattern.lead, *shape[2:])
    return found.expand(shape)


def _composes(
    function: MaskFunction, left: MaskFunction, right: MaskFunction, joined: Callable[..., bool]
) -> bool:
    parts = closure(function).get("mask_functions")
    if parts != (left, right):
        return False
    grid = [(torch.tensor(i), torch.tensor(j)) for i in range(6) for j in range(6)]
    return all(
        bool(function(0, 0, i, j)) == joined(bool(f(0, 0, i, j)) for f in parts) for i, j in grid
    )


def _remaps(function: MaskFunction, inner: MaskFunction, positions: Tensor) -> bool:
    given = closure(function)
    if given.get("mask_function") is not inner or given.get("position_ids") is not positions:
        return False
    grid = [(i, j) for i in range(12) for j in range(12)]
    return all(
        bool(function(1, 0, i, j)) == bool(inner(1, 0, positions[1, i], positions[1, j]))
        for i, j in grid
    )
