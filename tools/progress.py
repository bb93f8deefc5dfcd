"""Progress on stderr for whatever takes more than two seconds; silent where nobody looks."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

# Seconds before anything is shown, and between two updates of a clock.
PATIENCE, TICK = 2.0, 0.5


def counted(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar once they have taken two seconds, if stderr is a terminal.

    Args:
        items: what to go through.
        what: the bar's label.
        total: how many there are, if len() does not say.
    """
    from tqdm import tqdm

    bar: Iterable[T] = tqdm(
        items, desc=what, total=total, delay=PATIENCE, disable=None, leave=False
    )
    yield from bar


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Shows `what` and the seconds gone by, after two of them, if stderr is a terminal.

    For work that cannot say how far it has come.
    """
    if not sys.stderr.isatty():
        yield
        return
    done = threading.Event()

    def tick() -> None:
        if done.wait(PATIENCE):
            return
        from tqdm import tqdm

        with tqdm(desc=what, bar_format="{desc} … {elapsed}", leave=False) as clock:
            while not done.wait(TICK):
                clock.refresh()

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()
