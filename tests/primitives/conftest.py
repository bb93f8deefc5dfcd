"""Lets the tests of this folder import its helpers by plain name, as those of tests/ are."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest


@pytest.fixture
def runs(monkeypatch):
    """Names of the prepared calls that ran; CPU tensors count as usable."""
    from stand import stand_in

    from mixgrain.formats.cache import clear_caches

    yield stand_in(monkeypatch)
    clear_caches()
