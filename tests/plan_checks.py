"""Plans made on the device against those made from layouts, and both against the pattern."""

import torch
from fused_interpreter import expand
from torch import Tensor

import mixgrain as mg
from mixgrain.attention.cuda.plan import Plan, Work, build, unpack
from mixgrain.attention.cuda.planner import device_plan
from mixgrain.formats.costs import Costs

CUDA = torch.device("cuda")


def read(work: Work, group: int) -> Tensor:
    """The mask of every step of a warpgroup, written out, as its number means nothing."""
    whole = torch.full((2, 128), -1, dtype=torch.int32)
    whole[1, 0] = 0  # one that is skipped
    mask = work.steps[:, 1 + group].long()
    at = torch.where(mask < 0, len(work.masks) - 1 - mask, mask)
    return torch.cat([work.masks, whole])[at]


def same(pattern: mg.patterns.Pattern, nq: int, nk: int, costs: Costs, must: bool) -> None:
    groups = 2 + (nq + nk) % 2
    made = device_plan(pattern, nq, nk, 64, CUDA, costs, groups)
    assert made is not None or not must
    if made is None:
        return
    made = Plan([t.cpu() for t in made.tensors], made.ints)
    times, written = expand(unpack(*made))
    assert (written == 1).all()
    work, dense = unpack(*made), pattern.dense(nq, nk)
    which = torch.tensor(work.entry)
    assert torch.equal(times[which].view(-1, nq, nk), dense.long().view(-1, nq, nk))
    as_built(made, pattern, nq, nk, costs, groups)


def as_built(
    made: Plan, pattern: mg.patterns.Pattern, nq: int, nk: int, costs: Costs, groups: int
) -> None:
    """A plan, on the CPU, tensor by tensor against that of the layout."""
    other = build(pattern.to_layout("mixed", nq, nk, costs=costs), 64, groups=groups)
    assert made.ints == other.ints
    work, right = unpack(*made), unpack(*other)
    for name in Work._fields[:13]:
        if name not in ("steps", "masks"):
            a, b = getattr(work, name), getattr(right, name)
            assert a.dtype == b.dtype and torch.equal(a, b), name
    assert torch.equal(work.steps[:, 0], right.steps[:, 0])
    for group in range(3):
        assert torch.equal(read(work, group), read(right, group))
