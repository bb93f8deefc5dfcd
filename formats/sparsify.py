"""sparsify: a dense tensor into a SparseTensor, without losing a bit unless asked to prune."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from .arguments import among, as_flag, as_number, check_dense
from .block import SIZES, BlockLayout
from .entries import pack_bits
from .errors import DtypeError, LayoutError, ShapeError, UnsupportedError
from .layout import Layout
from .nm import NMLayout, choose
from .nm_metadata import check_encoding
from .panel import PanelLayout
from .patterns import from_dense
from .row import RowLayout
from .sparse import SparseTensor
from .tile import SIZE as TILE
from .tile import TileLayout

KINDS = ("tile", "nm", "block", "row", "panel", "mixed")
AXES = ("rows", "columns")

# Integers of the same width: only they tell −0 and the bits of a NaN from +0 reliably.
_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def sparsify(
    dense: Tensor,
    kind: str | None = None,
    prune: bool = False,
    layout: Layout | None = None,
    size: int = 64,
    n: int = 2,
    m: int = 4,
    density: float | None = None,
    axis: str | None = None,
) -> SparseTensor:
    """The SparseTensor that holds ``dense``.

    Every element whose bits are not +0 is kept: −0, NaN and denormals are, and ``to_dense`` gives
    back the same bits. With ``prune`` the largest magnitudes are kept (NaN counts as infinite, ties
    go to the lower index), with ``layout`` the values at its positions.

        kind     unit kept or dropped     live slots of the result
        tile     16×16 tile, 2-D only     every one of a kept tile inside the shape
        block    size×size block          every one of a kept block inside the shape
        nm       n of every m columns     all n of a group, inside the shape
        row      one element              exactly the elements kept
        panel    whole row or column,     all elements of the kept rows in the kept columns
                 2-D only
        mixed    one element              exactly the elements kept; blocks, panels and rows

    Args:
        dense: (*lead, nq, nk), float16, bfloat16, float32 or float64, 0-2 leading dimensions (none
            for "tile" and "panel"). Each entry has positions of its own: one leading dimension
            makes a layout of lead (1, h), two make (b, h).
        kind: one of the above; may be left out when ``layout`` is given.
        prune: keep the largest: n of each group (nm); units by L2 norm (tile, block, panel) or
            elements by magnitude (row, mixed) up to ``density``, for each entry alone.
        layout: sample at the positions of this layout. Its lead must be 1 or match ``dense``.
        size: side of the blocks: 16, 32, 64 or 128 (block, mixed).
        n: elements kept of each group (nm).
        m: columns of a group (nm).
        density: with ``prune``, floor(density · units) units are kept, density read as the decimal
            number it prints as; fewer where the others are all +0.
        axis: "rows" or "columns": what is pruned (panel, with ``prune``).

    Returns:
        The SparseTensor; its values are differentiable with respect to ``dense``.

    Raises:
        DtypeError: another dtype.
        ShapeError: not a matrix, more than two leading dimensions, or a layout of another shape.
        LayoutError: options that contradict each other, or elements the layout cannot hold.
    """
    check_dense("sparsify", "dense", dense)
    if dense.dtype not in _BITS:
        accepted = ", ".join(str(dtype) for dtype in _BITS)
        raise DtypeError(
            f"sparsify: given {dense.dtype}, expected a tensor of {accepted}; cast it, e.g. with "
            ".float()"
        )
    prune = as_flag("sparsify", "prune", prune)
    if not 2 <= dense.dim() <= 4:
        raise ShapeError(
            f"sparsify: given shape {tuple(dense.shape)}, expected (nq, nk) with 0-2 leading "
            "dimensions; reshape it"
        )
    if layout is not None:
        _check_sampling(kind, prune, layout)
        return SparseTensor(layout, _sample(dense, layout))
    if not isinstance(kind, str) or kind not in KINDS:
        raise LayoutError(f"sparsify: kind {kind!r:.80}; choose one of {KINDS}, or give layout=")
    _check_density(kind, prune, density)
    _check_axis(kind, prune, axis)
    if kind in ("block", "mixed") and not (isinstance(size, int) and size in SIZES):
        raise LayoutError(f"sparsify: size {size!r:.80}; choose one of {SIZES}")
    if dense.device.type == "meta":
        raise UnsupportedError(
            "sparsify: dense is on meta and holds no values to choose positions by; give a tensor "
            "with data, or layout="
        )
    dense = dense.resolve_neg()  # bits are looked at below
    (nq, nk), outer = dense.shape[-2:], dense.shape[:-2]
    if kind in ("tile", "panel") and outer:
        raise LayoutError(
            f"sparsify: {kind!r} holds one 2-D weight, given shape {tuple(dense.shape)}; sparsify "
            "the matrices one by one, or choose another kind"
        )
    # A dimension of size 0 holds no matrix, so it needs no positions: it stays a free dimension.
    lead = (math.prod(outer[:-1]), outer[-1]) if outer else (1, 1)
    entries = dense.detach().reshape(math.prod(outer), nq, nk)
    if 0 in outer:
        entries, lead = dense.new_zeros(1, nq, nk), (1, 1)
    made = _layout(entries, lead, kind, prune, size, n, m, density, axis)
    return SparseTensor(made, _sample(dense, made))


def _check_sampling(kind: str | None, prune: bool, layout: Layout) -> None:
    if not isinstance(layout, Layout):
        raise LayoutError(
            f"sparsify: layout={type(layout).__name__}, expected a layout; from a pattern, make "
            "one with pattern.to_layout(kind, nq, nk)"
        )
    if kind is not None and (not isinstance(kind, str) or kind != layout.kind):
        raise LayoutError(
            f"sparsify: kind {kind!r} and a {type(layout).__name__}; leave kind out with layout="
        )
    if prune:
        raise LayoutError(
            "sparsify: prune=True and layout= together; the layout already says what is kept"
        )


def _check_density(kind: str, prune: bool, density: float | None) -> None:
    wanted = prune and kind != "nm"
    if not wanted and density is not None:
        todo = "n and m say what 'nm' keeps" if kind == "nm" else "pass prune=True with it"
        raise LayoutError(f"sparsify: density={density} has no effect; {todo}")
    if density is not None:
        density = as_number("sparsify", "density", density)
    if wanted and (density is None or not 0 <= density <= 1):
        raise LayoutError(
            f"sparsify: prune=True with density={density}; expected the part of the units of "
            f"{kind!r} to keep, from 0 to 1"
        )


def _check_axis(kind: str, prune: bool, axis: str | None) -> None:
    if not (kind == "panel" and prune):
        if axis is not None:
            raise LayoutError(
                f"sparsify: axis={axis!r:.80} has no effect; it says what 'panel' prunes, with "
                "prune=True"
            )
    elif not among(axis, AXES):
        raise LayoutError(
            f"sparsify: 'panel' with prune=True and axis={axis!r:.80}; choose one of {AXES}, which "
            "are pruned as wholes"
        )


def _layout(
    entries: Tensor,
    lead: tuple[int, int],
    kind: str,
    prune: bool,
    size: int,
    n: int,
    m: int,
    density: float | None,
    axis: str | None,
) -> Layout:
    """The layout that holds matrices (b * h, nq, nk), each with its own positions."""
    shape = (entries.shape[1], entries.shape[2])
    kept = entries.view(_BITS[entries.dtype]) != 0
    if kind == "nm":
        check_encoding(n, m, "bytes")
        scores = entries.abs() if prune else entries.new_zeros(()).expand(entries.shape)
        if not prune:
            _check_groups(kept, lead, n, m)
        choice = choose(scores, kept, n, m)
        return NMLayout.from_choice(choice, shape, n, m, lead=lead, dtype=entries.dtype)
    if kind in ("tile", "block"):
        side = TILE if kind == "tile" else size
        units = _units(kept, side).flatten(-2).any(-1)
        if prune and density is not None:
            norms = torch.linalg.vector_norm(
                _units(entries, side), dim=(-2, -1), dtype=torch.float64
            )
            units = _largest(norms, units, density)
        if kind == "tile":
            return TileLayout.from_tile_mask(units[0], shape)
        return _block_layout(units, shape, size, lead)
    if kind == "panel":
        return _panel_layout(entries[0], kept[0], density, axis)
    if prune and density is not None:
        kept = _largest(entries.abs().double(), kept, density)
    if kind == "row":
        return _row_layout(kept, lead)
    made = from_dense(kept.reshape(*lead, *shape)).to_layout("mixed", *shape, size=size)
    assert isinstance(made, Layout)
    return made


def _units(entries: Tensor, side: int) -> Tensor:
    """(entries, rows, columns, side, side): the matrices cut into units, zeros beyond the edge."""
    nq, nk = entries.shape[-2:]
    whole = torch.nn.functional.pad(entries, (0, -nk % side, 0, -nq % side))
    rows, columns = -(-nq // side), -(-nk // side)
    return whole.reshape(entries.shape[0], rows, side, columns, side).transpose(2, 3)


def _largest(magnitude: Tensor, allowed: Tensor, density: float) -> Tensor:
    """Bool like ``allowed``: the floor(density · units) largest of each entry that are allowed."""
    # As a fraction of the number that was written: 0.29 · 100 is 29, not 28.999….
    flat = torch.where(allowed, magnitude.nan_to_num(math.inf, math.inf), -1.0).flatten(1)
    count = math.floor(Fraction(str(float(density))) * flat.shape[1])
    order = flat.argsort(dim=1, descending=True, stable=True)[:, :count]
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, True)
    return kept.reshape(allowed.shape) & allowed


def _check_groups(kept: Tensor, lead: tuple[int, int], n: int, m: int) -> None:
    """Raise LayoutError at the first group with more than n elements that are not +0."""
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[-1] % m))
    counts = padded.unflatten(-1, (padded.shape[-1] // m, m)).sum(-1)
    bad = (counts > n).nonzero()
    if not bad.numel():
        return
    entry, row, group = bad[0].tolist()
    where = f"row {row}, columns {group * m} to {min((group + 1) * m, kept.shape[-1]) - 1}"
    if lead != (1, 1):
        where = f"batch {entry // lead[1]}, head {entry % lead[1]}, {where}"
    raise LayoutError(
        f"sparsify: {int(counts[entry, row, group])} elements that are not +0 in {where} (group "
        f"{group}), one of {bad.shape[0]} such groups; {n}:{m} holds {n}; pass prune=True to keep "
        "the largest, or another n and m"
    )


def _distinct(masks: Tensor) -> tuple[Tensor, list[int]]:
    """The distinct ones of (entries, …) masks, in order of first use, and which each entry uses."""
    seen: dict[bytes, int] = {}
    first: list[int] = []
    entry: list[int] = []
    for e, mask in enumerate(masks):
        flat = mask.flatten()
        bits = pack_bits(torch.nn.functional.pad(flat, (0, -flat.numel() % 8)))
        number = seen.setdefault(bits.cpu().numpy().tobytes(), len(seen))
        if number == len(first):
            first.append(e)
        entry.append(number)
    return masks[first], entry


def _offsets(lines: Tensor) -> Tensor:
    """int64: where each line of a bool tensor (…, columns) starts among all True ones."""
    counts = lines.sum(-1).flatten()
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def _row_layout(kept: Tensor, lead: tuple[int, int]) -> RowLayout:
    masks, entry = _distinct(kept)
    columns = masks.nonzero()[:, 2]
    return RowLayout.from_csr(
        (kept.shape[1], kept.shape[2]), _offsets(masks), columns, lead=lead, entry=entry
    )


def _panel_layout(
    entry: Tensor, kept: Tensor, density: float | None, axis: str | None
) -> PanelLayout:
    """One dense panel: the rows that hold something × the columns that do, or pruned ones × all."""
    lines = [kept.any(1), kept.any(0)]
    if density is not None:
        pruned = AXES.index(axis or "")
        norms = torch.linalg.vector_norm(entry, dim=1 - pruned, dtype=torch.float64)
        lines[pruned] = _largest(norms[None], lines[pruned][None], density)[0]
        lines[1 - pruned] = torch.ones_like(lines[1 - pruned])
    # Axes without a gap are ranges, which kernels read without a list.
    rows, columns = (
        range(line.numel()) if bool(line.all()) else line.nonzero()[:, 0] for line in lines
    )
    panels = [(rows, columns, None)] if len(rows) and len(columns) else []
    shape = (entry.shape[0], entry.shape[1])
    return PanelLayout.from_panels(shape, panels, device=entry.device)


def _block_layout(
    kept: Tensor, shape: tuple[int, int], size: int, lead: tuple[int, int]
) -> BlockLayout:
    """Whole blocks where ``kept`` (entries, block rows, block columns), cut at the edges only."""
    blocks, entry = _distinct(kept)
    _, row, column = blocks.nonzero(as_tuple=True)
    (nq, nk), line = shape, torch.arange(size, device=kept.device)
    below, right = line < (nq % size or size), line < (nk % size or size)
    everything = torch.ones_like(line, dtype=torch.bool)
    # Three masks serve all edges: the lower one, the right one and the corner.
    cuts = [(below, everything), (everything, right), (below, right)]
    masks = pack_bits(torch.stack([rows[:, None] & columns for rows, columns in cuts]))
    low = (row == nq // size).long()  # the last block row only if it hangs over
    out = (column == nk // size).long()
    return BlockLayout.from_blocks(
        shape, size, _offsets(blocks), column, low + 2 * out - 1, masks, lead=lead, entry=entry
    )


def _sample(dense: Tensor, layout: Layout) -> Tensor:
    """Values (*free, slots) of ``dense`` at every slot of ``layout``, +0 at dead ones."""
    b, h = layout.lead
    outer = tuple(dense.shape[:-2])
    fits = (b == 1 or (len(outer) == 2 and outer[0] == b)) and (h == 1 or outer[-1:] == (h,))
    if layout.home not in (None, dense.device):
        raise ShapeError(
            f"sparsify: dense on {dense.device}, layout on {layout.home}; move one of them, e.g. "
            f"layout.to({str(dense.device)!r})"
        )
    if tuple(dense.shape[-2:]) != tuple(layout.shape) or not fits:
        lead = f"leading dimensions ({b if b > 1 else 'any'}, {h if h > 1 else 'any'}) and "
        raise ShapeError(
            f"sparsify: dense {tuple(dense.shape)} does not fit {layout!r}; expected "
            f"{lead if layout.lead != (1, 1) else ''}matrices of {tuple(layout.shape)}"
        )
    if b > 1 and h == 1:
        dense = dense.transpose(0, 1)  # heads are free, batch is folded into the slots
    folded = dense.flatten(-2 - (b > 1) - (h > 1))
    row, column = layout.indices()
    position = (layout.slot_entry() * layout.shape[0] + row) * layout.shape[1] + column
    values = folded.index_select(-1, position)
    live = layout.live()
    return values if live is None else torch.where(live, values, values.new_zeros(()))
