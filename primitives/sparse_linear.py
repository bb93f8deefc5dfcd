"""SparseLinear: torch.nn.Linear with a sparse weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from mixgrain.formats.arguments import as_device, as_flag, as_size, check_dense
from mixgrain.formats.errors import DtypeError, LayoutError, ShapeError, UnsupportedError
from mixgrain.formats.layout import Layout
from mixgrain.formats.pattern import Pattern
from mixgrain.formats.sparse import SparseTensor
from mixgrain.formats.sparsify import sparsify

from .activations import check_activation
from .checks import check_dtype
from .layout_module import LayoutModule
from .linear import linear


class SparseLinear(torch.nn.Module):
    """``act(x @ w.T + bias)`` with a weight that holds values at fixed positions only.

    Only kept values are parameters: they alone get gradients, and an optimiser's step keeps the
    positions. What fills up a layout (see ``Layout``) is zero, gets zero gradients and stays zero.

    Attributes:
        in_features: n_in.
        out_features: n_out.
        values: Parameter (slots,), the values in the order of the layout.
        bias: Parameter (n_out,), or None.
        positions: LayoutModule with the layout, (n_out, n_in).
        activation: name of what is applied to the result, as in ``linear``, or None. It is no part
            of the state dict.
    """

    in_features: int
    out_features: int
    values: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    activation: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        layout: Layout | Pattern | None = None,
        bias: bool = True,
        kind: str = "mixed",
        size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activation: str | None = None,
    ) -> None:
        """A layer with random values at given positions.

        Args:
            in_features: n_in, columns of x.
            out_features: n_out, columns of the result.
            layout: (n_out, n_in), any layout; or a pattern, row i of the weight being query i.
                None = the layer is empty until ``load_state_dict`` brings its positions and values.
            bias: whether to add a bias.
            kind: layout that a pattern becomes, "block", "row" or "mixed".
            size: side of its blocks.
            device: of the parameters and positions; on "meta" the positions are on the CPU.
            dtype: of the parameters.
            activation: None, "gelu", "gelu_tanh", "silu" or "relu"; see ``linear``.

        Raises:
            LayoutError: no layout or pattern, or one without linear layers (P.nm chooses by
                score: see ``from_linear`` for N:M weights).
            ShapeError: a layout of another shape, or with leading dimensions.
            UnsupportedError: another activation.
        """
        super().__init__()
        check_activation("SparseLinear", activation)
        self.activation = activation
        self.in_features, self.out_features = (
            as_size("SparseLinear", name, n)
            for name, n in (("in_features", in_features), ("out_features", out_features))
        )
        if device is not None:
            device = as_device("SparseLinear", device)
        if dtype is not None:
            check_dtype("SparseLinear", "dtype", dtype)
        target = torch.empty(0, device=device, dtype=dtype)
        place = torch.device("cpu") if target.is_meta else target.device
        shape = (self.out_features, self.in_features)
        if isinstance(layout, Pattern):
            layout = layout.to_layout(kind, *shape, size=size, device=place)
        if layout is not None:
            _check(layout, shape)
            layout = layout.to(place)
        slots = 0 if layout is None else layout.slots
        self.values = torch.nn.Parameter(target.new_empty(slots))
        self.positions = LayoutModule(layout)
        if as_flag("SparseLinear", "bias", bias):
            self.bias = torch.nn.Parameter(target.new_empty(self.out_features))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @classmethod
    def from_sparse(
        cls, s: SparseTensor, bias: Tensor | None = None, activation: str | None = None
    ) -> Self:
        """A layer that computes ``linear(x, s, bias, activation)``.

        Args:
            s: (n_out, n_in), without a run-time mask; its values are copied.
            bias: (n_out,), copied, or None.
            activation: as for the layer.

        Raises:
            LayoutError: no SparseTensor, or one with a run-time mask.
            ShapeError: leading dimensions, or a bias that does not fit.
        """
        if not isinstance(s, SparseTensor) or s.keep is not None:
            given = "a run-time mask" if isinstance(s, SparseTensor) else type(s).__name__
            raise LayoutError(
                f"SparseLinear.from_sparse: given {given}; expected the SparseTensor of a weight, "
                "e.g. of sparsify or load"
            )
        if s.values.dim() != 1:
            raise ShapeError(
                f"SparseLinear.from_sparse: s is {tuple(s.shape)}; expected (n_out, n_in)"
            )
        n_out, n_in = s.layout.shape
        if bias is not None:
            check_dense("SparseLinear.from_sparse", "bias", bias)
        if bias is not None and tuple(bias.shape) != (n_out,):
            raise ShapeError(
                f"SparseLinear.from_sparse: bias has shape {tuple(bias.shape)}; expected ({n_out},)"
            )
        _check(s.layout, (n_out, n_in))
        has_bias = bias is not None
        made = cls(n_in, n_out, bias=has_bias, device="meta", dtype=s.dtype, activation=activation)
        made.positions = LayoutModule(s.layout)
        made.values = torch.nn.Parameter(s.values.detach().clone())
        if bias is not None:
            made.bias = torch.nn.Parameter(bias.detach().clone())
        return made

    @classmethod
    def from_linear(
        cls,
        dense: torch.nn.Linear,
        kind: str | None = None,
        activation: str | None = None,
        **options: Any,
    ) -> Self:
        """A layer with the weight of a dense one, in a layout or pruned to it.

        Args:
            dense: the layer; it is left as it is.
            kind: "tile", "nm", "block", "row" or "mixed".
            activation: as for the layer: what follows the dense one.
            options: as for ``sparsify``: prune=True to drop what is small, with density, n and m,
                or size; layout= to take given positions.

        Raises:
            LayoutError: as ``sparsify``; elements that the layout cannot hold, without prune=True.
        """
        if not isinstance(dense, torch.nn.Linear):
            raise LayoutError(
                f"SparseLinear.from_linear: given a {type(dense).__name__}, expected a "
                "torch.nn.Linear; for a sparse weight use from_sparse"
            )
        sparse = sparsify(dense.weight.detach(), kind, **options)
        made = cls.from_sparse(sparse, dense.bias, activation)
        made.values.requires_grad_(dense.weight.requires_grad)
        if made.bias is not None:
            made.bias.requires_grad_(dense.bias.requires_grad)
        return made.train(dense.training)

    @property
    def weight(self) -> SparseTensor:
        """(n_out, n_in): the layout and the values, which are the parameter itself.

        Raises:
            LayoutError: the layer is empty still.
        """
        layout = self.positions.layout
        if layout is None:
            raise LayoutError(
                "SparseLinear: the layer has no positions yet; load a state dict, or make it with "
                "a layout"
            )
        return SparseTensor(layout, self.values)

    def reset_parameters(self) -> None:
        """Draw values and bias as torch.nn.Linear does, uniform in ± 1/sqrt(n_in)."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        if self.positions.layout is not None:
            torch.nn.init.uniform_(self.values, -bound, bound)
            live = self.positions.layout.live()
            if live is not None and not self.values.is_meta:
                with torch.no_grad():
                    self.values.masked_fill_(~live, 0.0)
        if self.bias is not None:
            torch.nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in) -> (..., n_out); see ``mixgrain.linear``."""
        return linear(x, self.weight, self.bias, self.activation)

    def to_dense(self) -> Tensor:
        """The weight as a dense (n_out, n_in) tensor, +0 where nothing is kept; differentiable."""
        return self.weight.to_dense()

    def to_linear(self) -> torch.nn.Linear:
        """A torch.nn.Linear that computes the same, with copies of the parameters.

        Raises:
            UnsupportedError: the layer has an activation.
        """
        if self.activation is not None:
            raise UnsupportedError(
                f"SparseLinear.to_linear: the layer applies {self.activation!r}, for which a "
                "torch.nn.Linear has no place; set layer.activation = None and put the activation "
                "behind the new layer"
            )
        weight = self.to_dense().detach()
        made = torch.nn.Linear(self.in_features, self.out_features, bias=self.bias is not None,
                               device="meta", dtype=weight.dtype)  # fmt: skip
        made.weight = torch.nn.Parameter(weight, requires_grad=self.values.requires_grad)
        if self.bias is not None:
            made.bias = torch.nn.Parameter(
                self.bias.detach().clone(), requires_grad=self.bias.requires_grad
            )
        return made.train(self.training)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if f"{prefix}weight" in state_dict and f"{prefix}values" not in state_dict:
            error_msgs.append(
                f"{prefix}weight: the state dict holds a dense weight; load it into a "
                "torch.nn.Linear and convert that with SparseLinear.from_linear"
            )
            return
        for name in ("values", "bias"):
            if state_dict.get(prefix + name) is None:  # missing, which torch reports
                continue
            try:
                check_dense("SparseLinear", prefix + name, state_dict[prefix + name])
            except DtypeError as error:
                error_msgs.append(str(error))
                return
        if self.positions.layout is None:
            self._adopt(state_dict, prefix, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _adopt(self, state: Mapping[str, Any], prefix: str, errors: list[str]) -> None:
        """Take positions from a state dict, if they are those of a layer like this."""
        found = LayoutModule()
        found.adopt(state, f"{prefix}positions.", errors)
        if found.layout is None:
            return
        try:
            _check(found.layout, (self.out_features, self.in_features))
        except ShapeError as error:
            errors.append(f"{prefix}{error}")
            return
        self.positions = found
        if not self.values.is_meta:
            self.positions.to(self.values.device)
        # The parameter stays the same object: an optimiser may hold it.
        self.values.data = self.values.data.new_empty(found.layout.slots)

    def extra_repr(self) -> str:
        """Sizes and the activation; the layout follows as a module of its own."""
        said = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )
        return said if self.activation is None else f"{said}, activation={self.activation!r}"


def _check(layout: object, shape: tuple[int, int]) -> None:
    if not isinstance(layout, Layout):
        raise LayoutError(
            f"SparseLinear: given a {type(layout).__name__} where a layout or pattern is expected; "
            "from_linear takes a dense layer, from_sparse a SparseTensor"
        )
    if layout.shape != shape or layout.lead != (1, 1):
        lead = "" if layout.lead == (1, 1) else f" that varies over (batch, heads) = {layout.lead}"
        raise ShapeError(
            f"SparseLinear: the layout is {layout.shape[0]}×{layout.shape[1]}{lead}; expected one "
            f"matrix of {shape[0]}×{shape[1]}, (out_features, in_features)"
        )
