"""The one door to transformers: its version, or an error that says what to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from mixgrain.formats.errors import BackendUnavailableError

OLDEST, NEWEST = (5, 20), 6  # the interfaces used here exist, and mean the same, from OLDEST on


def transformers_module(name: str = "transformers") -> ModuleType:
    """A module of transformers.

    Raises:
        BackendUnavailableError: transformers is missing, or of a version this code is not for.
    """
    try:
        version = importlib.import_module("transformers").__version__
    except ImportError as error:
        raise BackendUnavailableError(
            "mixgrain.huggingface needs transformers: pip install 'mixgrain[hf]'"
        ) from error
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < OLDEST or major >= NEWEST:
        raise BackendUnavailableError(
            f"mixgrain.huggingface is written for transformers >= {OLDEST[0]}.{OLDEST[1]}, "
            f"< {NEWEST}; {version} is installed: pip install 'mixgrain[hf]'"
        )
    return importlib.import_module(name)
