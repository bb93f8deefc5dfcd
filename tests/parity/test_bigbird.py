"""BigBird's block-sparse attention on mixgrain, against the module of transformers it replaces."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hf_models import distance, gradients, transformers
from torch import Tensor

import mixgrain as mg
from mixgrain.formats.errors import ShapeError, UnsupportedError

pytest.importorskip("transformers", minversion="5.20")
big_bird = pytest.importorskip("transformers.models.big_bird.modeling_big_bird")

WIDTH, HEADS = 32, 4


def config(**more):
    return transformers.BigBirdConfig(
        **{
            "vocab_size": 60, "hidden_size": WIDTH, "num_hidden_layers": 2,
            "num_attention_heads": HEADS, "intermediate_size": 48, "block_size": 8,
            "max_position_embeddings": 1024, "num_random_blocks": 2, "pad_token_id": 0,
            "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
            "attention_type": "block_sparse", **more,
        }
    )  # fmt: skip


def attention(seed: int | None = 3, **more):
    torch.manual_seed(0)
    module = big_bird.BigBirdBlockSparseAttention(config(**more), seed=seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=WIDTH**-0.5)
    return module


def adapted(module):
    ours = copy.deepcopy(module)
    assert mg.huggingface.adapt(torch.nn.ModuleList([ours])) == 1
    return ours


def call(module, hidden: Tensor, mask: Tensor) -> Tensor:
    """The module as BigBirdModel calls it; mask (B, N): 1 = a token, 0 = padding."""
    create = big_bird.BigBirdModel.create_masks_for_block_sparse_attn
    blocked, band, from_mask, to_mask = create(mask.to(hidden.dtype), module.block_size)
    return module(hidden, band, from_mask, to_mask, blocked, blocked)[0]


def given(n: int) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(3, n, WIDTH, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, n)
    mask[1, n - 11 :] = 0
    mask[2, n // 2 :] = 0
    return hidden, mask


# (tokens, block size, random blocks): each plan of random blocks that the module knows.
PLANS = {
    "all rows alike": (56, 8, 2),
    "two plans": (64, 8, 2),  # transformers cannot draw this one in training
    "random blocks near the start": (160, 8, 2),
    "the paper's": (1024, 64, 3),  # may draw a block that the row sees anyway
    "the paper's, one block": (1024, 32, 1),
    "the paper's, small blocks": (1024, 16, 2),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_outputs(name, training, dtype, close) -> None:
    n, size, drawn = PLANS[name]
    module = attention(block_size=size, num_random_blocks=drawn).train(training).to(dtype)
    hidden, mask = given(n)
    if training and name == "two plans":
        with pytest.raises(ValueError, match="broadcast"):
            call(module, hidden.to(dtype), mask)
        return
    expected = call(module, hidden.to(dtype), mask)
    got = call(adapted(module), hidden.to(dtype), mask)
    assert got.dtype == dtype and expected.abs().max() > 0.5
    # Outputs are means of values, and so is their rounding.
    largest = module.value(hidden.to(dtype)).abs().max()
    assert (got - expected).abs().max() < close * largest


def seen(module, n: int) -> Tensor:
    """How often (head, query block, key block) is seen, from the weights of transformers' module.

    With equal scores a key's weight is its share of the softmax, times how often it counts; the
    weights are put where the keys are, a repeated key's last copy only.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        size = module.block_size
        blocked, band, from_mask, to_mask = (
            big_bird.BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, n), size)
        )
        weights = module(torch.zeros(1, n, WIDTH), band, from_mask, to_mask, blocked, blocked)[1]
    return weights[0, :, ::size, ::size] > 0


@pytest.mark.parametrize("training", [False, True])
def test_the_pattern(training) -> None:
    module = attention().train(training)
    ours = adapted(module)
    pattern = ours.levels(160)[0][0]
    blocks = pattern.dense(160, 160).expand(HEADS, 160, 160)[:, ::8, ::8]
    assert torch.equal(blocks, seen(module, 160))
    lists = ours.random_blocks(160)
    assert lists.shape == (HEADS, 18, 2)
    if training:
        assert not np.array_equal(lists[0], lists[1])  # heads draw for themselves
    else:
        assert not lists.any()  # all random blocks are block 0, which so counts three times
        (_, once), (again, twice) = ours.levels(160)
        assert (once, twice) == (1, 2)
        assert again.nnz(160, 160) == 8 * (160 - 16)


@torch.no_grad()
def test_the_gate_sees_repeated_blocks() -> None:
    module = attention().eval()
    ours = adapted(module)
    hidden, mask = given(160)
    only_once = ours.levels(160)[:1]
    ours.levels = lambda n: only_once
    assert (call(ours, hidden, mask) - call(module, hidden, mask)).abs().max() > 1e-2


@pytest.mark.parametrize("training", [False, True])
def test_gradients(training) -> None:
    module = attention().train(training).double()
    ours = adapted(module)
    base, mask = given(160)
    base = base.double()
    weight = torch.randn(base.shape, generator=torch.Generator().manual_seed(4))
    found = []
    for one in (module, ours):
        hidden = base.clone().requires_grad_()
        (call(one, hidden, mask) * weight).sum().backward()
        found.append({"hidden": hidden.grad, **gradients(one)})
    assert len(found[0]) == 4
    for name, expected in found[0].items():
        assert distance(found[1][name], expected) < 1e-12, name
        assert expected.abs().max() > 0.1, name


@torch.no_grad()
def test_half_precision() -> None:
    module = attention().eval().to(torch.bfloat16)
    hidden, mask = given(104)
    hidden = hidden.to(torch.bfloat16)
    exact = call(copy.deepcopy(module).float(), hidden.float(), mask)
    errors = [
        (call(one, hidden, mask).float() - exact).square().mean().sqrt()
        for one in (module, adapted(module))
    ]
    assert call(adapted(module), hidden, mask).dtype == torch.bfloat16
    assert errors[1] < 1.05 * errors[0]


@torch.no_grad()
def test_drawing() -> None:
    """With a seed: the same blocks each time, and numpy's generator stands where it stood."""
    ours = adapted(attention().train())
    np.random.seed(11)
    first = ours.random_blocks(160)
    after = np.random.random()
    np.random.seed(11)
    assert np.random.random() == after
    assert np.array_equal(first, ours.random_blocks(160))
    # Without one: drawn anew each time, from where numpy stands, like transformers.
    module = attention(seed=None).train()
    ours, (hidden, mask) = adapted(module), given(160)
    np.random.seed(12)
    one = [call(module, hidden, mask) for _ in range(2)]
    # Seeded by None, numpy's generator takes entropy of the system: only ours can be compared.
    two = [call(ours, hidden, mask) for _ in range(2)]
    assert not torch.equal(*one) and not torch.equal(*two)


# Whole models


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_the_whole_model(training) -> None:
    """99 tokens, which transformers pads to 104."""
    torch.manual_seed(0)
    theirs = transformers.BigBirdModel(config()).train(training)
    for parameter in theirs.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    ours = copy.deepcopy(theirs)
    assert mg.huggingface.adapt(ours) == mg.huggingface.adapt(ours) == 2
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ids = torch.randint(2, 60, (2, 99), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(ids)
    mask[1, 70:] = 0
    expected = theirs(ids, attention_mask=mask)[0]
    got = ours(ids, attention_mask=mask)[0]
    assert (got - expected)[mask.bool()].abs().max() < 4e-6 * expected.abs().max()
    with torch.inference_mode():
        assert torch.equal(ours(ids, attention_mask=mask)[0], got)
    # Too short for sparse attention: transformers changes both to full attention.
    short = [one(ids[:, :40], attention_mask=mask[:, :40])[0] for one in (theirs, ours)]
    assert (short[0] - short[1]).abs().max() < 1e-5
    with pytest.raises(UnsupportedError, match='only while its attention_type is "block_sparse"'):
        mg.huggingface.adapt(ours)


@torch.no_grad()
def test_the_encoder_of_bigbird_pegasus() -> None:
    torch.manual_seed(0)
    theirs = transformers.BigBirdPegasusModel(
        transformers.BigBirdPegasusConfig(
            vocab_size=60, d_model=WIDTH, encoder_layers=2, decoder_layers=1, dropout=0.0,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=48, block_size=8, num_random_blocks=2, max_position_embeddings=256,
            attention_type="block_sparse", pad_token_id=0, bos_token_id=2, eos_token_id=1,
        )
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    ours = copy.deepcopy(theirs)
    assert mg.huggingface.adapt(ours) == 2
    ids = torch.randint(3, 60, (2, 99), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(ids)
    mask[1, 70:] = 0
    given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :9]}
    a, b = ours(**given).last_hidden_state, theirs(**given).last_hidden_state
    assert (a - b).abs().max() < 4e-6 * b.abs().max()


def test_what_is_refused() -> None:
    ours = adapted(attention())
    for n in (20, 24):
        with pytest.raises(ShapeError, match="at least four blocks"):
            ours(torch.zeros(1, n, WIDTH))
    with pytest.raises(UnsupportedError, match="output_attentions"):
        ours(torch.zeros(1, 64, WIDTH), output_attentions=True)
