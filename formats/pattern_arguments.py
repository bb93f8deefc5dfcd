"""What the constructors of patterns accept as numbers."""

import math
import operator

from .arguments import as_integer as as_integer
from .errors import LayoutError
from .pattern_static import UNBOUNDED


def as_radius(value: object, who: str) -> int:
    """`value` as an int >= 0, math.inf as UNBOUNDED; LayoutError otherwise."""
    if isinstance(value, float) and value == math.inf:
        return UNBOUNDED
    try:
        return min(as_integer(value, who, 0), UNBOUNDED)
    except LayoutError:
        raise LayoutError(
            f"{who}: {value!r:.80} given, an integer >= 0 or math.inf (no bound) expected"
        ) from None


def as_seed(value: object, who: str) -> int:
    """Any integer, modulo 2**64; LayoutError otherwise."""
    try:
        return operator.index(value) % (1 << 64)  # type: ignore[arg-type]
    except TypeError:
        raise LayoutError(f"{who}: {value!r:.80} given, an integer expected") from None
