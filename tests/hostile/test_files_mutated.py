"""Twenty thousand mutated files: an error that names the fault, or a load that is whole.

They are loaded by a child process whose memory is limited, so that neither a crash nor an enormous
allocation passes unseen. A fault is reported with the number of the file:
`PYTHONPATH=src:tests python -m hostile.attack FOLDER n n+1` makes it again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile.mutations import MUTATIONS

FILES = 20_000
# Processor time for one file of a few kilobytes, its products included.
SECONDS = 2.0
ROOT = Path(__file__).resolve().parents[2]
FORGED = {function.__name__: weight for function, weight in MUTATIONS}


@pytest.mark.slow
def test_twenty_thousand_mutated_files(tmp_path) -> None:
    child = subprocess.run(
        [sys.executable, "-m", "hostile.attack", str(tmp_path), "0", str(FILES)],
        env={
            "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}",
            "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "MKL_NUM_THREADS": "1",
        },
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    now = tmp_path / "now"
    at = now.read_text() if now.exists() else "before the first file"
    assert child.returncode == 0, f"died with {child.returncode} at {at}\n{child.stderr[-2000:]}"
    found = json.loads(child.stdout)
    assert not found["faults"], "\n".join(map(str, found["faults"][:20]))
    assert found["slowest"] < SECONDS, f"file {found['slowest_at']} took {found['slowest']} s"
    refused, loaded = found["refused"], found["loaded"]
    assert sum(refused.values()) + sum(loaded.values()) == FILES
    # Every mutation was made about as often as its weight says, and mostly did harm.
    for name, weight in FORGED.items():
        made = refused.get(name, 0) + loaded.get(name, 0)
        assert made > FILES * weight / sum(FORGED.values()) / 2, name
        assert refused.get(name, 0) > made / 2, f"{name}: loaded {loaded.get(name)} of {made}"
    # What harms nothing still loads: the checks are no blanket refusal.
    assert loaded["element"] > 100 and loaded["header"] > 10
