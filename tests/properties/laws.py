"""What makes a test a law: a body, what it is drawn from, and its share of a long run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy


@dataclass(frozen=True)
class Law:
    """One property.

    Attributes:
        body: the test itself; its @example lines are on it.
        strategies: what each of its arguments is drawn from.
        share: examples relative to the other laws; dear ones have less than 1, cheap ones more.
    """

    body: Callable[..., None]
    strategies: dict[str, SearchStrategy[Any]]
    share: float


def law(share: float = 1.0, /, **strategies: SearchStrategy[Any]) -> Callable[..., Any]:
    """``given`` and a number of examples: twice the profile's, since a law covers every kind of
    layout at once, and less for dear laws.

    run_long.py takes the law apart again and runs its body in pieces with seeds of their own.
    """

    def decorate(body: Callable[..., None]) -> Any:
        examples = max(5, round(2 * settings.default.max_examples * min(share, 1.0)))
        test = settings(max_examples=examples)(given(**strategies)(body))
        test.law = Law(body, strategies, share)
        return test

    return decorate
