"""As calls.py, of what stands between mixgrain and others: interchange, modules, transformers."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numpy as np
import torch
from hostile.calls import Call

import mixgrain as mg
from mixgrain import interchange as X
from mixgrain import patterns as P
from mixgrain.formats.errors import BackendUnavailableError

N = 32


def _weight(kind: str = "row", **options: Any) -> mg.SparseTensor:
    g = torch.Generator().manual_seed(5)
    return mg.sparsify(torch.randn(N, N, generator=g), kind, **options)


def _kept(pattern: Any) -> Any:
    """A pattern, asked for what it keeps, or a SparseTensor, checked."""
    if isinstance(pattern, mg.SparseTensor):
        pattern.layout.validate()
        return pattern.to_dense()
    return pattern.dense(*pattern.distinct[0].shape)


def _dense_of(make: Any) -> Any:
    def made(**kwargs: Any) -> Any:
        return _kept(make(**kwargs))

    return made


def _where_there(function: Any) -> Any:
    """Nothing where CuPy or transformers is not installed."""

    @functools.wraps(function)
    def called(**kwargs: Any) -> Any:
        with contextlib.suppress(BackendUnavailableError):
            return function(**kwargs)

    return called


def _adaptable() -> torch.nn.Module:
    """One layer that adapt knows."""
    try:
        from transformers.models.longformer.configuration_longformer import LongformerConfig
        from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
    except ImportError:
        return torch.nn.Linear(1, 1)
    config = LongformerConfig(hidden_size=8, num_attention_heads=2, attention_window=[4])
    return torch.nn.ModuleList([LongformerSelfAttention(config, 0)])


def _sparse_attention(**kwargs: Any) -> Any:
    layer = mg.SparseAttention(**kwargs)
    return layer(
        torch.ones(1, N, layer.embed_dim),
        *(torch.ones(1, N, other.in_features) for other in (layer.k_proj, layer.v_proj)),
    )


def _sparse_linear(**kwargs: Any) -> Any:
    layer = mg.SparseLinear(**kwargs)
    x = torch.ones(2, layer.in_features, device=layer.values.device, dtype=layer.values.dtype)
    return layer(x) if layer.positions.layout is not None else layer


def _load(module: torch.nn.Module, name: str) -> Any:
    """Load a state dict in which one entry is another value; torch collects what is wrong."""

    def load(value: Any) -> None:
        state = dict(module.state_dict())
        state[name] = value
        try:
            module.load_state_dict(state)
        except RuntimeError as error:  # torch's own class for what modules report
            raise mg.LayoutError(str(error)[:600]) from error

    return load


def exchange_calls() -> dict[str, Call]:
    """Name -> (function, keyword arguments), made anew."""
    p, row, w = P.window(3), P.window(3).to_layout("row", N, N), _weight()
    of = {"source": p, "nq": N, "nk": N}
    half = mg.sparsify(torch.ones(32, 64), "nm", prune=True, n=2, m=4).to(torch.float16)
    packed, meta = X.to_semi_structured(half)
    blocks = X.to_flash_blocks(p, N, N, 16)
    bsa = X.to_bsa(P.blocks(torch.ones(2, 2) > 0, 16), N, N, size=16)
    attention = mg.SparseAttention(16, 2, p)
    linear = mg.SparseLinear(N, N, row)
    return {
        "interchange.to_scipy": (X.to_scipy, {"s": w, "format": "csr"}),
        "interchange.to_torch": (X.to_torch, {"s": w, "layout": torch.sparse_csr}),
        "interchange.to_cupy": (_where_there(X.to_cupy), {"s": w, "format": "csr"}),
        "interchange.to_semi_structured": (X.to_semi_structured, {"s": half}),
        "interchange.to_edges": (X.to_edges, {**of, "flow": "source_to_target"}),
        "interchange.to_block_mask": (X.to_block_mask, {**of, "block_size": 16, "device": "cpu"}),
        "interchange.to_flash_blocks": (X.to_flash_blocks, {
            **of, "block_size": (16, 32), "compact": True}),
        "interchange.to_intervals": (X.to_intervals, {**of, "batch": 1, "max_intervals": 10}),
        "interchange.to_bsa": (X.to_bsa, {
            "source": P.full(), "nq": N, "nk": N, "size": 16, "batch": 1, "heads": 1}),
        "interchange.to_flashmask": (X.to_flashmask, {**of, "causal": None, "columns": None}),
        "interchange.from_dlpack": (X.from_dlpack, {"array": np.ones(3)}),
        "interchange.from_scipy": (_dense_of(X.from_scipy), {"matrix": X.to_scipy(w)}),
        "interchange.from_torch": (_dense_of(X.from_torch), {"matrix": X.to_torch(w)}),
        "interchange.from_cupy": (_dense_of(X.from_cupy), {"matrix": X.to_scipy(w)}),
        "interchange.from_semi_structured": (
            _dense_of(X.from_semi_structured), {"packed": packed, "meta": meta}),
        "interchange.from_edges": (_dense_of(X.from_edges), {
            "edge_index": torch.tensor([[0, 2, 1], [3, 1, 0]]), "shape": (4, 3),
            "edge_weight": torch.ones(3), "flow": "source_to_target"}),
        "interchange.from_edges, pattern": (_dense_of(X.from_edges), {
            "edge_index": torch.tensor([[0, 2, 1], [3, 1, 0]]), "shape": (4, 3)}),
        "interchange.from_block_mask": (_dense_of(X.from_block_mask), {
            "bm": X.to_block_mask(p, N, N, 16)}),
        "interchange.from_flash_blocks": (_dense_of(X.from_flash_blocks), {
            "blocks": blocks, "shape": (N, N), "block_size": 16, "mask_mod": blocks.mask_mod}),
        "interchange.from_flash_blocks, tuple": (
            lambda a, b, c, d: _kept(X.from_flash_blocks(
                (a, b, c, d), (N, N), 16, blocks.mask_mod)),
            dict(zip("abcd", blocks[:4], strict=True))),
        "interchange.from_intervals": (_dense_of(X.from_intervals), {
            "mask_func": X.to_intervals(p, N, N), "shape": (N, N), "batch": 1}),
        "interchange.from_bsa": (_dense_of(X.from_bsa), {
            "q2k_block_index": bsa.q2k_block_index, "shape": (N, N),
            "q2k_block_nums": bsa.q2k_block_nums, "block_sizes": torch.tensor([16, 5]),
            "size": 16}),
        "interchange.from_flashmask": (_dense_of(X.from_flashmask), {
            "startend_row_indices": X.to_flashmask(p, N, N).startend_row_indices,
            "shape": (N, N), "causal": False, "heads": 1}),
        "SparseTensor.to_layout": (w.to_layout, {"target": "mixed", "size": 16, "costs": None}),
        "patterns.from_layout, dense": (_dense_of(P.from_layout), {"layout": row}),
        "huggingface.adapt": (_where_there(mg.huggingface.adapt), {"model": _adaptable()}),
        "huggingface.register": (_where_there(mg.huggingface.register), {
            "name": "mixgrain-hostile", "impl": "auto"}),
        "LayoutModule": (mg.LayoutModule, {"layout": row}),
        "LayoutModule.load_state_dict": (_load(mg.LayoutModule(row), "columns"),
                                         {"value": row.columns}),
        "LayoutModule, empty": (_load_empty, {"value": row.columns}),
        "LayoutModule, extra": (_load(mg.LayoutModule(row), "_extra_state"),
                                {"value": mg.LayoutModule(row).get_extra_state()}),
        "SparseLinear": (_sparse_linear, {
            "in_features": N, "out_features": N, "layout": row, "bias": True, "kind": "mixed",
            "size": 16, "device": "cpu", "dtype": None}),
        "SparseLinear, pattern": (_sparse_linear, {
            "in_features": N, "out_features": N, "layout": p, "kind": "block", "size": 16}),
        "SparseLinear.from_sparse": (mg.SparseLinear.from_sparse, {"s": w, "bias": torch.ones(N)}),
        "SparseLinear.from_linear": (mg.SparseLinear.from_linear, {
            "dense": torch.nn.Linear(N, N), "kind": "row", "prune": True, "density": 0.5}),
        "SparseLinear.forward": (mg.SparseLinear(N, N, row), {"x": torch.ones(2, N)}),
        "SparseLinear.load_state_dict": (_load(linear, "values"), {"value": linear.values}),
        "SparseLinear, extra": (_load(linear, "positions._extra_state"),
                                {"value": linear.positions.get_extra_state()}),
        "SparseAttention": (_sparse_attention, {
            "embed_dim": 16, "num_heads": 2, "pattern": p, "num_kv_heads": 1, "bias": True,
            "impl": "auto", "dropout": 0.0, "kdim": 16, "vdim": 16, "device": "cpu",
            "dtype": None}),
        "SparseAttention, layout": (_sparse_attention, {
            "embed_dim": 16, "num_heads": 2, "pattern": row}),
        "SparseAttention.from_multihead": (mg.SparseAttention.from_multihead, {
            "dense": torch.nn.MultiheadAttention(16, 2), "pattern": p, "impl": "auto"}),
        "SparseAttention.forward": (attention, {
            "query": torch.ones(1, N, 16), "key": torch.ones(1, N, 16),
            "value": torch.ones(1, N, 16), "key_mask": torch.ones(1, N, dtype=torch.bool),
            "pattern": p}),
        "SparseAttention.load_state_dict": (
            _load(mg.SparseAttention(16, 2, row), "positions.columns"), {"value": row.columns}),
    }  # fmt: skip


def _load_empty(value: Any) -> None:
    """A state dict that brings its positions."""
    state = dict(mg.LayoutModule(P.window(3).to_layout("row", N, N)).state_dict())
    state["columns"] = value
    module = mg.LayoutModule()
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise mg.LayoutError(str(error)[:600]) from error
    assert module.layout is not None
    module.layout.validate()
