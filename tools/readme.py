"""Writes the parts of README.md that hold numbers, from the files that measured them.

python -m mixgrain.tools.readme            write
python -m mixgrain.tools.readme --check    only say whether README.md is up to date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mixgrain.formats.errors import MixgrainError

from .demo.report import TABLE, read_table, signed

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN = "<!-- demo table: written by python -m mixgrain.tools.readme from tools/demo/table.json -->"
END = "<!-- end of demo table -->"


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


def renewed(text: str, table: dict[str, Any] | None) -> str:
    """README's text with its generated section written anew.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the lines {BEGIN!r} and {END!r} must stand once each, in this order")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{demo_section(table)}\n\n{END}{after}"


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
        new = renewed(old, read_table(TABLE))
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
