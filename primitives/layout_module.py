"""LayoutModule: a layout as part of a torch module, its index tensors in the state dict."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any, Self, cast

import torch
from torch import Tensor

from mixgrain.formats.arguments import check_dense
from mixgrain.formats.block import BlockLayout
from mixgrain.formats.errors import LayoutError
from mixgrain.formats.layout import Layout
from mixgrain.formats.mixed import MixedLayout
from mixgrain.formats.nm import NMLayout
from mixgrain.formats.panel import PanelLayout
from mixgrain.formats.row import RowLayout
from mixgrain.formats.tile import TileLayout

_LAYOUTS: dict[str, type[Any]] = {
    cls.kind: cls
    for cls in (TileLayout, NMLayout, BlockLayout, RowLayout, PanelLayout, MixedLayout)
}


class LayoutModule(torch.nn.Module):
    """Holds a layout for a module: give yours one, and use its ``layout`` in ``forward``.

    The index tensors are buffers: they are in the state dict, follow ``.to(device)``, and casts of
    the model (``.half()``) leave them alone. Positions are part of what a model is, like its sizes:
    loading a state dict with others raises. They stay real when the model moves to the meta device,
    so ``to_empty`` and ``load_state_dict`` work as usual.

    Attributes:
        layout: the positions; None until a state dict brings them.
    """

    def __init__(self, layout: Layout | None = None) -> None:
        """Hold a layout.

        Args:
            layout: the positions; None = those of the first state dict that is loaded.
        """
        super().__init__()
        self._layout: Layout | None = None
        if layout is not None:
            self._hold(layout)

    @property
    def layout(self) -> Layout | None:
        """The positions; None until a state dict brings them."""
        return self._layout

    def _hold(self, layout: Layout) -> None:
        if not isinstance(layout, Layout):
            raise LayoutError(
                f"LayoutModule: given a {type(layout).__name__}, expected a layout; from a "
                "pattern, make one with pattern.to_layout(kind, nq, nk)"
            )
        self._layout = layout
        for name, tensor in _named_tensors(layout):
            self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Only the device is learnt from fn: what it makes of the indices may be a cast, or empty.
        if self._layout is not None:
            device = fn(torch.empty(0, dtype=torch.int32, device=self._layout.device)).device
            if device.type != "meta":
                self._hold(self._layout.to(device))
        return self

    def get_extra_state(self) -> Tensor:
        """Everything of the layout that is no tensor, as JSON in uint8."""
        text = "null" if self._layout is None else json.dumps(_described(self._layout))
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: the state was checked when it was loaded."""

    def adopt(self, state: Mapping[str, Any], prefix: str, errors: list[str]) -> None:
        """Take the layout from a state dict, if it has one there.

        Args:
            state: the state dict.
            prefix: what stands before the names of this module's tensors.
            errors: gets a message when there is one that cannot be.
        """
        text = _text(state.get(f"{prefix}_extra_state"))
        if text is None:
            return
        tensors = {key.removeprefix(prefix): value for key, value in state.items()}
        try:
            described = json.loads(text)
            layout = None if described is None else _built(described, tensors, "")
            if layout is not None:
                layout.validate()
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
                ValueError) as error:  # fmt: skip
            errors.append(f"{prefix}layout: no layout can be made of the state dict ({error})")
            return
        if layout is not None:
            self._hold(layout)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self._layout is None:
            self.adopt(state_dict, prefix, error_msgs)
        mine = {prefix + name: tensor for name, tensor in self._buffers.items()}
        given = {key for key in state_dict if key.startswith(prefix)}
        about = f"{prefix}_extra_state"
        if not given and mine:
            if strict:
                missing_keys += [*mine, about]
            return
        here, there = "nothing", "nothing"
        if self._layout is not None:
            here = json.dumps(_described(self._layout))
        if (text := _text(state_dict.get(about))) is not None:
            there = text
        elif about in state_dict:
            there = "what is no description of a layout"
        same = here == there and given == {*mine, about}
        if not same or not all(_equal(state_dict[key], mine[key]) for key in mine):
            error_msgs.append(
                f"{prefix}layout: the state dict holds other positions ({_short(there)}) than the "
                f"module ({self._layout!r}); positions are not copied into an existing layout: "
                "build the module with those it was saved with, or without a layout "
                "(layout=None) to take them from the state dict"
            )

    def extra_repr(self) -> str:
        """The layout."""
        return repr(self._layout)


def _named_tensors(layout: Layout, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for field in fields(cast(Any, layout)):
        value = getattr(layout, field.name)
        if isinstance(value, Tensor):
            yield prefix + field.name, value
        elif isinstance(value, Layout):
            yield from _named_tensors(value, f"{prefix}{field.name}_")


def _described(layout: Layout) -> dict[str, Any]:
    """Everything of a layout that is no tensor; tensors by None."""
    described: dict[str, Any] = {"kind": layout.kind}
    for field in fields(cast(Any, layout)):
        value = getattr(layout, field.name)
        if isinstance(value, Layout):
            described[field.name] = _described(value)
        elif field.name != "key":  # an identity within one process
            described[field.name] = "tensor" if isinstance(value, Tensor) else value
    return described


def _built(described: dict[str, Any], tensors: Mapping[str, Any], prefix: str) -> Layout:
    """The inverse of ``_described`` and ``_named_tensors``; checks nothing."""
    cls = _LAYOUTS[described["kind"]]
    given: dict[str, Any] = {}
    for field in fields(cls):
        if field.name == "key":
            continue
        value = described[field.name]
        if isinstance(value, dict):
            value = _built(value, tensors, f"{prefix}{field.name}_")
        elif value == "tensor":
            tensor = tensors.get(prefix + field.name)
            check_dense("LayoutModule", prefix + field.name, tensor)
            value = cast(Tensor, tensor).detach().clone()
        given[field.name] = tuple(value) if isinstance(value, list) else value
    return cast(Layout, cls(**given))


def _equal(given: object, mine: Tensor | None) -> bool:
    if not isinstance(given, Tensor) or mine is None or given.layout is not torch.strided:
        return False
    if given.is_nested or given.is_meta or mine.is_meta or given.dtype != mine.dtype:
        return False
    return torch.equal(given.to(mine.device), mine)


def _text(state: object) -> str | None:
    """What ``get_extra_state`` wrote; None where something else stands."""
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.is_meta:
        return None
    if state.is_nested or state.layout is not torch.strided or state.dim() != 1:
        return None
    return bytes(state.tolist()).decode(errors="replace")


def _short(text: str) -> str:
    """A described layout in a few words."""
    try:
        described = json.loads(text)
        rows, columns = described["shape"]
        return f"{described['kind']}, {rows}×{columns}, nnz={described['nnz']}"
    except (LookupError, TypeError, ValueError):
        return text[:60]
