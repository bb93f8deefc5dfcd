"""The public constructors of patterns, `mg.patterns`: lazy, combined with `|`, `&`, `~` and `-`.

    from mixgrain import patterns as P
    P.window(256) | P.global_tokens([0, 7])

Query i of nq stands at key position i + nk - nq, so a pattern of nq < nk queries is the last nq
rows of the square one.
"""

from collections.abc import Sequence
from typing import Any

from .arguments import SIDE_LIMIT, check_sequence
from .errors import LayoutError
from .pattern import Pattern
from .pattern_algebra import at, broadcast, table
from .pattern_arguments import as_integer, as_radius, as_seed
from .pattern_drawn import Random, RandomBlocks
from .pattern_nm import NM
from .pattern_static import (
    BlockWindow,
    Causal,
    Dilated,
    Documents,
    Full,
    Globals,
    Sinks,
    Window,
)
from .patterns_given import blocks, from_block_mask, from_csr, from_dense, from_layout
from .source import integers, positions

__all__ = [
    "bigbird",
    "blocks",
    "causal",
    "dilated",
    "documents",
    "from_block_mask",
    "from_csr",
    "from_dense",
    "from_layout",
    "full",
    "global_keys",
    "global_queries",
    "global_tokens",
    "longformer",
    "nm",
    "per_batch",
    "per_head",
    "random",
    "random_blocks",
    "sinks",
    "window",
]


def full() -> Pattern:
    """Every query sees every key."""
    return Full()


def causal() -> Pattern:
    """Every query sees the keys up to its own position.

    Aligned at the last key, unlike `is_causal` of torch's sdpa, which is aligned at the first.
    """
    return Causal()


def window(left: float, right: float | None = None) -> Pattern:
    """Keys at most `left` before and `right` after the query's position, both included.

    Args:
        left: integer >= 0, or math.inf for no bound.
        right: the same; `left` if None.

    Raises:
        LayoutError: negative, or neither an integer nor math.inf.
    """
    first = as_radius(left, "window(left)")
    return Window(first, first if right is None else as_radius(right, "window(right)"))


def dilated(radius: int, step: int) -> Pattern:
    """Keys whose distance is a multiple of `step` and at most radius · step, on both sides.

    Args:
        radius: how many keys to each side, integer >= 0.
        step: distance between them, integer >= 1.

    Raises:
        LayoutError: not such integers.
    """
    return Dilated(as_radius(radius, "dilated(radius)"), as_integer(step, "dilated(step)", 1))


def global_tokens(idx: Any) -> Pattern:
    """Listed positions see every key and are seen by every query; global_queries | global_keys.

    Args:
        idx: positions >= 0 in any order, a list, range, array or 1-D integer tensor; >= nk matches
            nothing.

    Raises:
        LayoutError: a negative position (for a tensor on a device: when it is first used).
    """
    return Globals(positions(idx, "global_tokens"), as_queries=True, as_keys=True)


def global_keys(idx: Any) -> Pattern:
    """Listed keys are seen by every query.

    Args:
        idx: as for global_tokens.

    Raises:
        LayoutError: a negative position.
    """
    return Globals(positions(idx, "global_keys"), as_queries=False, as_keys=True)


def global_queries(idx: Any) -> Pattern:
    """Queries at the listed positions see every key.

    Args:
        idx: as for global_tokens; positions, not row numbers, so the query at position p is row
            p + nq - nk.

    Raises:
        LayoutError: a negative position.
    """
    return Globals(positions(idx, "global_queries"), as_queries=True, as_keys=False)


def sinks(n: int) -> Pattern:
    """The first n keys are seen by every query.

    Raises:
        LayoutError: n is negative or no integer.
    """
    return Sinks(as_integer(n, "sinks(n)", 0))


def documents(ids: Any) -> Pattern:
    """Positions with equal ids see each other.

    Args:
        ids: integers (N,), or (B, N) for one list per batch entry; N must be nk. Equal ids need not
            stand together.

    Raises:
        DtypeError: not integers.
        ShapeError: not 1-D or 2-D.
    """
    source = integers(ids, "documents", ndim=(1, 2))
    if source.base.ndim == 1:
        return Documents(source)
    count = source.base.shape[0]
    if not count:
        raise LayoutError("documents: ids (0, N) given; give the ids of at least one batch entry")
    return table((count, 1), [Documents(source.entry(b)) for b in range(count)], over_batch=True)


def longformer(window: float, global_idx: Any) -> Pattern:
    """A sliding window and global tokens.

    Args:
        window: keys to each side, Hugging Face's attention_window // 2.
        global_idx: positions as for global_tokens.

    Raises:
        LayoutError: as window and global_tokens.

    Source: Beltagy et al., Longformer, arXiv 2004.05150.
    """
    radius = as_radius(window, "longformer(window)")
    return Window(radius, radius) | global_tokens(global_idx)


def random(density: float, seed: int) -> Pattern:
    """In each row about density · nk keys at random positions, drawn without replacement.

    Drawn by the query's position: the same on every device and for every number of queries.

    Args:
        density: mean kept fraction of a row, 0 to 1.
        seed: any integer, taken modulo 2**64.

    Raises:
        LayoutError: density outside [0, 1], or a seed that is no integer.
    """
    valid = isinstance(density, int | float) and not isinstance(density, bool)
    if not valid or not 0 <= density <= 1:
        raise LayoutError(f"random(density): {density!r:.80} given, a number from 0 to 1 expected")
    return Random(float(density), as_seed(seed, "random(seed)"))


def random_blocks(per_row: int, size: int, seed: int) -> Pattern:
    """In each block row `per_row` blocks of size × size, drawn without replacement.

    Args:
        per_row: blocks per block row, integer >= 0; all, if there are fewer.
        size: rows and columns of a block.
        seed: any integer, taken modulo 2**64.

    Raises:
        LayoutError: not such integers.
    """
    return RandomBlocks(
        as_integer(per_row, "random_blocks(per_row)", 0),
        as_integer(size, "random_blocks(size)", 1),
        as_seed(seed, "random_blocks(seed)"),
    )


def bigbird(size: int, window: int, random: int, globals: int, seed: int) -> Pattern:
    """BigBird in blocks of size × size: a window, global blocks and random blocks.

    Args:
        size: rows and columns of a block.
        window: blocks to each side of the own one.
        random: blocks per block row, drawn from those neither in the window nor global (all, if
            there are fewer).
        globals: the first so many blocks are global, as rows and as columns.
        seed: any integer, taken modulo 2**64.

    Raises:
        LayoutError: not such integers.

    Source: Zaheer et al., Big Bird, NeurIPS 2020.
    """
    side = as_integer(size, "bigbird(size)", 1)
    near = as_integer(window, "bigbird(window)", 0)
    drawn = as_integer(random, "bigbird(random)", 0)
    first = as_integer(globals, "bigbird(globals)", 0)
    if first * side >= SIDE_LIMIT:
        raise LayoutError(
            f"bigbird: {first} global blocks of {side} given, fewer than 2**31 positions expected"
        )
    return (
        BlockWindow(side, near)
        | RandomBlocks(drawn, side, as_seed(seed, "bigbird(seed)"), near, first)
        | global_tokens(range(first * side))
    )


def per_head(patterns: Sequence[Pattern]) -> Pattern:
    """One pattern for each query head; equal ones are stored once.

    Args:
        patterns: Hq patterns that are the same for all heads and batch entries.

    Raises:
        LayoutError: none given, or one that is itself per head or per batch entry, or P.nm.
    """
    items = _patterns(patterns, "per_head", most=0)
    return table((1, len(items)), items, over_batch=False)


def per_batch(patterns: Sequence[Pattern]) -> Pattern:
    """One pattern for each batch entry; equal ones are stored once.

    Args:
        patterns: B patterns, each for all heads or a per_head of the same number of heads.

    Raises:
        LayoutError: none given, or one that is itself per batch entry, or P.nm.
        ShapeError: different numbers of heads.
    """
    items = _patterns(patterns, "per_batch", most=1)
    heads = broadcast([item.lead for item in items], "per_batch")[1]
    flat = [at(item, 0, h) for item in items for h in range(heads)]
    return table((len(items), heads), flat, over_batch=True)


def nm(n: int, m: int) -> Pattern:
    """Keep the n largest scores of every m neighbouring keys, chosen at run time.

    Combines by & only. Groups are by original key number, key // m. A group with at most n live
    keys keeps them all; ties go to the lower key; the last group may be short.

    Raises:
        LayoutError: not integers with 1 <= n <= m.
    """
    kept, group = as_integer(n, "nm(n)", 1), as_integer(m, "nm(m)", 1)
    if kept > group:
        raise LayoutError(f"nm: n = {kept} of m = {group} given, 1 <= n <= m expected")
    return NM(kept, group)


def _patterns(given: Sequence[Pattern], who: str, most: int) -> list[Pattern]:
    items = list(check_sequence(who, "patterns", given))
    for item in items:
        if not isinstance(item, Pattern) or isinstance(item, NM) or item.leading_dims > most:
            raise LayoutError(
                f"{who}: {item!r:.200} given; patterns that are the same for all batch entries"
                f"{' and heads' if most == 0 else ''} expected (per_batch may hold per_head, "
                "not the reverse; combine P.nm with the whole table by &)"
            )
    if not items:
        raise LayoutError(f"{who}: no patterns given, at least one expected")
    return items
