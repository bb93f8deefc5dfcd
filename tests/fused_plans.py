"""Plans of the fused kernels made by hand, and what they have to compute."""

import math

import torch

from mixgrain.attention.cuda.cells import PACKED


def plan(mask: torch.Tensor, matrices: int, ctas: int, packed: bool) -> tuple[dict, torch.Tensor]:
    """Items of two query units each, steps in rising order; distinct words not sought.

    With ``packed`` every odd key unit is read from the gathered keys, and the last item goes to
    partial slots.
    """
    nq, nk = mask.shape
    rows, columns = -(-nq // 64), -(-nk // 64)
    full = torch.zeros(rows * 64, columns * 64, dtype=torch.bool)
    full[:nq, :nk] = mask
    items, steps, words = [], [], []
    order = torch.arange(32)
    # Bit 2j + e + 16h of thread 32w + 4g + t: row 16w + g + 8h, column 8j + 2t + e.
    thread = torch.arange(128)[:, None]
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (order // 16)
    column = 8 * (order % 16 // 2) + 2 * (thread % 4) + order % 2
    for first in range(0, rows, 2):
        begin = len(steps)
        for unit in range(columns):
            marks = []
            for u in (first, first + 1):
                tile = full[64 * u : 64 * u + 64, 64 * unit : 64 * unit + 64]
                if not tile.numel() or not tile.any():
                    marks.append(-2)
                elif tile.all():
                    marks.append(-1)
                else:
                    value = (tile[row, column].long() << order).sum(1)
                    words.append(torch.where(value >= 2**31, value - 2**32, value))
                    marks.append(len(words) - 1)
            if marks != [-2, -2]:
                here = unit + PACKED if packed and unit % 2 else unit
                steps.append([here, *marks, -2])
        second = first + 1 if first + 1 < rows else -1
        slots = (0, 1) if packed and first + 2 >= rows else (-1, -1)
        items.append([first, second, -1, begin, len(steps) - begin, *slots, -1])
    tiles = [(item, matrix) for matrix in range(matrices) for item in range(len(items))]
    starts = [len(tiles) * cta // ctas for cta in range(ctas + 1)]

    def on(values, *shape):
        return torch.tensor(values, dtype=torch.int32).reshape(*shape).cuda()

    made = {
        "starts": on(starts, -1),
        "tiles": on(tiles, -1, 2),
        "items": on(items, -1, 8),
        "steps": on(steps or [[0, -2, -2, -2]], -1, 4),
    }
    table = torch.stack(words) if words else torch.zeros(1, 128)
    return made, table.to(torch.int32).cuda()


def expected(q, k, v, mask, scale):
    k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q.double() @ k.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0)[..., None])
    return weights @ v, lse


def patterns(nq: int, nk: int) -> dict[str, torch.Tensor]:
    i, j = torch.arange(nq)[:, None], torch.arange(nk)[None]
    return {
        "window": (i - j).abs() <= 100,
        "causal": i >= j,
        # Rows without keys, units of one warpgroup only, lone units.
        "holes": (i % 7 != 3)
        & ((i * j + j) % 5 < 3)
        & (j >= 70)
        & (j // 64 != 3)
        & (i // 64 != j // 64),
        "nothing": (i < 0) & (j < 0),
    }
