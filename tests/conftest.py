"""What every test run shares: threads, hypothesis profiles, and the skipping of GPU tests.

`--hypothesis-profile=long` asks more of every property; `-m gpu` runs what needs a GPU,
`-m "not slow"` is the quick run.
"""

from __future__ import annotations

import importlib.util
import os

# Idle threads sleep: on a shared machine spinning ones wait for a core that others use. Read by
# the OpenMP runtime when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

# Under pytest-xdist each worker takes its share of the cores, otherwise torch's threads fight.
torch.set_num_threads(
    max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
)

if importlib.util.find_spec("hypothesis"):  # a GPU machine may lack it; property tests importorskip
    from hypothesis import HealthCheck, settings

    _shared = {
        "deadline": None,  # the first call of an operation pays for its plan
        "print_blob": True,
        "suppress_health_check": [HealthCheck.too_slow],
    }
    # The quick run is the same every time: it fails for the change, not for the day. New examples
    # are what longer runs are for; of tests/properties, run_long.py takes a million.
    settings.register_profile("quick", max_examples=25, derandomize=True, **_shared)
    settings.register_profile("long", max_examples=400, **_shared)
    settings.load_profile("quick")


def _why_no_gpu() -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA device: torch.cuda.is_available() is False"
    if importlib.util.find_spec("cupy") is None:
        return "needs CuPy: pip install mixgrain[cuda13]"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first; those marked gpu skipped, with the reason, where no GPU can run them."""
    # A long test that comes last leaves the other workers idle.
    items.sort(key=lambda item: "slow" not in item.keywords)
    if reason := _why_no_gpu():
        skip = pytest.mark.skip(reason=reason)
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
