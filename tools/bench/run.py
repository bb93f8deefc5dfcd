"""Runs benchmarks and writes their rows.

python -m mixgrain.tools.bench.run [ID …] [--out benchmarks/h200.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mixgrain import __version__

from .measure import device_ms, host_us, relative_error
from .works import Work, chosen


def environment() -> dict[str, str]:
    """Device and versions, for the head of the file."""
    import cupy

    found = {
        "device": torch.cuda.get_device_name(),
        "mixgrain": __version__,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cupy": cupy.__version__,
        "python": sys.version.split()[0],
    }
    with contextlib.suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    return found


def measure(work: Work) -> list[dict[str, Any]]:
    """Rows of one work: ours first, then the peers'; a wrong result prints no time."""
    reference = work.oracle()
    rows = []
    for engine, call in {"mixgrain": work.ours, **work.peers}.items():
        row: dict[str, Any] = {
            "work": work.id,
            "engine": engine,
            "shape": work.shape,
            "floor_ms": round(work.floor_ms, 5),
            "floor": work.floor,
        }
        try:
            out = call()
            if out.shape != reference.shape:
                out = out[:1, :1] if out.dim() == reference.dim() else out[0, 0]
            row["error"] = relative_error(out, reference)
            row["ok"] = bool(row["error"] <= work.tolerance)
            if row["ok"]:
                row["ms"] = round(device_ms(call), 5)
                row["host_us"] = round(host_us(call), 1)
        except Exception as error:  # one engine's failure is a row, not the end of the run
            row |= {"ok": False, "failed": f"{type(error).__name__}: {str(error)[:200]}"}
            traceback.print_exc(limit=6)
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run, print a line a row, and write JSON when asked; 1 when a row of ours failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ids", nargs="*", help="benchmarks; a trailing * is a wildcard")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for name, make in chosen(options.ids):
        try:
            rows += measure(make())
        except Exception as error:
            traceback.print_exc(limit=8)
            rows.append(
                {"work": name, "engine": "mixgrain", "ok": False, "failed": repr(error)[:300]}
            )
        torch.cuda.empty_cache()
        ours = next(
            (r.get("ms") for r in rows if r["work"] == name and r["engine"] == "mixgrain"), None
        )
        for row in (r for r in rows if r["work"] == name):
            ms = row.get("ms")
            times = f"{ms * 1e3:9.1f} µs  floor {row['floor_ms'] / ms:4.0%}" if ms else "   failed"
            ratio = f"  {ms / ours:5.2f}×" if ms and ours else ""
            print(
                f"{name:22s} {row['engine']:14s} {times}{ratio}  host {row.get('host_us', '-')} µs",
                flush=True,
            )
    if options.out:
        head = environment()
        options.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    return 0 if all(r["ok"] for r in rows if r["engine"] == "mixgrain") else 1


if __name__ == "__main__":
    sys.exit(main())
