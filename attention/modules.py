"""SparseAttention: multi-head attention over the positions a pattern keeps, as a module."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from mixgrain.formats.arguments import (
    as_device,
    as_flag,
    as_number,
    as_size,
    check_dense,
    kind_of,
)
from mixgrain.formats.errors import DtypeError, LayoutError, ShapeError, UnsupportedError
from mixgrain.formats.layout import Layout
from mixgrain.formats.pattern import Pattern
from mixgrain.primitives.checks import check_dtype
from mixgrain.primitives.layout_module import LayoutModule

from .arguments import IMPLS
from .attend import Impl, attend


class SparseAttention(torch.nn.Module):
    """Multi-head attention with a pattern, shaped after torch.nn.MultiheadAttention.

    Differences: tensors are batch first, a mask is True where a key is kept, key and value may be
    left out (self-attention), and only the output is returned.

    Attributes:
        embed_dim: E.
        num_heads: Hq, query heads of E / Hq features each.
        num_kv_heads: Hkv, key heads; Hq unless heads are grouped.
        pattern: the pattern; None where a layout was given, or where every call brings its own.
        positions: LayoutModule with the layout if one was given, else None.
        impl: as for ``attend``.
        q_proj: torch.nn.Linear, and so are k_proj, v_proj and out_proj.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        pattern: Pattern | Layout | None,
        num_kv_heads: int | None = None,
        bias: bool = True,
        impl: Impl = "auto",
        dropout: float = 0.0,
        kdim: int | None = None,
        vdim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A layer with random weights.

        Args:
            embed_dim: E, features of the query and of the output; a multiple of num_heads.
            num_heads: Hq.
            pattern: which keys each query sees, for all calls that bring no other; a layout fixes
                the numbers of queries and keys. None = every call brings one.
            num_kv_heads: Hkv, a divisor of Hq (grouped-query attention); None = Hq.
            bias: whether the projections have biases.
            impl: as for ``attend``.
            dropout: must be 0.
            kdim: features of the key; None = E.
            vdim: features of the value; None = E.
            device: of the parameters.
            dtype: of the parameters.

        Raises:
            ShapeError: heads that do not divide each other or E.
            LayoutError: neither a pattern nor a layout.
            UnsupportedError: dropout, or an unknown impl.
        """
        super().__init__()
        who = "SparseAttention"
        embed_dim = as_size(who, "embed_dim", embed_dim, 1)
        num_heads = as_size(who, "num_heads", num_heads, 1)
        heads = num_heads if num_kv_heads is None else num_kv_heads
        heads = as_size(who, "num_kv_heads", heads, 1)
        kdim, vdim = (
            n if n is None else as_size(who, name, n, 1)
            for name, n in (("kdim", kdim), ("vdim", vdim))
        )
        bias = as_flag(who, "bias", bias)
        if device is not None:
            device = as_device(who, device)
        if dtype is not None:
            check_dtype(who, "dtype", dtype)
        if embed_dim % num_heads:
            raise ShapeError(
                f"SparseAttention: embed_dim {embed_dim} and {num_heads} heads; give a multiple of "
                "the number of heads"
            )
        if num_heads % heads:
            raise ShapeError(
                f"SparseAttention: {num_heads} heads and {heads} key heads; the first must be a "
                "multiple of the second"
            )
        if as_number(who, "dropout", dropout):
            raise UnsupportedError(
                f"SparseAttention: dropout={dropout}; there is no dropout of attention "
                "probabilities; give 0 and drop from the output"
            )
        if not isinstance(impl, str) or impl not in IMPLS:
            raise UnsupportedError(
                f"SparseAttention: impl={impl!r:.80}; give one of {', '.join(IMPLS)}"
            )
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, heads
        self.head_dim = embed_dim // num_heads
        self.impl: Impl = impl
        self.pattern = pattern if isinstance(pattern, Pattern) else None
        self.positions = LayoutModule(pattern) if isinstance(pattern, Layout) else None
        if pattern is not None and self.pattern is None and self.positions is None:
            raise LayoutError(
                f"SparseAttention: given a {type(pattern).__name__} as the pattern; make one with "
                "mixgrain.patterns, e.g. patterns.from_dense(mask)"
            )
        narrow = heads * self.head_dim

        def project(n_in: int | None, n_out: int) -> torch.nn.Linear:
            return torch.nn.Linear(
                embed_dim if n_in is None else n_in, n_out, bias=bias, device=device, dtype=dtype
            )

        self.q_proj = project(embed_dim, embed_dim)
        self.k_proj = project(kdim, narrow)
        self.v_proj = project(vdim, narrow)
        self.out_proj = project(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights as torch.nn.MultiheadAttention does for separate projections."""
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            torch.nn.init.xavier_uniform_(layer.weight)
        self.out_proj.reset_parameters()
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)

    @classmethod
    def from_multihead(
        cls, dense: torch.nn.MultiheadAttention, pattern: Pattern | Layout | None,
        impl: Impl = "auto",
    ) -> Self:  # fmt: skip
        """A layer with the weights of a dense one, copied.

        Args:
            dense: batch first or not; this layer is batch first.
            pattern: as for the constructor.
            impl: as for ``attend``.

        Raises:
            TypeError: no torch.nn.MultiheadAttention.
            UnsupportedError: dropout, bias_k and bias_v, or add_zero_attn.
        """
        if not isinstance(dense, torch.nn.MultiheadAttention):
            raise TypeError(
                f"SparseAttention.from_multihead: dense is a {kind_of(dense)}; expected a "
                "torch.nn.MultiheadAttention"
            )
        if dense.bias_k is not None or dense.add_zero_attn:
            raise UnsupportedError(
                "SparseAttention.from_multihead: bias_k, bias_v and add_zero_attn add keys that no "
                "pattern names; append them to key and value"
            )
        weight, bias = dense.out_proj.weight, dense.in_proj_bias
        made = cls(
            dense.embed_dim, dense.num_heads, pattern, bias=bias is not None, impl=impl,
            dropout=dense.dropout, kdim=dense.kdim, vdim=dense.vdim, device=weight.device,
            dtype=weight.dtype,
        )  # fmt: skip
        parts = (
            (dense.q_proj_weight, dense.k_proj_weight, dense.v_proj_weight)
            if dense.in_proj_weight is None
            else dense.in_proj_weight.chunk(3)
        )
        with torch.no_grad():
            for n, layer in enumerate((made.q_proj, made.k_proj, made.v_proj)):
                layer.weight.copy_(parts[n])
                if bias is not None:
                    layer.bias.copy_(bias.chunk(3)[n])
            made.out_proj.weight.copy_(weight)
            if bias is not None:
                made.out_proj.bias.copy_(dense.out_proj.bias)
        return made.train(dense.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_mask: Tensor | None = None,
        pattern: Pattern | Layout | None = None,
    ) -> Tensor:
        """Attention of the projected tensors, projected.

        Args:
            query: (B, Nq, E) or (Nq, E).
            key: (B, Nk, kdim) or (Nk, kdim); None = query.
            value: (B, Nk, vdim) or (Nk, vdim); None = key.
            key_mask: bool (B, Nk) or (Nk,), True = kept.
            pattern: in place of the layer's own, for this call.

        Returns:
            (B, Nq, E) or (Nq, E). A query that sees no key gets the bias of the output.

        Raises:
            ShapeError: dimensions that do not fit each other or the layer, or another device.
            DtypeError: no dense tensors, or of another dtype than the layer.
            LayoutError: no pattern, or one that does not fit.
        """
        key = query if key is None else key
        value = key if value is None else value
        for name, given in (("query", query), ("key", key), ("value", value)):
            check_dense("SparseAttention", name, given)
        dims = query.dim()
        if dims not in (2, 3) or key.dim() != dims or value.dim() != dims:
            raise ShapeError(
                f"SparseAttention: query {tuple(query.shape)}, key {tuple(key.shape)}, value "
                f"{tuple(value.shape)}; give all as (B, N, features) or all as (N, features)"
            )
        kept = self._kept() if pattern is None else pattern
        if dims == 2:
            query, key, value = query[None], key[None], value[None]
        o = attend(
            self._heads(_projected(self.q_proj, "query", query), self.num_heads),
            self._heads(_projected(self.k_proj, "key", key), self.num_kv_heads),
            self._heads(_projected(self.v_proj, "value", value), self.num_kv_heads),
            kept, key_mask=key_mask, enable_gqa=True, impl=self.impl,
        )  # fmt: skip
        out: Tensor = self.out_proj(o.transpose(1, 2).flatten(2))
        return out[0] if dims == 2 else out

    def _kept(self) -> Pattern | Layout:
        kept = self.pattern if self.positions is None else self.positions.layout
        if kept is None:
            raise LayoutError(
                "SparseAttention: neither the layer nor this call has a pattern; pass pattern="
            )
        return kept

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        """(B, N, heads * D) -> (B, heads, N, D), a view."""
        split: Tensor = x.unflatten(-1, (heads, self.head_dim))
        return split.transpose(1, 2)

    def extra_repr(self) -> str:
        """Sizes, the way of computing and the pattern."""
        pattern = "" if self.pattern is None else f", pattern={self.pattern!r}"
        grouped = f", num_kv_heads={self.num_kv_heads}"
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"
            f"{grouped if self.num_kv_heads != self.num_heads else ''}, impl={self.impl!r}{pattern}"
        )


def _projected(layer: torch.nn.Module, name: str, x: Tensor) -> Tensor:
    """layer(x), once x fits; what stands in for a Linear looks at x itself."""
    if type(layer) is torch.nn.Linear:
        weight, op = layer.weight, "SparseAttention"
        if x.shape[-1] != layer.in_features:
            raise ShapeError(
                f"{op}: {name} has shape {tuple(x.shape)}; expected {layer.in_features} features"
            )
        if x.device != weight.device:
            raise ShapeError(f"{op}: {name} on {x.device}, weights on {weight.device}; move one")
        # Under autocast the product casts both.
        if x.dtype != weight.dtype and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
            raise DtypeError(
                f"{op}: {name} is {x.dtype}, weights are {weight.dtype}; expected one dtype; cast "
                f"{name} or the layer with .to(dtype)"
            )
    projected: Tensor = layer(x)
    return projected
