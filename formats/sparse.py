"""SparseTensor: a layout and the values at its positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .arguments import FLOAT8, as_device, as_flag, as_index, check_dense, kind_of
from .costs import Costs
from .errors import DtypeError, LayoutError, ShapeError
from .layout import TRACED, Layout, fact, same_positions
from .sparse_arguments import arguments_of, check_keep, check_together, factor_of, is_factor
from .tracing import constant

if TYPE_CHECKING:
    from .nm import NMLayout


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """A layout and the values at its positions.

    Attributes:
        layout: the positions.
        values: (*free, slots). Batch dimensions over which the layout is shared stay free; those
            over which it varies are folded, in C order, into the last axis: lead (1, 1) gives
            (B, H, slots), (1, h) gives (B, Σ_h), (b, 1) gives (H, Σ_b), (b, h) gives (Σ,).
        keep: None, or the run-time mask a ``key_mask`` left: bool (B, nk) or (nk,), True = kept;
            (B, nq) or (nq,) over rows when ``keep_rows``. Slots it drops are dead.
        keep_rows: the mask is over rows, as it is after ``.T``.
    """

    layout: Layout
    values: Tensor
    keep: Tensor | None = None
    keep_rows: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.layout, Layout):
            raise LayoutError(
                f"SparseTensor: layout is a {kind_of(self.layout)}; expected a layout, e.g. of "
                "pattern.to_layout(kind, nq, nk)"
            )
        check_dense("SparseTensor", "values", self.values)
        if self.values.dtype in FLOAT8:
            raise DtypeError(
                f"SparseTensor: values of {self.values.dtype}; expected float16, bfloat16, float32 "
                "or float64; torch moves no single elements of float8"
            )
        as_flag("SparseTensor", "keep_rows", self.keep_rows)
        if self.keep is not None:
            check_keep(self.layout, self.keep, self.keep_rows)
        if self.values.dim() < 1 or self.values.shape[-1] != self.layout.slots:
            raise ShapeError(
                f"SparseTensor: values {tuple(self.values.shape)} do not fit {self.layout!r}; "
                f"the last dimension must be its {self.layout.slots} slots"
            )

    # numpy arrays would otherwise multiply element by element, each with the whole matrix.
    __array_ufunc__ = None

    @property
    def lead_shape(self) -> tuple[int, ...]:
        """Leading dimensions of the matrices this tensor stands for."""
        free, (b, h) = tuple(self.values.shape[:-1]), self.layout.lead
        if b == 1:
            return free if h == 1 else (*free, h)
        if h == 1:
            return (*free[:-1], b, free[-1]) if free else (b, 1)
        return (*free, b, h)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense tensor: (*leading, nq, nk)."""
        return (*self.lead_shape, *self.layout.shape)

    @property
    def nnz(self) -> int:
        """Live slots of the layout, all its entries together (free dimensions not counted)."""
        return self.layout.nnz

    @property
    def density(self) -> float:
        """Kept positions over all positions."""
        return self.layout.density

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Device of the values."""
        return self.values.device

    @property
    def key_mask(self) -> Tensor | None:
        """The run-time key mask carried along, or None (None, too, when it is over rows)."""
        return None if self.keep_rows else self.keep

    def to(self, target: torch.device | str | torch.dtype) -> SparseTensor:
        """Values cast to a dtype, or values and positions moved to a device."""
        if isinstance(target, torch.dtype):
            return replace(self, values=self.values.to(target))
        target = as_device("SparseTensor.to", target)
        keep = None if self.keep is None else self.keep.to(target)
        return replace(
            self, layout=self.layout.to(target), values=self.values.to(target), keep=keep
        )

    def to_layout(
        self,
        target: str | Layout,
        size: int = 64,
        n: int = 2,
        m: int = 4,
        costs: Costs | None = None,
    ) -> SparseTensor:
        """The same positions and values in another layout, bit for bit.

        ``to_dense`` gives the same before and after. A run-time mask is kept; batch and head
        dimensions stay shared where they were. Positions that only the new layout keeps (the rest
        of a tile, what fills up a group) hold +0.

        Args:
            target: "row", "block" or "mixed", which keep exactly the same positions; "tile" or
                "nm", which keep whole units; or a layout of the same shape and lead.
            size: side of the blocks: 16, 32, 64 or 128 (block, mixed).
            n: elements kept of each group (nm).
            m: columns of a group (nm).
            costs: rates that "mixed" minimises; the device's defaults if None.

        Returns:
            A SparseTensor whose values are differentiable with respect to these.

        Raises:
            LayoutError: an unknown kind, or positions that the target cannot hold.
        """
        from .relayout import to_layout  # written in terms of this class

        return to_layout(self, target, size, n, m, costs)

    def with_values(self, values: Tensor) -> SparseTensor:
        """The same positions holding other values, shape (*free, slots)."""
        return replace(self, values=values)

    def part(self, i: int) -> SparseTensor:
        """The i-th disjoint part (blocks, panels, rest), a view of the last axis."""
        parts, offsets = self.layout.parts, self.layout.part_offsets
        i = as_index(i, "part(i)")
        if not -len(parts) <= i < len(parts):
            raise LayoutError(
                f"part({i}): {type(self.layout).__name__} has {len(parts)} parts; "
                f"give an index from 0 to {len(parts) - 1}"
            )
        i %= len(parts)
        values = self.values[..., offsets[i] : offsets[i] + parts[i].slots]
        return replace(self, layout=parts[i], values=values)

    def live(self) -> Tensor | None:
        """Which slots count: bool, broadcastable to ``values``; None when all do.

        The layout's own dead slots and those a run-time mask drops, together.
        """
        static: Tensor | None = fact(self.layout, "live")
        if self.keep is None:
            return static
        kept = gather_mask(self.layout, self.keep, self.keep_rows, self.values.dim() - 1)
        return kept if static is None else kept & static

    def map(self, f: Callable[..., Tensor]) -> SparseTensor:
        """Apply ``f`` to the kept values, position by position.

        Args:
            f: called once per part as ``f(v, i, j)`` or, if it takes four arguments,
                ``f(v, i, j, h)``: v (*free, slots), i row, j column and h head, int64
                (slots,). h is the head of the layout's entry; where heads are free, it has shape
                (H, 1), or (1,) if v has no leading dimensions, and broadcasts against v. Returns a
                tensor of v's shape.

        What f returns at dead slots is discarded (NaN included): they hold exact zeros.
        """
        wants_head = arguments_of(f) >= 4
        check_together("map", self.layout, self.values, self.keep)
        pieces: list[Tensor] = []
        position = 0
        offsets = self.layout.part_offsets
        for n, part in enumerate(self.layout.parts):
            piece = self.part(n)
            row, column = fact(part, "indices")
            arguments = [piece.values, row, column]
            if wants_head:
                arguments.append(piece._heads())
            result = f(*arguments)
            if isinstance(result, Tensor):
                check_dense("map", "what f returned", result)
            if not isinstance(result, Tensor) or result.shape != piece.values.shape:
                given = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
                raise ShapeError(
                    f"map: f returned {given} for values {tuple(piece.values.shape)}; "
                    "it must return a tensor of the shape it was given"
                )
            live = piece.live()
            if live is not None:
                result = torch.where(live, result, result.new_zeros(()))
            if offsets[n] > position:
                pieces.append(result.new_zeros(*result.shape[:-1], offsets[n] - position))
            pieces.append(result)
            position = offsets[n] + part.slots
        if self.layout.slots > position:
            shape = (*self.values.shape[:-1], self.layout.slots - position)
            pieces.append(pieces[-1].new_zeros(shape) if pieces else self.values.new_zeros(shape))
        if not pieces:
            return self
        return self.with_values(torch.cat(pieces, dim=-1) if len(pieces) != 1 else pieces[0])

    def _heads(self) -> Tensor:
        h = self.layout.lead[1]
        if h > 1:
            entry: Tensor = fact(self.layout, "slot_entry")
            return entry % h
        if self.values.dim() == 1:  # nothing is free: one head
            return torch.zeros(1, dtype=torch.int64, device=self.device)
        return torch.arange(self.values.shape[-2], device=self.device)[:, None]

    def to_dense(self) -> Tensor:
        """(*leading, nq, nk): values at live slots, +0 elsewhere. Differentiable."""
        layout = check_together("to_dense", self.layout, self.values, self.keep)
        nq, nk = layout.shape
        row, column = fact(layout, "indices")
        flat = (fact(layout, "slot_entry") * nq + row) * nk + column
        values, static = self.values, fact(layout, "live")
        if self.keep is not None:  # dropped slots write +0 at their own position
            values = torch.where(cast(Tensor, self.live()), values, values.new_zeros(()))
        if static is not None:
            values, flat = values[..., static], flat[static]
        # index_copy moves bits; scatter would quieten the signalling NaNs of 16-bit floats.
        empty = values.new_zeros(*values.shape[:-1], layout.entries * nq * nk)
        out = empty.index_copy(-1, flat, values)
        b, h = layout.lead
        free = tuple(values.shape[:-1])
        out = out.reshape(*free, b, h, nq, nk)
        if b > 1 and h == 1 and free:
            out = out.squeeze(-3).movedim(-4, -3)
        return out.reshape(self.shape)

    @property
    def T(self) -> SparseTensor:
        """The transposed matrix in canonical order; values permuted once, differentiably."""
        values = self.values
        layout = check_together("T", self.layout, values, self.keep)
        if layout.key == TRACED:  # an NMLayout, whose transpose is a view
            turned = cast("NMLayout", layout).turned()
        else:
            turned = fact(layout, "T")
            order, padding = _order(layout)
            values = values[..., order]
            if padding is not None:
                values = torch.where(padding, values.new_zeros(()), values)
        return SparseTensor(turned, values, self.keep, not self.keep_rows)

    def __mul__(self, scalar: float | Tensor) -> SparseTensor:
        """Scale every value; a tensor must broadcast over (*free, 1)."""
        if not is_factor(scalar):
            return NotImplemented
        return self.with_values(self.values * factor_of("*", scalar, self.values))

    __rmul__ = __mul__

    def __truediv__(self, scalar: float | Tensor) -> SparseTensor:
        """Divide every value."""
        if not is_factor(scalar):
            return NotImplemented
        return self.with_values(self.values / factor_of("/", scalar, self.values))

    def __neg__(self) -> SparseTensor:
        """Change every sign."""
        return self.with_values(-self.values)

    def __add__(self, other: SparseTensor) -> SparseTensor:
        """Sum of two tensors with the same layout key; a run-time mask of either is kept."""
        if not isinstance(other, SparseTensor):
            return NotImplemented
        if not same_positions(other.layout, self.layout):
            raise LayoutError(
                f"+: the layouts differ ({self.layout!r} and {other.layout!r}); add tensors made "
                "with one layout object, e.g. sparsify(x, …, layout=s.layout)"
            )
        masks = [m for m in (self.keep, other.keep) if m is not None]
        if len(masks) == 2 and self.keep_rows != other.keep_rows:
            raise LayoutError("+: one tensor carries a key mask, the other a row mask")
        keep = masks[0] & masks[1] if len(masks) == 2 else (masks[0] if masks else None)
        rows = self.keep_rows if self.keep is not None else other.keep_rows
        values = self.values + other.values
        return SparseTensor(self.layout, values, keep, rows)

    def __radd__(self, other: object) -> SparseTensor:
        # Not left to Python, which would have lists and arrays speak of concatenation.
        raise TypeError(
            f"+: a {kind_of(other)} and a SparseTensor given, two SparseTensors expected; map adds "
            "by position"
        )

    def __sub__(self, other: SparseTensor) -> SparseTensor:
        """Difference of two tensors with the same layout key."""
        return self + (-other) if isinstance(other, SparseTensor) else NotImplemented

    def __repr__(self) -> str:
        extra = "" if self.keep is None else (", row mask" if self.keep_rows else ", key mask")
        return (
            f"SparseTensor({'×'.join(map(str, self.shape))}, {type(self.layout).__name__}, "
            f"{str(self.dtype).removeprefix('torch.')}, nnz={self.nnz}, "
            f"density={self.density:.4g}{extra})"
        )


@constant
def _order(layout: Layout) -> tuple[Tensor, Tensor | None]:
    """The slot each slot of the transpose takes its value from, and which of those are padding."""
    order = layout.transpose_slots()
    padding = order < 0
    return order.clamp(min=0), padding if bool(padding.any()) else None


def gather_mask(layout: Layout, keep: Tensor, over_rows: bool, free: int) -> Tensor:
    """A run-time mask at every slot: bool, broadcastable to values (*free, slots).

    Args:
        layout: the positions.
        keep: bool (n,) or (B, n), True = kept; n is nk, or nq when over_rows.
        over_rows: the mask is over rows.
        free: number of free dimensions of the values.
    """
    b, h = layout.lead
    index = fact(layout, "indices")[0 if over_rows else 1]
    if keep.dim() == 1:
        return keep[index]
    if b > 1:
        if keep.shape[0] not in (1, b):
            raise ShapeError(f"key_mask has batch {keep.shape[0]}, the layout {b}")
        batch = layout.slot_entry() // h
        return keep.expand(b, -1)[batch, index]
    # (B, slots), then the head dimension, which is free unless the layout varies over heads.
    gathered = keep[:, index]
    heads_free = 1 if h == 1 else 0
    if free < 1 + heads_free:
        raise ShapeError(
            f"key_mask {tuple(keep.shape)} has a batch dimension but the tensor has none; "
            f"give a mask of shape ({keep.shape[1]},)"
        )
    return gathered.reshape(keep.shape[0], *([1] * heads_free), gathered.shape[1])


def _flatten_sparse(s: SparseTensor) -> tuple[list[Any], Any]:
    return [s.layout, s.values, s.keep], s.keep_rows


def _unflatten_sparse(children: Any, keep_rows: bool) -> SparseTensor:
    # Transformations may put non-tensors (None, specs) in the leaves: skip the shape check then.
    layout, values, keep = children
    made = object.__new__(SparseTensor)
    for name, value in (
        ("layout", layout),
        ("values", values),
        ("keep", keep),
        ("keep_rows", keep_rows),
    ):
        object.__setattr__(made, name, value)
    return made


pytree.register_pytree_node(
    SparseTensor,
    _flatten_sparse,
    _unflatten_sparse,
    serialized_type_name="mixgrain.SparseTensor",
)
