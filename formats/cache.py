"""Bounded memos whose keys may name tensors, and the switch that empties them all."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .tracing import concretely, kept

if TYPE_CHECKING:
    from .layout import Layout

V = TypeVar("V")

_registered: "weakref.WeakSet[LRU[Any]]" = weakref.WeakSet()


class LRU(Generic[V]):
    """A memo of the `size` most recently used values; safe to use from several threads."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._lock = threading.Lock()
        _registered.add(self)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of `key`, made now if it is not there.

        `make` runs outside the lock and outside whatever traces or transforms the caller, so that
        the tensors kept are real ones. When two threads make the same value the first one stored
        wins, so that every caller sees one object per key.
        """
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        made = concretely(make)
        with self._lock:
            value = self._values.setdefault(key, made)
            self._values.move_to_end(key)
            while len(self._values) > self.size:
                self._values.popitem(last=False)
            return value

    def peek(self, key: Hashable) -> V | None:
        """The value of `key`, which counts as used, or None; takes no lock."""
        found = self._values.get(key)
        if found is not None:
            try:  # noqa: SIM105  # contextlib.suppress takes a microsecond
                self._values.move_to_end(key)
            except KeyError:  # another thread dropped it this moment
                pass
        return found

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._values.clear()


class Reference:
    """A hashable name for an object; does not copy it, compare its contents or keep it alive.

    Two references are equal when they name the same living object; once it is gone its reference
    equals only itself, so a new object at the same address never finds the old one's entry.
    """

    __slots__ = ("_hash", "_ref")

    def __init__(self, target: object) -> None:
        self._ref = weakref.ref(target)
        self._hash = id(target)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Reference):
            return NotImplemented
        target = self._ref()
        return target is not None and target is other._ref()


layouts: "LRU[Layout]" = LRU(64)


def clear_caches() -> None:
    """Forget every memoised layout and plan of the process."""
    for memo in list(_registered):
        memo.clear()
    vars(kept).clear()  # a compiled function that used one of these compiles once more
