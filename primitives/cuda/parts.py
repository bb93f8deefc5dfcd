"""What the CUDA functions of the operators share: dtypes, aligned operands, arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.launch import Argument
from mixgrain.cuda.recording import current
from mixgrain.formats.errors import UnsupportedError

from ..plans.plan import PartPlan

#: Codes of types.cuh.
CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
#: Those of them that tensor cores take as they are.
HALVES = (torch.float16, torch.bfloat16)
THREADS = 128
# Grids count matrices in y or z.
MOST_MATRICES = 65_535
# Fewer fine positions than this gain less than a fork and join cost.
FORK_POSITIONS = 1 << 20


def activation_constant(code: int) -> dict[str, int]:
    """MG_ACTIVATION, which requests without one do not name: they are as old as their kernels."""
    return {"ACTIVATION": code} if code else {}


def check_dtypes(op: str, *dtypes: torch.dtype) -> None:
    """Raise UnsupportedError for float64, which has no kernels here."""
    for dtype in dtypes:
        if dtype not in CODES:
            raise UnsupportedError(
                f"{op}: no CUDA kernels for {str(dtype).removeprefix('torch.')}; use float32 with "
                ".float(), or compute in float64 on the CPU with .cpu()"
            )


def aligned(t: Tensor) -> Tensor:
    """A dense operand (F, E, N, D) that 16-byte copies can read.

    Itself where its last dimension has stride 1 and every row starts at a multiple of 16 bytes;
    else a copy, columns padded with zeros to a multiple of 8.
    """
    if t.shape[-1] % 8:
        return torch.nn.functional.pad(t, (0, -t.shape[-1] % 8)).contiguous()
    unit = 16 // t.element_size()
    strides = t.stride()
    even = strides[3] == 1 and not (strides[0] % unit or strides[1] % unit or strides[2] % unit)
    if not even:
        t = t.contiguous()
    return t.clone(memory_format=torch.contiguous_format) if t.data_ptr() % 16 else t


def ready(x: Tensor, inner: int, outer: int) -> bool:
    """Whether 16-byte copies can read (F, E, N, D) along dimension ``inner``."""
    unit = 16 // x.element_size()
    # A tensor map has no stride 0: nothing may be broadcast.
    steps = [x.stride(d) for d in (0, 1, outer) if x.shape[d] > 1]
    whole = x.stride(inner) == 1 or x.shape[inner] == 1
    return whole and not x.data_ptr() % 16 and not any(s % unit or not s for s in steps)


def in_tokens(x: Tensor) -> bool:
    """Whether inner positions of x (F, E, inner, D) are neighbours: rows of tokens, transposed.

    Results are then laid out alike.
    """
    return x.stride(2) == 1 and (x.shape[3] == 1 or x.shape[2] == 1 or x.stride(3) != 1)


def of_layer(keep: Tensor | None, dtypes: Sequence[torch.dtype], *given: Tensor) -> bool:
    """Whether a product is one of a layer, as the kernels that read rows of tokens take it.

    Args:
        keep: run-time mask or None, as has to be.
        dtypes: of values and results, which have to be the operands' own, of 16 bits.
        given: operands (F, E, n, T): one entry, and rows of tokens that 16-byte copies can read.
    """
    dtype = given[0].dtype
    if keep is not None or dtype not in HALVES or any(d != dtype for d in dtypes):
        return False
    return all(
        t.dtype == dtype and t.shape[1] == 1 and in_tokens(t) and ready(t, 2, 3) for t in given
    )


def in_fours(out: Tensor) -> bool:
    """Whether four rows of (F, E, rows, D) lie side by side, at multiples of their size."""
    return out.stride(2) == 1 and all(out.stride(d) % 4 == 0 for d in (0, 3) if out.shape[d] > 1)


def aligned_values(values: Tensor) -> Tensor:
    """Values (F, slots), contiguous and 16-byte aligned."""
    values = values.contiguous()
    return values.clone() if values.data_ptr() % 16 else values


def dense(t: Tensor) -> tuple[Argument, ...]:
    """Pointer and strides of free index, entry and row."""
    return (t.data_ptr(), *map(np.int64, t.stride()[:3]))


def mask(keep: Tensor | None) -> tuple[Argument, ...]:
    """Pointer and strides of a run-time mask (F, E, n)."""
    if keep is None:
        return 0, np.int64(0), np.int64(0), np.int64(0)
    return (keep.data_ptr(), *map(np.int64, keep.stride()))


def mask_side(keep: Tensor | None, first: bool) -> int:
    """MG_KEEP: 0 without a mask, 1 if it is over the first side a kernel names, 2 if the other."""
    return 0 if keep is None else 1 if first else 2


def tf32(dtype: torch.dtype) -> bool:
    """Whether float32 products may round operands to TF32: where torch allows it."""
    # Unlike allow_tf32, this can be read whichever of torch's two switches was used.
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def is_fine(part: PartPlan) -> bool:
    """Whether a part runs on CUDA cores: single entries."""
    return part.kind == "crow"


def at_once(parts: list[PartPlan], work: Callable[[PartPlan], None], free: int) -> None:
    """Launch work for every part, fine parts beside the coarse ones where there is much of them.

    A device hands out the CTAs of one kernel before those of the next. So the fine kernels go
    first, and walk with few CTAs: the coarse ones fill what is left of every multiprocessor, and
    one waits for gathers while the other computes or writes.

    Args:
        parts: of the layout.
        work: launches the kernels of one part; reads nothing that another part's kernels write.
        free: matrices.
    """
    recording = current()
    if recording is None or not (recording.open or _pays(parts, free)):
        for part in parts:
            work(part)
        return
    with recording.fork():
        with recording.side():
            for part in parts:
                if is_fine(part):
                    work(part)
        for part in parts:
            if not is_fine(part):
                work(part)


def _pays(parts: list[PartPlan], free: int) -> bool:
    """Whether a layout has coarse parts, and enough in fine ones to run them beside."""
    fine = [part for part in parts if is_fine(part)]
    positions = free * sum(part.starts[-1] - part.starts[0] for part in fine)
    return 0 < len(fine) < len(parts) and positions >= FORK_POSITIONS


@contextlib.contextmanager
def lanes(parts: list[PartPlan], free: int) -> Iterator[None]:
    """Inside, fine parts go on beside coarse ones from one operator to the next, where that pays.

    Args:
        parts: of the layout.
        free: matrices.
    """
    recording = current()
    if recording is None or not _pays(parts, free):
        yield
        return
    with recording.lanes():
        yield


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What is launched inside reads what both lanes wrote, and both go on after it."""
    recording = current()
    with contextlib.nullcontext() if recording is None else recording.together():
        yield


def gaps(parts: list[PartPlan], slots: int, cleared: bool = True) -> list[tuple[int, int]]:
    """Slots between the parts that no kernel clears: panel kernels clear theirs, row kernels too.

    Args:
        parts: of a plan.
        slots: in all.
        cleared: kernels of rows clear what is behind theirs.

    Returns:
        (start, stop) of each gap.
    """
    found, at = [], 0
    for part in parts:
        if at < part.starts[0]:
            found.append((at, part.starts[0]))
        at = part.starts[-1] + (part.scalars[-1] if cleared and is_fine(part) else 0)
    if at < slots:
        found.append((at, slots))
    return found


def runs(keep: Tensor | None, *tensors: Tensor, entries: int = 1) -> Iterator[tuple[Any, ...]]:
    """The mask and the tensors, (F, …) each, in runs that fit a grid; mostly one.

    A grid counts ``entries`` matrices for each free index.
    """
    free = tensors[0].shape[0]
    most = max(1, MOST_MATRICES // entries)
    if free <= most:
        yield (keep, *tensors)
        return
    for start in range(0, free, most):
        some = slice(start, start + most)
        yield (None if keep is None else keep[some], *(t[some] for t in tensors))


def sddmm_shared(rows: int, dim: int, operand: torch.dtype, out: torch.dtype) -> int:
    """Bytes of shared memory that sddmm.cuh lays out; it asserts that the sums agree.

    Args:
        rows: rows of a CTA's tile: 16, 32 or 64.
        dim: D rounded up to 16 when the kernel holds it, else 0.
        operand: dtype of q and k.
        out: dtype of the values.
    """
    size = operand.itemsize
    depth, pad = (32, 4) if size == 4 else (64, 8)
    pitch = (dim or depth) + pad
    stages = 2 if dim > 64 else 3
    stage = (64 if dim else 64 + rows) * pitch * size
    down = 2 if rows == 64 else 1
    staged = 4 * (rows // down) * (64 // (4 // down) * out.itemsize + 16)
    held = rows * pitch * size if dim else 0
    return (rows + 256) * 4 + stages * stage + max(staged, held)


def spmm_shared(rows: int, wide: int, operand: torch.dtype, transposed: bool) -> int:
    """Bytes of shared memory that spmm.cuh lays out; it asserts that the sums agree.

    Args:
        rows: rows of a CTA's tile: 16, 32 or 64.
        wide: columns of it: 64 or 128.
        operand: dtype of x.
        transposed: whether the product is with the transpose.
    """
    size = operand.itemsize
    depth, pad = (32, 4) if size == 4 else (64, 8)
    left = depth * (rows + pad) if transposed else rows * (depth + pad)
    words = depth + depth // 32
    notes = 4 * ((words + words % 2) * 4 + depth // 16 * 8)
    return -(-notes // 16) * 16 + 3 * (left + depth * (wide + pad)) * size


def held_dim(width: int, dtype: torch.dtype) -> int:
    """MG_DIM: D rounded up to 16 where Q stays in registers, else 0."""
    return -(-width // 16) * 16 if dtype != torch.float32 and width <= 128 else 0


def wide_of(width: int, dtype: torch.dtype) -> int:
    """MG_WIDE: columns of the result per CTA."""
    return 128 if width > 64 and dtype != torch.float32 else 64
