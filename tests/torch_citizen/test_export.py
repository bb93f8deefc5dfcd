"""torch.export: models with patterns and sparse weights, saved, loaded and run elsewhere."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

import mixgrain as mg
from mixgrain import patterns as P

N = 24


class Model(nn.Module):
    """A layer of everything: a pattern with tensors of its own, GQA, N:M, a sparse weight."""

    def __init__(self, impl: str, kind: str) -> None:
        super().__init__()
        pattern = P.causal() & (P.window(4) | P.global_tokens([0, 5]))
        self.attention = mg.SparseAttention(16, 4, pattern, num_kv_heads=2, impl=impl)
        options = {} if kind == "nm" else {"density": 0.5}
        self.linear = mg.SparseLinear.from_linear(nn.Linear(16, 24), kind, prune=True, **options)
        self.impl = impl

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        y = self.attention(x, key_mask=keep)[:, None]
        y = y + mg.attend(y, y, y, P.nm(2, 4), impl=self.impl)
        return self.linear(y[:, 0])


@pytest.fixture(autouse=True)
def cold():
    mg.clear_caches()


def inputs(batch: int = 2, length: int = N) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(batch, length, 16, generator=g), torch.rand(batch, length, generator=g) < 0.8


def through_a_file(program: torch.export.ExportedProgram) -> nn.Module:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("impl, kind", [("fused", "row"), ("composed", "tile"), ("fused", "nm")])
def test_export(impl: str, kind: str, strict: bool) -> None:
    model = Model(impl, kind).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    # Composed N:M lays out its positions anew for each batch, so its size is fixed.
    shapes = None if impl == "composed" else ({0: batch}, {0: batch})
    program = torch.export.export(model, inputs(), dynamic_shapes=shapes, strict=strict)
    assert any("mixgrain" in str(node.target) for node in program.graph.nodes)
    loaded = through_a_file(program)
    for size in (2,) if shapes is None else (2, 5):
        given = inputs(size)
        torch.testing.assert_close(loaded(*given), model(*given), rtol=0, atol=0)
    # What was made while exporting serves afterwards, gradients included.
    model(*inputs()).sum().backward()
    assert model.linear.values.grad.abs().sum() > 0


def test_exported_program_has_the_state_of_the_layer() -> None:
    model = Model("fused", "row").eval()
    program = torch.export.export(model, inputs())
    assert "linear.values" in program.state_dict
    assert torch.equal(program.state_dict["linear.values"], model.linear.values)
