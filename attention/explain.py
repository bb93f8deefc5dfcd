"""What attend does with a pattern, and what that costs: for people, before they run it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mixgrain.formats.arguments import as_device, as_integer, kind_of
from mixgrain.formats.block import BlockLayout
from mixgrain.formats.costs import Costs, check_costs
from mixgrain.formats.errors import LayoutError
from mixgrain.formats.layout import Layout
from mixgrain.formats.panel import PanelLayout
from mixgrain.formats.pattern import Pattern
from mixgrain.formats.pattern_nm import NM
from mixgrain.formats.row import RowLayout

from .attend import choose_impl, static_layout
from .cuda.choice import WIDEST, groups, split_costs
from .cuda.plan import Plan as CudaPlan
from .cuda.plan import count_work
from .cuda.plan import plan as plan_on_cuda
from .dense import rule
from .plan import plan, plan_nm
from .plan_steps import Plan


@dataclass(frozen=True)
class Part:
    """One part of a layout, all batch entries and heads of the layout together.

    Attributes:
        name: what it is made of, e.g. "blocks of 64".
        pieces: number of blocks, panels or rows.
        kept: kept positions.
        slots: positions held in memory, padding included.
        seconds: predicted time.
    """

    name: str
    pieces: int
    kept: int
    slots: int
    seconds: float


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found; ``print`` it.

    Attributes:
        source: the pattern or layout.
        shape: (nq, nk).
        lead: over how many (batch entries, heads) the pattern differs.
        head_dim: D that times are predicted for.
        impl: what ``impl="auto"`` runs of a bfloat16 head without gradient, mask, sinks and lse;
            "sdpa" is torch's own attention.
        why: the reason for it.
        kept: kept positions.
        density: kept positions over all.
        parts: the parts of the layout.
        steps: batches of tiles the fused kernel runs, None where it does not.
        computed: scores it computes, masked and padded ones included; None likewise.
        plan_bytes: memory that its plan takes; None likewise.
        seconds: predicted forward time of one batch entry and the heads in ``lead``.
        dense_seconds: the same for dense attention.
    """

    source: str
    shape: tuple[int, int]
    lead: tuple[int, int]
    head_dim: int
    impl: str
    why: str
    kept: int
    density: float
    parts: tuple[Part, ...]
    steps: int | None
    computed: int | None
    plan_bytes: int | None
    seconds: float
    dense_seconds: float

    @property
    def dense_is_cheaper(self) -> bool:
        """Whether dense attention is predicted to take no longer."""
        return self.dense_seconds <= self.seconds

    def __str__(self) -> str:
        nq, nk = self.shape
        lines = [
            f"{self.source}",
            f"  {nq} queries × {nk} keys, D = {self.head_dim}: keeps {self.kept} "
            f"({self.density:.3%})" + _over(self.lead),
            f'  impl="auto" runs {self.impl!r}: {self.why}',
        ]
        for part in self.parts:
            filled = part.kept / part.slots if part.slots else 1.0
            lines.append(
                f"  {part.name:<18} {part.pieces:>9} pieces  keep {part.kept:>12}  "
                f"{filled:>6.1%} full  {_time(part.seconds):>9}"
            )
        if self.computed is not None:
            extra = self.computed / self.kept if self.kept else 1.0
            lines.append(
                f"  computes {self.computed} scores in {self.steps} steps, {extra:.2f} for each "
                f"kept one; its plan takes {self.plan_bytes} bytes"
            )
        if self.impl == "sdpa":
            return "\n".join([*lines, f"  predicted {_time(self.seconds)}"])
        verdict = (
            "dense attention, of every position, costs no more"
            if self.dense_is_cheaper
            else f"{self.dense_seconds / max(self.seconds, 1e-6):.3g} times faster than dense"
        )
        lines.append(
            f"  predicted {_time(self.seconds)}, dense {_time(self.dense_seconds)}: {verdict}"
        )
        return "\n".join(lines)


def explain(
    pattern_or_layout: Pattern | Layout,
    nq: int,
    nk: int,
    head_dim: int = 64,
    device: torch.device | str = "cpu",
    costs: Costs | None = None,
) -> Explanation:
    """What attend would do, without running it; O(kept positions), as the layout itself.

    Args:
        pattern_or_layout: as for attend.
        nq: number of queries.
        nk: number of keys.
        head_dim: D (and Dv) that times are predicted for.
        device: where attend would run.
        costs: rates to predict with; None = the device's defaults. Predictions rank choices, they
            are no measurements.

    Raises:
        LayoutError: a pattern or layout without attention, or of another shape; sizes that are no
            numbers of queries, keys or dimensions.
        UnsupportedError: a device without attention.
    """
    where = as_device("explain", device, data=True)
    nq, nk = as_integer(nq, "explain(nq)", 0), as_integer(nk, "explain(nk)", 0)
    head_dim = as_integer(head_dim, "explain(head_dim)", 1)
    check_costs("explain", costs)
    if not isinstance(pattern_or_layout, Pattern | Layout):
        raise LayoutError(
            f"explain: {kind_of(pattern_or_layout)} given as the pattern; give a pattern "
            "(mixgrain.patterns) or a Block-, Row- or MixedLayout"
        )
    on_cuda = where.type == "cuda"
    split = split_costs(head_dim) if on_cuda else None
    # Units without masks, as all of dense attention are, are faster than what splits reckon with.
    rate = (costs or (Costs.h200() if on_cuda else Costs.cpu())).dense_flops
    costs = costs or split or Costs.cpu()
    impl = choose_impl("auto", where)
    if on_cuda and (isinstance(pattern_or_layout, NM) or head_dim > WIDEST):
        impl = "composed"
    handed = None
    if nq and nk:
        handed = rule(pattern_or_layout, where, torch.bfloat16, (1, 1, 1), nq, nk, head_dim)
    if handed is not None:
        impl = "sdpa"
    made: Plan | CudaPlan | None = None
    if isinstance(pattern_or_layout, NM):
        within = pattern_or_layout.within
        choice = (pattern_or_layout.n, pattern_or_layout.m)
        kept, lead = pattern_or_layout.nnz(nq, nk), pattern_or_layout.lead
        if within is None:
            made = plan_nm(nq, nk, *choice) if impl == "fused" else None
            seconds = costs.panel_seconds(nq, nk, head_dim)
            parts: tuple[Part, ...] = (Part("dense, then N:M", 1, kept, nq * nk, seconds),)
        else:
            blocks = within.to_layout("block", nq, nk, 64, device=where)
            assert isinstance(blocks, Layout)
            made = plan(blocks, choice) if impl == "fused" else None
            found = _part(blocks, costs, head_dim)
            parts = (Part(f"{found.name}, N:M", found.pieces, kept, found.slots, found.seconds),)
        entries = lead[0] * lead[1]
    else:
        if isinstance(pattern_or_layout, Layout) and pattern_or_layout.shape != (nq, nk):
            raise LayoutError(
                f"explain: {pattern_or_layout!r} for {nq} × {nk}; give the layout's own shape"
            )
        layout = static_layout(pattern_or_layout, nq, nk, where, split)
        kept, lead, entries = layout.nnz, layout.lead, layout.entries
        if impl == "fused":
            if on_cuda:
                units = groups(where, torch.bfloat16, head_dim)
                made = plan_on_cuda(layout, head_dim, where, units)
            else:
                made = plan(layout)
        parts = tuple(_part(part, costs, head_dim) for part in layout.parts)
    reasons = {
        "fused": "one pass over the kept tiles, O(N · D) memory, "
        + ("where no gradient is asked for" if on_cuda else "forward and backward"),
        "composed": "sddmm, softmax, spmm; no fused kernel exists for this on the device",
        "sdpa": "torch's attention; every query keeps the same keys, and it is the faster",
    }
    total = nq * nk * entries
    # Two products; a dense kernel keeps its scores in registers.
    dense = 4 * nq * nk * head_dim / rate
    seconds = sum(part.seconds + costs.launch_seconds for part in parts)
    if handed is not None:
        length = handed.end - handed.first
        seconds = 4 * nq * length * head_dim / rate * entries + costs.launch_seconds
    work = _work(made)
    return Explanation(
        source=repr(pattern_or_layout),
        shape=(nq, nk),
        lead=lead,
        head_dim=head_dim,
        impl=impl,
        why=reasons[impl],
        kept=kept,
        density=kept / total if total else 0.0,
        parts=parts,
        steps=work[0],
        computed=work[1],
        plan_bytes=work[2],
        seconds=seconds,
        dense_seconds=dense * entries + costs.launch_seconds,
    )


def _work(made: Plan | CudaPlan | None) -> tuple[int | None, int | None, int | None]:
    """Steps, computed scores and bytes of a plan."""
    if made is None:
        return None, None, None
    if isinstance(made, CudaPlan):
        return count_work(made)
    steps = _steps(made, made.steps.new_ones(made.steps.shape[0]))
    size = sum(t.numel() * t.element_size() for t in made.tensors)
    return steps, _steps(made, made.steps[:, 1:4].prod(1)), size


def _steps(made: Plan, weight: torch.Tensor) -> int:
    """Sum of a weight per step over all entries; equal entries run the same steps."""
    of = torch.zeros(max(made.ints[6:]) + 1, dtype=torch.int64)
    of.index_add_(0, made.steps[:, 0], weight)
    return int(of[list(made.ints[6:])].sum())


def _part(part: Layout, costs: Costs, D: int) -> Part:
    if isinstance(part, BlockLayout):
        count = part.slots // part.size**2
        return Part(
            f"blocks of {part.size}", count, part.nnz, part.slots,
            count * costs.block_seconds(part.size, D),
        )  # fmt: skip
    if isinstance(part, PanelLayout):
        times = [part.entry.count(u) for u in part.panel_entry.tolist()]
        sizes = torch.stack([part.row_count, part.col_count], 1).tolist()
        seconds = 0.0
        for n, (rows, cols) in zip(times, sizes, strict=True):
            # A panel with this many rows or columns is packed once for all of them.
            private = max(rows, cols) <= 256
            seconds += n * costs.panel_seconds(rows, cols, D, private=private)
        return Part("panels", sum(times), part.nnz, part.slots, seconds)
    if not isinstance(part, RowLayout):
        raise LayoutError(
            f"explain: no attention on {part!r}; give a pattern, BlockLayout, RowLayout or "
            "MixedLayout"
        )
    used = (part.row_offsets.diff() > 0).view(part.distinct, -1).sum(1).tolist()
    rows = sum(used[u] for u in part.entry)
    seconds = costs.entries_seconds(part.nnz, D) + costs.entry_rows_seconds(rows, D)
    return Part("single entries", rows, part.nnz, part.slots, seconds)


def _over(lead: tuple[int, int]) -> str:
    return "" if lead == (1, 1) else f", over {lead[0]} batch entries × {lead[1]} heads"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"
