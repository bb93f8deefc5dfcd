"""The fused attention forward on CUDA: gathering, the kernels of units and rows, the merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mixgrain.cuda.errors import CudaError
from mixgrain.cuda.prepared import Prepared
from mixgrain.cuda.recording import current
from mixgrain.formats.errors import BackendUnavailableError, UnsupportedError
from mixgrain.primitives.cuda import calls
from mixgrain.primitives.cuda.block_sm90 import laid_out
from mixgrain.primitives.cuda.parts import MOST_MATRICES, aligned

from ..cpu import empty_output
from . import choice, kernel, mma
from .cells import UNIT
from .gather import gather
from .keep import gathered_bits, unit_bits
from .merge import merge
from .plan import Work, unpack
from .row import rows
from .tables import Tables, tables


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    sink: Tensor | None,
    scale: float,
    plan: Sequence[Tensor],
    ints: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Attention over the kept positions; arguments and results as of ``attention.cpu.forward``.

    What a call launches is recorded once for its signature.
    """
    width = v.shape[3]
    if not (q.numel() and k.shape[2] and width):
        return _nothing(q, width, sink)
    arguments = _arguments(q, k, v, keep, sink, scale, plan, ints)
    try:
        call = calls.of("attention", _launches, arguments)
        given = calls.given(arguments)
        made, lse = call(given, [t.data_ptr() for t in given])
    except CudaError as error:
        raise BackendUnavailableError(f"attend: {error}") from error
    if made.shape[3] == width and q.is_contiguous():
        return made, lse
    out = empty_output(q, width)
    if out.is_contiguous() and made.shape[3] == width:
        return made, lse
    return out.copy_(made[..., :width]), lse


def direct(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    sink: Tensor | None,
    scale: float,
    plan: Sequence[Tensor],
    ints: Sequence[int],
) -> Prepared | None:
    """The prepared call of ``forward`` for such arguments, if its results are ``forward``'s."""
    if not (q.numel() and k.shape[2] and v.shape[3] and q.is_contiguous()):
        return None
    arguments = _arguments(q, k, v, keep, sink, scale, plan, ints)
    call = calls.of("attention", _launches, arguments)
    return call if call.shapes[0][3] == v.shape[3] else None


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    sink: Tensor | None,
    scale: float,
    plan: Sequence[Tensor],
    ints: Sequence[int],
) -> tuple[Any, ...]:
    return (q, k, v, keep, sink, float(scale), list(plan), tuple(ints), "fused")


def _nothing(q: Tensor, width: int, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Results where there are no queries, no keys or no values."""
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    if sink is not None:
        lse.copy_(sink[:, None])
    return empty_output(q, width).zero_(), lse


def _launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    sink: Tensor | None,
    scale: float,
    plan: list[Tensor],
    ints: tuple[int, ...],
    _kind: str,
) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, Nq, Dv or more), contiguous, and lse; while a call is recorded."""
    work = unpack(plan, ints)
    batch, heads, nq, _ = q.shape
    logits = None if sink is None else sink.to(torch.float32).contiguous()
    operands = _aligned(q, k, v, bool(work.items.shape[0]))
    out = q.new_empty(batch, heads, nq, operands[2].shape[3])
    lse = q.new_empty(batch, heads, nq, dtype=torch.float32)
    if work.lead[0] > 1 and batch * heads > MOST_MATRICES:
        raise UnsupportedError(
            f"attend: {batch} batch entries of {heads} heads with patterns of their own; give at "
            f"most {MOST_MATRICES} matrices at once"
        )
    step = max(1, MOST_MATRICES // heads)
    for first in range(0, batch, step):
        some = slice(first, first + step)
        kept = None if keep is None else keep[some]
        _run(out[some], lse[some], [t[some] for t in operands], kept, logits, scale, work)
    return out, lse


def _aligned(q: Tensor, k: Tensor, v: Tensor, units: bool) -> list[Tensor]:
    """Operands whose rows TMA and 16-byte loads can read; the unit kernel wants one width."""
    width = max(q.shape[3], v.shape[3])
    if units and q.shape[3] != v.shape[3]:
        width += -width % 8
        q, k, v = (torch.nn.functional.pad(t, (0, width - t.shape[3])) for t in (q, k, v))
    return [laid_out(aligned(t)) for t in (q, k, v)]


def _run(
    out: Tensor,
    lse: Tensor,
    operands: list[Tensor],
    keep: Tensor | None,
    sink: Tensor | None,
    scale: float,
    work: Work,
) -> None:
    """Attention of operands the kernels take as they are."""
    q, k, v = operands
    batch, heads, _, width = out.shape
    device = q.device.index
    head_bytes = k.shape[2] * (k.shape[3] + width) * k.element_size()
    shape = (batch, heads, k.shape[1])
    wgmma = choice.unit_kernel(device, q.dtype) == "sm90"
    walks = (kernel if wgmma else mma).walks(q.dtype, q.shape[3], device)
    apart = kernel.groups(q.shape[3]) if wgmma else 1
    found = tables(work, shape, head_bytes, walks, apart)
    partial = None
    if work.slots:
        size = (batch * heads, work.slots, UNIT)
        partial = (
            q.new_empty(*size, width, dtype=torch.float32),
            q.new_empty(*size, dtype=torch.float32),
        )
    jobs: list[Callable[[], None]] = []
    if work.items.shape[0]:
        values = _values(v, found, keep)
        packed = _packed(q, k, values, work, found)
        arguments = (
            out, lse, q, k, values, found.starts, found.tiles, work.items, work.steps,
            work.masks, scale, sink, packed, partial,
        )  # fmt: skip
        bits = None if keep is None else _kept(keep, work, found)
        launch = kernel.fused if wgmma else mma.fused
        jobs.append(lambda: launch(*arguments, bits))
    if work.row_items.shape[0]:
        jobs.append(
            lambda: rows(
                out, lse, partial, q, k, v, keep, scale, work, found.row_ranges, sink
            )
        )  # fmt: skip
    # One after the other: each of them fills the device, side by side they gain nothing.
    for job in jobs:
        job()
    if work.merge_rows.shape[0]:
        assert partial is not None
        merge(out, lse, partial, work, found.merge_ranges, sink)


def _values(v: Tensor, found: Tables, keep: Tensor | None) -> Tensor:
    """V, zero where units bring along keys that nobody keeps: zero times theirs may be NaN."""
    if found.dead is None and keep is None:
        return v
    return _step(_blanked, v, found.dead, keep)


def _blanked(v: Tensor, dead: Tensor | None, keep: Tensor | None) -> Tensor:
    for mask in (dead, None if keep is None else ~keep[:, None]):
        if mask is not None:
            v = torch.where(mask[..., None].to(v.device), 0, v)  # one pass; masked_fill makes two
    return v


def _kept(keep: Tensor, work: Work, found: Tables) -> tuple[Tensor, Tensor | None]:
    """Bits of the keys that a mask keeps, and of gathered ones where there are any."""
    gathered = None
    if work.key_rows.shape[1]:
        gathered = _step(gathered_bits, keep, work.key_rows, found.key_patterns)
    return _step(unit_bits, keep), gathered


def _step(function: Callable[..., Tensor], *arguments: Tensor | None) -> Tensor:
    """What torch does of a call, which may be being recorded."""
    recording = current()
    made: Any = recording.work(function, arguments, {}) if recording else function(*arguments)
    result: Tensor = made
    return result


def _packed(
    q: Tensor, k: Tensor, v: Tensor, work: Work, found: Tables
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gathered rows of q, k and v; the tensors themselves where a plan gathers none."""
    if not (work.key_rows.shape[1] or work.query_rows.shape[1]):
        return None
    keys = (work.key_rows, found.key_patterns)
    wanted = [(k, *keys), (v, *keys)] if work.key_rows.shape[1] else []
    if work.query_rows.shape[1]:
        wanted.append((q, work.query_rows, found.query_patterns))
    made = gather(*wanted)
    pk, pv = made[:2] if work.key_rows.shape[1] else (k, v)
    pq = made[-1] if work.query_rows.shape[1] else q
    return pq, pk, pv
