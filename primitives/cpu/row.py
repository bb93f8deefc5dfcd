"""RowLayout on the CPU: torch's sampled product and weighted bag kernels, one entry at a time.

Both read the operands of live slots only, so they are exact per element.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..plans.plan import PartPlan
from .part import CHUNK, Dropped, Part, Rows, Strip, bits_of, blank


class RowStrip(Strip):
    """R rows of about equal length W, padded where shorter."""

    def __init__(self, part: RowPart, rows: Tensor, width: int, start: int) -> None:
        self.part, self.width = part, width
        self.rows: Rows = rows
        self.span: slice | None = None
        self.pad: Tensor | None = None
        offsets = part.offsets
        if start >= 0:
            self.rows = slice(start, start + len(rows))
            begin = int(offsets[start])
            self.span = slice(begin, begin + len(rows) * width)
            return
        first = offsets[rows].long()
        counts = offsets[rows + 1].long() - first
        inside = torch.arange(width)
        index = first[:, None] + inside
        if bool((counts < width).any()):
            self.pad = inside >= counts[:, None]
            index.clamp_(max=max(int(offsets[-1]) - 1, 0))
            # The other way round: the slots of these rows, and where they lie in (R, W).
            row = torch.repeat_interleave(counts)
            local = torch.arange(len(row)) - (counts.cumsum(0) - counts).index_select(0, row)
            self.slots = first.index_select(0, row).add_(local)
            self.places = row.mul_(width).add_(local)
        self.index = index.view(-1)

    def load(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        if self.span:
            return values[self.span].view(-1, self.width).to(dtype, copy=True)
        return values.index_select(0, self.index).view(-1, self.width).to(dtype)

    def store(self, values: Tensor, m: Tensor) -> None:
        if self.span:
            values[self.span].view(-1, self.width).copy_(m)
        elif self.pad is None:
            values.scatter_(0, self.index, m.view(-1).to(values.dtype))
        else:
            flat = m.view(-1).index_select(0, self.places)
            values.scatter_(0, self.slots, flat.to(values.dtype))

    def kill_static(self, m: Tensor, fill: float) -> None:
        if self.pad is not None:
            blank(m, bits_of(self.pad, m), fill)

    def columns(self) -> Tensor:
        columns = self.part.columns
        at = columns[self.span] if self.span else columns.index_select(0, self.index)
        return at.view(-1, self.width).long()


class RowPart(Part):
    """One distinct pattern of a RowLayout."""

    exact = True

    def __init__(self, plan: PartPlan, shape: tuple[int, int], u: int) -> None:
        offsets, columns, t_offsets, t_rows, t_order, self.table, self.members = plan.tensors
        rows, cols = self.padded = shape
        begin, end = plan.scalars[u], plan.scalars[u + 1]
        self.u = u
        self.offsets = offsets[u * (rows + 1) : (u + 1) * (rows + 1)]
        self.columns = columns[begin:end]
        self.t_offsets = t_offsets[u * (cols + 1) : (u + 1) * (cols + 1)]
        self.t_rows = t_rows[begin:end]
        self.t_order = t_order[begin:end] - begin if begin else t_order[begin:end]

    def strips(self, width: int) -> Iterator[RowStrip]:
        at = 0
        for u, length, n, start in self.table.tolist():
            if u == self.u:
                step = max(1, CHUNK // length)
                for begin in range(0, n, step):
                    rows = self.members[at + begin : at + min(begin + step, n)]
                    yield RowStrip(self, rows, length, start + begin if start >= 0 else -1)
            at += n

    def _row_of(self, mask: Tensor) -> Tensor:
        counts = self.offsets.diff().long()
        return torch.repeat_interleave(mask[: self.padded[0]], counts)

    def _without(self, values: Tensor, dropped: Dropped | None) -> Tensor:
        """The values, with zeros where a run-time mask drops them."""
        if dropped is None:
            return values
        if dropped.over_rows:
            return values.masked_fill(self._row_of(dropped.mask), 0)
        return values.masked_fill(dropped.mask.index_select(0, self.columns), 0)

    def sddmm(
        self, out: Tensor, q: Tensor, k: Tensor, scale: float, dropped: Dropped | None
    ) -> None:
        (rows, cols), count = self.padded, len(self.columns)
        if not count:
            return
        direct = out.dtype == q.dtype
        scores = out.zero_() if direct else torch.zeros(count, dtype=q.dtype)
        if q.shape[1]:
            csr = _csr(self.offsets, self.columns, scores, (rows, cols))
            left, right = q[:rows], k[:cols].T
            torch.sparse.sampled_addmm(csr, left, right, beta=0.0, alpha=scale, out=csr)
        if dropped is not None:
            scores = self._without(scores, dropped)
            direct = False
        if not direct:
            out.copy_(scores)

    def spmm(self, acc: Tensor, values: Tensor, x: Tensor, dropped: Dropped | None) -> None:
        weights = self._without(values, dropped).to(acc.dtype)
        _add_bags(acc, x, self.columns, self.offsets, weights)

    def spmm_t(self, acc: Tensor, values: Tensor, x: Tensor, dropped: Dropped | None) -> None:
        weights = self._without(values, dropped).index_select(0, self.t_order).to(acc.dtype)
        _add_bags(acc, x, self.t_rows, self.t_offsets, weights)


def _add_bags(acc: Tensor, x: Tensor, index: Tensor, offsets: Tensor, weights: Tensor) -> None:
    """acc[i] += Σ weights[n] · x[index[n]] over offsets[i] ≤ n < offsets[i + 1]."""
    rows = len(offsets) - 1
    if rows and len(index) and x.shape[1]:
        acc[:rows] += embedding_bag(
            index, x, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
        )


def _csr(offsets: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        # torch warns once per process that its CSR tensors are in beta; users never see ours.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(offsets, columns, values, shape, check_invariants=False)
