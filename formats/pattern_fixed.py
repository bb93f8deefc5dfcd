"""Patterns of a fixed shape: a dense mask, CSR indices, a mask of blocks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import LayoutError
from .pattern import Frame, Pattern
from .runs import Runs, from_mask, from_sorted_pairs, stacked
from .source import Source

# Elements of the mask that are compared at a time.
MASK_PER_CHUNK = 1 << 24


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Pattern):
    """What a bool (nq, nk) mask keeps."""

    mask: Source

    def check(self, frame: Frame) -> None:
        require_shape("from_dense", tuple(self.mask.tensor.shape), frame)

    def runs(self, frame: Frame, rows: Tensor) -> Runs:
        self.check(frame)
        mask = self.mask.derive("mask", frame.device, lambda mask: mask)
        step = max(1, MASK_PER_CHUNK // (frame.nk + 1))
        return stacked([from_mask(mask[part]) for part in rows.split(step)])

    def runs_bound(self, frame: Frame) -> int:
        return max(1, (frame.nk + 1) // 2)

    def __repr__(self) -> str:
        return f"from_dense(<{shape_text(self.mask)}>)"


@dataclass(frozen=True, eq=False, repr=False)
class Csr(Pattern):
    """What the indices of a CSR matrix name."""

    indptr: Source
    indices: Source
    shape: tuple[int, int]

    def check(self, frame: Frame) -> None:
        require_shape("from_csr", self.shape, frame)

    def runs(self, frame: Frame, rows: Tensor) -> Runs:
        self.check(frame)
        return self.all_runs(frame.device).select(rows)

    def all_runs(self, device: torch.device) -> Runs:
        """The runs of all rows; validates the indices.

        Raises:
            LayoutError: says which array breaks which rule, and where.
        """
        return self.indptr.derive("runs", device, self._all_runs, self.indices)

    def _all_runs(self, indptr: Tensor, indices: Tensor) -> Runs:
        nq, nk = self.shape
        indptr, col = indptr.long(), indices.long()
        if indptr.numel() != nq + 1:
            raise LayoutError(
                f"from_csr: {indptr.numel()} entries in indptr, {nq + 1} expected (rows + 1)"
            )
        counts = indptr.diff()
        if int(indptr[0]) != 0 or int(indptr[-1]) != col.numel():
            raise LayoutError(
                f"from_csr: indptr runs from {int(indptr[0])} to {int(indptr[-1])}, "
                f"0 to len(indices) = {col.numel()} expected"
            )
        if bool((counts < 0).any()):
            at = int((counts < 0).nonzero()[0])
            raise LayoutError(
                f"from_csr: indptr falls from {int(indptr[at])} to {int(indptr[at + 1])} "
                f"at row {at}; it must not decrease"
            )
        row = torch.repeat_interleave(torch.arange(nq, device=col.device), counts)
        outside = (col < 0) | (col >= nk)
        if bool(outside.any()):
            at = int(outside.nonzero()[0])
            raise LayoutError(
                f"from_csr: column {int(col[at])} at entry {at} (row {int(row[at])}), "
                f"0 <= column < {nk} expected"
            )
        line = row * nk + col
        if bool((line[1:] < line[:-1]).any()):
            line = line.sort()[0]
            col = line - row * nk
        double = line[1:] == line[:-1]
        if bool(double.any()):
            at = int(double.nonzero()[0])
            raise LayoutError(
                f"from_csr: column {int(col[at])} stands twice in row {int(row[at])}; "
                "a pair is kept once: remove duplicates (scipy: sum_duplicates)"
            )
        return from_sorted_pairs(row, col, nq)

    def runs_bound(self, frame: Frame) -> int:
        return max(1, min(self.indices.tensor.numel(), (frame.nk + 1) // 2))

    def __repr__(self) -> str:
        return f"from_csr(<{self.indices.tensor.numel()} of {self.shape[0]}x{self.shape[1]}>)"


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(Pattern):
    """The blocks of size × size that a bool mask of blocks keeps."""

    mask: Source
    size: int

    def check(self, frame: Frame) -> None:
        given = tuple(self.mask.tensor.shape)
        expected = (-(-frame.nq // self.size), -(-frame.nk // self.size))
        if given != expected:
            raise LayoutError(
                f"blocks: a mask of {given[0]} × {given[1]} blocks of {self.size} given for "
                f"{frame.nq} × {frame.nk}, {expected[0]} × {expected[1]} blocks expected"
            )

    def runs(self, frame: Frame, rows: Tensor) -> Runs:
        self.check(frame)
        all_blocks = self.mask.derive("runs", frame.device, _mask_runs)
        blocks = all_blocks.select(rows // self.size)
        lo, hi = blocks.lo * self.size, (blocks.hi * self.size).clamp_(max=frame.nk)
        return Runs(blocks.offsets, lo, hi)

    def block_mask(self, frame: Frame, size: int) -> Tensor | None:
        self.check(frame)
        return self.mask.tensor if self.size == size else None

    def coarse(self, frame: Frame, size: int) -> bool:
        return self.size % size == 0

    def runs_bound(self, frame: Frame) -> int:
        return -(-frame.nk // (2 * self.size)) + 1

    def __repr__(self) -> str:
        return f"blocks(<{shape_text(self.mask)}>, {self.size})"


def _mask_runs(mask: Tensor) -> Runs:
    return stacked(
        [from_mask(part) for part in mask.split(max(1, MASK_PER_CHUNK // (mask.shape[1] + 1)))]
    )


def require_shape(who: str, shape: tuple[int, ...], frame: Frame) -> None:
    """Raise LayoutError unless the frame has the pattern's own shape."""
    if shape != (frame.nq, frame.nk):
        raise LayoutError(
            f"{who}: the pattern is {shape[0]} × {shape[1]}, but {frame.nq} × {frame.nk} "
            "(queries × keys) was asked for; its shape is fixed"
        )


def shape_text(source: Source) -> str:
    """The shape of a source, 3x4."""
    return "x".join(map(str, source.tensor.shape))
