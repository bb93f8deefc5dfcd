"""mixgrain inside Hugging Face transformers: `mg.huggingface`.

    mg.huggingface.register()
    model.set_attn_implementation("mixgrain")      # BERT, ModernBERT, Mistral, Llama, gpt-oss, …

    mg.huggingface.adapt(longformer)               # models with a sparse attention of their own

Needs the extra `hf`. Weights stay where they are, and outputs equal those of transformers' own
attention on all tokens that are not padding.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from mixgrain.formats.arguments import kind_of
from mixgrain.formats.errors import UnsupportedError

from .arguments import IMPLS
from .attend import Impl

if TYPE_CHECKING:
    import torch

__all__ = ["adapt", "register"]


def register(name: str = "mixgrain", impl: Impl = "auto") -> str:
    """Make mixgrain an attention implementation of transformers.

    Masks become patterns, never queries × keys tensors: causal, sliding windows, chunks, documents
    (packed sequences), blocks, padding, and their unions and intersections. Mask functions of the
    user are evaluated where the rest of the mask keeps something. Sinks (gpt-oss), grouped queries
    and every cache of transformers work. What would change the mathematics and is unknown here
    (softcap, position bias, dropout in training, output_attentions) raises when it is used.

    Args:
        name: for model.set_attn_implementation(name); registering again replaces it.
        impl: how attend computes, as in attend.

    Returns:
        name.

    Raises:
        BackendUnavailableError: transformers is missing or too old; names the extra.
        UnsupportedError: an unknown impl.
    """
    if not isinstance(name, str):
        raise TypeError(f"register: name is a {kind_of(name)}; expected a string")
    if not isinstance(impl, str) or impl not in IMPLS:
        raise UnsupportedError(f"register: impl={impl!r:.80}; give one of {', '.join(IMPLS)}")
    from .hf.requirement import transformers_module

    transformers = transformers_module()
    from .hf.forward import attention_forward
    from .hf.mask import make_mask

    transformers.AttentionInterface.register(name, functools.partial(attention_forward, impl=impl))
    transformers.AttentionMaskInterface.register(name, make_mask)
    return name


def adapt(model: torch.nn.Module) -> int:
    """Let Longformer's, LED's, BigBird's and BigBird-Pegasus' own sparse layers run on mixgrain.

    Such models bring their own sparse attention and take no registered one. Their layers change
    class, in place; parameters, state_dict and everything around them stay as they are.

    Args:
        model: any module that holds such layers.

    Returns:
        How many layers run on mixgrain now, those of an earlier call included.

    Raises:
        BackendUnavailableError: transformers is missing or too old; names the extra.
        UnsupportedError: no such layer.
    """
    from .hf.requirement import transformers_module

    transformers_module()
    from .hf.adapt import swap

    return swap(model)
