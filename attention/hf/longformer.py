"""Longformer's own attention on mixgrain.

Every token sees its window and the global tokens. Global tokens see everything, through
projections of their own (query_global, key_global, value_global): they are gathered, attended apart
and put back over what the window gave them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers.models.led.modeling_led import LEDEncoderSelfAttention
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from mixgrain.formats import patterns as P
from mixgrain.formats.pattern import Pattern

from ..attend import attend
from .forward import refuse


class _Longformer:
    """The forward of both classes; everything else is theirs."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        is_index_masked: Tensor | None = None,
        is_index_global_attn: Tensor | None = None,
        is_global_attn: bool | None = None,
        output_attentions: bool = False,
        **rest: Any,
    ) -> tuple[Tensor]:
        """Local and global attention.

        Args:
            hidden_states: (B, N, E), any N.
            attention_mask: (B, N): negative = padding, 0 = local, positive = global.
            is_index_masked: bool (B, N), padding; read from attention_mask if None.
            is_index_global_attn: bool (B, N), global tokens; read from attention_mask if None.
            is_global_attn: whether there are any.
            output_attentions: must be False.
            rest: what transformers passes to other layers.

        Returns:
            (B, N, E), padding 0.

        Raises:
            UnsupportedError: output_attentions, or dropout in training.
        """
        refuse(self, self.dropout, {**rest, "output_attentions": output_attentions})
        if attention_mask is None:
            attention_mask = hidden_states.new_zeros(hidden_states.shape[:2])
        masked = attention_mask < 0 if is_index_masked is None else is_index_masked
        tokens = attention_mask > 0 if is_index_global_attn is None else is_index_global_attn
        keys = None if is_cpu_false(masked) else ~masked

        def heads(x: Tensor) -> Tensor:
            split: Tensor = x.unflatten(-1, (self.num_heads, self.head_dim))
            return split.transpose(1, 2)

        scale = 1.0 / math.sqrt(self.head_dim)
        q, k, v = (heads(f(hidden_states)) for f in (self.query, self.key, self.value))
        listed = [torch.nonzero(row).flatten() for row in tokens.cpu()]
        pattern = window_and_globals(self.one_sided_attn_window_size, listed)
        out = _merged(attend(q, k, v, pattern, scale=scale, key_mask=keys))
        most = max(len(row) for row in listed)
        if most:
            # (B, most) positions of the global tokens; shorter lists are filled up and not used.
            device = hidden_states.device
            order = tokens.long().argsort(dim=1, descending=True, stable=True)[:, :most]
            used = tokens.gather(1, order)
            entry = torch.arange(len(listed), device=device)[:, None].expand_as(order)
            q = heads(self.query_global(hidden_states[entry, order]))
            k, v = heads(self.key_global(hidden_states)), heads(self.value_global(hidden_states))
            rows = _merged(attend(q, k, v, P.full(), scale=scale, key_mask=keys))
            out = out.index_put((entry[used], order[used]), rows[used])
        return (torch.where(masked[..., None], 0.0, out),)


def window_and_globals(radius: int, listed: list[Tensor]) -> Pattern:
    """The window and each batch entry's global keys, one pattern if all entries have the same."""
    first = listed[0]
    window = P.window(radius)
    if all(torch.equal(row, first) for row in listed):
        return window | P.global_keys(first) if len(first) else window
    return P.per_batch([window | P.global_keys(row) for row in listed])


def is_cpu_false(mask: Tensor) -> bool:
    """Whether a mask on the CPU has no True; looking at another device would mean waiting."""
    return mask.device.type == "cpu" and not bool(mask.any())


def _merged(o: Any) -> Tensor:
    merged: Tensor = o.transpose(1, 2).flatten(2)
    return merged


class MixgrainLongformerSelfAttention(_Longformer, LongformerSelfAttention):
    """LongformerSelfAttention on mixgrain."""


class MixgrainLEDEncoderSelfAttention(_Longformer, LEDEncoderSelfAttention):
    """LEDEncoderSelfAttention, the encoder of the Longformer encoder-decoder, on mixgrain."""
