"""Which attention "auto" runs where the fused kernels of CUDA could take the call."""

import pytest
import torch

from mixgrain import patterns as P
from mixgrain.attention import attend
from mixgrain.attention.cuda import choice


@pytest.mark.parametrize(
    ("keys", "dim", "chosen"),
    [(192, 256, "composed"), (193, 256, "fused"), (192, 128, "fused"), (64, 136, "composed")],
)
def test_wide_heads_over_few_keys(monkeypatch, keys, dim, chosen) -> None:
    monkeypatch.setattr(choice, "lacking", lambda *_: None)
    q, k, v = (torch.zeros(1, 1, n, dim) for n in (64, keys, keys))
    assert attend._fused_or("auto", P.full(), q, k, v, None) == chosen
    assert attend._fused_or("fused", P.full(), q, k, v, None) == "fused"
