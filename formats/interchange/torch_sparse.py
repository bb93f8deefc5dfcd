"""SparseTensors from and to torch's sparse tensors.

    torch                 mixgrain                       arrays shared
    sparse_csr            RowLayout                      values (of one matrix)
    sparse_csc, _coo      RowLayout                      none: they are put into row order
    sparse_bsr, s × s     BlockLayout                    values (of one matrix)
    sparse_bsc, s × s     BlockLayout                    none
    semi-structured       NMLayout                       see semi_structured.py

Leading dimensions: none, (H) or (B, H), each entry with its own positions. Stored zeros stay
stored: positions are what the arrays say.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ..arguments import among, shape_of, shown
from ..block import BlockLayout
from ..errors import LayoutError, UnsupportedError
from ..layout import Layout
from ..row import RowLayout
from ..sparse import SparseTensor
from .arrays import check_within, expanded, values
from .compressed import by_block, by_element, check_sparse, from_blocks, from_positions
from .semi_structured import from_semi_structured, is_semi_structured

# Dimensions of the values of one matrix.
_COMPRESSED: dict[object, int] = {
    torch.sparse_csr: 1,
    torch.sparse_csc: 1,
    torch.sparse_bsr: 3,
    torch.sparse_bsc: 3,
}
_BY_ROW = (torch.sparse_csr, torch.sparse_bsr)


def from_torch(matrix: Tensor) -> SparseTensor:
    """The SparseTensor of a sparse torch tensor, on its device; gradients flow through the values.

    Args:
        matrix: (nq, nk), (H, nq, nk) or (B, H, nq, nk) in torch's layout sparse_csr, sparse_csc,
            sparse_coo, or sparse_bsr and sparse_bsc with square blocks of 16 … 128; or a
            SparseSemiStructuredTensor (2-D). float16, bfloat16, float32 or float64.

    Returns:
        A SparseTensor with a RowLayout, BlockLayout or NMLayout. Lost: which of the row and column
        forms it was, and whether indices were int32 or int64.

    Raises:
        LayoutError: another layout, dimension or block size, a position given twice, indices out of
            range.
        DtypeError: another dtype.
    """
    if is_semi_structured(matrix):
        return from_semi_structured(matrix)
    given = matrix.layout if isinstance(matrix, Tensor) else type(matrix).__name__
    if not isinstance(matrix, Tensor) or given not in (*_COMPRESSED, torch.sparse_coo):
        shape = shape_of(matrix) if isinstance(matrix, Tensor) else ""
        raise LayoutError(
            f"from_torch: given {given} {shape}, expected a tensor of torch.sparse_csr, csc, coo, "
            "bsr or bsc; convert it with .to_sparse_csr() or .to_sparse_bsr((64, 64))"
        )
    if matrix.is_meta:
        raise UnsupportedError(
            "from_torch: a matrix on meta given, which holds no indices; expected one with data"
        )
    lead = matrix.ndim - 2 - matrix.dense_dim()
    if matrix.dense_dim() or not 0 <= lead <= 2:
        raise LayoutError(
            f"from_torch: given {tuple(matrix.shape)} with {matrix.dense_dim()} dense dimensions, "
            "expected (nq, nk) with 0-2 leading sparse dimensions; convert the entries one by one"
        )
    outer = tuple(int(n) for n in matrix.shape[:lead])
    if not math.prod(outer):
        raise LayoutError(f"from_torch: {tuple(matrix.shape)} has no matrix")
    padded = (1, 1, *outer)[-2:]
    make = _from_coo if matrix.layout == torch.sparse_coo else _from_compressed
    made = make(matrix, (padded[0], padded[1]))
    # A layout does not tell a dimension of size 1 from none: it becomes a free dimension.
    free = [1] * (lead - len(made.lead_shape))
    return made.with_values(made.values.reshape(*free, -1)) if free else made


def _from_compressed(matrix: Tensor, lead: tuple[int, int]) -> SparseTensor:
    by_row, blocked = matrix.layout in _BY_ROW, _COMPRESSED[matrix.layout] == 3
    offsets = matrix.crow_indices() if by_row else matrix.ccol_indices()
    inner = matrix.col_indices() if by_row else matrix.row_indices()
    outer, entries = matrix.ndim - 2, lead[0] * lead[1]
    data = matrix.values()
    data = data.flatten(0, outer)
    data = values(data, "from_torch", tuple(data.shape))
    nq, nk = (int(n) for n in matrix.shape[-2:])
    high, wide = (max(int(n), 1) for n in data.shape[1:]) if blocked else (1, 1)
    rows, columns = nq // high, nk // wide
    lines, across = (rows, columns) if by_row else (columns, rows)
    names = ("row", "columns") if by_row else ("column", "rows")
    offsets = offsets.reshape(entries, -1).long()
    inner = inner.reshape(entries, -1).long()
    # The entries below each other are one tall matrix, of as many elements each.
    count = inner.shape[1]
    if offsets.shape[1] != lines + 1 or bool((offsets[:, 0] != 0).any()):
        raise LayoutError(f"from_torch: {lines + 1} offsets expected, the first of them 0")
    if bool((offsets[:, -1] != count).any()):
        raise LayoutError(f"from_torch: offsets that do not end at {count}, the {names[1]} given")
    start = torch.arange(entries, device=offsets.device)[:, None] * count
    tall = torch.cat(((offsets[:, :-1] + start).flatten(), start.new_tensor([entries * count])))
    line = expanded(tall, entries * count, entries * lines, "from_torch", names)
    inner = inner.flatten()
    check_within(inner, 0, across, "from_torch", names[1].removesuffix("s"))
    make = from_blocks if blocked else from_positions
    if by_row:
        return make("from_torch", (nq, nk), line, inner, data, lead)
    entry = line // max(columns, 1)
    return make("from_torch", (nq, nk), entry * rows + inner, line - entry * columns, data, lead)


def _from_coo(matrix: Tensor, lead: tuple[int, int]) -> SparseTensor:
    place, size = matrix._indices(), tuple(int(n) for n in matrix.shape)
    for axis, extent in enumerate(size):
        check_within(place[axis], 0, extent, "from_torch", f"index of dimension {axis}")
    values(matrix._values(), "from_torch", (place.shape[1],))
    merged = matrix.coalesce()  # sorted, and differentiable; adds up what is given twice
    if merged._nnz() != place.shape[1]:
        raise LayoutError(
            f"from_torch: {place.shape[1] - merged._nnz()} positions are given more than once; "
            "each may be given once: call .coalesce() first, which adds them up"
        )
    *outer, row, col = merged.indices()
    for axis, number in enumerate(outer):
        row = row + number * math.prod(size[axis + 1 : -1])
    return from_positions("from_torch", (size[-2], size[-1]), row, col, merged.values(), lead)


def to_torch(s: SparseTensor, layout: torch.layout | None = None) -> Tensor:
    """A sparse torch tensor of a SparseTensor, on the same device.

    Args:
        s: any layout, (nq, nk) or with leading dimensions.
        layout: torch.sparse_csr, sparse_csc, sparse_bsr, sparse_bsc or sparse_coo; None =
            sparse_bsr for a BlockLayout, else sparse_csr. The compressed ones hold leading
            dimensions only if every entry keeps as many positions; sparse_coo holds any.

    Returns:
        A tensor of s.shape with the kept positions; bsr and bsc have whole blocks, whose masked
        positions are stored zeros. Gradients flow through the values. Lost: the key mask (dropped
        positions are stored zeros), and that heads share their positions. For 2:4 weights see
        to_semi_structured.

    Raises:
        LayoutError: a layout that cannot hold s.
    """
    check_sparse("to_torch", s, matrix=False)
    if layout is None:
        layout = torch.sparse_bsr if isinstance(s.layout, BlockLayout) else torch.sparse_csr
    if not among(layout, (*_COMPRESSED, torch.sparse_coo)):
        raise LayoutError(
            f"to_torch: layout {shown(layout)}; choose torch.sparse_csr, csc, bsr, bsc or coo"
        )
    if layout == torch.sparse_coo:
        return _to_coo(s)
    made = by_block("to_torch", s) if _COMPRESSED[layout] == 3 else by_element(s)
    kept, (b, h), distinct = made.layout, made.layout.lead, max(made.layout.entry) + 1
    sizes = sorted({stop - start for start, stop in itertools.pairwise(kept.entry_slots)})
    if len(sizes) > 1:
        raise LayoutError(
            f"to_torch: the entries keep {sizes[0]} to {sizes[-1]} positions; {layout} holds as "
            "many in each; ask for torch.sparse_coo, or convert them one by one"
        )
    size = kept.size if isinstance(kept, BlockLayout) else 1
    offsets, inner = _arrays(kept)
    counts = offsets.diff().reshape(distinct, -1)
    inner = inner.long().reshape(distinct, -1)
    data = _per_entry(made, sizes[0])
    if isinstance(kept, BlockLayout):
        data = data.unflatten(-1, (-1, size, size))
    lead = made.lead_shape
    entry = torch.tensor(kept.entry, device=inner.device)
    if layout not in _BY_ROW:
        lines = torch.arange(counts.shape[1], device=inner.device).repeat(distinct)
        rows = torch.repeat_interleave(lines, counts.flatten()).reshape(inner.shape)
        inner, order = inner.sort(dim=1, stable=True)
        rows = rows.gather(1, order)
        columns = kept.shape[1] // size
        base = torch.arange(distinct, device=inner.device)[:, None] * columns
        counts = torch.bincount((inner + base).flatten(), minlength=distinct * columns)
        counts, inner = counts.reshape(distinct, columns), rows
        order = _spread(order[entry], (b, h), lead)
        flat = data.reshape(math.prod(lead), *data.shape[len(lead) :])
        line = torch.arange(flat.shape[0], device=flat.device)[:, None]
        # Indexing moves bits; gather would quieten the signalling NaNs of 16-bit floats.
        data = flat[line, order.reshape(flat.shape[:2])].reshape(data.shape)
    ends = torch.nn.functional.pad(counts.cumsum(1), (1, 0))
    offsets, inner = (_spread(t[entry], (b, h), lead).contiguous() for t in (ends, inner))
    return torch.sparse_compressed_tensor(
        offsets, inner, data, s.shape, layout=layout, check_invariants=True
    )


def _arrays(layout: Layout) -> tuple[Tensor, Tensor]:
    """(offsets, columns) of the elements or blocks of all distinct patterns."""
    if isinstance(layout, BlockLayout):
        return layout.block_offsets.long(), layout.block_columns
    assert isinstance(layout, RowLayout)
    return layout.row_offsets, layout.columns


def _per_entry(s: SparseTensor, count: int) -> Tensor:
    """Values (*leading, count) of a tensor whose entries all have `count` slots."""
    b, h = s.layout.lead
    free = tuple(s.values.shape[:-1])
    data = s.values.reshape(*free, b, h, count)
    if b > 1 and h == 1 and free:
        data = data.movedim(len(free) - 1, -2)  # heads are free, and come after the batch
    return data.reshape(*s.lead_shape, count)


def _spread(per_entry: Tensor, lead: tuple[int, int], outer: tuple[int, ...]) -> Tensor:
    """(b · h, n) over the leading dimensions of a tensor: (*outer, n)."""
    split = per_entry.unflatten(0, lead)
    if len(outer) < 2:
        split = split[0] if outer else split[0, 0]
    spread: Tensor = split.expand(*outer, per_entry.shape[-1])
    return spread


def _to_coo(s: SparseTensor) -> Tensor:
    made = by_element(s)
    row, col = made.layout.indices()
    data = made.values
    (b, h), free = made.layout.lead, tuple(data.shape[:-1])
    grid = [
        torch.arange(n, device=data.device).reshape(-1, *[1] * (len(free) - i))
        for i, n in enumerate(free)
    ]
    entry = made.layout.slot_entry()
    outer = [*grid]
    if b > 1 and h == 1:
        # The last free dimension, if there is one, is the heads, which come after the batch.
        outer.insert(max(len(outer) - 1, 0), entry)
        if not free:
            outer.append(torch.zeros_like(entry))
    else:
        outer += [entry // h] * (b > 1) + [entry % h] * (h > 1)
    place = torch.stack([axis.expand(data.shape).flatten() for axis in (*outer, row, col)])
    made_tensor: Tensor = torch.sparse_coo_tensor(
        place, data.flatten(), s.shape, check_invariants=True
    ).coalesce()
    return made_tensor
