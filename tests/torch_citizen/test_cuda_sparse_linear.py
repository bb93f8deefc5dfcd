"""SparseLinear and sparsify_model on a GPU: eager, compiled, captured in graphs, trained."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixgrain as mg
from mixgrain.primitives.dispatch import TABLE

pytestmark = pytest.mark.gpu

OPTIONS = {
    "tile": {"kind": "tile", "density": 0.4},
    "nm": {"kind": "2:4"},
    "block": {"kind": "block", "density": 0.5, "size": 16},
    "row": {"kind": "row", "density": 0.1},
    "panel": {"kind": "panel", "density": 0.5, "axis": "rows"},
    "mixed": {"kind": "mixed", "density": 0.2, "size": 16},
}
# Every layout that has kernels: a new one is tested without a new line here.
KINDS = [cls.kind for cls, cells in TABLE["linear"].items() if "cuda" in cells]
# Relative to the largest result: roundings of the result and of sums in another order.
ERROR = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}
TOKENS = (1, 16, 300)


class Net(nn.Module):
    def __init__(self, width: int = 256, hidden: int = 512) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)
        self.head = nn.Linear(width, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(F.gelu(self.up(x))))


def net(kind: str, dtype: torch.dtype = torch.float16, seed: int = 0) -> Net:
    """A converted model on the GPU."""
    torch.manual_seed(seed)
    model = Net().to("cuda", dtype)
    rule = {**OPTIONS[kind], "prune": True}
    assert len(mg.sparsify_model(model, {"*": rule}).converted) == 3
    return model


def dense(model: nn.Module, dtype: torch.dtype = torch.float64) -> Net:
    """The same weights in dense layers, by default in float64."""
    made = Net().to("cuda", dtype)
    for name, layer in made.named_children():
        given = getattr(model, name)
        layer.weight = nn.Parameter(given.to_dense().detach().to(dtype))
        if given.bias is not None:
            layer.bias = nn.Parameter(given.bias.detach().to(dtype))
    return made


def inputs(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    draw = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", dtype=dtype, generator=draw)


def close(found: Tensor, wanted: Tensor, limit: float) -> None:
    error = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    assert error <= limit, error.item()


@pytest.fixture(autouse=True)
def cold():
    """Nothing compiled yet; full float32."""
    torch._dynamo.reset()
    assert not torch.backends.cuda.matmul.allow_tf32
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_compute_as_dense_ones(kind: str, dtype: torch.dtype) -> None:
    model = net(kind, dtype)
    exact = dense(model)
    for tokens in TOKENS:
        for name, layer in model.named_children():
            x = inputs(2, tokens, layer.in_features, dtype=dtype).requires_grad_()
            y = layer(x)
            g = inputs(*y.shape, dtype=dtype, seed=1)
            ours = torch.autograd.grad(y, [x, layer.values], g)
            x64, twin = x.detach().double().requires_grad_(), getattr(exact, name)
            y64 = twin(x64)
            wanted = torch.autograd.grad(y64, [x64, twin.weight], g.double())
            close(y, y64, ERROR[dtype])
            close(ours[0], wanted[0], ERROR[dtype])
            mask = layer.weight.layout.mask()[0, 0]
            close(layer.weight.with_values(ours[1]).to_dense(), wanted[1] * mask, ERROR[dtype])
            live = layer.weight.layout.live()
            assert live is None or not ours[1][~live].any()


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind: str, mode: str | None) -> None:
    """One graph of torch.compile, and CUDA graphs of it; values may change between calls."""
    model = net(kind).eval()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad():
        for step in range(4):
            x = inputs(64, 256, seed=step)
            close(compiled(x), dense(model)(x.double()), 4 * ERROR[torch.float16])
            for layer in model.children():
                layer.values.mul_(0.9)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_gradients(kind: str) -> None:
    model = net(kind)
    compiled = torch.compile(model, fullgraph=True)
    x = inputs(64, 256)
    found, wanted = [], []
    for run, into in ((compiled, found), (model, wanted)):
        model.zero_grad()
        run(x).float().square().mean().backward()
        into += [p.grad.clone() for p in model.parameters()]
    for mine, theirs in zip(found, wanted, strict=True):
        close(mine, theirs, 8 * ERROR[torch.float16])


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", KINDS)
def test_captured(kind: str, tokens: int) -> None:
    """A CUDA graph of the forward pass reads new inputs and new values, to the bit."""
    model = net(kind).eval()
    held = inputs(tokens, 256)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                model(held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(held)
        for step in range(3):
            x = inputs(tokens, 256, seed=step)
            held.copy_(x)
            graph.replay()
            assert torch.equal(out, model(x))
            for layer in model.children():
                layer.values.mul_(0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_is_captured(kind: str) -> None:
    """Forward, backward and AdamW in one graph: the same as eager steps, positions kept."""
    model = net(kind, torch.float32)
    eager = copy.deepcopy(model)
    masks = [layer.weight.layout.mask()[0, 0] for layer in model.children()]
    held, target = inputs(64, 256, dtype=torch.float32), inputs(64, 64, dtype=torch.float32, seed=9)
    optimisers = [
        torch.optim.AdamW(m.parameters(), 1e-3, capturable=True) for m in (model, eager)
    ]  # fmt: skip

    def step(m: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        optimiser.zero_grad(set_to_none=False)
        F.mse_loss(m(held), target).backward()
        optimiser.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(model, optimisers[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, optimisers[0])
    for seed in range(5):
        held.copy_(inputs(64, 256, dtype=torch.float32, seed=seed))
        graph.replay()
    held.copy_(inputs(64, 256, dtype=torch.float32))
    for _ in range(3):
        step(eager, optimisers[1])
    for seed in range(5):
        held.copy_(inputs(64, 256, dtype=torch.float32, seed=seed))
        step(eager, optimisers[1])
    for mine, theirs, mask in zip(model.children(), eager.children(), masks, strict=True):
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-4, atol=1e-5)
        assert not mine.to_dense()[~mask].any()
        live = mine.weight.layout.live()
        assert live is None or not mine.values[~live].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str, dtype: torch.dtype) -> None:
    model = net(kind, torch.float32)
    x = inputs(64, 256, dtype=torch.float32)
    with torch.autocast("cuda", dtype):
        y = model(x)
    assert y.dtype == dtype
    close(y, dense(model)(x.double()), 4 * ERROR[dtype])
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_moved_and_loaded(kind: str) -> None:
    """Converted on the CPU, moved; and loaded on the GPU from the state dict of the CPU's."""
    torch.manual_seed(0)
    model = Net()
    mg.sparsify_model(model, {"*": {**OPTIONS[kind], "prune": True}})
    state = model.state_dict()
    x = inputs(32, 256)
    moved = copy.deepcopy(model).to("cuda", torch.float16)
    loaded = Net().to("cuda", torch.float16)
    mg.load_model(loaded, state)
    assert torch.equal(moved(x), loaded(x))
    close(moved(x), dense(moved)(x.double()), 4 * ERROR[torch.float16])
    back = moved.to("cpu", torch.float32)
    close(back(x.cpu().float()), dense(loaded)(x.double()).cpu(), 4 * ERROR[torch.float16])
