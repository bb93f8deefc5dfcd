"""Products x S of rows of tokens with a 2:4 or 1:2 S of halves on sm_90a: spmm_nm_expand_sm90."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from mixgrain.cuda.compile import Request, request
from mixgrain.cuda.device import facts
from mixgrain.cuda.launch import kernel

from .block_sm90 import CODES, operand_map
from .nm_dense import TOKENS
from .nm_stored import Stored
from .parts import of_layer

# Columns of S of a CTA.
ACROSS = 128
# Stages of 64 rows; cycles of one, by tokens of a CTA; of a CTA beside them; and of a microsecond
# under this load.
STAGES = {256: 4, 128: 6, 64: 8}
STEP = {256: 1150, 128: 640, 64: 460}
START, CLOCK = 8000, 1370
# The same product with S expanded in memory, microseconds: a call, an element of S, more of it
# where S is larger than L2 and comes back from memory, an element and token. All of an H200.
CALL, EACH, NEAR, FAR, RATE = 4.0, 5.5e-7, 20e6, 3.5e-7, 2.7e-9


def takes(s: Stored, values: Tensor, x: Tensor) -> bool:
    """Whether ``product`` is for x (1, 1, rows, T), rows of tokens transposed.

    Always where S is not expanded in memory: kernels for all devices would go entry by entry.
    """
    if s.encoding not in (0, 1) or s.columns % 8 or not of_layer(None, (values.dtype,), x):
        return False
    if s.metadata.data_ptr() % 4 or not facts(x.device.index).hopper:
        return False
    several, tokens = facts(x.device.index).multiprocessors, x.shape[3]
    return tokens < TOKENS or not s.fits or on_chip(several, s.rows, s.columns, tokens)


def on_chip(several: int, rows: int, columns: int, tokens: int) -> bool:
    """Whether S is better expanded on chip than in memory."""
    elements = rows * columns
    memory = CALL + EACH * elements + FAR * max(0.0, elements - NEAR) + RATE * elements * tokens
    wide = wide_of(several, columns, tokens, rows)
    return cycles(several, columns, tokens, rows, wide) < CLOCK * memory


def product(values: Tensor, s: Stored, x: Tensor) -> Tensor:
    """Product x S.

    Args:
        values: (1, slots) of x's dtype, contiguous, 16-byte aligned.
        s: one matrix, 2:4 or 1:2 in 16 bits.
        x: (1, 1, rows, T), as ``takes`` says.

    Returns:
        (T, columns).
    """
    tokens = x.shape[3]
    out = x.new_empty((tokens, s.columns))
    wide = wide_of(facts(x.device.index).multiprocessors, s.columns, tokens, s.rows)
    kernel(spmm_request(wide, x.dtype), x.device.index)(
        (-(-s.columns // ACROSS), -(-tokens // wide)),
        384 if wide == 256 else 512,
        (
            operand_map(x.mT, wide),
            values.data_ptr(),
            s.metadata.data_ptr(),
            out.data_ptr(),
            *map(np.int32, (tokens, s.rows, s.columns, s.lines, s.packed)),
        ),
        memory(wide),
    )
    return out


def memory(wide: int) -> int:
    """Dynamic shared memory of a CTA, bytes: stages, and room to align."""
    return STAGES[wide] * (ACROSS + wide) * 128 + 1024


def wide_of(several: int, columns: int, tokens: int, rows: int) -> int:
    """Tokens of a CTA; however many, it adds up in the same order."""
    return min(STEP, key=lambda wide: cycles(several, columns, tokens, rows, wide))


def cycles(several: int, columns: int, tokens: int, rows: int, wide: int) -> int:
    """What the product takes in CTAs of ``wide`` tokens."""
    ctas = -(-columns // ACROSS) * -(-tokens // wide)
    return -(-ctas // several) * (START + STEP[wide] * -(-rows // 64))


@functools.lru_cache(maxsize=64)
def spmm_request(wide: int, dtype: torch.dtype) -> Request:
    """The kernel."""
    constants = {"WIDE": wide, "STAGES": STAGES[wide], "DTYPE": CODES[dtype]}
    return request("spmm_nm_expand_sm90", constants, flush=True)
