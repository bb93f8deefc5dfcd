"""A call of every public function that works: what its arguments are replaced in, one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.formats.panel import PanelLayout
from mixgrain.primitives.softmax import softmax_backward

N, D = 20, 8
Call = tuple[Callable[..., Any], dict[str, Any]]


def _q(*lead: int, rows: int = N, columns: int = D) -> torch.Tensor:
    return torch.randn(*lead, rows, columns, generator=torch.Generator().manual_seed(rows))


def _scores() -> mg.SparseTensor:
    q = _q(1, 2)
    return mg.sddmm(q, q, P.window(3).to_layout("row", N, N))


def _weight() -> mg.SparseTensor:
    return mg.sparsify(_q(columns=N), "row")


def _attend(impl: str) -> Call:
    kwargs = {
        "q": _q(1, 2), "k": _q(1, 2), "v": _q(1, 2), "pattern_or_layout": P.window(3),
        "scale": None, "key_mask": torch.ones(1, N, dtype=torch.bool), "enable_gqa": False,
        "sink_logits": torch.zeros(2), "return_lse": True, "impl": impl,
    }  # fmt: skip
    return mg.attend, kwargs


def _used(**fields: Any) -> Any:
    """Everything a SparseTensor offers."""
    s = mg.SparseTensor(**fields)
    return s.to_dense(), s.live(), s.T, mg.spmm(s, _q()), repr(s), s.part(0), -s


def _valid(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(**kwargs: Any) -> Any:
        layout = make(**kwargs)
        layout.validate()
        return layout.mask()

    return made


def _net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8))


def _swapped(rule: Any, **options: Any) -> str:
    return str(mg.sparsify_model(_net(), rule, **options))


def calls(folder: Path) -> dict[str, Call]:
    """Name -> (function, keyword arguments), made anew."""
    q, s, w = _q(1, 2), _scores(), _weight()
    row, p = s.layout, P.window(3)
    choice = torch.tensor([0, 1], dtype=torch.uint8).expand(1, 4, 2, 2)
    mg.save(folder / "loaded", s)
    return {
        "sddmm": (mg.sddmm, {
            "q": q, "k": q, "layout": row, "scale": 1.0, "out_dtype": None,
            "key_mask": torch.ones(N, dtype=torch.bool)}),
        "sddmm, dynamic": (mg.sddmm, {"q": q, "k": q, "layout": P.nm(2, 4), "scale": 1.0}),
        "softmax": (mg.softmax, {"s": s, "return_lse": True, "out_dtype": None}),
        "softmax_backward": (softmax_backward, {
            "p": s, "grad": s, "grad_lse": torch.ones(1, 2, N)}),
        "spmm": (mg.spmm, {"s": s, "x": q}),
        "linear": (mg.linear, {
            "x": _q(columns=N), "w": w, "bias": torch.ones(N), "activation": "gelu",
        }),
        "attend": _attend("auto"),
        "attend, composed": _attend("composed"),
        "attend, reference": _attend("reference"),
        "merge": (mg.merge, {"o1": q, "lse1": q[..., 0], "o2": q, "lse2": q[..., 0]}),
        "explain": (mg.explain, {
            "pattern_or_layout": p, "nq": N, "nk": N, "head_dim": 64, "device": "cpu",
            "costs": None}),
        "sparsify": (mg.sparsify, {"dense": _q(columns=N), "kind": "row"}),
        "sparsify, pruned": (mg.sparsify, {
            "dense": _q(columns=N), "kind": "block", "prune": True, "size": 16, "density": 0.5}),
        "sparsify, nm": (mg.sparsify, {
            "dense": _q(columns=N), "kind": "nm", "prune": True, "n": 2, "m": 4}),
        "sparsify, sampled": (mg.sparsify, {"dense": _q(columns=N), "layout": row}),
        "sparsify, panel": (mg.sparsify, {
            "dense": torch.ones(N, N), "kind": "panel", "prune": True, "density": 0.5,
            "axis": "rows"}),
        "sparsify_model": (_swapped, {
            "rule": "mixed", "prune": True, "density": 0.5, "size": 16}),
        "sparsify_model, choice": (lambda choice: _swapped({"0": choice}), {"choice": "row"}),
        "sparsify_model, model": (
            lambda model: mg.sparsify_model(model, "row"), {"model": _net()}),
        "load_model": (lambda source: mg.load_model(_net(), source), {
            "source": _net().state_dict()}),
        "load_model, model": (lambda model: mg.load_model(model, _net().state_dict()), {
            "model": _net()}),
        "save": (mg.save, {"path": folder / "saved", "s": s}),
        "load": (mg.load, {"path": folder / "loaded"}),
        "SparseTensor": (_used, {
            "layout": row, "values": _q(columns=row.slots), "keep_rows": False,
            "keep": torch.ones(N, dtype=torch.bool)}),
        "SparseTensor.to": (s.to, {"target": "cpu"}),
        "SparseTensor.with_values": (s.with_values, {"values": s.values}),
        "SparseTensor.part": (s.part, {"i": 0}),
        "SparseTensor.map": (s.map, {"f": lambda v, i, j: v}),
        "SparseTensor.map, result": (
            lambda result: s.map(lambda v, i, j: result), {"result": s.values}),
        "SparseTensor *": (lambda other: s * other, {"other": 2.0}),
        "* SparseTensor": (lambda other: other * s, {"other": 2.0}),
        "SparseTensor /": (lambda other: s / other, {"other": 2.0}),
        "SparseTensor +": (lambda other: s + other, {"other": s}),
        "+ SparseTensor": (lambda other: other + s, {"other": s}),
        "SparseTensor -": (lambda other: s - other, {"other": s}),
        "Layout.to": (row.to, {"device": "cpu"}),
        "patterns.window": (P.window, {"left": 3, "right": 3}),
        "patterns.dilated": (P.dilated, {"radius": 3, "step": 2}),
        "patterns.sinks": (P.sinks, {"n": 3}),
        "patterns.global_tokens": (P.global_tokens, {"idx": [1, 2]}),
        "patterns.global_keys": (P.global_keys, {"idx": [1, 2]}),
        "patterns.global_queries": (P.global_queries, {"idx": [1, 2]}),
        "patterns.documents": (P.documents, {"ids": [0, 1]}),
        "patterns.blocks": (P.blocks, {
            "block_mask": torch.ones(2, 2, dtype=torch.bool), "size": 16}),
        "patterns.random": (P.random, {"density": 0.5, "seed": 0}),
        "patterns.random_blocks": (P.random_blocks, {"per_row": 1, "size": 16, "seed": 0}),
        "patterns.longformer": (P.longformer, {"window": 3, "global_idx": [0]}),
        "patterns.bigbird": (P.bigbird, {
            "size": 16, "window": 1, "random": 1, "globals": 1, "seed": 0}),
        "patterns.from_dense": (P.from_dense, {"mask": torch.ones(N, N, dtype=torch.bool)}),
        "patterns.from_csr": (P.from_csr, {
            "indptr": [0, 1, 2], "indices": [0, 1], "shape": (2, 2)}),
        "patterns.from_layout": (P.from_layout, {"layout": row}),
        "Costs": (mg.Costs, {
            "dense_flops": 1e12, "copy_bytes": 1e10, "gather_bytes": 1e10,
            "private_panel_factor": 1.3, "launch_seconds": 0.0, "element_bytes": 2,
            "slot_passes": 2.0, "head_dim": 64}),
        "patterns.per_head": (P.per_head, {"patterns": [P.causal()]}),
        "patterns.per_batch": (P.per_batch, {"patterns": [P.causal()]}),
        "patterns.nm": (P.nm, {"n": 2, "m": 4}),
        "Pattern |": (lambda other: P.causal() | other, {"other": p}),
        "Pattern &": (lambda other: P.causal() & other, {"other": p}),
        "Pattern -": (lambda other: P.causal() - other, {"other": p}),
        "| Pattern": (lambda other: other | P.causal(), {"other": p}),
        "Pattern.dense": (p.dense, {"nq": N, "nk": N, "device": "cpu"}),
        "Pattern.nnz": (p.nnz, {"nq": N, "nk": N}),
        "Pattern.density": (p.density, {"nq": N, "nk": N}),
        "Pattern.row": (p.row, {"i": 0, "nq": N, "nk": N}),
        "Pattern.block": (p.block, {"i": 0, "j": 0, "size": 16, "nq": N, "nk": N}),
        "Pattern.to_layout": (p.to_layout, {
            "kind": "mixed", "nq": N, "nk": N, "size": 16, "device": "cpu", "costs": None}),
        "RowLayout.from_csr": (_valid(mg.RowLayout.from_csr), {
            "shape": (2, 3), "row_offsets": torch.tensor([0, 1, 2]),
            "columns": torch.tensor([0, 1]), "lead": (1, 1), "entry": None}),
        "BlockLayout.from_blocks": (_valid(mg.BlockLayout.from_blocks), {
            "shape": (32, 48), "size": 16, "block_offsets": torch.tensor([0, 1, 2]),
            "block_columns": torch.tensor([0, 1]), "mask_index": torch.tensor([-1, 0]),
            "masks": torch.full((1, 16, 2), 7, dtype=torch.uint8), "lead": (1, 1),
            "entry": None}),
        "TileLayout.from_tiles": (_valid(mg.TileLayout.from_tiles), {
            "rows": torch.tensor([0, 1]), "columns": torch.tensor([0, 1]), "shape": (32, 48)}),
        "TileLayout.from_tile_mask": (_valid(mg.TileLayout.from_tile_mask), {
            "kept": torch.ones(2, 3, dtype=torch.bool), "shape": (32, 48)}),
        "NMLayout.from_choice": (_valid(mg.NMLayout.from_choice), {
            "choice": choice, "shape": (4, 8), "n": 2, "m": 4, "lead": (1, 1),
            "dtype": torch.float32, "encoding": None, "within": None}),
        "NMLayout.from_columns": (_valid(mg.NMLayout.from_columns), {
            "columns": choice + torch.tensor([0, 4])[:, None], "shape": (4, 8), "n": 2, "m": 4,
            "lead": (1, 1)}),
        "NMLayout.from_metadata": (_valid(mg.NMLayout.from_metadata), {
            "metadata": choice, "shape": (4, 8), "n": 2, "m": 4, "encoding": "bytes",
            "lead": (1, 1), "within": None}),
        "MixedLayout.from_parts": (_valid(mg.MixedLayout.from_parts), {
            "shape": (N, N), "blocks": None, "panels": None, "rest": row, "lead": (1, 1),
            "entry": None}),
        "PanelLayout.from_panels": (_valid(PanelLayout.from_panels), {
            "shape": (8, 8), "panels": [(range(2), torch.tensor([1, 3]), None)], "lead": (1, 1),
            "entry": None, "panel_entry": [0], "device": "cpu"}),
    }  # fmt: skip


# Public names without arguments to get wrong, or with a test of their own.
ELSEWHERE = {
    "LayoutError", "MixgrainError", "clear_caches", "patterns", "patterns.full", "patterns.causal",
    "patterns.from_block_mask", "interchange.BlockIndices", "interchange.Edges",
    "interchange.FlashBlocks", "interchange.FlashMask", "interchange.SemiStructured",
}  # fmt: skip
