"""Random pattern expressions as nested tuples, their patterns, and their masks pair by pair.

The masks are made of tests/predicates.py and of boolean operations; nothing of the library's
algebra is in them. Random draws have no predicate: their masks are their own square ones.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import predicates as literal
import torch
from hypothesis import strategies as st
from torch import Tensor

from mixgrain.formats import patterns as P
from mixgrain.formats.pattern import Pattern

Expression = tuple[Any, ...]

SIDES = (5, 0, 1, 2, 3, 8, 11, 16, 17, 24)


def ids_of(how: str, n: int, nk: int) -> list[int]:
    """Documents by a rule, so that one expression serves every number of keys."""
    return [j * n // max(nk, 1) if how == "runs" else j * j % n for j in range(nk)]


def _radius(value: int | None) -> float:
    return math.inf if value is None else value


def pattern_of(e: Expression, nq: int, nk: int) -> Pattern:
    """The library's pattern; the shape matters to ids and fixed masks only."""
    name, *a = e
    if name in ("|", "&", "-"):
        left, right = pattern_of(a[0], nq, nk), pattern_of(a[1], nq, nk)
        return left | right if name == "|" else left & right if name == "&" else left - right
    if name == "~":
        return ~pattern_of(a[0], nq, nk)
    if name == "window":
        return P.window(_radius(a[0]), _radius(a[1]))
    if name == "documents":
        return P.documents(torch.tensor(ids_of(*a, nk), dtype=torch.int64))
    if name == "from_dense":
        return P.from_dense(_mask(e, nq, nk))
    if name == "from_csr":
        mask = _mask(e, nq, nk)
        pointers = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
        return P.from_csr(pointers, mask.nonzero()[:, 1], (nq, nk))
    if name == "blocks":
        return P.blocks(_block_mask(e, nq, nk), a[0])
    if name in ("global_tokens", "global_keys", "global_queries"):
        return getattr(P, name)(list(a[0]))
    if name == "longformer":
        return P.longformer(a[0], list(a[1]))
    return getattr(P, name)(*a)  # type: ignore[no-any-return]


def _block_mask(e: Expression, nq: int, nk: int) -> Tensor:
    _, size, seed = e
    g = torch.Generator().manual_seed(seed)
    return torch.rand(-(-nq // size), -(-nk // size), generator=g) < 0.5


def _keep(e: Expression, nq: int, nk: int) -> literal.Keep:
    name, *a = e
    if name == "window":
        return literal.window(_radius(a[0]), _radius(a[1]))
    if name == "documents":
        ids = ids_of(*a, nk)
        return literal.documents(lambda n: ids)
    if name == "blocks":
        blocks = _block_mask(e, nq, nk).tolist()
        return literal.blocks(lambda n, m: blocks, a[0])
    if name == "bigbird":
        return literal.bigbird_fixed(a[0], a[1], a[3])
    if name in ("global_tokens", "global_keys", "global_queries"):
        return getattr(literal, name)(list(a[0]))  # type: ignore[no-any-return]
    if name == "longformer":
        return literal.longformer(a[0], list(a[1]))
    return getattr(literal, name)(*a)  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=1 << 14)
def _mask(e: Expression, nq: int, nk: int) -> Tensor:
    """The mask of a leaf; remembered, since leaves come again and again."""
    if e[0] in ("from_dense", "from_csr"):
        g = torch.Generator().manual_seed(e[2])
        return torch.rand(nq, nk, generator=g) < e[1]
    if e[0] in ("random", "random_blocks") or (e[0] == "bigbird" and e[3]):
        drawn = pattern_of(e, nq, nk)
        return drawn.dense(nk, nk)[nk - nq :] if nq <= nk else drawn.dense(nq, nk)
    return literal.mask_of(_keep(e, nq, nk), nq, nk)


def mask_of(e: Expression, nq: int, nk: int) -> Tensor:
    """bool (nq, nk), by predicates and boolean algebra."""
    name, *a = e
    if name == "~":
        return ~mask_of(a[0], nq, nk)
    if name not in ("|", "&", "-"):
        return _mask(e, nq, nk)
    left, right = mask_of(a[0], nq, nk), mask_of(a[1], nq, nk)
    return left | right if name == "|" else left & right if name == "&" else left & ~right


_radii = st.sampled_from((1, 0, 2, 4, 9, None))
_small = st.sampled_from((1, 0, 2, 3, 5))
_positive = st.sampled_from((2, 1, 3, 5))
_indices = st.lists(st.integers(0, 25), max_size=4).map(tuple)
_seeds = st.integers(0, 99)
_density = st.sampled_from((0.3, 0.0, 0.05, 0.8, 1.0))

_LEAVES: dict[str, tuple[st.SearchStrategy[Any], ...]] = {
    "window": (_radii, _radii),
    "causal": (),
    "full": (),
    "sinks": (_small,),
    "dilated": (_small, _positive),
    "global_tokens": (_indices,),
    "global_keys": (_indices,),
    "global_queries": (_indices,),
    "documents": (st.sampled_from(("runs", "squares")), _positive),
    "longformer": (_small, _indices),
    "bigbird": (_positive, _small, _small, _small, _seeds),
    "random": (_density, _seeds),
    "random_blocks": (_small, _positive, _seeds),
}
_FIXED: dict[str, tuple[st.SearchStrategy[Any], ...]] = {
    "from_dense": (_density, _seeds),
    "from_csr": (_density, _seeds),
    "blocks": (_positive, _seeds),
}


@st.composite
def expressions(
    draw: st.DrawFn, fixed: bool = True, most: int = 3, causal: bool = False
) -> Expression:
    """A leaf, or a few joined by ``|``, ``&``, ``-`` and ``~``.

    Args:
        draw: given by hypothesis.
        fixed: leaves of a fixed shape (from_dense, from_csr, blocks) as well.
        most: number of leaves.
        causal: cut the whole down to the keys up to the query.
    """
    table = {**_LEAVES, **_FIXED} if fixed else _LEAVES
    names = list(table)
    made: Expression | None = None
    for _ in range(draw(st.integers(1, most))):
        name = draw(st.sampled_from(names))
        leaf: Expression = (name, *(draw(part) for part in table[name]))
        if made is None:
            made = leaf
        else:
            sign = draw(st.sampled_from(("|", "&", "-", "- turned", "~ |", "~ &")))
            if sign == "- turned":
                made = ("-", leaf, made)
            elif sign[0] == "~":
                made = ("~", (sign[2], made, leaf))
            else:
                made = (sign, made, leaf)
    assert made is not None
    return ("&", ("causal",), made) if causal else made


sides = st.sampled_from(SIDES)
