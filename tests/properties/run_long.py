"""The long run: more than a million examples over all laws, in pieces, on many processes.

    python tests/properties/run_long.py -n 16      # all of it; writes tests/properties/record.json
    python tests/properties/run_long.py -n 2 --only merge --examples 20000 --record /tmp/some.json

Laws are run in pieces of about PIECE examples, each with a seed made of the run's seed, the name of
the law and the number of the piece, so pieces explore apart from each other and any of them can be
run again alone. A finished piece is a line in the progress file; a run that was stopped goes on
from there when it is started again, as long as sources, seed and sizes are the same. The record is
written when all pieces are done, whether they failed or not; it counts the examples that were run
to their end, and how many of them were different.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import gc
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import os
import platform
import re
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECORD = HERE / "record.json"
PROGRESS = ROOT / ".hypothesis" / "long_run.jsonl"

EXAMPLES = 1_060_000
PIECE = 1000

#: What a result depends on: the floors under test, and what the tests are made of.
SOURCES = (
    "formats/**/*.py",
    "primitives/*.py",
    "primitives/cpu/*.py",
    "primitives/plans/*.py",
    "attention/*.py",
    "tests/properties/*.py",
    "tests/predicates.py",
    "tests/pattern_checks.py",
    "tests/layout_cases.py",
    "tests/primitives/cases.py",
)
#: Files of the folder that no law depends on.
ASIDE = ("conftest.py", "run_long.py", "test_record.py")


@dataclass(frozen=True)
class Piece:
    """Some examples of one law."""

    law: str
    number: int
    examples: int
    seed: int


def digest() -> str:
    """SHA-256 of everything that a result depends on."""
    total = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            if path.parent != HERE or path.name not in ASIDE:
                total.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return total.hexdigest()


def prepare() -> None:
    """Make this a process that can import the laws, with one thread."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for folder in (ROOT / "src", HERE.parent, HERE.parent / "primitives", HERE):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    import torch

    torch.set_num_threads(1)


def settle() -> None:
    """Make this a process that does nothing else: what is imported is not looked through for
    garbage again and again, which takes a tenth of the time.
    """
    prepare()
    _laws()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def laws() -> dict[str, Any]:
    """All laws of the folder by name, file::function."""
    found = {}
    for path in sorted(HERE.glob("test_*.py")):
        if path.name not in ASIDE:
            for name, value in vars(importlib.import_module(path.stem)).items():
                if name.startswith("test_") and hasattr(value, "law"):
                    found[f"{path.stem}::{name}"] = value.law
    return found


def seed_of(run: int, law: str, number: int) -> int:
    """A seed for one piece, on every machine the same."""
    text = f"{run} {law} {number}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big")


def pieces(shares: dict[str, float], examples: int, seed: int) -> list[Piece]:
    """The whole run: at least ``examples``, dealt out by shares."""
    made, total = [], sum(shares.values())
    for law, share in shares.items():
        count = math.ceil(examples * share / total)
        parts = max(1, round(count / PIECE))
        made += [
            Piece(law, i, count * (i + 1) // parts - count * i // parts, seed_of(seed, law, i))
            for i in range(parts)
        ]
    # In no order, so that the progress of the first minutes speaks for the rest.
    return sorted(made, key=lambda piece: (piece.number, piece.seed))


def counted(body: Callable[..., None], seen: list[bytes]) -> Callable[..., None]:
    """The body; leaves a fingerprint of every example that ran to its end."""

    @functools.wraps(body)
    def run(**drawn: Any) -> None:
        body(**drawn)
        seen.append(hashlib.blake2b(repr(drawn).encode(), digest_size=8).digest())

    return run


def run_piece(piece: Piece) -> dict[str, Any]:
    """Run one piece: what was counted, or how it failed."""
    prepare()
    import hypothesis
    from hypothesis import HealthCheck, Phase, given, settings

    law = _laws()[piece.law]
    seen: list[bytes] = []
    phases = [Phase.generate, Phase.shrink]
    if piece.number == 0:
        phases.insert(0, Phase.explicit)
    chosen = settings(
        max_examples=piece.examples,
        deadline=None,
        database=None,
        derandomize=False,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    test = hypothesis.seed(piece.seed)(chosen(given(**law.strategies)(counted(law.body, seen))))
    began, failure, said = time.process_time(), None, io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            test()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        shown = traceback.format_exception(error)
        failure = {"piece": asdict(piece), "error": "".join(shown)[-6000:], "said": said.getvalue()}
    return {
        "law": piece.law,
        "number": piece.number,
        "examples": len(seen),
        "seconds": time.process_time() - began,
        "prints": base64.b64encode(b"".join(seen)).decode(),
        "failure": failure,
    }


_laws = functools.cache(laws)


def done_before(path: Path, run: dict[str, Any]) -> list[dict[str, Any]]:
    """Results of an earlier start of the same run; else an empty file with this run's heading."""
    if path.exists():
        lines = path.read_text().splitlines()
        with contextlib.suppress(ValueError):
            if lines and json.loads(lines[0]) == run:
                # A process that was killed may have left half a line.
                whole = [line for line in lines if line.endswith("}")]
                path.write_text("\n".join(whole) + "\n")
                return [json.loads(line) for line in whole[1:]]
        print(f"{path} is of another run, of other sources or sizes; starting anew", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run) + "\n")
    return []


def results_of(todo: list[Piece], processes: int) -> Iterator[dict[str, Any]]:
    """Results as they come."""
    if processes == 1:
        yield from map(run_piece, todo)
        return
    # Fresh processes: torch does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, initializer=settle) as pool:
        yield from pool.imap_unordered(run_piece, todo)


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Per law: examples run, different ones, seconds of a core, failures."""
    made: dict[str, Any] = defaultdict(
        lambda: {"examples": 0, "different": 0, "seconds": 0.0, "failures": 0}
    )
    prints: dict[str, set[bytes]] = defaultdict(set)
    for result in results:
        entry = made[result["law"]]
        entry["examples"] += result["examples"]
        entry["seconds"] += result["seconds"]
        entry["failures"] += result["failure"] is not None
        raw = base64.b64decode(result["prints"])
        prints[result["law"]].update(raw[i : i + 8] for i in range(0, len(raw), 8))
    for name, entry in made.items():
        entry["different"] = len(prints[name])
        entry["seconds"] = round(entry["seconds"], 1)
    return dict(sorted(made.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-n", "--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--examples", type=int, default=EXAMPLES, help=f"default {EXAMPLES:,}")
    parser.add_argument("--seed", type=int, default=0, help="of the whole run")
    parser.add_argument("--only", default="", help="regular expression over the names of laws")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--progress", type=Path, default=PROGRESS)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--rates", action="store_true", help="print examples per second at the end")
    args = parser.parse_args()
    if args.only and args.record == RECORD:
        parser.error("--only runs a part; name another --record for it")
    prepare()
    import hypothesis
    import torch

    import mixgrain

    shares = {name: law.share for name, law in laws().items() if re.search(args.only, name)}
    run = {"seed": args.seed, "examples": args.examples, "only": args.only, "digest": digest()}
    todo = pieces(shares, args.examples, args.seed)
    results = done_before(args.progress, run)
    done = {(result["law"], result["number"]) for result in results}
    todo = [piece for piece in todo if (piece.law, piece.number) not in done]
    spent = sum(result["wall"] for result in results)
    ran = sum(result["examples"] for result in results)
    print(f"{len(shares)} laws, {len(todo)} pieces to go, {ran:,} examples done before", flush=True)
    began = last = said = time.perf_counter()
    with args.progress.open("a") as progress:
        for n, result in enumerate(results_of(todo, args.processes), 1):
            now = time.perf_counter()
            # Of a run in several goes, wall time is the sum of what its goes took.
            result["wall"], last = now - last, now
            progress.write(json.dumps(result) + "\n")
            progress.flush()
            results.append(result)
            ran += result["examples"]
            if result["failure"]:
                print(f"FAILED {result['law']}\n{result['failure']['error']}", flush=True)
            if now - said > 10 or n == len(todo):
                said = now
                print(f"{n}/{len(todo)} pieces, {ran:,} examples, {now - began:.0f} s", flush=True)
            if now - began > 60 * args.minutes and n < len(todo):
                print("time is up: no record yet; the same command goes on from here")
                return 2
    made = summary(results)
    failures = [result["failure"] for result in results if result["failure"]]
    record = {
        "examples": sum(entry["examples"] for entry in made.values()),
        "different": sum(entry["different"] for entry in made.values()),
        "failures": failures,
        "seed": args.seed,
        "date": datetime.now(timezone.utc).date().isoformat(),  # noqa: UP017  # as datetime.UTC
        "wall_seconds": round(spent + time.perf_counter() - began, 1),
        "processes": args.processes,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "hypothesis": hypothesis.__version__,
            "mixgrain": mixgrain.__version__,
        },
        "digest": run["digest"],
        "laws": made,
    }
    if digest() != run["digest"]:
        print("sources changed meanwhile; the record is of those at the start")
    args.record.parent.mkdir(parents=True, exist_ok=True)
    args.record.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if args.rates:
        for name, entry in sorted(made.items(), key=lambda one: -one[1]["seconds"]):
            rate = entry["examples"] / max(entry["seconds"], 1e-9)
            print(f"{rate:7.0f}/s {entry['examples']:8,} {entry['different']:8,} different  {name}")
    seconds = sum(entry["seconds"] for entry in made.values())
    print(
        f"{record['examples']:,} examples ({record['different']:,} different), {len(failures)} "
        f"failures, {record['examples'] / max(seconds, 1e-9):.0f} examples a second and core"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    # The laws are about the CPU; where there is a GPU, sixteen processes leave it alone.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.exit(main())
