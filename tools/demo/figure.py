"""The demo's picture: how the patterns lie in memory, and what they cost for what they keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.formats.layout import Layout

from ..plot import (
    COLOURS,
    GRID,
    INK,
    MUTED,
    draw_layout,
    frame,
    legend_patches,
    new_figure,
    rgb,
)
from .measure import Layer, Result, mean_and_error, median, over_dense
from .report import shipped_rows
from .variants import TILES

# Inches.
WIDTH, HEIGHT = 14.4, 9.2
# Positions to a side of the close-up of an N:M choice.
ZOOM = 32
GREEN = "#2c8a57"
# Where a label stands around its point, in points: right, left, above, below.
PLACES = {"r": (8, 0), "l": (-8, 0), "a": (0, 9), "b": (0, -9)}
NEAR_KEPT = {
    "dense": "al",
    "window 128": "bl",
    "Longformer": "a",
    "2:4 weights": "l",
    "tile weights 90%": "l",
}
NEAR_TIME = {"dense": "a", "window 128": "l", "Longformer": "a", "BigBird": "b"}


def draw_choice(axes: Any, layer: Layer, n: int, m: int, offset: int) -> None:
    """Draws which scores of a small square on the diagonal an N:M pattern kept in a real layer."""
    q, k, _ = layer
    rows = slice(offset, offset + ZOOM)
    s = mg.sddmm(q[0, 0, rows], k[0, 0, rows], P.causal() & P.nm(n, m))
    causal = np.tri(ZOOM, dtype=bool)
    kept = s.layout.mask()[0, 0].numpy() & causal
    image = np.ones((ZOOM, ZOOM, 3))
    image[causal] = pale(COLOURS["nm"])
    image[kept] = rgb(COLOURS["nm"])
    axes.imshow(image, extent=(0, ZOOM, ZOOM, 0), interpolation="nearest")
    frame(axes, f"{ZOOM} × {ZOOM} scores of one head")
    axes.vlines(range(m, ZOOM, m), 0, ZOOM, color="white", linewidth=1.2)
    axes.hlines(range(1, ZOOM), 0, ZOOM, color="white", linewidth=0.4)


def draw_tiles(axes: Any, weight: mg.SparseTensor) -> None:
    """Draws which tiles of a weight matrix are kept: as many of its rows as it has columns."""
    mask = weight.layout.mask()[0, 0].numpy()
    mask = mask[: mask.shape[1]]
    image = np.empty((*mask.shape, 3))
    image[:] = pale(GREEN)
    image[mask] = rgb(GREEN)
    rows, columns = mask.shape
    axes.imshow(image, extent=(0, columns, rows, 0), interpolation="nearest")
    frame(axes, f"{rows} × {columns} weights in 16 × 16 tiles")
    axes.vlines(range(16, columns, 16), 0, rows, color="white", linewidth=0.6)
    axes.hlines(range(16, rows, 16), 0, columns, color="white", linewidth=0.6)


def style_chart(axes: Any, title: str, xlabel: str) -> None:
    """Titles, grid and spines of a chart."""
    axes.set_title(title, fontsize=10.5, color=INK, loc="left", pad=10, fontweight="bold")
    axes.set_xlabel(xlabel, fontsize=9, color=INK)
    axes.grid(True, which="major", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=MUTED)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#b8bec6")


def pale(colour: str) -> NDArray[np.float64]:
    """A tint of a colour, for what is dropped."""
    tint: NDArray[np.float64] = 1 - 0.13 * (1 - rgb(colour))
    return tint


def colour_of(result: Result) -> str:
    """One colour for each family of variants."""
    if result.variant.dense:
        return INK
    if result.variant.pruning is not None:
        return GREEN
    if result.variant.dynamic:
        return COLOURS["nm"]
    return COLOURS["block"] if result.variant.name.startswith("window") else COLOURS["panel"]


def draw_points(axes: Any, results: list[Result], costs: list[float], near: dict[str, str]) -> None:
    """Draws each variant's extra bits per byte over its cost, with error bars and its name."""
    from matplotlib.patheffects import withStroke

    baseline = next(r for r in results if r.variant.dense)
    for result, cost in zip(results, costs, strict=True):
        extra, error = (0.0, 0.0) if result is baseline else over_dense(result, baseline)
        colour = colour_of(result)
        square = result.variant.pruning is not None
        axes.errorbar(
            cost,
            extra,
            yerr=None if error != error else error,
            color=colour,
            marker="s" if square else "o",
            markersize=6.5,
            elinewidth=1.2,
            markeredgecolor="white",
            markeredgewidth=0.8,
            zorder=4,
        )
        place = near.get(result.variant.name, "r")
        x, y = (sum(PLACES[p][axis] for p in place) for axis in (0, 1))
        axes.annotate(
            "dense, by torch SDPA" if result is baseline else result.variant.name,
            (cost, extra),
            xytext=(x, y),
            textcoords="offset points",
            ha="left" if x > 0 else "right" if x < 0 else "center",
            va="center" if not y else "bottom" if y > 0 else "top",
            fontsize=8.5,
            color=colour,
            zorder=5,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )


def draw_window_curve(axes: Any, table: dict[str, Any] | None) -> None:
    """Draws the shipped evaluation's curve of plain windows, the yardstick for the other points."""
    rows = [r for name, r in shipped_rows(table).items() if name.startswith("window")]
    rows.sort(key=lambda row: row["kept_causal"])
    if not rows or table is None:
        return
    axes.errorbar(
        [row["kept_causal"] for row in rows],
        [row["extra"]["mean"] for row in rows],
        yerr=[row["extra"]["se"] for row in rows],
        color="#8fb4d9",
        linewidth=1.6,
        marker="o",
        markersize=3,
        elinewidth=1,
        zorder=2,
        label=f"windows of 32 … 1024, {table['contexts']} contexts (shipped)",
    )
    axes.legend(
        frameon=False, fontsize=8.5, labelcolor=MUTED, loc="lower left", bbox_to_anchor=(0, 0.08)
    )


def draw_patterns(
    figure: Any,
    layouts: list[tuple[str, Layout]],
    layer: Layer,
    weight: mg.SparseTensor,
) -> None:
    """Draws the upper row: three patterns, a close-up of 2:4, a tile-pruned weight."""

    def box(place: int, title: str) -> Any:
        left = 0.035 + 0.191 * place
        figure.text(left, 0.862, title, fontsize=10.5, color=INK, fontweight="bold", va="bottom")
        return figure.add_axes((left, 0.585, 0.172, 0.172 * WIDTH / HEIGHT))  # a square

    for place, (title, layout) in enumerate(layouts[:3]):
        n = layout.shape[0]
        share = layout.nnz / (n * (n + 1) / 2)
        draw_layout(box(place, title), layout, f"{n:,} × {n:,}, {share:.1%} of the causal scores")
    middle = layer[0].shape[-2] // 2
    draw_choice(box(3, "2:4 scores, a close-up"), layer, 2, 4, middle - middle % 4)
    draw_tiles(box(4, f"tile weights, {TILES:.0%}"), weight)
    kinds = [part.kind for _, layout in layouts[:3] for part in layout.parts]
    keep = {"loc": "upper left", "frameon": False, "fontsize": 9, "labelcolor": INK}
    keep |= {"handlelength": 1, "columnspacing": 1.6, "ncols": 4}
    figure.legend(handles=legend_patches(kinds), bbox_to_anchor=(0.03, 0.56), **keep)


def draw_charts(figure: Any, results: list[Result], table: dict[str, Any] | None) -> None:
    """Draws the lower row: quality against what is kept, and against time."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    left = figure.add_axes((0.06, 0.07, 0.42, 0.39))
    style_chart(
        left,
        "Quality against what is kept",
        "share kept:  ● of the causal scores   ■ of the weights",
    )
    left.set_xscale("log", base=2)
    draw_window_curve(left, table)
    kept = [1.0 if r.variant.dense else r.kept_causal for r in results]
    draw_points(left, results, kept, NEAR_KEPT)
    left.set_xticks([2.0**-i for i in range(7)])
    percent = FuncFormatter(lambda value, _: f"{100 * value:.1f}".removesuffix(".0") + " %")
    left.xaxis.set_major_formatter(percent)
    left.set_ylabel("bits per byte above dense (log scale)", fontsize=9.5, color=INK)
    shown = [r["kept_causal"] for name, r in shipped_rows(table).items() if "window" in name]
    left.set_xlim(min(kept + shown) / 1.3, 1.3)

    right = figure.add_axes((0.545, 0.07, 0.42, 0.39), sharey=left)
    words = "milliseconds of attention per context, all layers, on this machine"
    style_chart(right, "Quality against time", words)
    right.set_xscale("log")
    attention = [r for r in results if r.variant.pruning is None]
    spent = [1000 * median([t.attention for t in r.times]) for r in attention]
    draw_points(right, attention, spent, NEAR_TIME)
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_minor_locator(NullLocator())
    low, high = right.get_xlim()
    right.set_xlim(low / 1.35, high * 1.35)
    scale_extra(left, results, table)
    for axes in (left, right):
        axes.axhline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)


def scale_extra(axes: Any, results: list[Result], table: dict[str, Any] | None) -> None:
    """Scales the vertical axis: logarithmic, but linear around 0, where dense stands."""
    from matplotlib.ticker import FuncFormatter

    baseline = next(r for r in results if r.variant.dense)
    extras = [0.0 if r is baseline else over_dense(r, baseline)[0] for r in results]
    extras += [
        row["extra"]["mean"]
        for name, row in shipped_rows(table).items()
        if name.startswith("window")
    ]
    axes.set_yscale("symlog", linthresh=0.01, linscale=0.5)
    axes.set_ylim(min(-0.004, 1.5 * min(extras)), max(0.02, 1.7 * max(extras)))
    axes.set_yticks(
        [
            tick
            for tick in (-1, -0.1, 0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
            if tick <= max(extras) * 1.7 and tick >= min(extras)
        ]
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()


def draw_demo(
    path: Path,
    results: list[Result],
    layouts: list[tuple[str, Layout]],
    layer: Layer,
    weight: mg.SparseTensor,
    table: dict[str, Any] | None,
) -> None:
    """Writes the demo's picture.

    Args:
        path: A PNG.
        results: What was measured, the dense baseline among it.
        layouts: Titles and layouts of the static patterns to draw, three of them.
        layer: Queries, keys and values of a real layer, for the close-up of 2:4.
        weight: A tile-pruned weight.
        table: The shipped evaluation, or None.
    """
    figure = new_figure(WIDTH, HEIGHT)
    figure.text(0.035, 0.968, "mixgrain demo", fontsize=18, color=INK, fontweight="bold", va="top")
    figure.text(0.035, 0.925, subtitle(results), fontsize=10, color=MUTED, va="top")
    draw_patterns(figure, layouts, layer, weight)
    draw_charts(figure, results, table)
    figure.savefig(path, format="png", metadata={"Title": "mixgrain demo"})


def subtitle(results: list[Result]) -> str:
    """The picture's second line: what was scored, and the model's own cost."""
    baseline = next(r for r in results if r.variant.dense)
    bits, _ = mean_and_error(baseline.bits)
    count = len(baseline.bits)
    return (
        f"A byte-level language model trained with dense attention, run with sparse attention or"
        f" sparse weights. Dense: {bits:.3f} bits per byte, {count} held-out"
        f" context{'s' if count > 1 else ''}."
    )
