"""Patterns and layouts as text: a picture for a terminal and a few lines that sum it up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixgrain.formats.block import BlockLayout
from mixgrain.formats.errors import LayoutError
from mixgrain.formats.layout import Layout
from mixgrain.formats.panel import PanelLayout
from mixgrain.formats.pattern import Pattern
from mixgrain.formats.pattern_nm import NM

from .cells import Cell, cell_for, cell_sizes, count_cells, countable, pair
from .survey import Survey, sampled_cells, static_part, strata_for, survey

# Lines of the picture, and pairs of characters in a line.
CELLS = 32

# What stands for a cell: all kept, blocks, panels, single entries; nothing.
GLYPHS = {"full": "██", "block": "▒▒", "panel": "||", "row": "··", "": "  "}
PLAIN_GLYPHS = {"full": "##", "block": "%%", "panel": "||", "row": "..", "": "  "}
# Where only the kept share of a cell is known: from which share on, how it looks, what it means.
SHADES = (
    (0.0, "··", "..", "under 1% kept"),
    (0.01, "░░", "::", "under 10%"),
    (0.1, "▒▒", "++", "under half"),
    (0.5, "▓▓", "%%", "half or more"),
    (1.0, "██", "##", "all"),
)


@dataclass(frozen=True)
class Subject:
    """One (batch entry, head) of a pattern, looked at and ready to be drawn.

    Attributes:
        whole: the pattern it was taken from.
        pattern: the one drawn, the same for all batch entries and heads.
        shape: (nq, nk).
        at: which (batch entry, head) it is.
        survey: what it costs.
        layout: its mixed layout; None for N:M, whose choice waits for the scores, and where the
            layout would take too long.
    """

    whole: Pattern
    pattern: Pattern
    shape: tuple[int, int]
    at: tuple[int, int]
    survey: Survey
    layout: Layout | None

    def shares(self, most: int) -> tuple[Tensor, Cell, bool]:
        """The kept share of each cell, float64; rows and columns of a cell; whether all counted.

        Args:
            most: at most so many cells lie along each side.
        """
        cell = cell_for(self.shape, most)
        cell = (max(cell[0], strata_for(self.shape[0], self.survey.runs)), cell[1])
        within = static_part(self.pattern)
        counts, whole = sampled_cells(within, *self.shape, cell, self.survey.runs)
        return counts / cell_sizes(self.shape, cell), cell, whole


def subject(
    pattern: Pattern, nq: int, nk: int, size: int = 64, batch: int = 0, head: int = 0
) -> Subject:
    """One entry of a pattern, with its layout where that is affordable.

    Args:
        pattern: any.
        nq: number of queries.
        nk: number of keys.
        size: side of the layout's blocks.
        batch: which batch entry; 0 where the pattern does not differ between them.
        head: likewise.

    Raises:
        LayoutError: no such batch entry or head, or a fixed shape other than (nq, nk).
    """
    b, h = pattern.lead
    if not (0 <= batch < b and 0 <= head < h):
        raise LayoutError(
            f"batch entry {batch}, head {head} given; {pattern} differs over {b} batch entries and "
            f"{h} heads, counted from 0"
        )
    flat = pattern.distinct[pattern.entry[batch * h + head]]
    found = survey(flat, nq, nk, size)
    layout: Layout | None = None
    if found.affordable and not isinstance(flat, NM):
        layout = flat.to_layout("mixed", nq, nk, size=size)
        layout = layout if countable(layout) else None
    return Subject(pattern, flat, (nq, nk), (batch, head), found, layout)


def draw_subject(shown: Subject, plain: bool = False) -> str:
    """A picture of a subject: by its layout, or by the kept share of each cell.

    Args:
        shown: what to draw.
        plain: use characters of ASCII only.
    """
    if shown.layout is not None:
        return draw(shown.layout, plain)
    shares, cell, whole = shown.shares(CELLS)
    # 0 is nothing; a share is never rounded up to "all".
    bounds = torch.tensor([least for least, *_ in SHADES], dtype=shares.dtype)
    level = torch.where(shares > 0, torch.bucketize(shares, bounds, right=True), 0)
    glyphs = ["  ", *(ascii if plain else block for _, block, ascii, _ in SHADES)]
    used = sorted(set(level.flatten().tolist()) - {0})
    legend = [f"{glyphs[n]} {SHADES[n - 1][3]}" for n in used]
    if not whole:
        legend.append("from a sample of the queries")
    picture = [[glyphs[n] for n in row] for row in level.tolist()]
    return _framed(picture, cell, legend, plain)


def sum_up(shown: Subject) -> str:
    """A few lines on a subject: how much is kept, and as what."""
    (nq, nk), found = shown.shape, shown.survey
    lines = []
    if shown.layout is not None:
        lines.append(summary(shown.layout))
    else:
        share = found.kept / (nq * nk) if nq * nk else 0.0
        about = "" if found.exact else "about "
        lines.append(f"{nq:,} × {nk:,}, keeps {about}{found.kept:,} ({share:.3%})")
        if isinstance(shown.pattern, NM):
            n, m = shown.pattern.n, shown.pattern.m
            lines.append(
                f"  of every {m} neighbouring keys the {n} with the largest scores, chosen as it "
                "runs; the picture shows where it chooses"
            )
        else:
            lines.append(
                "  too many parts for a layout here; the picture shows the pattern itself, without "
                "its blocks, panels and single entries"
            )
    b, h = shown.whole.lead
    if b * h > 1:
        lines.append(
            f"  {b} batch entries × {h} heads, {len(shown.whole.distinct)} different; this is batch"
            f" entry {shown.at[0]}, head {shown.at[1]} (--batch and --head choose another)"
        )
    return "\n".join(lines)


def draw(layout: Layout, plain: bool = False) -> str:
    """A picture of the layout's first entry, framed, at most 32 lines high, with its legend.

    Args:
        layout: Any that holds attention's positions.
        plain: Use characters of ASCII only.
    """
    glyphs = PLAIN_GLYPHS if plain else GLYPHS
    cell = cell_for(layout.shape, CELLS)
    sizes = cell_sizes(layout.shape, cell)
    total, most = torch.zeros_like(sizes), torch.zeros_like(sizes)
    kinds = ["", "full"]
    picture = torch.zeros_like(sizes)
    for counted in count_cells(layout, cell):
        kinds.append(counted.kind)
        picture[counted.kept > most] = len(kinds) - 1
        most = torch.maximum(most, counted.kept)
        total += counted.kept
    picture[(total == sizes) & (total > 0)] = 1
    words = {
        "full": "all kept",
        "block": "partly, in blocks",
        "panel": "partly, in panels",
        "row": "partly, single entries",
    }
    shown = set(picture.flatten().tolist())
    legend = [f"{glyphs[k]} {words[k]}" for n, k in enumerate(kinds) if k and n in shown]
    return _framed(
        [[glyphs[kinds[c]] for c in row] for row in picture.tolist()], cell, legend, plain
    )


def _framed(picture: list[list[str]], cell: Cell, legend: list[str], plain: bool) -> str:
    corners, bar, side = ("++++", "-", "|") if plain else ("┌┐└┘", "─", "│")
    bar *= 2 * len(picture[0])
    rows = [f"{side}{''.join(row)}{side}" for row in picture]
    rows = [f"{corners[0]}{bar}{corners[1]}", *rows, f"{corners[2]}{bar}{corners[3]}"]
    high, wide = pair(cell)
    times = "x" if plain else "×"
    return "\n".join([*rows, "   ".join([f"each cell {high} {times} {wide}", *legend])])


def summary(layout: Layout) -> str:
    """One line for the layout and one for each of its parts."""
    lines = [repr(layout)]
    for part in layout.parts:
        padding = 1 - part.nnz / part.slots if part.slots else 0.0
        share = part.nnz / layout.nnz if layout.nnz else 0.0
        lines.append(
            f"  {_what(part):44} {part.nnz:>12,} kept ({share:6.1%} of all), {padding:5.1%} padding"
        )
    if layout.entries > 1:
        lines.append(f"  {layout.entries} entries (batch × heads); the picture shows the first")
    return "\n".join(lines)


def _what(part: Layout) -> str:
    if isinstance(part, BlockLayout):
        partial = int((part.mask_index >= 0).sum())
        count, masks = part.mask_index.numel(), part.masks.shape[0]
        return f"blocks of {part.size}: {count - partial} full, {partial} partial ({masks} masks)"
    if isinstance(part, PanelLayout):
        return f"panels: {part.panel_entry.numel()}"
    return "single entries" if part.kind == "row" else part.kind
