"""Lets the tests of this folder import its helpers by plain name, as those of tests/ are."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
