"""Whole models of transformers on mixgrain, against their own eager attention."""

from __future__ import annotations

import copy
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hf_models import MODELS, batch, distance, gradients, on, outputs, transformers

import mixgrain as mg
from mixgrain.attention.hf import requirement
from mixgrain.attention.hf.forward import attention_forward
from mixgrain.formats.errors import BackendUnavailableError, ShapeError, UnsupportedError

CAUSAL = [name for name, model in MODELS.items() if model.causal]
# Of the largest output; float32 sums in another order, through a few layers.
CLOSE = 4e-6


@pytest.fixture(scope="module", autouse=True)
def registered():
    assert mg.huggingface.register() == "mixgrain"
    mg.huggingface.register("mixgrain-composed", impl="composed")


@pytest.fixture(scope="module")
def models():
    made: dict[str, object] = {}

    def model(name):
        if name not in made:
            made[name] = MODELS[name].make()
        return made[name]

    return model


def with_positions(given: dict) -> dict:
    """Positions count tokens, as generate() counts them."""
    places = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**given, "position_ids": places}


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["mixgrain", "mixgrain-composed"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_of_valid_tokens(name, side, implementation, models) -> None:
    model, given = models(name), batch(37, (0, 5, 21), side)
    if MODELS[name].causal:
        given = with_positions(given)
    valid = given["attention_mask"].bool()
    expected = outputs(on(model, "eager"), **given)[valid]
    assert distance(outputs(on(model, implementation), **given)[valid], expected) < CLOSE
    assert expected.abs().max() > 0.5


@torch.no_grad()
def test_the_gate_sees_a_window_that_is_one_off(models) -> None:
    model, given = models("mistral"), batch(37, (0,), "right")
    expected = outputs(on(model, "eager"), **given)
    other = MODELS["mistral"].make(sliding_window=7)
    other.load_state_dict(model.state_dict())
    assert distance(outputs(on(other, "mixgrain"), **given), expected) > 1e-2


@torch.no_grad()
def test_the_gate_sees_a_missing_sink(models) -> None:
    model, given = models("gpt-oss"), batch(37, (0,), "right")
    expected = outputs(on(model, "eager"), **given)
    other = copy.deepcopy(model)
    for layer in other.model.layers:
        torch.nn.init.constant_(layer.self_attn.sinks, -torch.inf)
    assert distance(outputs(on(other, "mixgrain"), **given), expected) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", CAUSAL)
def test_generate(name, cache, models) -> None:
    """Prefill and decoding: the same tokens, and the same logits at each step."""
    given = {
        **batch(11, (0, 4), "left"),
        "max_new_tokens": 12,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "cache_implementation": cache,
    }
    model = models(name)
    eager, ours = (on(model, how).generate(**given) for how in ("eager", "mixgrain"))
    assert torch.equal(eager.sequences, ours.sequences)
    assert distance(torch.stack(ours.logits), torch.stack(eager.logits)) < CLOSE
    assert eager.sequences.unique().numel() > 12


@pytest.mark.parametrize("name", ["bert", "mistral", "llama4"])
def test_inference_mode(name, models) -> None:
    model, given = on(models(name), "mixgrain"), batch(21, (0, 6), "right")
    with torch.no_grad():
        expected = outputs(model, **given)
    with torch.inference_mode():
        assert torch.equal(outputs(model, **given), expected)


@torch.no_grad()
def test_beam_search(models) -> None:
    model, given = models("mistral"), batch(9, (0, 3), "left")
    eager, ours = (
        on(model, how).generate(**given, max_new_tokens=6, num_beams=3, do_sample=False)
        for how in ("eager", "mixgrain")
    )
    assert torch.equal(eager, ours)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt-oss", "llama4"])
def test_prefill_in_pieces(name, models) -> None:
    """Several queries behind a cache: the suffix law."""
    model, ids = on(models(name), "mixgrain"), batch(29, (0, 0), "left")["input_ids"]
    whole = outputs(on(models(name), "eager"), input_ids=ids)
    on(model, "mixgrain")
    cache, parts = None, []
    for part in ids.split([3, 11, 1, 14], dim=1):
        made = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = made.past_key_values
        parts.append(made.logits)
    assert distance(torch.cat(parts, 1), whole) < CLOSE


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral", "llama4"])
def test_packed_sequences(name, models) -> None:
    """Sequences one after the other in one row see themselves only."""
    model, lengths = models(name), [13, 1, 9, 14]
    pieces = [batch(n, (0,), "right", seed=n)["input_ids"] for n in lengths]
    packed = {
        "input_ids": torch.cat(pieces, 1),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    ours = outputs(on(model, "mixgrain"), **packed, use_cache=False)
    assert distance(ours, outputs(on(model, "eager"), **packed, use_cache=False)) < CLOSE
    alone = torch.cat([outputs(model, input_ids=piece) for piece in pieces], 1)
    assert distance(ours, alone) < CLOSE


@torch.no_grad()
def test_encoder_and_decoder() -> None:
    """Self attention on both sides and cross attention, with their caches."""
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    given = batch(23, (0, 9), "right")
    start = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(4))
    more = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = outputs(model, **given, decoder_input_ids=start)
    tokens = model.generate(**given, **more)
    on(model, "mixgrain")
    assert distance(outputs(model, **given, decoder_input_ids=start), expected) < CLOSE
    assert torch.equal(model.generate(**given, **more), tokens)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "mistral"])
def test_a_compiled_model(name, models) -> None:
    model, given = on(models(name), "mixgrain"), batch(21, (0, 6), "right")
    expected = outputs(model, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = torch.compile(model, backend="eager")
        assert torch.equal(outputs(compiled, **given), expected)
    torch._dynamo.reset()


def test_gradient_checkpointing(models) -> None:
    model, given = copy.deepcopy(models("mistral")).train(), batch(21, (0, 6), "right")
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        outputs(on(model, "mixgrain"), **given, use_cache=False).square().sum().backward()
        found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@torch.no_grad()
def test_long_sequences_stay_small() -> None:
    """32,768 tokens in a window of 64: a mask of them all would be 1 GiB, and scores 4 GiB."""
    model = (
        MODELS["mistral"]
        .make(sliding_window=64, num_hidden_layers=1, max_position_embeddings=40_000)
        .model
    )
    given = batch(1 << 15, (100,), "left")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = outputs(on(model, "mixgrain"), **given, use_cache=False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024  # KiB
    last = outputs(
        on(model, "eager"),
        input_ids=given["input_ids"][:, -128:],
        position_ids=torch.arange((1 << 15) - 128, 1 << 15)[None],
        use_cache=False,
    )
    assert distance(made[:, -64:], last[:, -64:]) < 1e-4


@pytest.mark.parametrize("name", ["bert", "modernbert", "mistral", "gpt-oss"])
def test_gradients_in_training(name, models) -> None:
    model = copy.deepcopy(models(name)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    given = batch(21, (0, 6), "right")
    shape = outputs(on(model, "eager"), **given).shape
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    weight = weight * given["attention_mask"][..., None]
    found = {}
    for how in ("eager", "mixgrain"):
        model.zero_grad()
        (outputs(on(model, how), **given) * weight).sum().backward()
        found[how] = gradients(model)
    assert found["eager"].keys() == found["mixgrain"].keys()
    projections = [n for n in found["eager"] if any(x in n for x in ("query", "q_proj", "Wqkv"))]
    assert projections and all(found["eager"][n].abs().max() > 1e-3 for n in projections)
    for part, expected in found["eager"].items():
        assert distance(found["mixgrain"][part], expected) < 2e-5, part


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt-oss"])
def test_half_precision(name, dtype, models) -> None:
    """As near to float32 as eager in the same precision."""
    model, given = models(name), batch(37, (0, 0, 0), "right")
    if name == "gpt-oss":  # a router's choice of experts jumps where rounding decides it
        model = MODELS[name].make(num_experts_per_tok=4)
    exact = outputs(on(model, "eager"), **given)
    half = copy.deepcopy(model).to(dtype)
    errors = {}
    for how in ("eager", "mixgrain"):
        made = outputs(on(half, how), **given)
        assert made.dtype == dtype
        errors[how] = (made.float() - exact).square().mean().sqrt()
    assert errors["mixgrain"] < 1.2 * errors["eager"]


# Masks given by the user, and what is refused


@torch.no_grad()
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_4d_mask(kind, models) -> None:
    model, given = models("bert"), batch(16, (0, 0), "right")
    keep = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(3)) < 0.5
    keep |= torch.eye(16, dtype=torch.bool)
    low = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
    expected = outputs(on(model, "eager"), input_ids=given["input_ids"], attention_mask=low)
    mask = keep if kind == torch.bool else low
    ours = outputs(on(model, "mixgrain"), input_ids=given["input_ids"], attention_mask=mask)
    assert distance(ours, expected) < CLOSE
    low[0, 0, 3, 4] = -1.0
    with pytest.raises(UnsupportedError, match="so it is a bias"):
        outputs(model, input_ids=given["input_ids"], attention_mask=low)


def layer(**attributes) -> torch.nn.Module:
    module = torch.nn.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def qkv(nq=5, nk=5, heads=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, n, 8, generator=generator) for n in (nq, nk, nk)]


CHANGES = {
    "softcap": 30.0, "position_bias": torch.zeros(1, 4, 5, 5), "head_mask": torch.ones(4),
    "output_attentions": True, "indices": torch.zeros(2, 5, 2), "cache": object(),
    "cu_seq_lens_q": torch.tensor([0, 5]), "alibi": torch.zeros(4), "sinks": torch.zeros(4),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_arguments_that_change_the_mathematics_raise(name) -> None:
    with pytest.raises(UnsupportedError, match=rf'{name}.*set_attn_implementation\("eager"\)'):
        attention_forward(layer(is_causal=False), *qkv(), None, **{name: CHANGES[name]})


def test_harmless_arguments_are_accepted() -> None:
    q, k, v = qkv()
    o, weights = attention_forward(
        layer(is_causal=False), q, k, v, None, use_cache=True, position_ids=torch.arange(5),
        output_router_logits=True, num_items_in_batch=torch.tensor(3), cache=None, softcap=None,
        output_attentions=False, deterministic=True, dropout=0.0,
    )  # fmt: skip
    assert weights is None and o.is_contiguous()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    assert distance(o, expected) < 1e-6


def test_an_argument_that_the_models_own_attention_names(monkeypatch) -> None:
    home = type(sys)("a_model_of_next_year")

    def eager_attention_forward(module, query, key, value, attention_mask, twist=None, **rest):
        raise AssertionError

    home.eager_attention_forward = eager_attention_forward
    monkeypatch.setitem(sys.modules, home.__name__, home)
    module = type("Layer", (torch.nn.Module,), {"__module__": home.__name__, "is_causal": False})()
    attention_forward(module, *qkv(), None, twist=None)
    with pytest.raises(UnsupportedError, match="takes twist"):
        attention_forward(module, *qkv(), None, twist=2.0)


def test_dropout() -> None:
    module = layer(is_causal=False)
    with pytest.raises(UnsupportedError, match=r"dropout=0\.1"):
        attention_forward(module.train(), *qkv(), None, dropout=0.1)
    attention_forward(module.eval(), *qkv(), None, dropout=0.1)


def test_models_that_cannot_run(models) -> None:
    given = batch(9, (0,), "right")
    gemma = transformers.Gemma2Config(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(gemma)
    with pytest.raises(UnsupportedError, match="softcap"):
        outputs(on(model, "mixgrain"), **given)
    bert = models("bert")
    with pytest.raises(UnsupportedError, match="output_attentions"):
        on(bert, "mixgrain")(**given, output_attentions=True)
    training = MODELS["bert"].make(attention_probs_dropout_prob=0.1).train()
    with pytest.raises(UnsupportedError, match="dropout"):
        outputs(on(training, "mixgrain"), **given)


def test_no_mask() -> None:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    q, k, v = qkv()
    for causal in (False, True):
        expected = sdpa(q, k, v, is_causal=causal).transpose(1, 2)
        by_module = attention_forward(layer(is_causal=causal), q, k, v, None)[0]
        by_argument = attention_forward(
            layer(is_causal=not causal), q, k, v, None, is_causal=causal
        )[0]
        assert distance(by_module, expected) < 1e-6 and torch.equal(by_module, by_argument)
    q, k, v = qkv(nq=1)
    one = attention_forward(layer(is_causal=True), q, k, v, None)[0]
    assert distance(one, sdpa(q, k, v).transpose(1, 2)) < 1e-6
    for module, more, lengths in (
        (layer(), {}, (5, 5)),  # nobody says whether it is causal
        (layer(is_causal=True), {}, (3, 5)),  # aligned at the first or the last key?
        (layer(is_causal=True), {"sliding_window": 2}, (5, 5)),
    ):
        with pytest.raises(UnsupportedError, match="no mask given"):
            attention_forward(module, *qkv(*lengths), None, **more)


def test_masks_for_other_lengths_and_kinds() -> None:
    from mixgrain.attention.hf.mask import make_mask

    with pytest.raises(ShapeError, match="5 queries and 5 keys"):
        attention_forward(layer(), *qkv(), make_mask(2, 5, 6))
    for mask in (torch.ones(2, 5), "causal"):
        with pytest.raises(UnsupportedError, match="attention_mask"):
            attention_forward(layer(), *qkv(), mask)


def test_a_block_mask() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, i, j: i >= j, 2, 4, 200, 200, device="cpu")
    q, k, v = qkv(200, 200)
    o = attention_forward(layer(), q, k, v, mask)[0]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert distance(o, expected.transpose(1, 2)) < 1e-6


def test_scaling_may_be_a_parameter() -> None:
    q, k, v = qkv()
    scale = torch.tensor(0.3, requires_grad=True)
    o = attention_forward(layer(is_causal=False), q, k, v, None, scaling=scale)[0]
    fixed = attention_forward(layer(is_causal=False), q, k, v, None, scaling=0.3)[0]
    assert distance(o.detach(), fixed) < 1e-6
    assert torch.autograd.grad(o.square().sum(), scale)[0].abs() > 0


def test_registering() -> None:
    with pytest.raises(UnsupportedError, match="impl='fast'"):
        mg.huggingface.register(impl="fast")


@pytest.mark.parametrize("version", ["5.19.0", "6.0.0", "4.57.1"])
def test_other_versions_of_transformers(version, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with pytest.raises(BackendUnavailableError, match=rf"{version} is installed.*mixgrain\[hf\]"):
        mg.huggingface.register()


def test_without_transformers(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (mg.huggingface.register, lambda: mg.huggingface.adapt(torch.nn.Linear(2, 2))):
        with pytest.raises(BackendUnavailableError, match=r"pip install 'mixgrain\[hf\]'"):
            call()
    monkeypatch.undo()
    assert requirement.transformers_module() is sys.modules["transformers"]


def test_transformers_is_loaded_when_it_is_needed() -> None:
    code = (
        "import sys, mixgrain as mg; mg.huggingface.adapt; "
        "assert 'transformers' not in sys.modules and 'torch._dynamo' not in sys.modules"
    )
    path = str(Path(mg.__file__).parents[1])
    child = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True
    )
    assert child.returncode == 0, child.stderr.decode()
