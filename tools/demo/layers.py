"""The demo's model with torch.nn.Linear in place of bare matrices, for layers to be swapped."""

from __future__ import annotations

import copy

from torch import nn

from .model import Block, ByteLM


def with_layers(model: ByteLM) -> ByteLM:
    """A copy of the model whose blocks hold their matrices in torch.nn.Linear.

    Names become those of layers: "blocks.0.qkv" is one, its matrix "blocks.0.qkv.weight". The
    embedding, which is also the output matrix, stays a parameter. What is a layer already stays.
    """
    made = copy.deepcopy(model)
    for block in made.blocks:
        for name in Block.STACKED:
            weight = getattr(block, name)
            if isinstance(weight, nn.Module):
                continue
            rows, columns = weight.shape
            layer = nn.Linear(columns, rows, bias=False, device="meta", dtype=weight.dtype)
            layer.weight = weight
            delattr(block, name)
            setattr(block, name, layer.train(block.training))
    return made
