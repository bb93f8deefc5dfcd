"""Patterns and SparseTensors from and to edge lists, as PyTorch Geometric has them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import among, shown
from ..errors import LayoutError
from ..pattern import Pattern
from ..pattern_ragged import ragged
from ..runs import from_sorted_pairs
from ..sparse import SparseTensor
from .arrays import as_shape, in_row_order, indices, values
from .compressed import by_element, check_sparse, from_positions
from .sources import Positions, as_pattern

# Which row of edge_index holds the queries: the target takes its message from the source.
_QUERIES = {"source_to_target": 1, "target_to_source": 0}


class Edges(NamedTuple):
    """An edge list.

    Attributes:
        edge_index: int64 (2, E), sources above targets; in order of rows, then columns.
        edge_weight: (E,), or None for positions alone.
    """

    edge_index: Tensor
    edge_weight: Tensor | None


def from_edges(
    edge_index: Any,
    shape: tuple[int, int],
    edge_weight: Any = None,
    flow: str = "source_to_target",
) -> Pattern | SparseTensor:
    """The pattern of an edge list, or its SparseTensor if the edges have weights.

    Edge (source j, target i) keeps key j for query i, so that attention, or a product with the
    features of the sources, gathers at the targets what flows there.

    Args:
        edge_index: int (2, E), sources above targets, in any order, each edge once.
        shape: (number of queries, number of keys): (targets, sources).
        edge_weight: float (E,), or None.
        flow: "source_to_target", or "target_to_source" to gather at the sources; then shape is
            (sources, targets).

    Returns:
        Without weights a pattern of this shape, otherwise a SparseTensor with a RowLayout, whose
        values are differentiable with respect to edge_weight. Lost: the order of the edges.

    Raises:
        LayoutError: a node out of range, or an edge given twice.
        ShapeError: not (2, E), or as many weights.
        DtypeError: not integers, or weights of a dtype that is not computed with.
    """
    who = "from_edges"
    size, first = as_shape(shape, who), _queries(flow, who)
    pairs = indices(edge_index, who, 2)
    if pairs.shape[0] != 2:
        raise LayoutError(
            f"{who}: edge_index {tuple(pairs.shape)}, (2, E) expected, sources above targets; "
            "transpose a list of pairs with .T"
        )
    row, col = pairs[first], pairs[1 - first]
    if edge_weight is not None:
        weights = values(edge_weight, who, (pairs.shape[1],))
        return from_positions(who, size, row, col, weights)
    offsets, columns, _ = in_row_order(row, col, size, who, "edge")
    rows = torch.repeat_interleave(
        torch.arange(size[0], device=columns.device), offsets.diff(), output_size=columns.numel()
    )
    runs = from_sorted_pairs(rows, columns, size[0])
    return ragged([runs], None, size, who)


def to_edges(
    source: Positions,
    nq: int | None = None,
    nk: int | None = None,
    flow: str = "source_to_target",
) -> Edges:
    """The edge list of a pattern, a layout or a SparseTensor, which brings its values as weights.

    Args:
        source: a pattern or layout that is the same for all heads, or one 2-D matrix.
        nq: number of queries, for a pattern.
        nk: number of keys, for a pattern.
        flow: as for from_edges.

    Returns:
        Edges in order of queries, then keys. Lost: the shape, that is nodes without an edge.

    Raises:
        LayoutError: leading dimensions, or P.nm.
        ShapeError: a pattern without nq and nk.
    """
    who = "to_edges"
    first = _queries(flow, who)
    weights: Tensor | None = None
    if isinstance(source, SparseTensor):
        made = by_element(check_sparse(who, source))
        (row, col), weights = made.layout.indices(), made.values
    else:
        pattern, frame = as_pattern(source, nq, nk, who)
        if len(pattern.distinct) > 1 or pattern.lead != (1, 1):
            raise LayoutError(
                f"{who}: {pattern!r} differs between heads or batch entries; convert the patterns "
                "in .distinct one by one"
            )
        flat = pattern.distinct[0]
        row, col = flat.runs(frame, frame.rows()).pairs()
    both = (row, col) if first == 0 else (col, row)
    return Edges(torch.stack(both), weights)


def _queries(flow: str, who: str) -> int:
    if not among(flow, _QUERIES):
        raise LayoutError(
            f"{who}: flow {shown(flow)}; choose 'source_to_target' or 'target_to_source'"
        )
    return _QUERIES[flow]
