"""Pictures of layouts as PNG: which positions are kept, and in which kind of part they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixgrain.formats.layout import Layout

from .picture import cell_sizes, count_cells, summary

Image = NDArray[np.float64]

INK = "#22272e"
MUTED = "#6b7480"
GRID = "#e3e6ea"
# One colour for each kind of part, told apart by all common kinds of colour vision.
COLOURS = {"block": "#1f6fb2", "panel": "#e8871e", "row": "#b5197a", "nm": "#5c3fa8"}
# Dead slots: what a tile holds besides the kept positions.
PADDING = 0.16
LABELS = {
    "block": "blocks",
    "panel": "panels",
    "row": "single entries",
}


def new_figure(width: float, height: float) -> Any:
    """A figure of width × height inches that needs no display and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def rgb(colour: str) -> NDArray[np.float64]:
    """Red, green and blue of '#rrggbb', 0 to 1."""
    return np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def layout_image(layout: Layout, pixels: int = 512) -> Image:
    """The layout's first entry as an image (height, width, 3), at most `pixels` to a side.

    A pixel takes the colour of the part that keeps most of its positions, the stronger the more of
    them are kept; slots that hold nothing are pale.
    """
    cell = max(1, -(-max(layout.shape) // pixels))
    sizes = cell_sizes(layout.shape, cell).numpy()
    image = np.ones((*sizes.shape, 3))
    most = np.zeros(sizes.shape)
    for counted in count_cells(layout, cell):
        kept, held = (t.numpy() / sizes for t in (counted.kept, counted.held))
        # A lone key column is thinner than a pixel and must still be seen.
        ink = np.where(kept > 0, 0.6 + 0.4 * np.sqrt(kept.clip(0, 1)), PADDING * (held > 0))
        wins = (kept > most) | ((most == 0) & (held > 0) & (kept == 0))
        painted = 1 - ink[..., None] * (1 - rgb(COLOURS[counted.kind]))
        image[wins] = painted[wins]
        most = np.maximum(most, kept)
    return image


def frame(axes: Any, caption: str) -> None:
    """Gives a picture its caption below, and a thin frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(caption, fontsize=8, color=MUTED, labelpad=4, loc="left")
    for spine in axes.spines.values():
        spine.set_color("#b8bec6")
        spine.set_linewidth(0.8)


def draw_layout(axes: Any, layout: Layout, caption: str = "") -> None:
    """Draws the layout's first entry: queries downwards, keys to the right."""
    nq, nk = layout.shape
    # No more image than screen: of two image rows on one screen row, one would vanish.
    pixels = int(min(axes.get_window_extent().bounds[2:]))
    axes.imshow(layout_image(layout, pixels), extent=(0, nk, nq, 0), interpolation="nearest")
    frame(axes, caption)


def legend_patches(kinds: list[str]) -> list[Any]:
    """Legend entries for the kinds of parts, and one for padding when blocks are among them."""
    from matplotlib.patches import Patch

    patches = [Patch(color=COLOURS[kind], label=LABELS[kind]) for kind in LABELS if kind in kinds]
    if "block" in kinds:
        pale = 1 - PADDING * (1 - rgb(COLOURS["block"]))
        patches.append(Patch(color=tuple(pale), label="computed, not kept"))
    return patches


def write_layout(path: Path, layout: Layout, title: str) -> None:
    """Writes one layout as a PNG with its title, legend and summary."""
    figure = new_figure(7.2, 7.9)
    axes = figure.add_axes((0.09, 0.15, 0.84, 0.766))
    draw_layout(axes, layout)
    axes.set_xlabel(f"{layout.shape[1]:,} keys", fontsize=9, color=MUTED)
    axes.set_ylabel(f"{layout.shape[0]:,} queries", fontsize=9, color=MUTED)
    shown = title if len(title) <= 80 else title[:79] + "…"
    figure.text(0.5, 0.955, shown, ha="center", fontsize=11, color=INK, family="monospace")
    patches = legend_patches([part.kind for part in layout.parts])
    if patches:
        figure.legend(
            handles=patches,
            loc="upper center",
            bbox_to_anchor=(0.5, 0.945),
            ncols=4,
            frameon=False,
            fontsize=8.5,
        )
    figure.text(
        0.05, 0.02, summary(layout), fontsize=6.6, color=INK, family="monospace", va="bottom"
    )
    figure.savefig(path, metadata={"Title": title})
