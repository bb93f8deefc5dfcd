"""Which layers of transformers change to which class."""

from __future__ import annotations

import torch

from mixgrain.formats.arguments import kind_of
from mixgrain.formats.errors import UnsupportedError

# Class of transformers -> (our module, our class). A subclass of one of these may compute something
# else, so only the very class is changed.
SWAPS = {
    "LongformerSelfAttention": ("longformer", "MixgrainLongformerSelfAttention"),
    "LEDEncoderSelfAttention": ("longformer", "MixgrainLEDEncoderSelfAttention"),
    "BigBirdBlockSparseAttention": ("bigbird", "MixgrainBigBirdBlockSparseAttention"),
    "BigBirdPegasusBlockSparseAttention": ("bigbird", "MixgrainBigBirdPegasusBlockSparseAttention"),
}


def swap(model: torch.nn.Module) -> int:
    """Change the class of every layer listed; see huggingface.adapt."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"adapt: model is a {kind_of(model)}; expected a torch.nn.Module")
    count = 0
    for layer in model.modules():
        kind = type(layer)
        if kind.__name__ in SWAPS and kind.__module__.startswith("transformers."):
            layer.__class__ = _ours(*SWAPS[kind.__name__])
            count += 1
        elif kind.__name__ in {name for _, name in SWAPS.values()}:
            count += 1
    if not count:
        raise UnsupportedError(
            f"adapt: {type(model).__name__} has none of {', '.join(SWAPS)}; for other models use "
            'register() and model.set_attn_implementation("mixgrain"). BigBird has such layers '
            'only while its attention_type is "block_sparse"'
        )
    return count


def _ours(module: str, name: str) -> type[torch.nn.Module]:
    if module == "longformer":
        from . import longformer as home
    else:
        from . import bigbird as home  # type: ignore[no-redef]
    made: type[torch.nn.Module] = getattr(home, name)
    return made
