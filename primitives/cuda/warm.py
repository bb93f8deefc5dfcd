"""The kernels that calls ask for, found by recording launch code; needs no GPU.

Tests compile them for every architecture, and ``mixgrain warm`` does so ahead of first use.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mixgrain.cuda.compile import Request
from mixgrain.cuda.device import pretending
from mixgrain.cuda.recording import Recording, recorded
from mixgrain.cuda.steps import Launch
from mixgrain.formats import patterns
from mixgrain.formats.block import BlockLayout
from mixgrain.formats.layout import Layout
from mixgrain.formats.nm import NMLayout, choose
from mixgrain.formats.nm_metadata import encoding_for
from mixgrain.formats.tile import TileLayout

from ..blank import nm_layout
from ..dispatch import TABLE
from ..plans import nm
from ..plans.plan import Plan
from . import (
    block_few,
    block_sm90,
    block_weights_sm90,
    dense_tile_sm90,
    launch_code,
    nm_expand_sm90,
    nm_weights_sm90,
    pair_sm90,
    row_few,
    row_weights_sm90,
    strew_sm90,
    tile_sm90,
    tile_thin,
    tile_weights_sm90,
    union_sm90,
)
from .calls import describe
from .parts import MOST_MATRICES

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
#: Dtypes of the operands, and of the values beside them.
DTYPES = ((HALF, HALF), (BRAIN, BRAIN), (FLOAT, FLOAT))
#: Dtypes of values that differ from the operands': scores that are kept in float32, and the like.
MIXED_DTYPES = ((HALF, FLOAT), (BRAIN, FLOAT), (FLOAT, HALF), (FLOAT, BRAIN))
#: Head dimensions, or columns of x, that kernels are cut for differently.
WIDTHS = (8, 16, 32, 64, 80, 96, 128, 200, 256, 512)
#: The common ones among them.
COMMON = (64, 128)
#: Tokens of a linear that kernels are cut for differently.
TOKENS = (1, 16, 32, 64, 128, 512, 8192)
#: N:M ratios whose weights are common: n, m, encoding of halves, of float32.
RATIOS = ((2, 4, "2:4", "2:4"), (1, 2, "1:2-half", "1:2-float32"))
#: Without a run-time mask; with one over columns; over rows.
MASKS = (0, 1, 2)


@functools.cache
def _layouts() -> tuple[Layout, ...]:
    """Small layouts that between them have every kind of part and every class of row lengths."""
    n = 640
    band = patterns.window(70)
    made: list[Any] = [band.to_layout("block", n, n, size=size) for size in (16, 32, 64, 128)]
    full = patterns.full()
    # Nothing masked, and rows of more blocks than one warp takes.
    made += [full.to_layout("block", n, n, size=size) for size in (16, 32, 64, 128)]
    rows = (full, band, patterns.window(45), patterns.window(20), patterns.window(9))
    made += [pattern.to_layout("row", n, n) for pattern in rows]
    some = patterns.global_tokens(list(range(0, n, 40)))
    mixed = (band | some | patterns.random(0.004, 0)).to_layout("mixed", n, n)
    kinds = [part.kind for part in mixed.parts]
    assert kinds == ["block", "panel", "row"], kinds
    # Blocks and entries alone, which softmax takes otherwise.
    two = (patterns.window(250) | patterns.random(0.004, 0)).to_layout("mixed", n, n)
    assert [part.kind for part in two.parts] == ["block", "row"]
    made += [mixed, mixed.parts[1], two]
    # Few tiles in short lines, in long ones, and many.
    for lines, across in ((8, 8), (4, 64), (20_000, 1)):
        kept = torch.ones(lines, across, dtype=torch.bool)
        made.append(TileLayout.from_tile_mask(kept, (16 * lines, 16 * across)))
    return (*made, *_nm_layouts(n))


def _nm_layouts(n: int) -> Iterator[Layout]:
    """Packed N:M, alone and within blocks: rows of every class of lengths."""
    band = patterns.window(70)
    for (kept, of), dtype in (((2, 4), HALF), ((1, 2), HALF), ((1, 2), FLOAT)):
        for rows, columns in ((n, n), (33, 70), (5, 33_000)):
            choice = torch.arange(kept, dtype=torch.uint8).expand(1, rows, -(-columns // of), kept)
            yield NMLayout.from_choice(choice, (rows, columns), kept, of, dtype=dtype)
        for size in (16, 32, 64):
            for pattern in (band, patterns.full()):
                within = pattern.to_layout("block", n, n, size=size)
                assert isinstance(within, BlockLayout)
                live = within.live()
                live = torch.ones(within.slots, dtype=torch.bool) if live is None else live
                live = live.view(-1, size, size)
                choice = choose(live.float(), live, kept, of)
                yield NMLayout.from_choice(choice, (n, n), kept, of, dtype=dtype, within=within)


def requests(
    arch: str,
    dtypes: Sequence[tuple[torch.dtype, torch.dtype]] = DTYPES,
    widths: Sequence[int] = COMMON,
    masks: Sequence[int] = (0,),
) -> list[Request]:
    """The kernels that calls of these kinds ask for on an architecture, each once.

    Args:
        arch: one of ``mixgrain.cuda.compile.ARCHITECTURES``.
        dtypes: pairs of the operands' dtype and the values'.
        widths: head dimensions and columns.
        masks: 0 without a run-time mask, 1 over columns, 2 over rows.

    Every operator, forward and backward, over every kind of layout; without arguments those of the
    common calls. The others, and float32 products that torch lets round to TF32, compile when first
    used.
    """
    found: dict[Request, None] = {}
    with pretending(arch):
        for layout in _layouts():
            products = TABLE["spmm"][type(layout)]["cuda"](layout)
            softmax = TABLE["softmax"].get(type(layout))
            rowwise = softmax["cuda"](layout) if softmax else None
            for mask in masks:
                for operand, value in dtypes:
                    if not _meant_for(layout, value):
                        continue
                    if rowwise:
                        for name, arguments in _rowwise_calls(
                            layout, rowwise, mask, operand, value
                        ):
                            found |= dict.fromkeys(_asked(name, arguments))
                    for width in widths:
                        for name, arguments in _products(
                            layout, products, mask, operand, value, width
                        ):
                            found |= dict.fromkeys(_asked(name, arguments))
                        if isinstance(layout, NMLayout) and mask < 2:
                            arguments = _pruning(layout, products, mask, operand, value, width)
                            found |= dict.fromkeys(_asked("prune", arguments))
        for operand, value in dtypes:
            if operand == value:
                for name, arguments in (*_weight_calls(operand, masks), *_layer_calls(operand)):
                    found |= dict.fromkeys(_asked(name, arguments))
                if operand != FLOAT:
                    found |= dict.fromkeys(_layers(arch, operand))
    return list(found)


def _weight_calls(
    dtype: torch.dtype, masks: Sequence[int]
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Arguments of linear and spmm with N:M weights, and of their derivatives."""
    for n, m, half, single in RATIOS:
        encoding = single if dtype == FLOAT else half
        for size in (512, 4096):
            layout = nm_layout((size, size), n, m, encoding, (1, 1), None)
            plan, values = nm.plan_of(layout), _meta(1, layout.slots, dtype=dtype)
            for tokens in TOKENS:
                x = _meta(1, tokens, size, dtype=dtype)
                for transposed in (False, True):
                    yield "linear", (values, x, None, *plan, transposed)
                lines = x.mT[:, None]
                yield "sddmm", (lines, lines, None, False, *plan, 1.0, dtype)
            for mask in masks:
                keep = _keep(layout, mask)
                for width in COMMON:
                    x = _meta(1, 1, size, width, dtype=dtype)
                    for name in ("spmm", "spmm_t"):
                        yield name, (values, x, *keep, *plan, 1.0, dtype)
                    yield "sddmm", (x, x, *keep, *plan, 1.0, dtype)


def _layer_calls(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Arguments of a layer of blocks, whose rows of tokens are turned."""
    layout = _layouts()[0]
    plan = TABLE["linear"][type(layout)]["cuda"](layout)
    values, x = _meta(layout.slots, dtype=dtype), _meta(64, layout.shape[1], dtype=dtype)
    for bias in (None, _meta(layout.shape[0], dtype=dtype)):
        yield "tokens", (values, x, bias, *plan, None, False, None)


def _layers(arch: str, dtype: torch.dtype) -> Iterator[Request]:
    """Kernels of layers of blocks and rows on rows of tokens, for devices of any size."""
    for tokens in row_few.TOKENS:
        yield row_few.few_request(tokens, dtype)
    for transposed in (False, True):
        for size in block_few.SIZES:
            for how in block_few.cuts(size):
                yield block_few.few_request(size, how, dtype, transposed)
        if arch != "90a":
            continue
        for size, cuts in block_sm90.TOKEN_CUTS.items():
            for cut in cuts:
                yield block_sm90.spmm_request(size, dtype, cut, transposed, False, 0)
        for wide in union_sm90.TOKEN_COSTS:
            yield union_sm90.spmm_request(32, dtype, wide, transposed, False, 0)
        for partial in (False, True):  # asked for by large products only
            yield pair_sm90.spmm_request(dtype, transposed, partial)
        yield pair_sm90.spmm_request(dtype, transposed, False, 0)
    if arch == "90a":
        for size in block_few.SIZES:
            yield block_weights_sm90.sddmm_request(size, dtype)
        for wide in dense_tile_sm90.STAGES:
            yield row_weights_sm90.sddmm_request(wide, dtype)
            yield nm_weights_sm90.sddmm_request(wide, dtype)
            for rows in (False, True):
                yield tile_weights_sm90.sddmm_request(wide, dtype, rows)
        for wide in nm_expand_sm90.STAGES:
            yield nm_expand_sm90.spmm_request(wide, dtype)
        for strewn in strew_sm90.COSTS:
            yield strew_sm90.spmm_request(strewn, dtype)
        # Stages with room for 64 tiles are of dense patches.
        for tile_cut, room, transposed in itertools.product(
            tile_sm90.CUTS, (16, 32), (False, True)
        ):
            for rows in (False, True):
                yield tile_sm90.spmm_request(tile_cut, room, dtype, transposed, rows, False)
        for blocks, split, group, transposed in itertools.product(
            (1, 2, 4), tile_thin.SPLITS, (2, 4), (False, True)
        ):
            thin = tile_thin.Thin(blocks, split, 1, group)
            yield tile_thin.thin_request(thin, dtype, dtype, transposed)


def _meant_for(layout: Layout, value: torch.dtype) -> bool:
    """Whether values of this dtype come in this layout: 1:2 has an encoding for each size."""
    return not isinstance(layout, NMLayout) or layout.encoding == encoding_for(
        layout.n, layout.m, value
    )


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _keep(layout: Layout, mask: int) -> tuple[Tensor | None, bool]:
    if not mask:
        return None, False
    n = layout.shape[0 if mask == 2 else 1]
    return _meta(1, layout.entries, n, dtype=torch.bool), mask == 2


def _products(
    layout: Layout,
    plan: Plan,
    mask: int,
    operand: torch.dtype,
    value: torch.dtype,
    width: int,
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Arguments of sddmm, spmm and its transpose."""
    shared = (*_keep(layout, mask), *plan, 1.0)
    # Of many matrices the fine parts run beside the coarse ones, by kernels of their own.
    for free in (1, MOST_MATRICES) if len(layout.parts) > 1 else (1,):
        q, k = (_meta(free, layout.entries, n, width, dtype=operand) for n in layout.shape)
        values = _meta(free, layout.slots, dtype=value)
        yield "sddmm", (q, k, *shared, value)
        for name, x in (("spmm", k), ("spmm_t", q)):
            yield name, (values, x, *shared, operand)
    if isinstance(layout, TileLayout):  # of linear: rows of tokens, transposed
        values = _meta(1, layout.slots, dtype=value)
        q, k = (_meta(1, 1, width, n, dtype=operand).mT for n in layout.shape)
        yield "sddmm", (q, k, *shared, value)
        for name, x in (("spmm", k), ("spmm_t", q)):
            yield name, (values, x, *shared, operand)


def _pruning(
    layout: NMLayout,
    plan: Plan,
    mask: int,
    operand: torch.dtype,
    value: torch.dtype,
    width: int,
) -> tuple[Any, ...]:
    """Arguments of prune."""
    q, k = (_meta(1, layout.entries, n, width, dtype=operand) for n in layout.shape)
    return q, k, _keep(layout, mask)[0], *plan, 1.0, value


def _rowwise_calls(
    layout: Layout, plan: Plan, mask: int, first: torch.dtype, second: torch.dtype
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Arguments of the operators along rows."""
    a, b = (_meta(1, layout.slots, dtype=dtype) for dtype in (first, second))
    shared = (*_keep(layout, mask), *plan)
    yield "softmax", (a, *shared, second, True)
    yield "softmax_backward", (b, b, None, *shared, first)
    if first == second:
        yield "row_sum", (a, *shared)
        yield (
            "row_expand",
            (_meta(1, layout.entries, layout.shape[0], dtype=FLOAT), *shared, first),
        )


def _asked(name: str, arguments: tuple[Any, ...]) -> list[Request]:
    recording = Recording(0)
    described = describe(recording, arguments)
    with recorded(recording):
        launch_code(name)(*described)
    return [step.kernel.wanted for step in recording.steps if isinstance(step, Launch)]
