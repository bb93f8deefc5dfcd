"""Writes the parts of README.md that hold numbers, from the files that measured them.

python -m mixgrain.tools.readme            write
python -m mixgrain.tools.readme --check    only say whether README.md is up to date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from mixgrain.formats.errors import MixgrainError

from .demo.finetune import Outcome, cells
from .demo.report import TABLE, read_table, signed

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN = "<!-- demo table: written by python -m mixgrain.tools.readme from tools/demo/table.json -->"
END = "<!-- end of demo table -->"
SPEED = README.parent / "benchmarks" / "h200.json"
SPEED_BEGIN = (
    "<!-- benchmarks: written by python -m mixgrain.tools.readme from benchmarks/h200.json -->"
)
SPEED_END = "<!-- end of benchmarks -->"
# Works of a table each: a layer with some kind of weight and so many tokens.
LAYER = re.compile(r"([a-z]+)-[a-z0-9]+-(\d+)")
LAYERS = {
    "layer": "One pruned layer, y = x Wᵀ with W of 4096 × 4096 float16, by tokens; in brackets how "
    "many times as fast as the dense one:",
    "training": "The same layers forward and backward, with the gradients of x and of what is kept "
    "of W:",
}
TUNED = README.parent / "benchmarks" / "finetune.json"
TUNED_BEGIN = (
    "<!-- fine-tuning: written by python -m mixgrain.tools.readme from benchmarks/finetune.json -->"
)
TUNED_END = "<!-- end of fine-tuning -->"


def demo_section(table: dict[str, Any] | None) -> str:
    """The demo's table in Markdown, with the conditions it was measured under."""
    if table is None:
        return "No evaluation has been shipped yet; `mixgrain demo` measures a small sample."
    heads = ("run", "bits per byte", "above dense", "attention mass kept", "kept")
    lines = ["| " + " | ".join(heads) + " |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in table["variants"]:
        dense = row["name"] == "dense"
        weights = row["pruning"] is not None
        cells = (
            f"**{row['name']}**: {row['words']}",
            f"{row['bits']['mean']:.4f}",
            "" if dense else signed(row["extra"]["mean"], row["extra"]["se"]),
            "" if row["mass"] is None else f"{row['mass']:.3f}",
            f"{row['kept_causal']:.1%}" + (" of weights" if weights else ""),
        )
        lines.append("| " + " | ".join(cells) + " |")
    versions = table["versions"]
    lines += [
        "",
        f"{table['contexts']} contexts of {table['length']} bytes, {table['text']}; "
        f"{table['model']['parameters'] / 1e6:.1f} million parameters. ± is the standard error of"
        f" the paired difference, kept the share of the causal scores; attention mass over"
        f" {table['mass_contexts']} contexts. Attention: {table['attention']}; products: "
        f"{table['products']}; "
        f"{table['device']}, torch {versions['torch']}, mixgrain {versions['mixgrain']}.",
    ]
    return "\n".join(lines)


def tuned_section(measured: dict[str, Any]) -> str:
    """What pruning and fine-tuning the demo's model gave, in Markdown."""
    heads, *rows = cells([Outcome(**row) for row in measured["rows"]])
    rule = ["---", *["---:"] * (len(heads) - 1)]
    lines = ["| " + " | ".join(row) + " |" for row in (heads, rule, *rows)]
    how = measured["settings"]
    lines += [
        "",
        f"Bits per byte; ± the standard deviation over {how['seeds']} seeds, each of "
        f"{how['steps']} steps of {how['batch']} × {how['length']} bytes; scored on "
        f"{how['contexts']} held-out contexts of {how['length scored']} bytes in {how['dtype']}. "
        "MB: the blocks' weights in float32, positions included. Tokens per second of forward "
        f"passes of {how['together']} contexts. {how['device']}, torch {how['torch']}, mixgrain "
        f"{how['mixgrain']}.",
    ]
    return "\n".join(lines)


def training_line() -> str:
    """How the demo's model was trained and what it reached, from the training run's log."""
    log = json.loads((Path(__file__).parent / "demo" / "train.json").read_text(encoding="utf-8"))
    result, versions = log["result"], log["versions"]
    return (
        f"The model was trained by `python -m mixgrain.tools.demo.train` in {log['seconds']:.0f} s "
        f"on one {log['device']} (torch {versions['torch']}). On all {result['contexts']} held-out "
        f"contexts it costs {result['dense']:.3f} bits per byte; windows of 256 bytes cost "
        f"{result['cost_of_256']:.3f} more on the same bytes. Held out, and never trained on, are "
        "files whose path has a SHA-256 divisible by 10, and what repeats them."
    )


def speed_section(measured: dict[str, Any] | None) -> str:
    """The benchmarks in Markdown: our device time, how close to the floor, and the peers' times."""
    if measured is None:
        return "No benchmarks have been run yet."
    lines = [
        "| id | work | mixgrain | of the floor | against |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    works: dict[str, list[dict[str, Any]]] = {}
    for row in measured["rows"]:
        works.setdefault(row["work"], []).append(row)
    layers = [line for kind in LAYERS for line in layers_table(works, kind)]
    for name, rows in works.items():
        ours = next(row for row in rows if row["engine"] == "mixgrain")
        if "ms" not in ours:
            lines.append(f"| {name} | {ours.get('shape', '')} | failed | | |")
            continue
        if "goal_us" in ours:  # host times, each a figure of its own
            lines += [
                f"| {name} | {row['shape']} | {_micro(row['host_us'])} of host time | | |"
                for row in rows
            ]
            continue
        peers = ", ".join(
            f"{row['engine']} {row['ms'] * 1e3:.0f} µs ({row['ms'] / ours['ms']:.1f}×)"
            for row in rows
            if row is not ours and "ms" in row
        )
        if "eta" in ours:
            eta = f"{ours['eta']:.2f} of the dense rate of {ours['eta_of']}"
            peers = ", ".join(filter(None, (eta, peers)))
        share = ours["floor_ms"] / ours["ms"]
        lines.append(
            f"| {name} | {ours['shape']} | {ours['ms'] * 1e3:.0f} µs | {share:.0%} | {peers} |"
        )
    lines += layers
    lines += [
        "",
        "Device time of CUDA-graph replays with caches flushed, medians, after the device has "
        "rested and then run the call itself for a while; of `launch` and `plan`, host time of "
        f"repeated calls; {measured['device']}, "
        f"torch {measured['torch']}, CUDA {measured['cuda']}, CuPy {measured['cupy']}, mixgrain "
        f"{measured['mixgrain']}. `moves of single lines`, copies and fills of as many bytes move "
        "what a work has to move and compute nothing; large products of 64-blocks take lines by "
        "pairs, which move less. The floors and errors stand in "
        "[benchmarks/h200.json](benchmarks/h200.json).",
    ]
    return "\n".join(lines)


def layers_table(works: dict[str, list[dict[str, Any]]], kind: str) -> list[str]:
    """Lines of a table of LAYERS by weights and tokens; none where none was measured.

    Works that it shows are taken out; what failed is left to the list of all.
    """
    found: dict[str, dict[int, str]] = {}
    for name in list(works):
        match = LAYER.fullmatch(name)
        times = {row["engine"]: row for row in works[name] if "ms" in row}
        ours, dense = times.get("mixgrain"), times.get("F.linear") or times.get("cuBLAS dense")
        if match is None or match[1] != kind or ours is None or dense is None:
            continue
        del works[name]
        # "… -> … float16, what is kept, … tokens", or in another order.
        kept = next(p for p in ours["shape"].split(", ") if "float16" not in p and "tok" not in p)
        us = ours["ms"] * 1e3
        cell = f"{us:.1f} µs ({dense['ms'] / ours['ms']:.2f}×)"
        found.setdefault(kept, {})[int(match[2])] = cell
    if not found:
        return []
    tokens = sorted(set().union(*found.values()))
    lines = [
        "",
        LAYERS[kind],
        "",
        "| of W is kept | " + " | ".join(f"{n:,}" for n in tokens) + " |",
        "| --- |" + " ---: |" * len(tokens),
    ]
    for kept, by_tokens in found.items():
        lines.append(f"| {kept} | " + " | ".join(by_tokens.get(n, "") for n in tokens) + " |")
    return lines


def _micro(us: float) -> str:
    return f"{us:.1f} µs" if us < 100 else f"{us / 1000:.1f} ms"


def replaced(text: str, begin: str, end: str, body: str) -> str:
    """The text with what stands between two marker lines written anew.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the lines {begin!r} and {end!r} must stand once each, in this order")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n\n{body}\n\n{end}{after}"


def renewed(
    text: str,
    table: dict[str, Any] | None,
    speed: dict[str, Any] | None = None,
    tuned: dict[str, Any] | None = None,
) -> str:
    """README's text with its generated sections written anew.

    Raises:
        ValueError: the markers of a section are not there, once each and in order.
    """
    body = f"{demo_section(table)}\n\n{training_line()}"
    text = replaced(text, BEGIN, END, body)
    if speed is not None and SPEED_BEGIN in text:
        text = replaced(text, SPEED_BEGIN, SPEED_END, speed_section(speed))
    if tuned is not None and TUNED_BEGIN in text:
        text = replaced(text, TUNED_BEGIN, TUNED_END, tuned_section(tuned))
    return text


def read_measured(path: Path) -> dict[str, Any] | None:
    """Figures of the checkout, or None in an installed package, which has none."""
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def main(argv: list[str] | None = None) -> int:
    """Writes or checks; returns 1 when a check finds README.md out of date."""
    top = argparse.ArgumentParser(
        prog="python -m mixgrain.tools.readme", description=(__doc__ or "").splitlines()[0]
    )
    top.add_argument("--check", action="store_true", help="write nothing")
    top.add_argument("--readme", type=Path, default=README, help="the file (default: %(default)s)")
    options = top.parse_args(argv)
    try:
        old = options.readme.read_text(encoding="utf-8")
        new = renewed(old, read_table(TABLE), read_measured(SPEED), read_measured(TUNED))
    except (MixgrainError, OSError, ValueError) as error:
        print(f"{options.readme}: {error}", file=sys.stderr)
        return 2
    if options.check:
        if new != old:
            print(f"{options.readme} is out of date: run python -m mixgrain.tools.readme")
        return int(new != old)
    options.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
