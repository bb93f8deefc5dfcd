"""What the launch path costs: host time of calls, first use, and two streams against one."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.formats.layout import Layout, next_key
from mixgrain.primitives.cuda import parts

from .measure import host_us, intervals, kernels
from .work import COPY_BYTES, Work, host_row, random

# A first call of this text's process, between two looks at the clock.
FIRST = """
import time, torch
import mixgrain as mg
from mixgrain import patterns as P
{before}
torch.cuda.synchronize()
begin = time.perf_counter()
{call}
torch.cuda.synchronize()
print((time.perf_counter() - begin) * 1e3)
"""
# A kernel after another has run; attention before anything of ours has, CuPy and plans included.
FIRST_SPMM = FIRST.format(
    before="""
layout = P.window(64).to_layout("block", 1024, 1024, device="cuda")
values = torch.ones(layout.slots, device="cuda", dtype=torch.float16)
x = torch.ones(1024, 64, device="cuda", dtype=torch.float16)
mg.sddmm(x, x, layout)
""",
    call="mg.spmm(mg.SparseTensor(layout, values), x)",
)
FIRST_ATTEND = FIRST.format(
    before='q = torch.randn(1, 16, 4096, 128, device="cuda", dtype=torch.bfloat16)',
    call='mg.attend(q, q, q, P.longformer(256, range(64)), impl="fused")',
)


def _first_use(text: str) -> tuple[float, float]:
    """Milliseconds of a first call that compiles its kernels, and of one that finds them on disk.

    Args:
        text: of a process that prints the milliseconds of its call.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = {**os.environ, "MIXGRAIN_CACHE_DIR": folder}
        made = [
            subprocess.run(
                [sys.executable, "-c", text], env=given, check=True, capture_output=True, text=True
            )
            for _ in range(2)
        ]
    return float(made[0].stdout), float(made[1].stdout)


def launch() -> list[dict[str, Any]]:
    """Rows of the host times; the floor is torch's own ``x.add_`` in the same run."""
    n, d = 4096, 64
    q, k, v = (random(1, 1, n, d, dtype=torch.float16, seed=s) for s in range(3))
    layout = P.window(60).to_layout("block", n, n, device="cuda")
    mixed = (P.window(60) | P.random(0.002, 1)).to_layout("mixed", n, n, device="cuda")
    assert len(mixed.parts) == 2, mixed
    s, t = mg.sddmm(q, k, layout), mg.sddmm(q, k, mixed)
    p, r = mg.softmax(s), mg.softmax(t)
    asking = q.clone().requires_grad_(), k.clone().requires_grad_()
    for _ in range(2):  # clocks and caches settle
        host_us(lambda: mg.spmm(p, v), 500)
    floor = host_us(lambda: q.add_(0))
    calls: dict[str, tuple[Callable[[], object], float]] = {
        "one kernel: sddmm": (lambda: mg.sddmm(q, k, layout), 10),
        "one kernel: softmax": (lambda: mg.softmax(s), 10),
        "one kernel: spmm": (lambda: mg.spmm(p, v), 10),
        "one kernel, recorded: sddmm": (lambda: mg.sddmm(asking[0], asking[1], layout), 18),
    }
    several: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "sddmm": (lambda: mg.sddmm(q, k, layout), lambda: mg.sddmm(q, k, mixed)),
        "softmax": (lambda: mg.softmax(s), lambda: mg.softmax(t)),
        "spmm": (lambda: mg.spmm(p, v), lambda: mg.spmm(r, v)),
    }
    # All times first: once a profiler has run, every launch of the process takes longer.
    one = {name: host_us(call) for name, (call, _) in calls.items()}
    more = {name: _difference(*pair) for name, pair in several.items()}
    backward = _backward(asking, lambda q, k: mg.sddmm(q, k, layout).values)
    backward_floor = _backward(asking, _Sum.apply)
    rows = [_row(name, one[name], floor, goal, call) for name, (call, goal) in calls.items()]
    for name, (few, many) in several.items():
        each = more[name] / max(len(intervals(many)) - len(intervals(few)), 1)
        rows.append(_row(f"each further kernel: {name} of a mixed layout", each, floor, 6, many))
    row = _row("each further kernel: backward of sddmm", backward, backward_floor, 6, None)
    row["floor"] = "the same for an autograd.Function whose gradients are a torch.add each"
    rows.append(row)
    cold, disk = _first_use(FIRST_SPMM)
    rows.append(_row("first use, compiled: spmm", cold * 1e3, floor, 2e6, None))
    rows.append(_row("first use, from disk: spmm", disk * 1e3, floor, 2e4, None))
    cold, _ = _first_use(FIRST_ATTEND)
    rows.append(_row("first use, compiled: attend, fused", cold * 1e3, floor, 3e6, None))
    return rows


def _difference(less: Callable[[], object], more: Callable[[], object]) -> float:
    """Microseconds that one call takes longer than another; they are timed in turn."""
    return statistics.median(host_us(more) - host_us(less) for _ in range(7))


class _Sum(torch.autograd.Function):
    """Two gradients, one kernel each: what a further one costs whoever computes it."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a + b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        return tuple(grad + t if wanted else None for t, wanted in pairs)


def _backward(asking: tuple[Tensor, Tensor], function: Callable[..., Tensor]) -> float:
    """Microseconds that the second kernel of a backward pass adds to the first."""
    q, k = asking
    for _ in range(2):
        function(q, k)
    both, one = function(q, k), function(q, k.detach())
    grad = torch.ones_like(both)
    return _difference(
        lambda: torch.autograd.grad(one, (q,), grad, retain_graph=True),
        lambda: torch.autograd.grad(both, (q, k), grad, retain_graph=True),
    )


def _row(
    shape: str, spent: float, floor: float, goal: float, call: Callable[[], object] | None
) -> dict[str, Any]:
    return host_row("launch", shape, spent, floor, goal, kernels(call) if call else "")


def _streams() -> tuple[Callable[[], Tensor], Callable[[], Tensor], Any]:
    """Composed attention whose fine kernels run beside the coarse ones; the same in sequence."""
    n = 4096
    pattern = P.window(256) | P.random(0.005, 0)
    q, k, v = (random(4, 16, n, 64, dtype=torch.float16, seed=s) for s in range(3))
    layout = pattern.to_layout("mixed", n, n, device="cuda")
    other: Layout = replace(cast(Any, layout), key=next_key())  # prepared calls of its own

    def two() -> Tensor:
        return mg.attend(q, k, v, layout, impl="composed")

    def one() -> Tensor:
        before, parts.FORK_POSITIONS = parts.FORK_POSITIONS, 1 << 62
        try:
            return mg.attend(q, k, v, other, impl="composed")
        finally:
            parts.FORK_POSITIONS = before

    return two, one, (q, k, v, layout, pattern)


def composed_streams() -> Work:
    """±256 and 0.5 % at random: coarse and fine kernels on two streams, against one."""
    two, one, (q, k, v, layout, pattern) = _streams()
    values = layout.nnz * 64 * 2
    return Work(
        id="composed-streams",
        ours=two,
        peers={"one stream": one},
        oracle=lambda: mg.attend(
            q[:1, :1], k[:1, :1], v[:1, :1], pattern, impl="reference"
        ).double(),
        floor_ms=(4 * values + 4 * q.numel() * 2) / COPY_BYTES * 1e3,
        floor="scores written, read and written, read once; Q, K, V, out once; at 4.24 TB/s",
        shape="±256 and 0.5 % at random, B4 H16 N4096 D64 float16",
        tolerance=1e-2,
    )


def overlap() -> str:
    """A table of the kernels of `composed-streams` as the profiler saw them, for both ways."""
    two, one, _ = _streams()
    lines = []
    for name, call in (("two streams", two), ("one stream", one)):
        found = intervals(call)
        lines += [
            name,
            f"  {'kernel':44s} {'from µs':>9s} {'to µs':>9s} {'beside the one before':>22s}",
        ]
        last = 0.0
        for kernel, start, end in found:
            beside = max(0.0, min(last, end) - start) if last else 0.0
            lines.append(f"  {kernel[:44]:44s} {start:9.1f} {end:9.1f} {beside:22.1f}")
            last = max(last, end)
        lines.append("")
    return "\n".join(lines).rstrip()
