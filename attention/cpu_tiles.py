"""Pieces of the fused CPU kernel: gather, scatter, mask, choose and multiply a step's tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .plan_steps import ALIGN, SPARE, Step, unpack_steps

# Elements of the largest temporary of the element-exact product.
_SLAB = 1 << 21


@dataclass(frozen=True)
class Work:
    """A plan as the kernels use it, see ``plan.Plan``.

    Attributes:
        steps: the steps of each distinct pattern.
        ids: int32.
        bits: uint8.
        masks: uint8 (M + 1, size, size // 8).
        shape: (nq, nk).
        lead: (b, h).
        nm: (n, m), (0, 0) for none.
        entry: distinct pattern of each of the b * h entries.
        lut: (256, 8), 0 for every bit that is set and −inf for every other.
    """

    steps: dict[int, list[Step]]
    ids: Tensor
    bits: Tensor
    masks: Tensor
    shape: tuple[int, int]
    lead: tuple[int, int]
    nm: tuple[int, int]
    entry: tuple[int, ...]
    lut: Tensor

    @classmethod
    def of(cls, tensors: Sequence[Tensor], ints: Sequence[int]) -> Work:
        """Decode what crossed the operator boundary."""
        steps: dict[int, list[Step]] = {}
        for step in unpack_steps(tensors[0]):
            steps.setdefault(step.pattern, []).append(step)
        byte = torch.arange(256)[:, None] >> torch.arange(8)
        lut = torch.where(byte % 2 == 1, 0.0, -math.inf)
        nq, nk, b, h, n, m = ints[:6]
        _, ids, bits, masks = tensors
        entry = tuple(ints[6:])
        return cls(steps, ids, bits, masks, (nq, nk), (b, h), (n, m), entry, lut)

    def steps_of(self, batch: int, head: int) -> list[Step]:
        """The steps of one (batch, head)."""
        b, h = self.lead
        u = self.entry[(batch if b > 1 else 0) * h + (head if h > 1 else 0)]
        return self.steps.get(u, [])


def padded_length(n: int) -> int:
    """Rows that n queries or keys are stored in."""
    return -(-(n + SPARE) // ALIGN) * ALIGN


def padded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, width) as ``dtype``, contiguous, zero rows behind the last one."""
    out = x.new_zeros(padded_length(x.shape[0]), x.shape[1], dtype=dtype)
    out[: x.shape[0]] = x
    return out


def pick_rows(x: Tensor, step: Step, ids: Tensor) -> Tensor:
    """The rows of ``x`` (n, width) that a step's tiles own: (tiles, rows, width)."""
    return _pick(x, ids, step.tiles, step.rows, step.row_unit, step.row_at, step.row_range)


def pick_cols(x: Tensor, step: Step, work: Work) -> Tensor:
    """The columns' rows of ``x`` (n, width): (tiles, cols, width).

    Under N:M all first members of the groups come first, then all second ones, and so on: members
    are compared with each other, so each stands in a row of its own.
    """
    x = _pick(x, work.ids, step.tiles, step.cols, step.col_unit, step.col_at, step.col_range)
    return regroup(x.transpose(1, 2), work.nm[1]).transpose(1, 2) if work.nm[1] else x


def regroup(x: Tensor, m: int) -> Tensor:
    """(…, groups * m) group by group to (…, m * groups) member by member."""
    groups: Tensor = x.unflatten(-1, (-1, m))
    return groups.transpose(-1, -2).flatten(-2)


def _pick(
    x: Tensor, ids: Tensor, tiles: int, count: int, unit: int, at: int, ranged: int
) -> Tensor:
    width = x.shape[-1]
    if ranged:
        return x[at : at + tiles * count].view(tiles, count, width)
    listed = ids[at : at + tiles * count // unit]
    return (
        x.view(x.shape[0] // unit, unit * width).index_select(0, listed).view(tiles, count, width)
    )


def put_rows(x: Tensor, step: Step, ids: Tensor, new: Tensor) -> None:
    """Store (tiles, rows, width) where ``pick_rows`` took it from."""
    if step.row_range:
        rows = step.tiles * step.rows
        x[step.row_at : step.row_at + rows] = new.view(rows, x.shape[-1])
        return
    wide = step.row_unit * x.shape[-1]
    listed = ids[step.row_at : step.row_at + step.tiles * step.rows // step.row_unit]
    # Not −1 rows: there may be no columns.
    x.view(x.shape[0] // step.row_unit, wide).index_copy_(
        0, listed.long(), new.view(listed.numel(), wide)
    )


def add_cols(x: Tensor, step: Step, work: Work, new: Tensor) -> None:
    """Add (tiles, cols, width) to the rows of ``x`` it belongs to, in a fixed order.

    ``index_add_`` on the CPU adds row after row, so sums repeat bitwise.
    """
    m = work.nm[1]
    if m:
        new = new.unflatten(1, (m, -1)).transpose(1, 2).flatten(1, 2)
    if step.col_range:
        x[step.col_at : step.col_at + step.cols] += new[0]
        return
    wide = step.col_unit * x.shape[-1]
    listed = work.ids[step.col_at : step.col_at + step.tiles * step.cols // step.col_unit]
    rows = x.shape[0] // step.col_unit
    x.view(rows, wide).index_add_(0, listed, new.view(listed.numel(), wide))


def scores(
    q: Tensor, k: Tensor, step: Step, work: Work, key_bias: Tensor | None, exact: bool
) -> Tensor:
    """Scaled, masked scores of a step: (tiles, rows, cols), −inf where nothing is kept.

    Args:
        q: (tiles, rows, D), scaled.
        k: (tiles, cols, D).
        step: the step.
        work: the plan.
        key_bias: None, or (padded nk, 1), −inf for dropped keys and pads, 0 elsewhere.
        exact: scores may be infinite or NaN: overwrite what is masked instead of adding −inf.
    """
    s = torch.bmm(q, k.transpose(1, 2))
    bias = mask_bias(step, work)
    if bias is not None and work.nm[1]:
        bias = regroup(bias, work.nm[1])
    if key_bias is not None:
        picked = pick_cols(key_bias, step, work).transpose(1, 2)
        bias = picked if bias is None else bias + picked
    if bias is not None:
        if exact:
            s = torch.where(bias < 0, -math.inf, s)
        else:
            s += bias
    if work.nm[1]:
        choose(s, *work.nm, exact)
    return s


def mask_bias(step: Step, work: Work) -> Tensor | None:
    """0 where kept and −inf elsewhere, (1 or tiles, rows, cols); None when all are kept."""
    tiles, rows, cols = step.mask_tiles, step.rows, step.cols
    if step.mask == 0:
        return None
    if step.mask == 1:
        size = work.masks.shape[1]
        count = cols // size
        which = work.ids[step.mask_at : step.mask_at + tiles * count]
        packed = work.masks.view(work.masks.shape[0], -1).index_select(0, which)
        packed = packed.view(tiles, count, size, -1).transpose(1, 2)
    else:
        row_bytes = -(-cols // 8)
        packed = work.bits[step.mask_at : step.mask_at + tiles * rows * row_bytes]
    bias = work.lut.index_select(0, packed.reshape(-1).int()).view(tiles, rows, -1)
    return bias[..., :cols]


def choose(s: Tensor, n: int, m: int, exact: bool) -> None:
    """Put all but the n largest of every m members out of the running, in place.

    Ties go to the lower index; a NaN counts as infinite.

    Args:
        s: (tiles, rows, m * groups), member by member.
        n: members to keep.
        m: members of a group.
        exact: scores may be infinite or NaN; without, the lowest finite number does for −inf,
            because a member is dropped for a larger one only, and costs a third of a select.
    """
    member = s.unflatten(-1, (m, -1))
    score = torch.where(member.isnan(), torch.inf, member) if exact else member
    rank = torch.empty(member.shape, dtype=torch.uint8)
    for i in range(m):
        rank[:, :, i] = m - 1 - i
    for i in range(m):
        for j in range(i + 1, m):
            first = (score[:, :, i] >= score[:, :, j]).view(torch.uint8)
            rank[:, :, j] += first
            rank[:, :, i] -= first
    drop = rank >= n
    if exact:
        member.masked_fill_(drop, -torch.inf)
    else:
        member.add_(drop.to(s.dtype), alpha=torch.finfo(s.dtype).min / 2)


def weights(s: Tensor, shift: Tensor) -> Tensor:
    """exp(s − shift), in place; exactly 0 where s is −inf, and below 5e-38 (1e-304 in float64).

    The exponential of torch's vector library takes fifty times longer where the result underflows,
    −inf included, so arguments stop short of that and what they give is cut off.
    """
    lowest, cut = (-700.0, 1e-304) if s.dtype == torch.float64 else (-86.0, 5e-38)
    s.sub_(shift).clamp_(min=lowest).exp_()
    return torch.nn.functional.threshold(s, cut, 0.0, inplace=True)


def product(a: Tensor, live: Tensor | None, b: Tensor) -> Tensor:
    """Batched a @ b of (tiles, rows, inner) and (tiles, inner, width).

    Args:
        a: exactly 0 at dead positions.
        live: None, or which elements of ``a`` count, when ``b`` may hold infinities or NaN; then
            every product is formed on its own, so that a dead position cannot turn them into NaN.
        b: the right factor.
    """
    if live is None:
        return torch.bmm(a, b)
    tiles, rows, inner = a.shape
    out = a.new_zeros(tiles, rows, b.shape[-1])
    step = max(1, _SLAB // max(rows * b.shape[-1], 1))
    for t in range(tiles):
        for c in range(0, inner, step):
            here = slice(c, c + step)
            terms = a[t, :, here, None] * b[t, None, here]
            out[t] += torch.where(live[t, :, here, None], terms, 0.0).sum(1)
    return out


def overflows(*factors: Tensor) -> bool:
    """Whether sums of products of these could be infinite or NaN, or an element already is.

    Args:
        factors: one or two (n, width) tensors of the same width.
    """
    bound = float(factors[0].shape[-1])
    for t in factors:
        bound *= float(t.abs().amax()) if t.numel() else 0.0
    # Written so that NaN says yes.
    return not bound < torch.finfo(factors[0].dtype).max / 16
