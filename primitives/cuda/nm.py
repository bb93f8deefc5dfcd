"""NMLayout on CUDA: which kernel takes a product of a batch of N:M matrices, and its launch.

Every function sees one part, kind "nm" or (the flagged transpose) "nm_t", as ``plans.nm`` has it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import Kernel, kernel
from mixgrain.formats.errors import UnsupportedError
from mixgrain.formats.nm_metadata import metadata_shape, padded

from ..plans.nm import ENCODINGS
from ..plans.plan import PartPlan
from . import nm_sm90
from .parts import CODES, THREADS, aligned, aligned_values, mask, runs, tf32

#: Kinds of parts that are N:M.
KINDS = ("nm", "nm_t")


class Stored(NamedTuple):
    """An N:M matrix as it lies, whichever way it is used.

    Attributes:
        metadata: of all entries.
        encoding: index into ENCODINGS.
        n: kept per group.
        m: columns per group.
        entries: number of matrices that metadata tells apart.
        rows: of the matrix.
        columns: of the matrix.
        lines: rows as stored.
        packed: values of a stored row.
    """

    metadata: Tensor
    encoding: int
    n: int
    m: int
    entries: int
    rows: int
    columns: int
    lines: int
    packed: int

    @property
    def words(self) -> int:
        """Bytes of metadata of one matrix."""
        shape, dtype = metadata_shape(
            (1, self.lines, self.packed // self.n, self.n), ENCODINGS[self.encoding], self.m
        )
        return int(np.prod(shape)) * dtype.itemsize


def stored(part: PartPlan, shape: tuple[int, int], entries: int) -> Stored:
    """What a part holds.

    Raises:
        UnsupportedError: it lies within a static pattern.
    """
    n, m, encoding, inside = part.scalars[:4]
    if inside:
        raise UnsupportedError(
            "no CUDA kernels for an NMLayout within a BlockLayout in this version; it runs on cpu: "
            "move tensors and layout with .cpu() and .to('cpu')"
        )
    rows, columns = shape[::-1] if part.kind == "nm_t" else shape
    lines, groups = padded(rows, columns, m, ENCODINGS[encoding])
    return Stored(part.tensors[0], encoding, n, m, entries, rows, columns, lines, groups * n)


def _ready(x: Tensor, inner: int, outer: int) -> bool:
    """Whether 16-byte copies can read (F, E, N, D) along dimension ``inner``."""
    unit = 16 // x.element_size()
    # A tensor map has no stride 0: nothing may be broadcast.
    steps = [x.stride(d) for d in (0, 1, outer) if x.shape[d] > 1]
    whole = x.stride(inner) == 1 or x.shape[inner] == 1
    return whole and not x.data_ptr() % 16 and not any(s % unit or not s for s in steps)


def _oriented(x: Tensor, even: bool) -> tuple[Tensor, bool]:
    """A right operand (F, E, inner, N) as kernels read it, and whether N lies contiguous.

    Args:
        x: any strides.
        even: N has to be a multiple of 8.

    Returns:
        Itself or a copy; else the rows of the contiguous dimension are at multiples of 16 bytes.
    """
    if not (even and x.shape[3] % 8):
        if _ready(x, 2, 3):
            return x, False
        if x.shape[3] % 8 == 0 and _ready(x, 3, 2):
            return x, True
    if not even and x.stride(2) == 1:
        # Tokens by features of a linear, in rows of odd length: stay so.
        turned = torch.nn.functional.pad(x.transpose(2, 3), (0, -x.shape[2] % 8)).contiguous()
        return turned.transpose(2, 3)[:, :, : x.shape[2]], False
    return aligned(x.contiguous()), True


def product(
    values: Tensor,
    x: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    part: PartPlan,
    shape: tuple[int, int],
    scale: float,
    dtype: torch.dtype,
    transposed: bool,
    turned: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """Scale · S x, or Sᵀ x when transposed.

    Args:
        values: (F, slots).
        x: (F, E, inner, N), any strides.
        keep: bool (F, E, n) or None.
        keep_rows: the mask is over rows of S.
        part: kind "nm" or "nm_t".
        shape: of S.
        scale: multiplies the product.
        dtype: of the result.
        transposed: multiply by the transpose.
        turned: return the product's transpose; dtype is x's and there is no mask.
        bias: (F, outer), added to each column before rounding; turned only, F = 1.

    Returns:
        (F, E, outer, N), contiguous, or (F, E, N, outer).
    """
    s = stored(part, shape, x.shape[1])
    flipped = part.kind == "nm_t"
    transposed = transposed != flipped
    outer = s.columns if transposed else s.rows
    width = x.shape[3]
    x, major = _oriented(x, not turned)
    values = aligned_values(values)
    free, entries, _, wide = x.shape
    if turned:
        out = x.new_empty(free, entries, wide, outer + -outer % 8, dtype=dtype)
    else:
        out = x.new_empty(free, entries, outer, wide, dtype=dtype)
    if turned and bias is not None:
        bias = bias.contiguous()
    if _sparse_wgmma(s, values, x, keep, dtype, major, transposed):
        nm_sm90.spmm(out, values, s, x, major, scale, turned, bias)
        return out[..., : outer if turned else width].contiguous()
    if turned:
        out = x.new_empty(free, entries, wide, outer, dtype=dtype)
    side = 0 if keep is None else 1 if keep_rows == flipped else 2
    run, shared = _any_kernel(
        x.device.index, s.encoding, s.n, s.m, x.dtype, values.dtype, dtype,
        transposed, major, turned, wide_of(wide, x.dtype), side, tf32(x.dtype),
    )  # fmt: skip
    for kept, to, weights, right in runs(keep, out, values, x, entries=entries):
        run(
            (
                -(-outer // 64),
                -(-wide // wide_of(wide, x.dtype)),
                to.shape[0] * entries,
            ),
            THREADS,
            (
                to.data_ptr(),
                weights.data_ptr(),
                s.metadata.data_ptr(),
                right.data_ptr(),
                *map(np.int64, (right.stride(0), right.stride(1), right.stride(2 if major else 3))),
                *mask(kept),
                0 if bias is None else bias.data_ptr(),
                np.int64(s.words),
                *map(np.int32, (entries, s.rows, s.columns, s.lines, s.packed, wide)),
                np.float32(scale),
            ),
            shared,
        )
    return out if turned else out[..., :width].contiguous()


def linear(
    values: Tensor,
    x: Tensor,
    bias: Tensor | None,
    part: PartPlan,
    shape: tuple[int, int],
    transposed: bool,
) -> Tensor:
    """Product x Sᵀ + bias, or x S + bias when transposed; see `product`.

    Args:
        values: (F, slots).
        x: (F, T, inner), any strides.
        bias: (outer,) or None.
        part: kind "nm" or "nm_t".
        shape: of S.
        transposed: multiply by S itself.

    Returns:
        (F, T, outer) of x's dtype.
    """
    free, tokens, inner = x.shape
    step = x.stride()
    right = x.as_strided((free, 1, inner, tokens), (step[0], step[0], step[2], step[1]))
    out = product(
        values, right, None, False, part, shape, 1.0, x.dtype, transposed, True, bias
    )  # fmt: skip
    return out.view(free, tokens, out.shape[3])


def _sparse_wgmma(
    s: Stored,
    values: Tensor,
    x: Tensor,
    keep: Tensor | None,
    dtype: torch.dtype,
    major: bool,
    transposed: bool,
) -> bool:
    """Whether the sparse tensor cores of sm_90a take this product."""
    if transposed or keep is not None or values.dtype != x.dtype or not _hopper(x.device.index):
        return False
    if x.dtype == torch.float32:
        return s.encoding == 2 and not major and tf32(x.dtype) and dtype == torch.float32
    return s.encoding in (0, 1) and dtype in (x.dtype, torch.float32)


def _hopper(device: int) -> bool:
    """Whether this is one of sm_90a; tests put the portable kernels in its place."""
    return facts(device).hopper


def wide_of(width: int, dtype: torch.dtype) -> int:
    """MG_WIDE: columns of the result per CTA."""
    return 128 if width > 64 and dtype != torch.float32 else 64


def any_request(
    encoding: int,
    n: int,
    m: int,
    operand: torch.dtype,
    value: torch.dtype,
    out: torch.dtype,
    transposed: bool,
    major: bool,
    turned: bool,
    wide: int,
    side: int,
    rounded: bool,
) -> Request:
    """The kernel that takes every N:M product."""
    constants = {
        "ENCODING": encoding,
        "N": n,
        "M": m,
        "DTYPE": CODES[operand],
        "VALUES": CODES[value],
        "OUT": CODES[out],
        "TRANSPOSED": int(transposed),
        "MAJOR": int(major),
        "TURNED": int(turned),
        "WIDE": wide,
        "KEEP": side,
        "TF32": int(rounded),
    }
    return request("spmm_nm_any", constants, flush=operand != torch.float32)


@functools.lru_cache(maxsize=1024)
def _any_kernel(device: int, *rest: Any) -> tuple[Kernel, int]:
    """The kernel and its shared memory."""
    operand, (transposed, major, _, wide) = rest[3], rest[6:10]
    size = operand.itemsize
    depth, pad = (32, 4) if size == 4 else (64, 8)
    left = depth * (64 + pad) if transposed else 64 * (depth + pad)
    right = depth * (wide + pad) if major else wide * (depth + pad)
    return kernel(any_request(*rest), device), 3 * (left + right) * size


def sddmm(
    q: Tensor,
    k: Tensor,
    keep: Tensor | None,
    keep_rows: bool,
    part: PartPlan,
    shape: tuple[int, int],
    slots: int,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Scale · q kᵀ at every slot; zero at dead ones.

    Args:
        q: (F, E, nq, D), any strides.
        k: (F, E, nk, D), any strides, q's dtype.
        keep: bool (F, E, n) or None.
        keep_rows: the mask is over rows of S.
        part: kind "nm" or "nm_t".
        shape: of S.
        slots: of all entries.
        scale: multiplies the scores.
        dtype: of the result.

    Returns:
        (F, slots).
    """
    s = stored(part, shape, q.shape[1])
    flipped = part.kind == "nm_t"
    if flipped:
        q, k = k, q
    major = _ready(q, 2, 3) and _ready(k, 2, 3)
    if not major:
        q, k = (t if t.shape[3] % 8 == 0 and _ready(t, 3, 2) else aligned(t) for t in (q, k))
    free, entries, _, depth = q.shape
    values = q.new_empty(free, slots, dtype=dtype)
    side = 0 if keep is None else 1 if keep_rows == flipped else 2
    run, shared = _sddmm_kernel(
        q.device.index, s.encoding, s.n, s.m, q.dtype, dtype, major, side, tf32(q.dtype)
    )
    line = 3 if major else 2
    for kept, to, left, right in runs(keep, values, q, k, entries=entries):
        run(
            (-(-s.lines // 64), -(-(s.packed // s.n * s.m) // 64), to.shape[0] * entries),
            THREADS,
            (
                to.data_ptr(),
                s.metadata.data_ptr(),
                left.data_ptr(),
                *map(np.int64, (left.stride(0), left.stride(1), left.stride(line))),
                right.data_ptr(),
                *map(np.int64, (right.stride(0), right.stride(1), right.stride(line))),
                *mask(kept),
                np.int64(s.words),
                *map(np.int32, (entries, s.rows, s.columns, s.lines, s.packed, depth)),
                np.float32(scale),
            ),
            shared,
        )
    return values


def sddmm_request(
    encoding: int,
    n: int,
    m: int,
    operand: torch.dtype,
    value: torch.dtype,
    major: bool,
    side: int,
    rounded: bool,
) -> Request:
    """The kernel of the sampled product."""
    constants = {
        "ENCODING": encoding,
        "N": n,
        "M": m,
        "DTYPE": CODES[operand],
        "VALUES": CODES[value],
        "MAJOR": int(major),
        "KEEP": side,
        "TF32": int(rounded),
    }
    return request("sddmm_nm", constants, flush=operand != torch.float32)


@functools.lru_cache(maxsize=1024)
def _sddmm_kernel(device: int, *rest: Any) -> tuple[Kernel, int]:
    """The kernel and its shared memory."""
    operand, major = rest[3], rest[5]
    size = operand.itemsize
    depth, pad = (32, 4) if size == 4 else (64, 8)
    side = depth * (64 + pad) if major else 64 * (depth + pad)
    return kernel(sddmm_request(*rest), device), max(6 * side * size, 64 * 65 * 4)
