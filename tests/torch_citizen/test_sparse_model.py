"""sparsify_model and load_model: whole models, what they share, how they are stored and trained."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.formats.errors import FileFormatError, LayoutError, ShapeError, UnsupportedError

CHOICES = {
    "tile": {"kind": "tile", "prune": True, "density": 0.5},
    "2:4": {"kind": "2:4", "prune": True},
    "1:2": {"kind": "1:2", "prune": True},
    "block": {"kind": "block", "prune": True, "density": 0.5, "size": 16},
    "row": {"kind": "row", "prune": True, "density": 0.3},
    "mixed": {"kind": "mixed", "prune": True, "density": 0.3, "size": 16},
    "rows": {"kind": "panel", "prune": True, "density": 0.5, "axis": "rows"},
    "columns": {"kind": "panel", "prune": True, "density": 0.5, "axis": "columns"},
}
PRUNED = CHOICES["2:4"]


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    """Blocks between an embedding and an output layer, which may share their weight."""

    def __init__(self, tied: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(20, 32)
        self.blocks = nn.ModuleList(Block(32, 48) for _ in range(2))
        self.head = nn.Linear(32, 20)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


TOKENS = torch.arange(60).reshape(4, 15) % 20


def layers(model: nn.Module) -> dict[str, mg.SparseLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, mg.SparseLinear)}


def masked(model: nn.Module, sparse: nn.Module) -> nn.Module:
    """The dense model with the weights of the sparse one."""
    model = copy.deepcopy(model)
    for name, layer in layers(sparse).items():
        model.get_submodule(name).weight = nn.Parameter(layer.to_dense().detach())
    return model


# Rules


@pytest.mark.parametrize("name", CHOICES)
def test_computes_as_the_pruned_dense_model(name: str) -> None:
    dense, model = Model(), Model()
    choice = dict(CHOICES[name])
    report = mg.sparsify_model(model, choice.pop("kind"), **choice)
    assert list(layers(model)) == [
        "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head",
    ]  # fmt: skip
    torch.testing.assert_close(model(TOKENS), masked(dense, model)(TOKENS))
    for at, layer in layers(model).items():
        options = {"kind": "nm", "n": int(name[0]), "m": int(name[2])} if ":" in name else {}
        expected = mg.sparsify(dense.get_submodule(at).weight, **{**CHOICES[name], **options})
        assert torch.equal(layer.to_dense(), expected.to_dense())
    kept = sum(layer.weight.nnz for layer in layers(model).values())
    size = sum(dense.get_submodule(at).weight.numel() for at in layers(model))
    assert report.density == kept / size and not report.left


def test_report_counts_bytes_and_prints() -> None:
    model = Model()
    held = sum(t.nbytes for t in model.parameters())
    report = mg.sparsify_model(model, {"blocks.*.up": PRUNED, "head": None, "blocks.1.*": "row"})
    assert [line.name for line in report.converted] == [
        "blocks.0.up",
        "blocks.1.up",
        "blocks.1.down",
    ]
    assert report.before == held
    assert report.after == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    line = report.converted[0]
    layer = model.blocks[0].up
    assert (line.shape, line.layout, line.nnz, line.before) == ((48, 32), "nm 2:4", 768, 6144)
    assert line.after == layer.values.nbytes + sum(b.nbytes for b in layer.buffers())
    assert dict(report.left) == dict.fromkeys(["blocks.0.down", "head"], "the rule leaves it")
    text = str(report).splitlines()
    assert text[0].split() == [
        "layer",
        "shape",
        "layout",
        "nnz",
        "density",
        "before",
        "after",
        "ratio",
    ]
    assert text[1].split()[:5] == ["blocks.0.up", "48×32", "nm", "2:4", "768"]
    assert text[-2] == "left as it was: blocks.0.down, head: the rule leaves it"
    assert text[-1].startswith(f"the whole model: {held:,} bytes before, {report.after:,} after")


def test_the_first_glob_that_matches_decides() -> None:
    model = Model()
    mg.sparsify_model(model, {"blocks.0.*": "dense", "*.up": PRUNED, "blocks.*": CHOICES["tile"]})
    kinds = {name: layer.weight.layout.kind for name, layer in layers(model).items()}
    assert kinds == {"blocks.1.up": "nm", "blocks.1.down": "tile"}


def test_a_rule_may_be_a_function() -> None:
    model, seen = Model(), []
    layout = P.random(0.2, seed=3).to_layout("row", 48, 32)
    weight = mg.sparsify(torch.randn(32, 48), "row", prune=True, density=0.1)
    choices = {"blocks.0.up": layout, "blocks.0.down": weight, "blocks.1.up": {"layout": layout}}

    def rule(name: str, layer: nn.Linear) -> object:
        assert type(layer) is nn.Linear
        seen.append(name)
        return choices.get(name)

    up = model.blocks[0].up.weight.detach()
    mg.sparsify_model(model, rule)
    assert seen == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]
    assert list(layers(model)) == list(choices)
    assert torch.equal(model.blocks[0].up.to_dense(), up * layout.mask()[0, 0])
    assert torch.equal(model.blocks[0].down.to_dense(), weight.to_dense())
    assert model.blocks[0].down.values is not weight.values


def test_nothing_is_lost_without_prune() -> None:
    model = Model()
    with torch.no_grad():
        model.head.weight[:, ::2] = 0
    with pytest.raises(LayoutError, match=r"layer 'blocks\.0\.up': .*prune=True"):
        mg.sparsify_model(model, "2:4")
    assert not layers(model)  # not one of them
    before = copy.deepcopy(model)
    mg.sparsify_model(model, {"head": "2:4", "*": "row"})
    torch.testing.assert_close(model(TOKENS), before(TOKENS))
    assert torch.equal(model.head.to_dense(), before.head.weight)


WRONG = {
    "no layer": ({"blocks.*.upp": "row"}, {}, r"no linear layer is called 'blocks\.\*\.upp'"),
    "no kind": ({"head": "diagonal"}, {}, r"'head': 'diagonal' given; expected a kind \('tile'"),
    "kind for all": ("csr", {}, "'csr' given; expected a kind"),
    "no such option": ("tile", {"sparsity": 0.5}, "option 'sparsity'; expected those of sparsify"),
    "an option that contradicts": ("2:4", {"m": 8}, "'2:4' and n or m"),
    "an option without effect": ("row", {"density": 0.5}, "layer 'blocks.0.up': .*pass prune=True"),
    "options beside a mapping": ({"head": "row"}, {"prune": True}, "they go beside a kind"),
    "options as a mapping": ({"kind": "tile", "prune": True}, {}, "options go beside the kind"),
    "a dict without a kind": ({"head": {"prune": True}}, {}, "without a kind"),
    "dense with options": ({"head": {"kind": "dense", "size": 16}}, {}, "takes no options"),
    "empty": ({}, {}, "an empty rule"),
    "a number": (3, {}, "the rule is a int; expected a kind of layout"),
    "None": (None, {}, "the rule is a NoneType"),
    "a key that is no text": ({0: "row"}, {}, "names 0; expected a layer's name"),
    "a callable that returns nonsense": (lambda name, layer: True, {}, "'blocks.0.up': True given"),
    "n > m": ({"head": "5:4"}, {}, "layer 'head': .*1 ≤ n ≤ m"),
    "a layout of another shape": (
        {"head": P.window(2).to_layout("row", 5, 5)}, {}, "layer 'head': .*does not fit"),
    "a weight of another shape": (
        {"head": mg.sparsify(torch.ones(3, 3), "row")}, {}, r"layer 'head': .*of \(20, 32\)"),
    "another dtype": (
        {"head": mg.sparsify(torch.ones(20, 32).half(), "row")}, {}, "layer 'head': .*float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rule(name: str) -> None:
    rule, options, words = WRONG[name]
    model = Model()
    with pytest.raises((LayoutError, ShapeError), match=words):
        mg.sparsify_model(model, rule, **options)
    assert not layers(model)


def test_wrong_models() -> None:
    with pytest.raises(LayoutError, match=r"expected a torch\.nn\.Module"):
        mg.sparsify_model(torch.ones(3, 3), "row")
    with pytest.raises(UnsupportedError, match=r"SparseLinear\.from_linear"):
        mg.sparsify_model(nn.Linear(4, 4), "row")
    with pytest.raises(UnsupportedError, match=r"Conv1d holds no torch\.nn\.Linear"):
        mg.sparsify_model(nn.Conv1d(3, 3, 1), "row")
    with pytest.raises(UnsupportedError, match=r"layer 'head': .*meta"), torch.device("meta"):
        mg.sparsify_model(nn.ModuleDict({"head": nn.Linear(4, 4)}), "row")


# What layers share, and what is in the way


def test_one_layer_under_two_names_stays_one() -> None:
    model = Model()
    model.blocks[1].up = model.blocks[0].up
    report = mg.sparsify_model(model, "row")
    assert model.blocks[1].up is model.blocks[0].up
    assert isinstance(model.blocks[1].up, mg.SparseLinear)
    assert [line.name for line in report.converted].count("blocks.1.up") == 0
    other = Model()
    other.blocks[1].up = other.blocks[0].up
    with pytest.raises(LayoutError, match=r"the names blocks\.0\.up, blocks\.1\.up"):
        mg.sparsify_model(other, {"blocks.0.up": "row"})


def test_layers_that_share_a_weight_still_do() -> None:
    def tied() -> Model:
        model = Model()
        model.blocks[1].up.weight = model.blocks[0].up.weight
        return model

    model = tied()
    report = mg.sparsify_model(model, {"*.up": PRUNED})
    one, two = model.blocks[0].up, model.blocks[1].up
    assert one is not two and one.values is two.values and one.bias is not two.bias
    assert one.positions.layout is two.positions.layout
    assert [line.name for line in report.converted] == ["blocks.0.up"]
    copied = copy.deepcopy(model)
    assert copied.blocks[0].up.values is copied.blocks[1].up.values
    model(TOKENS).sum().backward()
    alone = copy.deepcopy(masked(tied(), model))
    alone(TOKENS).sum().backward()
    grads = [alone.blocks[i].up.weight.grad for i in range(2)]
    found = one.weight.with_values(one.values.grad).to_dense()
    torch.testing.assert_close(found, (grads[0] + grads[1]) * (one.to_dense() != 0))
    loaded = tied()
    mg.load_model(loaded, model.state_dict())
    assert loaded.blocks[0].up.values is loaded.blocks[1].up.values
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    with pytest.raises(LayoutError, match=r"'blocks\.0\.up' shares its weight with 'blo"):
        mg.sparsify_model(tied(), {"blocks.0.up": PRUNED})
    with pytest.raises(LayoutError, match="shares its weight"):
        mg.sparsify_model(tied(), {"blocks.0.up": PRUNED, "blocks.1.up": "row"})


def test_a_weight_that_an_embedding_shares() -> None:
    model = Model(tied=True)
    report = mg.sparsify_model(model, "row")
    assert report.left == {"head": "shares its weight with 'embedding', which stays as it is"}
    assert model.head.weight is model.embedding.weight and len(layers(model)) == 4
    with pytest.raises(LayoutError, match=r"'head' shares its weight with 'embedding'.*untie them"):
        mg.sparsify_model(Model(tied=True), {"head": "row"})


def test_what_is_sparse_already_stays() -> None:
    model = Model()
    mg.sparsify_model(model, {"head": PRUNED})
    head = model.head
    report = mg.sparsify_model(model, {"head": "row", "*": "row"})
    assert model.head is head and report.left == {"head": "already sparse"}
    report = mg.sparsify_model(model, "row")
    assert not report.converted and len(report.left) == 5
    assert "the whole model" in str(report) and report.density != report.density


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_layers_that_cannot_be_swapped() -> None:
    def build() -> nn.Module:
        model = nn.ModuleDict({"scaled": Scaled(16, 16), "hooked": nn.Linear(16, 16),
                               "plain": nn.Linear(16, 16)})  # fmt: skip
        model["hooked"].register_forward_hook(lambda *_: None)
        return model

    model = build()
    report = mg.sparsify_model(model, "row")
    assert list(layers(model)) == ["plain"]
    assert "is a Scaled" in report.left["scaled"] and "has hooks" in report.left["hooked"]
    for name, words in (("scaled", "is a Scaled, whose owner"), ("hooked", "has hooks")):
        with pytest.raises(LayoutError, match=f"'{name}' {words}"):
            mg.sparsify_model(build(), {name: "row"})
        with pytest.raises(LayoutError, match=f"'{name}' {words}"):
            mg.sparsify_model(build(), lambda at, layer, name=name: "row" if at == name else None)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("train", [True, False])
def test_torchs_transformer(train: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    dense = nn.TransformerEncoder(layer, 2).train(train)
    model = copy.deepcopy(dense)
    report = mg.sparsify_model(model, "2:4", prune=True)
    assert len(layers(model)) == 4 and len(report.left) == 2
    x, padding = torch.randn(2, 5, 32), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    expected = masked(dense, model)
    with torch.no_grad():  # where torch would take its fast path
        for mask in (None, padding):
            got, wanted = (m(x, src_key_padding_mask=mask) for m in (model, expected))
            kept = slice(None) if mask is None else slice(3)
            torch.testing.assert_close(got[:, kept], wanted[:, kept], rtol=1e-4, atol=1e-5)


def test_parametrized_weights_are_converted_as_they_are_in_effect() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    parametrizations.weight_norm(model[0])
    prune.l1_unstructured(model[1], "weight", 0.5)
    prune.random_unstructured(model[1], "weight", 0.2)  # a container of two
    prune.l1_unstructured(model[2], "bias", 0.5)
    model.append(nn.Linear(16, 16, bias=False))
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model[3])
    old = model[3].weight.detach().clone()
    with torch.no_grad():
        model[3].weight_g.mul_(2)
        model[0].parametrizations.weight.original0.mul_(3)
        model[1].weight_orig.mul_(2)  # the weight itself stays as it was until the next call
        stale = model[1].weight.clone()
    x = torch.randn(5, 16)
    mg.sparsify_model(model, "row")
    assert torch.equal(model[1].to_dense(), 2 * stale)
    assert model[1].weight.nnz == int((stale != 0).sum()) < 128  # −0 is no value to keep
    torch.testing.assert_close(model[3].to_dense(), 2 * old)
    found = model[:3](x)

    torch.manual_seed(0)
    again = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    with torch.no_grad():
        again[0].weight.mul_(3)
        again[1].weight.copy_(2 * stale)
    prune.l1_unstructured(again[2], "bias", 0.5)
    torch.testing.assert_close(found, again(x))
    assert all(layer.values.requires_grad for layer in model)
    assert not hasattr(model[0], "parametrizations") and not model[1]._forward_pre_hooks


def test_frozen_stays_frozen_and_the_bias_is_the_same_parameter() -> None:
    model = Model().eval()
    model.head.weight.requires_grad_(False)
    bias, shared = model.head.bias, model.blocks[0].up.bias
    model.blocks[1].up.bias = shared
    with torch.no_grad():
        mg.sparsify_model(model, "row")
    assert not model.head.values.requires_grad and model.blocks[0].up.values.requires_grad
    assert model.head.bias is bias and model.blocks[1].up.bias is shared
    assert not any(layer.training for layer in layers(model).values())


# Stored and moved


def converted() -> Model:
    model = Model()
    globs = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]
    names = ["tile", "2:4", "block", "rows", "mixed"]
    mg.sparsify_model(model, {g: CHOICES[name] for g, name in zip(globs, names, strict=True)})
    return model


def test_state_dict_round_trips(tmp_path) -> None:
    model = converted()
    held = io.BytesIO()
    torch.save(model.state_dict(), held)
    held.seek(0)
    state = torch.load(held, weights_only=True)
    copied = copy.deepcopy(model)
    copied.load_state_dict(state)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for source in (state, tmp_path / "model.safetensors", str(tmp_path / "model.safetensors")):
        other = Model(seed=1)
        head = other.head.bias
        assert mg.load_model(other, source) is None
        assert torch.equal(other(TOKENS), model(TOKENS)) and other.head.bias is head
        for name, layer in layers(other).items():
            assert layer.weight.layout.kind == layers(model)[name].weight.layout.kind
        mg.load_model(other, source)  # the positions are there by now


def test_tied_models_through_safetensors(tmp_path) -> None:
    model = Model(tied=True)
    model.blocks[1].up.weight = model.blocks[0].up.weight
    mg.sparsify_model(model, {"blocks.*": PRUNED})
    save_model(model, tmp_path / "m.safetensors")  # keeps one name of what is shared
    other = Model(tied=True, seed=1)
    other.blocks[1].up.weight = other.blocks[0].up.weight
    mg.load_model(other, tmp_path / "m.safetensors")
    assert torch.equal(other(TOKENS), model(TOKENS))
    assert other.head.weight is other.embedding.weight


def test_dtype_and_training_stay_those_of_the_model() -> None:
    model, other = converted(), Model(seed=1).half().eval()
    other.head.weight.requires_grad_(False)
    mg.load_model(other, model.state_dict())
    assert {p.dtype for p in other.parameters()} == {torch.float16}
    assert not other.head.training and not other.head.values.requires_grad
    torch.testing.assert_close(other(TOKENS).float(), model(TOKENS), rtol=0.02, atol=0.02)


def test_load_model_refuses(tmp_path) -> None:
    state = converted().state_dict()
    with pytest.raises(LayoutError, match=r"'blocks\.0\.up', and in this Linear there is no such"):
        mg.load_model(nn.Linear(3, 3), state)
    model = Model()
    model.head = Scaled(32, 20)
    with pytest.raises(LayoutError, match="'head', and in this Model it is a Scaled"):
        mg.load_model(model, state)
    with pytest.raises(LayoutError, match="'head', which shares its weight with 'embedding' in"):
        mg.load_model(Model(tied=True), state)
    with pytest.raises(LayoutError, match="source is a list"):
        mg.load_model(Model(), [1])
    with pytest.raises(LayoutError, match="given a OrderedDict"):
        mg.load_model(state, state)
    with pytest.raises(LayoutError, match="expected one matrix of"):
        model = Model()
        model.head = nn.Linear(32, 21)
        mg.load_model(model, state)
    with pytest.raises(LayoutError, match=r"does not fit.*Missing key.*embedding\.weight"):
        mg.load_model(Model(), {k: v for k, v in state.items() if k != "embedding.weight"})
    (tmp_path / "junk.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(FileFormatError, match="no intact safetensors file"):
        mg.load_model(Model(), tmp_path / "junk.safetensors")
    mg.save(tmp_path / "one.safetensors", mg.sparsify(torch.ones(3, 3), "row"))
    with pytest.raises(FileFormatError, match=r"mixgrain\.load"):
        mg.load_model(Model(), tmp_path / "one.safetensors")
    with pytest.raises(FileFormatError, match="no sparse/"):
        mg.load_model(Model(), tmp_path)
    with pytest.raises(OSError):
        mg.load_model(Model(), tmp_path / "none.safetensors")


def test_casts_copies_and_moves() -> None:
    model = converted()
    expected = model(TOKENS)
    assert torch.equal(copy.deepcopy(model)(TOKENS), expected)
    double = copy.deepcopy(model).to("cpu", torch.float64)
    assert double(TOKENS).dtype == torch.float64
    torch.testing.assert_close(double(TOKENS).float(), expected, rtol=1e-4, atol=1e-5)
    meta = copy.deepcopy(model).to("meta")
    assert all(p.is_meta for p in meta.parameters())
    meta.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(meta(TOKENS), expected)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(TOKENS)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.05, atol=0.05)


def test_compiled_in_one_graph() -> None:
    torch._dynamo.reset()
    model = converted()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(TOKENS)
    expected.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    found = compiled(TOKENS)
    found.square().sum().backward()
    assert torch.equal(found, expected)
    assert all(map(torch.equal, [p.grad for p in model.parameters()], grads))


def test_values_may_be_pruned_further() -> None:
    model = converted()
    head = model.blocks[0].down
    prune.l1_unstructured(head, "values", 0.5)
    assert (head.to_dense() != 0).sum() == head.values.numel() // 2 < head.weight.nnz
    model(TOKENS).sum().backward()
    assert not head.values_orig.grad[head.values_mask == 0].any()
    expected = model(TOKENS)
    prune.remove(head, "values")
    assert torch.equal(model(TOKENS), expected)


# Trained


@pytest.mark.parametrize("name", CHOICES)
def test_fine_tuning_is_masked(name: str) -> None:
    """As a dense model whose gradients and weights are masked in every step."""
    model = Model()
    choice = dict(CHOICES[name])
    mg.sparsify_model(model, choice.pop("kind"), **choice)
    dense = masked(Model(), model)
    masks = {at: layer.weight.layout.mask()[0, 0] for at, layer in layers(model).items()}
    target = (TOKENS * 7 + 3) % 20
    optimisers = [torch.optim.AdamW(m.parameters(), 0.01, weight_decay=0.1) for m in (model, dense)]
    losses = []
    for _ in range(20):
        for m, optimiser in zip((model, dense), optimisers, strict=True):
            optimiser.zero_grad()
            loss = F.cross_entropy(m(TOKENS).flatten(0, 1), target.flatten())
            loss.backward()
            if m is dense:
                for at, mask in masks.items():
                    dense.get_submodule(at).weight.grad *= mask
            else:
                losses.append(loss.item())
            optimiser.step()
    assert losses[-1] < 0.7 * losses[0]
    for at, layer in layers(model).items():
        after = layer.to_dense()
        assert not after[~masks[at]].any()
        torch.testing.assert_close(after, dense.get_submodule(at).weight, rtol=1e-3, atol=2e-4)
        state = optimisers[0].state[layer.values]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == layer.values.shape
        live = layer.positions.layout.live()
        assert live is None or not layer.values[~live].any()
        assert live is None or not state["exp_avg"][~live].any()
    held = sum(t.numel() for s in optimisers[0].state.values() for t in s.values() if t.dim())
    assert held == 2 * sum(p.numel() for p in model.parameters())
