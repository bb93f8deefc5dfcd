"""Tiny random models of transformers, and the comparison of their outputs on two attentions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.20")

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Model:
    """A kind of model: its configuration class and what differs from the small one."""

    config: str
    options: dict[str, Any]
    causal: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    def make(self, **more: Any) -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**{**self.options, **self.extra, **more})
        kind = transformers.AutoModelForCausalLM if self.causal else transformers.AutoModel
        model = kind.from_config(config, attn_implementation="eager").eval()
        for parameter in model.parameters():
            # Larger weights: attention far from uniform shows a wrong mask.
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                torch.nn.init.normal_(parameter, std=1.0)
        return model


# What each is there for.
MODELS = {
    "bert": Model("BertConfig", SMALL, causal=False),  # padding only
    "modernbert": Model(  # global and local layers, two-sided window
        "ModernBertConfig",
        SMALL,
        causal=False,
        extra={"local_attention": 8, "global_attn_every_n_layers": 2, "num_hidden_layers": 3},
    ),
    "llama": Model("LlamaConfig", GROUPED),  # grouped queries
    "qwen3": Model("Qwen3Config", GROUPED, extra={"head_dim": 16}),  # D other than E / H
    "mistral": Model("MistralConfig", GROUPED, extra={"sliding_window": 6}),  # window in each layer
    "deepseek": Model(  # D other than Dv
        "DeepseekV3Config",
        SMALL,
        extra={
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 2,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
        },
    ),
    "gpt-oss": Model(  # sinks; full and sliding layers
        "GptOssConfig",
        GROUPED,
        extra={
            "head_dim": 8,
            "sliding_window": 6,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "llama4": Model(  # chunks, and layers without positions
        "Llama4TextConfig",
        GROUPED,
        extra={
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 5,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 4,
        },
    ),
    "gpt2": Model(  # learned positions
        "GPT2Config",
        {"vocab_size": 99, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4},
        extra={"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "attn_pdrop": 0.0},
    ),
}


def batch(length: int, padding: tuple[int, ...], side: str, seed: int = 1) -> dict[str, Tensor]:
    """Random tokens, one row per entry of `padding`, each with so many padding tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 99, (len(padding), length), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        if count:
            mask[row, slice(0, count) if side == "left" else slice(length - count, None)] = 0
    return {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}


def on(model: Any, implementation: str) -> Any:
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    return model


def outputs(model: Any, **given: Any) -> Tensor:
    """The first output: hidden states or logits."""
    return model(**given)[0]


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference in units of the largest value of b."""
    assert a.shape == b.shape and a.dtype == b.dtype
    return float((a - b).abs().max() / b.abs().max())


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradient of each module, weight and bias together: that of a key's bias alone is 0."""
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts.setdefault(name.rpartition(".")[0], []).append(parameter.grad.flatten())
    return {name: torch.cat(grads) for name, grads in parts.items()}
