"""NMLayouts that wait for their metadata: all of a layout and its plan that shapes decide."""

from __future__ import annotations

from typing import Any

import torch

from mixgrain.formats.block import BlockLayout
from mixgrain.formats.layout import put, take
from mixgrain.formats.nm import NMLayout
from mixgrain.formats.tracing import constant

from .plans import nm
from .plans.plan import Plan


def nm_layout(
    shape: tuple[int, int],
    n: int,
    m: int,
    encoding: str,
    lead: tuple[int, int],
    within: BlockLayout | None,
) -> NMLayout:
    """An NMLayout of this shape with empty metadata.

    Args:
        shape: (nq, nk).
        n: kept per group.
        m: columns per group.
        encoding: of the metadata.
        lead: (b, h).
        within: the static pattern that limits the choice, or None.
    """
    if torch.compiler.is_dynamo_compiling():
        traced: NMLayout = take(_put_nm(shape, n, m, encoding, lead, within))
        return traced
    return NMLayout.from_metadata(
        torch.empty(0), shape, n, m, encoding=encoding, lead=lead, within=within
    )


@constant
def _put_nm(
    shape: tuple[int, int],
    n: int,
    m: int,
    encoding: str,
    lead: tuple[int, int],
    within: BlockLayout | None,
) -> str:
    return put(nm_layout(shape, n, m, encoding, lead, within))


def nm_plan(
    shape: tuple[int, int],
    n: int,
    m: int,
    encoding: str,
    lead: tuple[int, int],
    within: BlockLayout | None,
    transposed: bool = False,
) -> Plan:
    """The plan of such a layout, or of its transposed view."""
    return Plan(*_plan_nm(shape, n, m, encoding, lead, within, transposed))


@constant
def _plan_nm(
    shape: tuple[int, int],
    n: int,
    m: int,
    encoding: str,
    lead: tuple[int, int],
    within: BlockLayout | None,
    transposed: bool,
) -> tuple[Any, ...]:
    blank = nm_layout(shape, n, m, encoding, lead, within)
    return tuple(nm.plan_of(blank.T if transposed else blank))
