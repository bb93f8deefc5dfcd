"""The portable kernels of blocks and panels: sddmm_….cu and spmm_….cu, which share their tiles."""

from __future__ import annotations

import functools

import torch

from mixgrain.cuda.compile import request
from mixgrain.cuda.launch import Kernel, kernel

from .parts import CODES, held_dim, sddmm_shared, spmm_shared


@functools.lru_cache(maxsize=2048)
def sddmm_kernel(
    device: int,
    part: str,
    rows: int,
    width: int,
    operand: torch.dtype,
    out: torch.dtype,
    side: int,
    rounded: bool,
    size: int | None = None,
) -> tuple[Kernel, int]:
    """The kernel and its shared memory.

    Args:
        device: torch's index.
        part: "block" or "panel".
        rows: of a CTA's tile.
        width: D.
        operand: dtype of q and k.
        out: dtype of the values.
        side: see ``parts.mask_side``.
        rounded: operands to TF32.
        size: of a block.
    """
    dim = held_dim(width, operand)
    shared = sddmm_shared(rows, dim, operand, out)
    constants = {
        "DTYPE": CODES[operand],
        "OUT": CODES[out],
        "DIM": dim,
        "KEEP": side,
        "TF32": int(rounded),
        "SHARED": shared,
    }
    return _kernel(device, f"sddmm_{part}", constants, size, operand), shared


@functools.lru_cache(maxsize=2048)
def spmm_kernel(
    device: int,
    part: str,
    rows: int,
    wide: int,
    operand: torch.dtype,
    value: torch.dtype,
    out: torch.dtype,
    transposed: bool,
    side: int,
    rounded: bool,
    size: int | None = None,
    add: bool | None = None,
) -> tuple[Kernel, int]:
    """The kernel and its shared memory.

    Args:
        device: torch's index.
        part: "block" or "panel".
        rows: of a CTA's tile.
        wide: columns of it.
        operand: dtype of x.
        value: dtype of the values.
        out: dtype of what is written.
        transposed: multiply by the transpose.
        side: see ``parts.mask_side``.
        rounded: operands to TF32.
        size: of a block.
        add: add to what is there, where the kernel can.
    """
    shared = spmm_shared(rows, wide, operand, transposed)
    constants = {
        "DTYPE": CODES[operand],
        "VALUES": CODES[value],
        "OUT": CODES[out],
        "WIDE": wide,
        "TRANSPOSED": int(transposed),
        "KEEP": side,
        "TF32": int(rounded),
        "SHARED": shared,
    }
    if add is not None:
        constants["ADD"] = int(add)
    return _kernel(device, f"spmm_{part}", constants, size, operand), shared


def _kernel(
    device: int, name: str, constants: dict[str, int], size: int | None, operand: torch.dtype
) -> Kernel:
    if size is not None:
        constants["SIZE"] = size
    return kernel(request(name, constants, flush=operand != torch.float32), device)
