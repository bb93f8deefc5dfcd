"""Pictures as PNG: which positions are kept, and in which kind of part they lie."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixgrain.formats.layout import Layout
from mixgrain.formats.pattern_nm import NM

from .cells import cell_for, cell_sizes, count_cells
from .picture import Subject, sum_up

Image = NDArray[np.float64]

INK = "#22272e"
MUTED = "#6b7480"
GRID = "#e3e6ea"
# One colour for each kind of part, told apart by all common kinds of colour vision.
COLOURS = {
    "block": "#1f6fb2",
    "panel": "#e8871e",
    "row": "#b5197a",
    "nm": "#5c3fa8",
    "kept": "#2c8a57",
}
# Dead slots: what a tile holds besides the kept positions.
PADDING = 0.16
LABELS = {
    "block": "blocks",
    "panel": "panels",
    "row": "single entries",
    "nm": "N:M chooses here",
    "kept": "kept",
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
    cell = cell_for(layout.shape, pixels)
    sizes = cell_sizes(layout.shape, cell).numpy()
    image = np.ones((*sizes.shape, 3))
    most = np.zeros(sizes.shape)
    for counted in count_cells(layout, cell):
        kept, held = (t.numpy() / sizes for t in (counted.kept, counted.held))
        ink = np.where(kept > 0, _ink(kept), PADDING * (held > 0))
        wins = (kept > most) | ((most == 0) & (held > 0) & (kept == 0))
        image[wins] = _painted(ink, counted.kind)[wins]
        most = np.maximum(most, kept)
    return image


def share_image(shares: NDArray[np.float64], kind: str) -> Image:
    """Kept shares (height, width), 0 to 1, as an image (height, width, 3) in one colour."""
    # Shares of far different sizes stand side by side, hence the root.
    return _painted(np.where(shares > 0, 0.3 + 0.7 * shares.clip(0, 1) ** 0.25, 0.0), kind)


def _ink(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    # A lone key column is thinner than a pixel and must still be seen.
    ink: NDArray[np.float64] = 0.6 + 0.4 * np.sqrt(shares.clip(0, 1))
    return ink


def _painted(ink: NDArray[np.float64], kind: str) -> Image:
    image: Image = 1 - ink[..., None] * (1 - rgb(COLOURS[kind]))
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
    _place(axes, layout_image(layout, _pixels(axes)), layout.shape)
    frame(axes, caption)


def _pixels(axes: Any) -> int:
    # No more image than screen: of two image rows on one screen row, one would vanish.
    return max(1, int(min(axes.get_window_extent().bounds[2:])))


def _place(axes: Any, image: Image, shape: tuple[int, int]) -> None:
    """Shows an image as nq × nk, as long as neither side then is less than a quarter."""
    nq, nk = shape
    ratio = nq / nk
    # Data units are positions, so an aspect of 1 keeps them square.
    aspect = min(max(ratio, 0.25), 4.0) / ratio
    axes.imshow(image, extent=(0, nk, nq, 0), interpolation="nearest", aspect=aspect)


def legend_patches(kinds: list[str]) -> list[Any]:
    """Legend entries for the kinds of parts, and one for padding when blocks are among them."""
    from matplotlib.patches import Patch

    patches = [Patch(color=COLOURS[kind], label=LABELS[kind]) for kind in LABELS if kind in kinds]
    if "block" in kinds:
        pale = 1 - PADDING * (1 - rgb(COLOURS["block"]))
        patches.append(Patch(color=tuple(pale), label="computed, not kept"))
    return patches


def write_subject(path: Path, shown: Subject) -> None:
    """Writes one entry of a pattern as a PNG with its title, legend and summary."""
    title, (nq, nk) = str(shown.whole), shown.shape
    # Inches: the picture is at most `side` wide and high, with room for text above and below.
    side, left, below, above = 6.0, 0.65, 1.2, 0.7
    height = side * min(1.0, max(nq / nk, 0.25))
    width, tall = side + left + 0.55, height + below + above
    figure = new_figure(width, tall)
    axes = figure.add_axes((left / width, below / tall, side / width, height / tall))
    note = ""
    if shown.layout is not None:
        _place(axes, layout_image(shown.layout, _pixels(axes)), shown.shape)
        patches = legend_patches([part.kind for part in shown.layout.parts])
    else:
        shares, _, whole = shown.shares(_pixels(axes))
        kind = "nm" if isinstance(shown.pattern, NM) else "kept"
        _place(axes, share_image(shares.numpy(), kind), shown.shape)
        patches = legend_patches([kind])
        note = "" if whole else ", from a sample of the queries"
    frame(axes, "")
    axes.set_xlabel(f"{nk:,} keys{note}", fontsize=9, color=MUTED, loc="center")
    axes.set_ylabel(f"{nq:,} queries", fontsize=9, color=MUTED)
    # A "$" would start mathematics.
    lines = textwrap.wrap(title.replace("$", r"\$"), 80)
    text = "\n".join(lines[:2]) + (" …" if len(lines) > 2 else "")
    top = 1 - (above - 0.3) / tall
    figure.text(0.5, top, text, ha="center", va="bottom", fontsize=9, color=INK, family="monospace")
    if patches:
        figure.legend(
            handles=patches, loc="upper center", bbox_to_anchor=(0.5, top + 0.02 / tall), ncols=4,
            frameon=False, fontsize=8.5,
        )  # fmt: skip
    summed = [
        line
        for long in sum_up(shown).splitlines()
        for line in textwrap.wrap(long, 108, subsequent_indent="    ", drop_whitespace=False)
    ]
    figure.text(
        0.3 / width, 0.14 / tall, "\n".join(summed), fontsize=6.6, color=INK, family="monospace",
        va="bottom",
    )  # fmt: skip
    figure.savefig(path, format="png", metadata={"Title": title})
