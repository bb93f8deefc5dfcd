"""The short way of the public functions: eager calls on CUDA tensors whose signature was seen.

The first call of a signature goes the long way, through every check and to a plan. What it found
out is kept here, and equal calls need none of it: the signature proves what the checks would. They
go to the prepared kernels directly, past torch's dispatcher, with or without autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, cast

import torch
from torch import Tensor

from mixgrain.formats.block import BlockLayout
from mixgrain.formats.cache import LRU
from mixgrain.formats.layout import Layout
from mixgrain.formats.mixed import MixedLayout
from mixgrain.formats.nm import NMLayout
from mixgrain.formats.panel import PanelLayout
from mixgrain.formats.row import RowLayout
from mixgrain.formats.tile import TileLayout

from . import ops
from .fold import (
    expand,
    fold,
    fold_mask,
    fold_values,
    fold_vector,
    free_shape,
    unfold,
    unfold_vector,
)
from .gradients import Work
from .lately import Signatures, signature
from .looks import address, plain, usable
from .plans.plan import Plan, trusted

if TYPE_CHECKING:
    from mixgrain.cuda.prepared import Prepared

LAYOUT_TYPES = frozenset((BlockLayout, RowLayout, PanelLayout, MixedLayout, NMLayout, TileLayout))
# Layouts whose calls are kept.
LAYOUTS = 128

_grad_enabled: Callable[[], bool] = torch.is_grad_enabled

_layouts: LRU[Signatures[Call]] = LRU(LAYOUTS)


def find(layout: Layout) -> Signatures[Call] | None:
    """The calls of a layout."""
    if type(layout) is not NMLayout:
        return _layouts.peek((layout.key, layout._home))  # `home` itself asks whether it is traced
    return _layouts.peek(_place(layout)) if trusted(layout) else None


def _place(layout: Layout) -> Hashable:
    """What a layout's calls are kept under.

    An NMLayout may have been made by the call before. All of a valid one but its metadata, which
    calls are given, follows from this much.
    """
    if type(layout) is not NMLayout:
        return layout.key, layout._home
    found: Hashable = layout.__dict__.get("_place")
    if found is None:
        within = layout.within
        found = (
            layout.shape, layout.lead, layout.n, layout.m, layout.encoding, layout.transposed,
            layout._home, None if within is None else (within.key, within._home),
        )  # fmt: skip
        layout.__dict__["_place"] = found
    return found


def index_of(layout: Layout) -> Tensor | None:
    """What calls are given of a layout itself: the metadata of an NMLayout."""
    return layout.metadata if type(layout) is NMLayout else None


def without_index(layout: Layout, plan: Plan) -> tuple[Layout, Plan]:
    """A layout and its plan as they may be kept: without what calls are given."""
    if not isinstance(layout, NMLayout):
        return layout, plan
    nothing = layout.metadata.new_empty(0)
    tensors = [nothing, *plan.tensors[1:]]
    return replace(layout, metadata=nothing), plan._replace(tensors=tensors)


class Term(NamedTuple):
    """Operators on tensors as users hold them: fold, compute, unfold.

    Attributes:
        works: what to compute of the tensors, one operator or several.
        layout: the positions.
        lead: leading dimensions of the matrices.
        kinds: of each tensor, as in ``gradients.KINDS``; "index", the last, is that of a tensor
            that stands for the first one of the plan.
        keep_rows: the run-time mask is over rows.
        plan: of the layout for these operators.
    """

    works: tuple[Work, ...]
    layout: Layout
    lead: tuple[int, ...]
    kinds: tuple[str, ...]
    keep_rows: bool
    plan: Plan

    def of(self, wanted: tuple[bool, ...]) -> Self:
        """The same with some of its operators."""
        return self._replace(works=tuple(compress(self.works, wanted)))

    @property
    def indexed(self) -> bool:
        """Whether the last tensor is of the plan."""
        return self.kinds[-1] == "index"

    @property
    def results(self) -> list[str]:
        """Kinds of all results that are wanted."""
        return [kind for work in self.works for kind in work.results]

    def folded(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The tensors as the operators take them."""
        lead = self.layout.lead
        return [
            None if t is None else _fold(kind, t, lead, self.lead)
            for kind, t in zip(self.kinds, tensors, strict=True)
        ]

    def folded_mask(self, keep: Tensor | None) -> Tensor | None:
        """The mask as the operators take it."""
        return fold_mask(keep, self.layout.lead, self.lead)

    def unfolded(self, made: Sequence[Tensor]) -> list[Tensor]:
        """What the operators return, as users hold it."""
        pairs = zip(self.results, made, strict=True)
        return [_unfold(kind, t, self.layout, self.lead) for kind, t in pairs]

    def through_operators(
        self, tensors: Sequence[Tensor | None], keep: Tensor | None
    ) -> list[Tensor]:
        """Compute by the dispatcher, so that whatever is active sees it."""
        folded, mask = self.folded(tensors), self.folded_mask(keep)
        plan, index = self.plan, folded[-1]
        if self.indexed:
            assert index is not None
            plan = plan._replace(tensors=[index, *plan.tensors[1:]])
        made: list[Tensor] = []
        for work in self.works:
            given = [folded[n] for n in work.operands]
            found = getattr(ops, work.op)(*given, mask, self.keep_rows, plan, *work.scalars)
            made += (found if isinstance(found, tuple) else (found,))[: len(work.results)]
        return self.unfolded(made)

    def prepare(self, tensors: Sequence[Tensor | None], keep: Tensor | None) -> Call:
        """The call for tensors like these."""
        from .cuda import together

        folded, mask = self.folded(tensors), self.folded_mask(keep)
        made = together(self.works, folded, mask, self.keep_rows, self.plan, self.indexed)
        copied = any(
            new is not None and old is not None and not _same_memory(new, old)
            for new, old in zip([*folded, mask], [*tensors, keep], strict=True)
        )
        shapes = [self._result(kind, s) for kind, s in zip(self.results, made.shapes, strict=True)]
        shaped = None if None in shapes else made.shaped(cast(Any, shapes))
        return Call(self, shaped or made, copied, shaped is None)

    def _result(self, kind: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape users see of a result, None where it is not contiguous."""
        b, h = self.layout.lead
        if kind == "values":
            return (*free_shape((b, h), self.lead), shape[1])
        if kind == "index":
            return shape
        return None if b > 1 and h == 1 else (*self.lead, *shape[2:])


def _same_memory(view: Tensor, of: Tensor) -> bool:
    """Whether a tensor made by folding another is a view of it."""
    return view.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()


def _fold(kind: str, t: Tensor, lead: tuple[int, int], full: tuple[int, ...]) -> Tensor:
    if kind == "dense":
        return fold(expand(t, full), lead)
    if kind == "index":
        return t
    return fold_values(t, lead, full) if kind == "values" else fold_vector(t, lead)


def _unfold(kind: str, t: Tensor, layout: Layout, full: tuple[int, ...]) -> Tensor:
    if kind == "values":
        return t.reshape(*free_shape(layout.lead, full), layout.slots)
    if kind == "index":
        return t
    return (unfold if kind == "dense" else unfold_vector)(t, layout.lead, full)


class Call:
    """A prepared call on tensors as users hold them.

    Attributes:
        run: takes tensors of the signature, a mask last, and the list of their addresses, which it
            uses up; returns the result, or a tuple of several.
        backward: what computes the gradients; None where the call may not be recorded.
    """

    __slots__ = ("_prepared", "_term", "_viewed", "backward", "run")

    def __init__(self, term: Any, prepared: Prepared, copied: bool, viewed: bool) -> None:
        self._term, self._prepared, self._viewed = term, prepared, viewed
        self.backward: Backward | None = None
        self.run: Callable[[tuple[Tensor, ...], list[int]], Any] = prepared.__call__
        if copied or viewed:
            self.run = self._folding if copied else self._viewing

    def _viewing(self, given: tuple[Tensor, ...], pointers: list[int]) -> Any:
        """Where results are views."""
        made = self._prepared(given, pointers)
        # Of what nobody else has: they may be changed in place.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            if not isinstance(made, tuple):
                return self._term.unfolded([made])[0]
            return tuple(self._term.unfolded(made))

    def _folding(self, given: tuple[Tensor, ...], pointers: list[int]) -> Any:
        """Where folding copies: repeated key heads, strides that do not fold."""
        keep = given[-1] if given[-1].dtype == torch.bool else None
        tensors: list[Tensor | None] = list(given if keep is None else given[:-1])
        # What may be missing stands before what is of the plan.
        last = len(tensors) - self._term.indexed
        tensors[last:last] = [None] * (len(self._term.kinds) - len(tensors))
        every = (*self._term.folded(tensors), self._term.folded_mask(keep))
        folded = tuple(t for t in every if t is not None)
        pointers = [t.data_ptr() for t in folded]
        return (self._viewing if self._viewed else self._prepared)(folded, pointers)


class Preparable(Protocol):
    """What makes calls; see the method of ``Term``."""

    def prepare(self, tensors: Sequence[Tensor | None], keep: Tensor | None) -> Call: ...


class Gradients(Preparable, Protocol):
    """What computes the gradients of a call's inputs; see the methods of ``Term``."""

    def of(self, wanted: tuple[bool, ...]) -> Self: ...
    def through_operators(
        self, tensors: Sequence[Tensor | None], keep: Tensor | None
    ) -> list[Tensor]: ...


class Backward:
    """The backward pass of a call: all gradients that are wanted in one prepared call.

    Args:
        term: the gradients of all inputs, in their order; its tensors are those saved, then the
            gradients of the results.
    """

    __slots__ = ("_calls", "_term")

    def __init__(self, term: Gradients) -> None:
        self._term = term
        self._calls: Signatures[Call] = Signatures()

    def __call__(
        self, tensors: tuple[Tensor | None, ...], keep: Tensor | None, wanted: tuple[bool, ...]
    ) -> Sequence[Tensor | None]:
        """Gradients, None where not wanted; by the operators if they are to be differentiated."""
        if torch.compiler.is_dynamo_compiling() or _grad_enabled():
            return self._through_operators(tensors, keep, wanted)
        given = tuple([t for t in (*tensors, keep) if t is not None])
        rest = wanted, keep is None, *[t is None for t in tensors]
        seen = self._calls.find(given, rest) or self._made(tensors, keep, wanted, given, rest)
        if seen is None:
            return self._through_operators(tensors, keep, wanted)
        call, pointers = seen
        made = call.run(given, pointers)
        if False not in wanted:
            return made if isinstance(made, tuple) else (made,)
        return _spread(made if isinstance(made, tuple) else (made,), wanted)

    def _made(
        self,
        tensors: tuple[Tensor | None, ...],
        keep: Tensor | None,
        wanted: tuple[bool, ...],
        given: tuple[Tensor, ...],
        rest: Hashable,
    ) -> tuple[Call, list[int]] | None:
        """A new call; None: the operators."""
        # E.g. what a hook of saved tensors left on the CPU.
        if not plain() or not all(map(usable, given)):
            return None
        pointers = [address(t) for t in given]
        if -1 in pointers:
            return None
        call = self._term.of(wanted).prepare(tensors, keep)
        if not torch.cuda.is_current_stream_capturing():
            self._calls.keep(given, pointers, rest, call)
        return call, pointers

    def _through_operators(
        self, tensors: tuple[Tensor | None, ...], keep: Tensor | None, wanted: tuple[bool, ...]
    ) -> Sequence[Tensor | None]:
        return _spread(self._term.of(wanted).through_operators(tensors, keep), wanted)


def _spread(made: Sequence[Tensor], wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """What was made at the places where something was wanted."""
    rest = iter(made)
    return [next(rest) if want else None for want in wanted]


def learnable(*tensors: Tensor | None) -> bool:
    """Whether a call that passed all checks may go the short way from here on."""
    return (
        not torch.compiler.is_dynamo_compiling()
        and plain()
        and all(t is None or usable(t) for t in tensors)
        and not torch.cuda.is_current_stream_capturing()  # plans may be copies for the capture
    )


def learn(
    layout: Layout,
    rest: Hashable,
    term: Preparable,
    tensors: Sequence[Tensor | None],
    keep: Tensor | None,
) -> Call:
    """Keep the call of a signature; it has to be ``learnable``."""
    kept = _layouts.get(_place(layout), Signatures)
    given = [t for t in (*tensors, keep) if t is not None]
    pointers = [t.data_ptr() for t in given]
    call = kept.get(signature(given, pointers, rest))  # may not be recorded, or of another NMLayout
    if call is None:
        with torch.no_grad():
            call = term.prepare(tensors, keep)
        kept.keep(given, pointers, rest, call)
    return call
