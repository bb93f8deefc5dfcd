"""The demo's tables, as text: what was measured here, beside the shipped evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mixgrain.formats.errors import MixgrainError

from .measure import Result, mean_and_error, median, over_dense

HERE = Path(__file__).parent
WEIGHTS = HERE / "model.safetensors"
TABLE = HERE / "table.json"
FORMAT = 1


class DemoError(MixgrainError, RuntimeError):
    """The demo lacks something it needs; says what and where."""


def read_table(path: Path = TABLE) -> dict[str, Any] | None:
    """The shipped evaluation, or None where there is none.

    Raises:
        DemoError: the file is not such a table.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise DemoError(f"{path} is no table of the demo: {error!r}") from None
    if version != FORMAT:
        raise DemoError(
            f"{path}: format {version!r} given, {FORMAT} expected; "
            "write it again with python -m mixgrain.tools.demo.table"
        )
    table: dict[str, Any] = found
    return table


def shipped_rows(table: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The rows of a table by name; none without a table."""
    return {row["name"]: row for row in table["variants"]} if table else {}


def align(rows: list[list[str]], left: int = 1) -> list[str]:
    """Lines of aligned columns, the first `left` to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def milliseconds(seconds: float) -> str:
    """A time in milliseconds, with three digits or more."""
    ms = 1000 * seconds
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}"


def signed(mean: float, error: float) -> str:
    """A difference and its standard error, '+0.012 ±0.001'."""
    return f"{mean:+.3f}" if math.isnan(error) else f"{mean:+.3f} ±{error:.3f}"


def _row(
    result: Result, baseline: Result, shipped: dict[str, dict[str, Any]], weights: bool
) -> list[str]:
    own = result is baseline
    alone = [t.products if weights else t.attention for t in result.times]
    cells = [
        result.variant.name + (" (torch SDPA)" if own and not weights else ""),
        f"{mean_and_error(result.bits)[0]:.3f}",
        "" if own else signed(*over_dense(result, baseline)),
    ]
    if not weights:
        cells.append("" if result.mass is None else f"{result.mass:.3f}")
    kept = 1.0 if own else result.kept_causal
    cells += [f"{kept:.1%}", milliseconds(median(alone))]
    cells.append(milliseconds(median([t.forward for t in result.times])))
    if shipped:
        row = shipped.get(result.variant.name)
        cells.append(f"{row['bits']['mean']:.3f}" if row else "")
        difference = "" if own or not row else signed(row["extra"]["mean"], row["extra"]["se"])
        cells.append(difference)
    return cells


def results_table(results: list[Result], table: dict[str, Any] | None) -> str:
    """Two tables, of the sparse attentions and of the sparse weights."""
    shipped = shipped_rows(table)
    baseline = next(r for r in results if r.variant.dense)
    blocks = []
    for weights in (False, True):
        head = ["weights" if weights else "attention", "bits/byte", "over dense"]
        head += [] if weights else ["mass"]
        head += ["kept", "products" if weights else "attn", "model"]
        head += [f"of {table['contexts']}", "over dense"] if table else []
        rows = [head]
        for result in results:
            if result is baseline or (result.variant.pruning is not None) == weights:
                rows.append(_row(result, baseline, shipped, weights))
        lines = align(rows)
        blocks.append("\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]]))
    return "\n\n".join(blocks)


def footnotes(results: list[Result], table: dict[str, Any] | None, mass_contexts: int) -> str:
    """What the columns mean."""
    baseline = next(r for r in results if r.variant.dense)
    notes = {
        "bits/byte": "mean over the same contexts in every row; lower is better",
        "over dense": "the paired difference, ± its standard error",
        "mass": "share of the dense softmax on kept positions: mean over rows, heads, layers; "
        + _count(mass_contexts, "context"),
        "kept": f"of the causal scores, which are {baseline.kept_full:.1%} of all; of the blocks'"
        " weights",
        "attn": "attention alone, milliseconds per context (median)",
        "products": "products with the blocks' weights alone, the same",
        "model": "the whole forward pass, the same",
    }
    if table:
        notes[f"of {table['contexts']}"] = (
            f"the shipped evaluation: {table['contexts']} contexts, {table['text']}"
        )
    return "\n".join(f"{name:12}{words}" for name, words in notes.items())


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
