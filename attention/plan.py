"""Plans of the fused CPU kernel, made when a layout is first met: see plan_steps."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from mixgrain.formats.block import BlockLayout
from mixgrain.formats.cache import LRU
from mixgrain.formats.errors import LayoutError
from mixgrain.formats.layout import Layout
from mixgrain.formats.tracing import untraced
from mixgrain.primitives.plans.plan import validate_once

from .plan_parts import add_blocks, add_panel, add_panels, add_rest, block_groups
from .plan_steps import Builder, Plan

__all__ = ["Plan", "plan", "plan_nm"]


class _Memo(LRU[Plan]):
    """An LRU that traced code can read: torch.compile cannot enter locks."""

    def find(self, key: Hashable, make: Callable[[], Plan]) -> Plan:
        if torch.compiler.is_compiling():
            found = self._values.get(key)
            return _made_outside(key, make) if found is None else found
        return self.get(key, make)


_plans = _Memo(128)

# Planning reads index tensors on the host, so under torch.compile it breaks the graph the first
# time; call a function once before compiling it with fullgraph=True.
_made_outside: Callable[[Hashable, Callable[[], Plan]], Plan] = untraced(_plans.get)


def plan(layout: Layout, nm: tuple[int, int] = (0, 0)) -> Plan:
    """The plan of a Block, Row or Mixed layout; the last 128 are remembered by the layout's key.

    A layout is validated when its first plan is made, unless the library made it itself.

    Args:
        layout: kept positions, on the CPU.
        nm: (n, m) to choose the n largest scores of every m neighbouring keys, (0, 0) for none.

    Raises:
        LayoutError: another layout, or indices at fault.
    """

    def make() -> Plan:
        validate_once(layout)
        made = Builder(layout.shape, layout.lead, layout.entry, nm)
        if isinstance(layout, BlockLayout) and nm[1] and layout.size % nm[1]:
            block_groups(made, layout)
            return made.finish()
        add = {"block": add_blocks, "panel": add_panels, "row": add_rest}
        for part in layout.parts:
            add[part.kind](made, part)  # type: ignore[operator]
        return made.finish()

    if layout.kind not in ("block", "panel", "row", "mixed") or (
        nm[1] and not isinstance(layout, BlockLayout)
    ):
        raise LayoutError(
            f"no attention plan for {layout!r}; BlockLayout, RowLayout and MixedLayout have one "
            "(N:M inside BlockLayout only)"
        )
    return _plans.find((layout.key, nm), make)


def plan_nm(nq: int, nk: int, n: int, m: int) -> Plan:
    """The plan of P.nm(n, m) alone: one panel of all rows and columns."""

    def make() -> Plan:
        made = Builder((nq, nk), (1, 1), (0,), (n, m))
        if nq and nk:
            add_panel(made, 0, range(nq), range(nk), None)
        return made.finish()

    return _plans.find(("nm", nq, nk, n, m), make)
