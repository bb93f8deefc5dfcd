"""Longformer's own attention on mixgrain, against the module of transformers it replaces."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hf_models import distance, gradients, transformers
from torch import Tensor

import mixgrain as mg
from mixgrain.formats.errors import UnsupportedError

pytest.importorskip("transformers", minversion="5.20")
longformer = pytest.importorskip("transformers.models.longformer.modeling_longformer")

WIDTH, HEADS = 32, 4


def config(**more):
    return transformers.LongformerConfig(
        **{
            "vocab_size": 60, "hidden_size": WIDTH, "num_hidden_layers": 2,
            "num_attention_heads": HEADS, "intermediate_size": 48, "attention_window": [4, 12],
            "max_position_embeddings": 200, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
            "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, **more,
        }
    )  # fmt: skip


def attention(window: int, seed: int = 0):
    torch.manual_seed(seed)
    module = longformer.LongformerSelfAttention(config(attention_window=[window] * 2), 0).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=WIDTH**-0.5)
    return module


def adapted(module):
    ours = copy.deepcopy(module)
    assert mg.huggingface.adapt(torch.nn.ModuleList([ours])) == 1
    return ours


def call(module, hidden: Tensor, mask: Tensor) -> Tensor:
    """The module as LongformerModel calls it; mask: −1 padding, 0 local, 1 global."""
    low = torch.finfo(hidden.dtype).min
    return module(
        hidden,
        attention_mask=mask.to(hidden.dtype) * -low,
        is_index_masked=mask < 0,
        is_index_global_attn=mask > 0,
        is_global_attn=bool((mask > 0).any()),
    )[0]


def largest(module, hidden: Tensor) -> float:
    """The largest value: outputs are means of values, and their rounding is of that size."""
    return max(float(f(hidden).abs().max()) for f in (module.value, module.value_global))


def masks(n: int) -> dict[str, Tensor]:
    plain = torch.zeros(3, n, dtype=torch.int64)
    cases = {"local only": plain}
    for name, where in {
        "one global token": [[0], [0], [0]],
        "other tokens in each entry": [[0, 7, n - 1], [3], [n // 2, n // 2 + 1]],
        "no global token in one entry": [[1, 2], [], [5]],
        "neighbouring and distant": [list(range(6)), [0, n - 1], list(range(0, n, 5))],
        "all global": [list(range(n))] * 3,
    }.items():
        mask = plain.clone()
        for row, tokens in enumerate(where):
            mask[row, tokens] = 1
        cases[name] = mask
    for name, spans in {
        "padding right": (slice(n, n), slice(n - 9, n), slice(n // 2, n)),
        "padding left": (slice(0, 0), slice(0, 9), slice(0, n // 2)),
        "padding inside": (slice(3, 5), slice(9, 20), slice(0, 1)),
    }.items():
        for base in ("local only", "other tokens in each entry"):
            mask = cases[base].clone()
            for row, span in enumerate(spans):
                mask[row, span] = -1
            cases[f"{name}, {base}"] = mask
    return cases


@torch.no_grad()
@pytest.mark.parametrize("name", masks(48))
@pytest.mark.parametrize("window", [4, 6, 24, 48])
def test_outputs(name, window) -> None:
    n, module = 48, attention(window)
    hidden = torch.randn(3, n, WIDTH, generator=torch.Generator().manual_seed(1))
    mask = masks(n)[name]
    expected = call(module, hidden, mask)
    difference = (call(adapted(module), hidden, mask) - expected).abs().max()
    assert difference < 1e-6 * largest(module, hidden)
    assert expected.abs().max() > 0.5


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 5, 47, 61])
def test_any_length(n) -> None:
    """transformers pads to a multiple of the window; ours needs no padding."""
    window, module = 8, attention(8)
    hidden = torch.randn(3, n, WIDTH, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(3, n, dtype=torch.int64)
    mask[0, 0] = mask[2, n // 2] = 1
    fill = -n % window
    padded = torch.nn.functional.pad(hidden, (0, 0, 0, fill), value=3.0)
    expected = call(module, padded, torch.nn.functional.pad(mask, (0, fill), value=-1))[:, :n]
    difference = (call(adapted(module), hidden, mask) - expected).abs().max()
    assert difference < 1e-6 * largest(module, hidden)


def test_gradients() -> None:
    module = attention(6).train()
    ours = adapted(module)
    n = 36
    mask = masks(n)["padding right, other tokens in each entry"]
    base = torch.randn(3, n, WIDTH, generator=torch.Generator().manual_seed(3))
    weight = torch.randn(3, n, WIDTH, generator=torch.Generator().manual_seed(4))
    found = []
    for one in (module, ours):
        hidden = base.clone().requires_grad_()
        (call(one, hidden, mask) * weight).sum().backward()
        found.append({"hidden": hidden.grad, **gradients(one)})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 7
    for name, expected in found[0].items():
        assert distance(found[1][name], expected) < 3e-6, name
        assert expected.abs().max() > 0.1, name


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype) -> None:
    """As near to float32 as transformers in the same precision."""
    module, mask = attention(6), masks(36)["other tokens in each entry"]
    hidden = torch.randn(3, 36, WIDTH, generator=torch.Generator().manual_seed(5)).to(dtype)
    half = copy.deepcopy(module).to(dtype)
    exact = call(half.float(), hidden.float(), mask)
    half = half.to(dtype)
    errors = [
        (call(one, hidden, mask).float() - exact).square().mean().sqrt()
        for one in (half, adapted(half))
    ]
    assert errors[1] < 1.05 * errors[0]


# Whole models


def model(kind="LongformerModel", **more):
    torch.manual_seed(0)
    made = getattr(transformers, kind)(config(**more)).eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return made


def tokens(n=43):
    ids = torch.randint(3, 60, (2, n), generator=torch.Generator().manual_seed(6))
    mask, globals_ = torch.ones_like(ids), torch.zeros_like(ids)
    mask[1, -13:] = 0
    globals_[0, [0, 20]] = globals_[1, 0] = 1
    return {"input_ids": ids, "attention_mask": mask, "global_attention_mask": globals_}


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_the_whole_model(training) -> None:
    """43 tokens, which transformers pads to 48; a window of its own in each layer."""
    theirs = model().train(training)
    ours = copy.deepcopy(theirs)
    assert mg.huggingface.adapt(ours) == 2
    given = tokens()
    expected, got = theirs(**given)[0], ours(**given)[0]
    valid = given["attention_mask"].bool()
    assert (got - expected)[valid].abs().max() < 4e-6 * expected.abs().max()
    with torch.inference_mode():
        assert torch.equal(ours(**given)[0], got)
    local = {**given, "global_attention_mask": None}
    assert (theirs(**local)[0] - expected)[valid].abs().max() > 1e-2  # the gate sees global tokens
    assert (ours(**local)[0] - theirs(**local)[0])[valid].abs().max() < 1e-5


@torch.no_grad()
def test_the_encoder_of_led() -> None:
    torch.manual_seed(0)
    made = transformers.LEDModel(
        transformers.LEDConfig(
            vocab_size=60, d_model=WIDTH, encoder_layers=2, decoder_layers=1, dropout=0.0,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=48, attention_window=[4, 8], max_encoder_position_embeddings=128,
            attention_dropout=0.0, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        )
    ).eval()  # fmt: skip
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    ours = copy.deepcopy(made)
    assert mg.huggingface.adapt(ours) == 2
    given = tokens()
    expected, got = made(**given), ours(**given)
    valid = given["attention_mask"].bool()
    for name in ("encoder_last_hidden_state", "last_hidden_state"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a - b)[valid].abs().max() < 4e-6 * b.abs().max(), name


def test_weights_stay_where_they_are() -> None:
    theirs = model()
    ours = copy.deepcopy(theirs)
    names = list(ours.state_dict())
    pointers = [p.data_ptr() for p in ours.parameters()]
    assert mg.huggingface.adapt(ours) == mg.huggingface.adapt(ours) == 2  # twice changes nothing
    assert list(ours.state_dict()) == names
    assert [p.data_ptr() for p in ours.parameters()] == pointers
    with torch.no_grad():
        expected = ours(**tokens())[0]
        for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(copied.encoder.layer[0].attention.self).__name__.startswith("Mixgrain")
            assert torch.equal(copied(**tokens())[0], expected)
    fresh = model()
    fresh.load_state_dict(ours.state_dict())
    assert isinstance(ours.encoder.layer[0].attention.self, longformer.LongformerSelfAttention)


def test_what_is_refused() -> None:
    ours = model()
    mg.huggingface.adapt(ours)
    with pytest.raises(UnsupportedError, match="output_attentions"):
        ours(**tokens(), output_attentions=True)
    dropping = model(attention_probs_dropout_prob=0.1).train()
    mg.huggingface.adapt(dropping)
    with pytest.raises(UnsupportedError, match=r"dropout=0\.1"):
        dropping(**tokens())
    dropping.eval()(**tokens())
    with pytest.raises(UnsupportedError, match=r"Linear has none of LongformerSelfAttention"):
        mg.huggingface.adapt(torch.nn.Linear(2, 2))
