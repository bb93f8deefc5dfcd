"""The record of the last GPU run: which sources passed, where, and how many tests of each file.

    python tests/gpu_record.py          run pytest -m gpu and write tests/gpu_record.json
    python tests/gpu_record.py --check  say whether the record is of the sources as they are

CI has no GPU: it reads the record, so that nobody mistakes untested kernels for tested ones.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "gpu_record.json"
# What decides what runs on a device: kernels, what compiles and launches them, their plans, and
# the short ways past checks and operators.
SOURCES = (
    "cuda/**/*.cu",
    "cuda/**/*.cuh",
    "cuda/*.py",
    "primitives/cuda/*.py",
    "primitives/plans/*.py",
    "attention/cuda/*.py",
    "attention/attend.py",
    "attention/dense.py",
    "attention/eager.py",
    "attention/folded.py",
    "primitives/eager.py",
    "primitives/lately.py",
    "primitives/looks.py",
    "primitives/recorded.py",
    "primitives/recorded_linear.py",
    "primitives/recorded_nm.py",
)


def sources() -> list[Path]:
    """Kernel-relevant files, sorted by their path."""
    return sorted({path for pattern in SOURCES for path in ROOT.glob(pattern)})


def digest() -> str:
    """SHA-256 over names and bytes of the kernel-relevant files."""
    total = hashlib.sha256()
    for path in sources():
        total.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def read() -> dict:
    """The record."""
    return json.loads(RECORD.read_text())


def complaint() -> str | None:
    """What is wrong with the record, or None."""
    if not RECORD.exists():
        return "no GPU run is recorded: python tests/gpu_record.py on a machine with a GPU"
    record = read()
    if record["digest"] != digest():
        return (
            f"the record is of other sources ({record['digest'][:12]}, these are {digest()[:12]}): "
            "python tests/gpu_record.py on a machine with a GPU"
        )
    if record["failed"] or not record["passed"]:
        return f"the recorded run passed {record['passed']} and failed {record['failed']} tests"
    return None


def run() -> int:
    """Run the GPU tests and write the record; pytest's exit status."""
    import torch

    report = ROOT / ".gpu_report.xml"
    status = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={report}", *sys.argv[1:]],
        cwd=ROOT,
        check=False,
    ).returncode
    counts: dict[str, Counter] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        kind = (
            "failed"
            if kinds & {"failure", "error"}
            else "skipped"
            if "skipped" in kinds
            else "passed"
        )
        counts.setdefault(case.get("classname", ""), Counter())[kind] += 1
    report.unlink()
    import cupy

    record = {
        "digest": digest(),
        "device": torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cupy": cupy.__version__,
        },
        **{kind: sum(c[kind] for c in counts.values()) for kind in ("passed", "failed", "skipped")},
        "files": {name: dict(sorted(c.items())) for name, c in sorted(counts.items())},
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    totals = ", ".join(f"{record[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
    print(f"{RECORD.name}: {totals}")
    return status


if __name__ == "__main__":
    if "--check" in sys.argv:
        said = complaint()
        print(said or f"the record is of these sources: {read()['passed']} tests passed")
        sys.exit(bool(said))
    sys.exit(run())
