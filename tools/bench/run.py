"""Runs benchmarks and writes their rows.

python -m mixgrain.tools.bench.run [ID …] [--out benchmarks/h200.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mixgrain import __version__
from mixgrain.formats.errors import BackendUnavailableError

from . import launching
from .measure import device_ms, host_us, kernels, plan_ms, relative_error
from .work import Work
from .works import chosen


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
    rows: list[dict[str, Any]] = []
    right: list[tuple[dict[str, Any], Callable[[], object]]] = []
    for engine, call in {"mixgrain": work.ours, **work.peers}.items():
        row: dict[str, Any] = {
            "work": work.id,
            "engine": engine,
            "shape": work.shape,
            "floor_ms": round(work.floor_ms, 5),
            "floor": work.floor,
            "plan_ms": None,  # where an engine plans nothing, or nothing apart from its call
        }
        try:
            out = call()
            expected = work.oracles[engine]() if engine in work.oracles else reference
            if out.shape != expected.shape:
                out = out[:1, :1] if out.dim() == expected.dim() else out[0, 0]
            row["error"] = relative_error(out, expected)
            row["ok"] = bool(row["error"] <= work.tolerance)
            if row["ok"]:
                row["ms"] = round(device_ms(call), 5)
                row["host_us"] = round(host_us(call), 1)
                if work.rate is not None:
                    row["eta_of"], rate = work.rate()
                    row["eta"] = round(work.flops / (row["ms"] * 1e-3) / rate, 3)
                right.append((row, call))
                if engine in work.plans:
                    row["plan_ms"] = round(work.plans[engine](), 3)
                elif call == work.ours:
                    row["plan_ms"] = round(plan_ms(call, row["host_us"]), 3)
        except Exception as error:  # one engine's failure is a row, not the end of the run
            row |= _failed(error)
        rows.append(row)
    for row, engine_call in right:  # at last: once a profiler has run, launches take longer
        try:
            row["impl"] = kernels(engine_call)
        except Exception as error:
            row |= _failed(error)
    return rows


def _failed(error: Exception) -> dict[str, Any]:
    traceback.print_exc(limit=6)
    return {"ok": False, "failed": f"{type(error).__name__}: {str(error)[:200]}"}


def run(ids: list[str], out: Path | None) -> int:
    """Measure works, print a line a row, and write JSON when asked.

    Args:
        ids: benchmarks, a trailing * is a wildcard; all when empty.
        out: the file to write, or None.

    Returns:
        1 when a row of ours failed or was wrong, else 0.

    Raises:
        UnsupportedError: an id that does not exist.
        BackendUnavailableError: there is no GPU.
    """
    # Host times before anything starts a profiler, as the rows of `launch` do at their end.
    works = sorted(chosen(ids), key=lambda work: {"plan": 0, "launch": 1}.get(work[0], 2))
    if not torch.cuda.is_available():
        raise BackendUnavailableError("bench: a CUDA GPU is needed, torch finds none here")
    rows: list[dict[str, Any]] = []

    head = environment()

    def write() -> None:
        if out:
            out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")

    for name, make in works:
        try:
            made = make()
            rows += measure(made) if isinstance(made, Work) else made
        except Exception as error:
            traceback.print_exc(limit=8)
            rows.append(
                {"work": name, "engine": "mixgrain", "ok": False, "failed": repr(error)[:300]}
            )
        torch.cuda.empty_cache()
        mine = [row for row in rows if row["work"] == name]
        ours = next((row.get("ms") for row in mine if row["engine"] == "mixgrain"), None)
        for row in mine:
            print(line(row, ours), flush=True)
        write()  # a run that is stopped keeps what it has measured
    if out and any(row["work"] == "composed-streams" for row in rows):
        (out.parent / "composed-streams.txt").write_text(launching.overlap() + "\n")
    return 0 if all(r["ok"] for r in rows if r["engine"] == "mixgrain") else 1


def line(row: dict[str, Any], ours: float | None) -> str:
    """A row for the terminal; `ours` is mixgrain's time for the same work, milliseconds."""
    head = f"{row['work']:22s} {row['engine']:14s}"
    ms = row.get("ms")
    if not ms:
        return f"{head}    failed"
    if "goal_us" in row:
        return f"{head} {row['host_us']:9.1f} µs of host time  {row['shape']}"
    ratio = f"  {ms / ours:5.2f}×" if ours else ""
    share = f"floor {row['floor_ms'] / ms:4.0%}"
    eta = f"  eta {row['eta']:.3f}" if "eta" in row else ""
    return f"{head} {ms * 1e3:9.1f} µs  {share}{ratio}{eta}  host {row['host_us']} µs"


def main(arguments: list[str] | None = None) -> int:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ids", nargs="*", help="benchmarks; a trailing * is a wildcard")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    return run(options.ids, options.out)


if __name__ == "__main__":
    sys.exit(main())
