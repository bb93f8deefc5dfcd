"""A byte-level transformer whose attention and matrix products can be swapped for sparse ones.

A block is: root-mean-square norm, a short causal convolution (each byte sees the three before it),
attention with rotary positions and normalised queries and keys, and a gated MLP. The embedding is
also the output matrix. Nothing here knows mixgrain: `attend` and `linear` are plain callables.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

# q, k, v, each (B, H, N, head_dim), positions already rotated in  ->  (B, H, N, head_dim)
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
# x (..., in), the weight's name in the state dict, the weight (out, in)  ->  (..., out)
Linear: TypeAlias = Callable[[Tensor, str, Any], Tensor]

BYTES = 256
# The short context that the full one is compared with: windows of this many bytes, of each of which
# the second half is scored.
SHORT = 256


@dataclass(frozen=True)
class Config:
    """The model's sizes.

    Attributes:
        context: Longest sequence, in bytes.
        width: Features per position; a multiple of `heads` and, for sparse weights, of 64.
        heads: Attention heads of width // heads features each.
        layers: Blocks.
        hidden: Features inside the gated MLP; a multiple of 64 for sparse weights.
        taps: Earlier bytes that the convolution before attention sees.
        rope_base: Longest rotary wavelength is about 2π times this, in bytes.
    """

    context: int = 2048
    width: int = 256
    heads: int = 4
    layers: int = 7
    hidden: int = 384
    taps: int = 3
    rope_base: float = 10_000.0

    @property
    def head_dim(self) -> int:
        """Features per attention head."""
        return self.width // self.heads


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense causal attention: q, k, v and the result are (B, H, N, head_dim)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def dense(x: Tensor, name: str, weight: Tensor | nn.Module) -> Tensor:
    """The plain matrix product x @ weight.T, or what a layer makes of x; `name` is not used."""
    return weight(x) if isinstance(weight, nn.Module) else F.linear(x, weight)


def norm(x: Tensor, gain: Tensor) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * gain).to(x.dtype)


def rotary_tables(context: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions, each float32 (context, head_dim // 2)."""
    frequency = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(context, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of features (i, i + head_dim // 2) by its position's angle.

    Args:
        x: Queries or keys, (..., N, H, head_dim).
        cos: (N, head_dim // 2).
        sin: (N, head_dim // 2).

    Returns:
        Like x, same dtype.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Block(nn.Module):
    """One layer. Matrices are (out, in); those that share an input are stacked along `out`.

    Attributes:
        heads: Attention heads.
        dropout: Share of what the layer adds to x that is dropped, while training only.
    """

    # How many equal matrices each parameter stacks; the optimiser treats them one by one.
    STACKED: ClassVar[dict[str, int]] = {"qkv": 3, "out": 1, "up": 2, "down": 1}

    def __init__(self, config: Config) -> None:
        """Starts as the identity, with small random inner weights."""
        super().__init__()
        d, f = config.width, config.hidden
        self.heads = config.heads
        self.dropout = 0.0
        self.attention_gain = nn.Parameter(torch.ones(d))
        self.taps = nn.Parameter(torch.zeros(config.taps, d))
        self.qkv = nn.Parameter(torch.empty(3 * d, d).normal_(std=0.5 * d**-0.5))
        self.query_gain = nn.Parameter(torch.ones(config.head_dim))
        self.key_gain = nn.Parameter(torch.ones(config.head_dim))
        self.out = nn.Parameter(torch.zeros(d, d))
        self.mlp_gain = nn.Parameter(torch.ones(d))
        self.up = nn.Parameter(torch.empty(2 * f, d).normal_(std=0.5 * d**-0.5))
        self.down = nn.Parameter(torch.zeros(d, f))

    def look_back(self, x: Tensor) -> Tensor:
        """Adds to x (B, N, d) what the few positions before hold, feature by feature."""
        mixed = x
        for distance, tap in enumerate(self.taps, start=1):
            mixed = mixed + tap * F.pad(x, (0, 0, distance, 0))[:, : x.shape[1]]
        return mixed

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, linear: Linear, prefix: str
    ) -> Tensor:
        """Maps x (B, N, d) to (B, N, d); `prefix` completes the weights' names."""
        h = self.look_back(norm(x, self.attention_gain))
        qkv = linear(h, f"{prefix}qkv", self.qkv).reshape(*x.shape[:2], 3, self.heads, -1)
        q = rotate(norm(qkv[:, :, 0], self.query_gain), cos, sin)
        k = rotate(norm(qkv[:, :, 1], self.key_gain), cos, sin)
        o = attend(q.transpose(1, 2), k.transpose(1, 2), qkv[:, :, 2].transpose(1, 2))
        x = x + self._drop(linear(o.transpose(1, 2).flatten(2), f"{prefix}out", self.out))
        gate, value = linear(norm(x, self.mlp_gain), f"{prefix}up", self.up).chunk(2, dim=-1)
        return x + self._drop(linear(F.silu(gate) * value, f"{prefix}down", self.down))


class ByteLM(nn.Module):
    """Predicts the next byte from the bytes up to here.

    Attributes:
        config: The sizes.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Config | None = None) -> None:
        """Draws new weights; `config` defaults to the demo's sizes."""
        super().__init__()
        self.config = config = config or Config()
        self.embedding = nn.Parameter(torch.empty(BYTES, config.width).normal_(std=0.02))
        self.embedding_gain = nn.Parameter(torch.ones(config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.output_gain = nn.Parameter(torch.ones(config.width))
        cos, sin = rotary_tables(config.context, config.head_dim, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor, attend: Attend = causal, linear: Linear = dense) -> Tensor:
        """Scores every next byte.

        Args:
            tokens: int64 (B, N), bytes 0…255, N at most `config.context`.
            attend: Computes attention; the default is dense and causal.
            linear: Computes x @ weight.T for the weight of the given name; the default is dense.

        Returns:
            Logits (B, N, 256); row n is about byte n + 1.

        Raises:
            ValueError: tokens are longer than the context.
        """
        n = tokens.shape[1]
        if n > self.config.context:
            raise ValueError(
                f"tokens have {n} positions, the model was trained on {self.config.context}:"
                " pass shorter sequences"
            )
        cos, sin = self.cos[:n], self.sin[:n]
        x = norm(F.embedding(tokens, self.embedding), self.embedding_gain)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, attend, linear, f"blocks.{i}.")
        return linear(norm(x, self.output_gain), "embedding", self.embedding)


@torch.no_grad()
def byte_bits(
    model: ByteLM,
    contexts: Tensor,
    attend: Attend = causal,
    linear: Linear = dense,
    batch: int = 16,
) -> Tensor:
    """The cost in bits of every byte after the first of each context.

    Args:
        model: On any device; contexts are moved there.
        contexts: uint8 (n, length).
        attend: As in `ByteLM.forward`.
        linear: As in `ByteLM.forward`.
        batch: Contexts scored at a time.

    Returns:
        float32 (n, length - 1) on the model's device; column t - 1 is the cost of byte t. Its mean
        is the bits per byte.
    """
    scored = []
    for part in torch.split(contexts, batch):
        tokens = part.to(model.embedding.device, torch.int64)
        logits = model(tokens[:, :-1], attend=attend, linear=linear).float()
        nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        scored.append(nats.view(len(part), -1) / torch.log(torch.tensor(2.0)).item())
    return torch.cat(scored)


def evaluate(model: ByteLM, contexts: Tensor) -> dict[str, float]:
    """Bits per byte with the full context and with 128 to 255 bytes of it.

    For the short context each context is cut into windows of 256 bytes at a stride of 128, each
    scored alone on its last 128 bytes: together that is every byte from position 128 on, once.

    Args:
        model: The model.
        contexts: uint8 (n, length), length a multiple of 128.

    Returns:
        `dense`: mean over all bytes but the first of each context.
        `dense_from_128`: mean over the bytes from position 128 on.
        `context_256`: mean over those same bytes, scored in windows of 256.
        `cost_of_256`: context_256 - dense_from_128.
        `contexts`, `scored`, `scored_from_128`: how many contexts and bytes that were.
    """
    n, length = contexts.shape
    half = SHORT // 2
    batch = max(1, 32768 // length)
    full = byte_bits(model, contexts, batch=batch)
    windows = contexts.unfold(1, SHORT, half).reshape(-1, SHORT)
    short = byte_bits(model, windows, batch=batch * length // SHORT)[:, half - 1 :]
    same = full[:, half - 1 :]
    assert same.numel() == short.numel(), "both contexts must score the same bytes"
    dense, late, limited = (t.double().mean().item() for t in (full, same, short))
    return {
        "dense": dense,
        "dense_from_128": late,
        "context_256": limited,
        "cost_of_256": limited - late,
        "contexts": n,
        "scored": full.numel(),
        "scored_from_128": same.numel(),
    }


def save(model: ByteLM, path: Path | str, metadata: dict[str, str] | None = None) -> None:
    """Writes float16 weights as safetensors, the config and `metadata` in its header."""
    tensors = {name: t.detach().half().cpu() for name, t in model.state_dict().items()}
    header = {"format": "pt", "config": json.dumps(asdict(model.config))} | (metadata or {})
    save_file(tensors, path, header)


def load(path: Path | str, device: torch.device | str = "cpu") -> ByteLM:
    """Reads what `save` wrote, as a float32 model in evaluation mode.

    Raises:
        ValueError: The file holds no config, so it is not one of this model's.
    """
    with safe_open(str(path), framework="pt", device="cpu") as file:
        config = (file.metadata() or {}).get("config")
        if config is None:
            raise ValueError(f"{path} has no 'config' in its header: not written by model.save")
        names = file.keys()
        tensors = {name: file.get_tensor(name).float() for name in names}
    model = ByteLM(Config(**json.loads(config)))
    model.load_state_dict(tensors)
    return model.eval().to(device)
