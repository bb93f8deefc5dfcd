"""Evening out what was dealt."""

from __future__ import annotations

from collections.abc import Sequence


def evened(mine: list[list[int]], costs: Sequence[float]) -> None:
    """Exchange tiles between the CTA with the most and another, as long as the most falls.

    Args:
        mine: tiles of each CTA; changed in place.
        costs: of each tile.
    """
    loads = [sum(costs[tile] for tile in own) for own in mine]
    for _ in range(4 * len(mine)):
        top = max(range(len(mine)), key=loads.__getitem__)
        best: tuple[float, int, int, int] | None = None
        for other in sorted(range(len(mine)), key=loads.__getitem__)[: len(mine) // 2]:
            gap = loads[top] - loads[other]
            for a, given in enumerate(mine[top]):
                for b, taken in enumerate(mine[other]):
                    moved = costs[given] - costs[taken]
                    # The larger of the two sums afterwards.
                    worst = loads[top] - min(moved, gap - moved)
                    if 0 < moved < gap and (best is None or worst < best[0]):
                        best = (worst, other, a, b)
            if best is not None and best[0] <= loads[top] - gap // 2:
                break
        if best is None:
            return
        _, other, a, b = best
        moved = costs[mine[top][a]] - costs[mine[other][b]]
        mine[top][a], mine[other][b] = mine[other][b], mine[top][a]
        loads[top] -= moved
        loads[other] += moved
