"""Lets the laws import their helpers, and those of tests/primitives, by plain name."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "primitives")]
