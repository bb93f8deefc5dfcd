"""Some of many compile requests, so few that compiling them is quick and so many that all is met.

A kernel has up to fourteen constants, and what the listing asks for of it are hundreds of
combinations. Compile faults come from one constant or from two that do not go together, so that
requests are chosen which between them have every value, or every two values at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

from mixgrain.cuda.compile import Request

Met = frozenset[tuple[Hashable, ...]]


def met(wanted: Request, together: int, shared: bool = False) -> Met:
    """Any ``together`` values of a request's constants, and the memory it reserves if asked for.

    That number, SHARED, follows from the other constants; kernels assert that it is theirs.
    """
    values = [("flush", int(wanted.flush)), *wanted.constants]
    found = set(itertools.combinations((v for v in values if v[0] != "SHARED"), together))
    if shared:
        found.update((value,) for value in values if value[0] == "SHARED")
    return frozenset(found)


def covering(
    listed: Sequence[Request], together: int, turn: float = 0.0, shared: bool = False
) -> list[Request]:
    """Of every kernel, requests that meet all that those listed meet; each adds to those before.

    Args:
        listed: requests of any kernels.
        together: how many values of constants at once.
        turn: in [0, 1), where in the listing the search begins: others are chosen of those that add
            as much.
        shared: meet every size of shared memory, too.
    """
    by_name: dict[str, list[Request]] = {}
    for wanted in listed:
        by_name.setdefault(wanted.name, []).append(wanted)
    chosen = []
    for requests in by_name.values():
        begin = int(turn * len(requests))
        has = {w: met(w, together, shared) for w in (*requests[begin:], *requests[:begin])}
        left = set().union(*has.values())
        while left:
            most = max(has, key=lambda wanted: len(has[wanted] & left))
            left -= has[most]
            chosen.append(most)
    return chosen
