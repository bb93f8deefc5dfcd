"""SparseLinear, SparseAttention and LayoutModule: what a model engineer does with a layer."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.formats.errors import DtypeError, LayoutError, ShapeError, UnsupportedError

KINDS = {
    "row": {"density": 0.3},
    "block": {"density": 0.5, "size": 16},
    "mixed": {"density": 0.3, "size": 16},
    "tile": {"density": 0.5},
    "nm": {"n": 1, "m": 4},
}


def layer_of(kind: str, bias: bool = True, seed: int = 0) -> mg.SparseLinear:
    torch.manual_seed(seed)
    dense = nn.Linear(40, 24, bias=bias)
    return mg.SparseLinear.from_linear(dense, kind, prune=True, **KINDS[kind])


def stored(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict that has been in a file, as torch.save with weights_only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_computes_as_the_dense_layer(kind: str, bias: bool) -> None:
    layer, x = layer_of(kind, bias), torch.randn(3, 5, 40)
    dense = layer.to_linear()
    assert isinstance(dense, nn.Linear) and (dense.bias is None) != bias
    torch.testing.assert_close(layer(x), dense(x))
    assert torch.equal(layer.to_dense(), dense.weight)
    again = mg.SparseLinear.from_linear(dense, layout=layer.positions.layout)
    assert torch.equal(again.values, layer.values) and torch.equal(again(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_training_keeps_the_positions(kind: str) -> None:
    layer, dense = layer_of(kind), layer_of(kind).to_linear()
    mask = layer.weight.with_values(torch.ones_like(layer.values)).to_dense() > 0
    optimisers = [torch.optim.AdamW(m.parameters(), 0.05, weight_decay=0.1) for m in (layer, dense)]
    for step in range(3):
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(step))
        for model, optimiser in zip((layer, dense), optimisers, strict=True):
            optimiser.zero_grad()
            model(x).square().sum().backward()
            if model is dense:
                dense.weight.grad *= mask
            optimiser.step()
    torch.testing.assert_close(layer.to_dense(), dense.weight * mask, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.bias, dense.bias, rtol=1e-4, atol=1e-5)
    assert bool((layer.to_dense()[~mask] == 0).all())
    live = layer.positions.layout.live()
    assert live is None or not layer.values[~live].any()


def test_initialised_as_torch_does() -> None:
    layer = mg.SparseLinear(400, 300, P.random(0.2, seed=1), kind="block", size=16)
    live = layer.positions.layout.live()
    assert not layer.values[~live].any()
    bound = 400**-0.5
    for drawn in (layer.values[live], layer.bias):
        assert 0.9 * bound < drawn.abs().max() <= bound
        torch.testing.assert_close(drawn.std(), torch.tensor(bound / 3**0.5), rtol=0.1, atol=0)
    before = layer.values.clone()
    layer.reset_parameters()
    assert not torch.equal(before, layer.values)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles(kind: str) -> None:
    layer, x = layer_of(kind), torch.randn(3, 40)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        # Buffers are the layout's own tensors, there as here.
        buffers = {b.data_ptr() for b in other.buffers() if b.numel()}
        assert buffers == {t.data_ptr() for t in other.positions.layout.tensors() if t.numel()}
        with torch.no_grad():
            other.values.zero_()
        assert layer.values.any()


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind: str) -> None:
    layer, x = layer_of(kind), torch.randn(3, 40)
    state = stored(layer.state_dict())
    for other in (
        mg.SparseLinear(40, 24),  # takes the positions from the state dict
        mg.SparseLinear(40, 24, layer.positions.layout),
        mg.SparseLinear(40, 24, layer.positions.layout, device="meta").to_empty(device="cpu"),
        mg.SparseLinear(40, 24, device="meta").to_empty(device="cpu"),
    ):
        result = other.load_state_dict(state)
        assert not result.missing_keys and not result.unexpected_keys
        assert torch.equal(other(x), layer(x))
    with torch.device("meta"):
        model = nn.Sequential(mg.SparseLinear(40, 24, layer.positions.layout))
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict({f"0.{name}": t for name, t in state.items()}, assign=True)
    assert torch.equal(model(x), layer(x))
    plain = load_safetensors(save_safetensors(dict(layer.state_dict())))
    other = mg.SparseLinear(40, 24)
    other.load_state_dict(plain)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("strict", [True, False])
def test_other_positions_are_refused(strict: bool) -> None:
    for one, other in [("row", "block"), ("nm", "tile"), ("row", "row"), ("mixed", "mixed")]:
        state = layer_of(one, seed=1).state_dict()
        with pytest.raises(RuntimeError, match="holds other positions") as error:
            layer_of(other).load_state_dict(state, strict=strict)
        assert f"({one}, 24×40, nnz=" in str(error.value)
    # The same tensors, read as another format.
    two = mg.SparseLinear.from_linear(nn.Linear(64, 32), "nm", prune=True)
    state = two.state_dict()
    text = bytes(state["positions._extra_state"].tolist()).replace(b'"n": 2', b'"n": 1')
    state["positions._extra_state"] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="holds other positions"):
        two.load_state_dict(state, strict=strict)


def test_a_dense_state_dict_says_what_to_do() -> None:
    for layer in (layer_of("row"), mg.SparseLinear(40, 24)):
        with pytest.raises(RuntimeError, match=r"dense weight.*SparseLinear.from_linear"):
            layer.load_state_dict(nn.Linear(40, 24).state_dict())


def test_an_empty_layer_says_so_and_checks_what_it_takes() -> None:
    empty, state = mg.SparseLinear(40, 24), layer_of("row").state_dict()
    with pytest.raises(LayoutError, match="no positions yet"):
        empty(torch.randn(3, 40))
    with pytest.raises(RuntimeError, match="expected one matrix of 24×41"):
        mg.SparseLinear(41, 24).load_state_dict(state)
    broken = dict(state) | {"positions.columns": state["positions.columns"] + 40}
    with pytest.raises(RuntimeError, match="no layout can be made of the state dict"):
        empty.load_state_dict(broken)
    broken = dict(state) | {"positions._extra_state": torch.tensor([1, 2], dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match="no layout can be made of the state dict"):
        empty.load_state_dict(broken)
    missing = {name: t for name, t in state.items() if not name.startswith("positions")}
    with pytest.raises(RuntimeError, match=r"positions\.columns"):
        layer_of("row").load_state_dict(missing)


@pytest.mark.parametrize("kind", KINDS)
def test_casts_and_moves(kind: str) -> None:
    layer, x = layer_of(kind), torch.randn(3, 40)
    tensors = [t.clone() for t in layer.positions.layout.tensors()]
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        cast = copy.deepcopy(layer).to(dtype)
        assert cast.values.dtype == cast.bias.dtype == dtype
        torch.testing.assert_close(cast(x.to(dtype)), layer(x).to(dtype), rtol=0.02, atol=0.02)
        for mine, was in zip(cast.positions.layout.tensors(), tensors, strict=True):
            assert torch.equal(mine, was)
    key = layer.positions.layout.key
    layer.half().float().to("cpu")
    assert layer.positions.layout.key == key  # no new plan
    meta = copy.deepcopy(layer).to("meta")
    assert meta.values.is_meta
    meta.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(meta(x), layer(x))


def test_saved_weight(tmp_path) -> None:
    layer, x = layer_of("mixed"), torch.randn(3, 40)
    mg.save(tmp_path / "w.safetensors", layer.weight)
    other = mg.SparseLinear.from_sparse(mg.load(tmp_path / "w.safetensors"), layer.bias)
    assert torch.equal(other(x), layer(x))
    assert other.bias is not layer.bias


def test_from_linear_keeps_what_is_frozen() -> None:
    dense = nn.Linear(40, 24).eval()
    dense.weight.requires_grad_(False)
    layer = mg.SparseLinear.from_linear(dense, "row")
    assert not layer.values.requires_grad and layer.bias.requires_grad and not layer.training
    assert not layer.to_linear().weight.requires_grad
    with pytest.raises(LayoutError, match="prune=True"):
        mg.SparseLinear.from_linear(dense, "nm")
    with pytest.raises(LayoutError, match=r"expected a torch\.nn\.Linear"):
        mg.SparseLinear.from_linear(nn.Conv1d(3, 3, 1), "row")


def test_what_is_no_weight_is_refused() -> None:
    with pytest.raises(LayoutError, match="from_linear takes a dense layer"):
        mg.SparseLinear(40, 24, torch.ones(24, 40))
    with pytest.raises(ShapeError, match=r"expected one matrix of 24×40"):
        mg.SparseLinear(40, 24, P.window(3).to_layout("row", 40, 24))
    with pytest.raises(ShapeError, match="varies over"):
        mg.SparseLinear(40, 24, P.per_head([P.window(1), P.window(2)]))
    with pytest.raises(LayoutError):
        mg.SparseLinear(40, 24, P.nm(2, 4))
    with pytest.raises(ShapeError, match="varies over"):
        mg.SparseLinear.from_sparse(mg.sparsify(torch.randn(2, 24, 40), "row"))
    with pytest.raises(ShapeError, match="n_out, n_in"):
        mg.SparseLinear.from_sparse(mg.sddmm(torch.randn(2, 5, 3), torch.randn(7, 3), P.window(1)))
    with pytest.raises(LayoutError, match="expected the SparseTensor"):
        mg.SparseLinear.from_sparse(torch.randn(24, 40))
    with pytest.raises(ShapeError, match="bias has shape"):
        mg.SparseLinear.from_sparse(layer_of("row").weight, torch.zeros(40))
    with pytest.raises(DtypeError, match="bias is a int; expected"):
        mg.SparseLinear.from_sparse(layer_of("row").weight, 3)
    for features in (None, 2.5, -1, "3"):
        with pytest.raises(LayoutError, match=r"in_features\): .* an integer >= 0 expected"):
            mg.SparseLinear(features, 24)


def test_a_layout_in_a_module_of_ones_own() -> None:
    class Graph(nn.Module):
        def __init__(self, pattern) -> None:
            super().__init__()
            self.edges = mg.LayoutModule(pattern.to_layout("row", 12, 12))

        def forward(self, x: Tensor) -> Tensor:
            return mg.spmm(mg.softmax(mg.sddmm(x, x, self.edges.layout)), x)

    graph, x = Graph(P.window(2)), torch.randn(12, 4)
    other = Graph(P.window(2))
    other.load_state_dict(stored(graph.state_dict()))
    assert torch.equal(other(x), graph(x))
    assert "edges.columns" in dict(graph.named_buffers())
    with pytest.raises(RuntimeError, match=r"edges\.layout: the state dict holds other positions"):
        Graph(P.window(3)).load_state_dict(graph.state_dict())
    with pytest.raises(LayoutError, match="expected a layout"):
        mg.LayoutModule(P.window(2))


# SparseAttention


@pytest.mark.parametrize("impl", ["fused", "composed"])
def test_attention_equals_torchs_module(impl: str) -> None:
    torch.manual_seed(0)
    pattern = P.causal() & (P.window(4) | P.global_keys([1]))
    for options in ({}, {"kdim": 12, "vdim": 20}, {"bias": False}):
        theirs = nn.MultiheadAttention(24, 4, batch_first=True, **options)
        for p in theirs.parameters():
            nn.init.normal_(p, std=0.3)
        mine = mg.SparseAttention.from_multihead(theirs, pattern, impl=impl)
        query, key = torch.randn(2, 9, 24), torch.randn(2, 11, options.get("kdim", 24))
        value = torch.randn(2, 11, options.get("vdim", 24))
        mask = ~pattern.dense(9, 11)
        dropped = torch.zeros(2, 11, dtype=torch.bool)
        dropped[1, 7:] = True
        for padding in (None, dropped):
            wanted = theirs(query, key, value, padding, need_weights=False, attn_mask=mask)[0]
            keep = None if padding is None else ~padding
            got = mine(query, key, value, key_mask=keep)
            rows = slice(None) if padding is None else slice(5)  # torch's rows without keys are NaN
            torch.testing.assert_close(got[:, rows], wanted[:, rows], rtol=1e-4, atol=1e-5)
        wanted = theirs(query[0], key[0], value[0], attn_mask=mask, need_weights=False)[0]
        torch.testing.assert_close(mine(query[0], key[0], value[0]), wanted, rtol=1e-4, atol=1e-5)


def test_attention_module() -> None:
    x = torch.randn(2, 13, 24)
    layer = mg.SparseAttention(24, 6, P.causal() & P.window(4), num_kv_heads=2, impl="composed")
    assert layer.k_proj.out_features == layer.v_proj.out_features == 8
    assert "causal() & window(4)" in repr(layer) and "num_kv_heads=2" in repr(layer)
    other = pickle.loads(pickle.dumps(layer))
    assert torch.equal(other(x), layer(x))
    # For one call, another pattern; a layer may have none of its own.
    bare = mg.SparseAttention(24, 6, None, num_kv_heads=2)
    bare.load_state_dict(layer.state_dict())
    torch.testing.assert_close(bare(x, pattern=P.full()), layer(x, pattern=P.full()))
    assert not torch.allclose(layer(x, pattern=P.full()), layer(x))
    with pytest.raises(LayoutError, match="pass pattern="):
        bare(x)
    # A layout is part of the state.
    fixed = mg.SparseAttention(24, 6, P.window(2).to_layout("block", 13, 13, 16), num_kv_heads=2)
    assert "positions.block_columns" in fixed.state_dict()
    assert torch.isfinite(fixed(x)).all()
    fixed.double()(x.double()).sum().backward()
    assert all(p.grad is not None for p in fixed.parameters())


def test_attention_refuses() -> None:
    with pytest.raises(UnsupportedError, match=r"dropout=0\.1"):
        mg.SparseAttention(24, 4, P.causal(), dropout=0.1)
    with pytest.raises(ShapeError, match="multiple of"):
        mg.SparseAttention(24, 5, P.causal())
    with pytest.raises(ShapeError, match="multiple of the second"):
        mg.SparseAttention(24, 4, P.causal(), num_kv_heads=3)
    with pytest.raises(UnsupportedError, match="give one of"):
        mg.SparseAttention(24, 4, P.causal(), impl="flash")
    with pytest.raises(LayoutError, match="from_dense"):
        mg.SparseAttention(24, 4, torch.ones(3, 3))
    for wrong in (None, 2.5, 0, "3"):
        with pytest.raises(LayoutError, match=r"num_heads\): .* an integer >= 1 expected"):
            mg.SparseAttention(24, wrong, P.causal())
        if wrong is not None:
            with pytest.raises(LayoutError, match=r"kdim\): .* an integer >= 1 expected"):
                mg.SparseAttention(24, 4, P.causal(), kdim=wrong)
    layer = mg.SparseAttention(24, 4, P.causal())
    with pytest.raises(DtypeError, match="key is a list; expected"):
        layer(torch.randn(2, 3, 24), [1.0])
    with pytest.raises(ShapeError, match=r"give all as \(B, N, features\)"):
        layer(torch.randn(2, 3, 4, 24))
    for option in ({"add_bias_kv": True}, {"add_zero_attn": True}, {"dropout": 0.2}):
        with pytest.raises(UnsupportedError):
            mg.SparseAttention.from_multihead(nn.MultiheadAttention(24, 4, **option), P.causal())
