"""Finding a call again that was made lately, without taking its tensors apart.

A signature is a key of everything that checks and launch code look at; making one takes longer than
the launch. Whether tensors are like those of a call before, torch's compiler asks in one step, with
the guards of what it has compiled: types, keys of dispatch (so no wrapper, lazy or sparse tensor
passes for a plain one, nor any tensor inside a transform or under autocast), dtypes, devices,
shapes, strides, whether gradients are asked for. Calls that are not found so are looked up by their
signatures.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from .looks import TENSORS, address, plain, watched

V = TypeVar("V")

# Signatures of one layout.
SIGNATURES = 64
# Calls that are told apart so, of one layout; and guards that are made until there is another
# signature, so that calls of more kinds than that, in turn, do not make them without end.
_MOST, _TRIES = 8, 64
_guards: Callable[..., Any] | None = getattr(
    getattr(torch._C._dynamo, "guards", None), "TensorGuards", None
)


class _Seen(NamedTuple, Generic[V]):
    """A call that was made.

    Attributes:
        rest: what of it is no tensor.
        check: whether tensors are like its own.
        tf32: torch's switch for float32 products then; None without float32.
        call: what computes it.
    """

    rest: Hashable
    check: Callable[..., bool]
    tf32: str | None
    call: V


class Signatures(dict[Hashable, V]):
    """Calls of one layout by their signatures; those made lately are found without.

    Callers differ in ``rest``, what of a call is no tensor, where they give other numbers of them.
    """

    __slots__ = ("_seen", "_tries")

    def __init__(self) -> None:
        super().__init__()
        self._seen: tuple[_Seen[V], ...] = ()
        self._tries = _TRIES

    def find(self, tensors: Sequence[Any], rest: Hashable) -> tuple[V, list[int]] | None:
        """A call of such tensors and their addresses; None: it is none of these, or means more."""
        # What guards do not see; transforms and autocast they do.
        if watched():
            return None
        for t in tensors:
            if type(t) in TENSORS and t.is_nested:
                return None  # whose strides a guard reads, which ends the process
        for seen in self._seen:
            if seen.rest == rest and seen.check(*tensors):
                if seen.tf32 is not None and seen.tf32 != tf32():
                    continue
                pointers = []
                for t in tensors:
                    at = t.data_ptr()
                    if at & 15 or not (at or not t.numel()):
                        return self._look_up(tensors, rest)
                    pointers.append(at)
                return seen.call, pointers
        return self._look_up(tensors, rest)

    def _look_up(self, tensors: Sequence[Any], rest: Hashable) -> tuple[V, list[int]] | None:
        """The same for a call that was made, but not lately."""
        if not plain():
            return None
        pointers = [address(t) for t in tensors]
        if -1 in pointers:
            return None
        found = self.get(signature(tensors, pointers, rest))
        if found is None:
            return None
        self._remember(tensors, pointers, rest, found)
        return found, pointers

    def keep(
        self, tensors: Sequence[Tensor], pointers: Sequence[int], rest: Hashable, call: V
    ) -> None:
        """Store a call; of too many all are forgotten."""
        if len(self) >= SIGNATURES:
            self.clear()
        self[signature(tensors, pointers, rest)] = call
        self._tries = _TRIES  # guards come when it is made again

    def _remember(
        self, tensors: Sequence[Tensor], pointers: Sequence[int], rest: Hashable, call: V
    ) -> None:
        """As one made lately; not one whose tensors lie at odd addresses, or one of them twice."""
        if any(pointer & 15 for pointer in pointers) or len(set(map(id, tensors))) < len(tensors):
            return
        if self._tries <= 0:
            self._seen = ()  # looking among them would only take time
            return
        self._tries -= 1
        check = _check(tensors)
        if check is not None:
            switch = tf32() if any(t.dtype is torch.float32 for t in tensors) else None
            self._seen = (_Seen(rest, check, switch, call), *self._seen[: _MOST - 1])


def signature(tensors: Sequence[Tensor], pointers: Sequence[int], rest: Hashable) -> Hashable:
    """All that checks, plans and launch code look at.

    Args:
        tensors: what the call is given.
        pointers: their addresses.
        rest: what is no tensor, which of them there are included.
    """
    key: list[Hashable] = [rest]
    for t, at in zip(tensors, pointers, strict=True):
        key += (t.shape, t.stride(), t.dtype, at & 15, t.get_device())
    if any(t.dtype is torch.float32 for t in tensors):
        key.append(tf32())
    return tuple(key)


def tf32() -> str:
    """Torch's switch for float32 products; this reads whichever of its two was used."""
    return str(torch.backends.cuda.matmul.fp32_precision)


def _check(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """What compares as many tensors with these; None where torch offers nothing for that."""
    if _guards is None:
        return None
    try:
        made = _guards(
            *tensors,
            dynamic_dims_sizes=[list(t.shape) for t in tensors],
            dynamic_dims_strides=[list(t.stride()) for t in tensors],
        )
        check: Callable[..., bool] = made.check
        return check if check(*tensors) else None
    except (TypeError, RuntimeError):  # a torch that wants other arguments
        return None
