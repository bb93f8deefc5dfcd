"""Modes and surroundings: autocast, determinism, inference, checkpoints, threads, forks, hooks."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import mixgrain as mg
from mixgrain import patterns as P

N = 40
PATTERN = P.causal() & (P.window(6) | P.global_tokens([0, 9]))


@pytest.fixture(autouse=True)
def cold():
    mg.clear_caches()


def tensors(*lead: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*lead, N, 8, generator=g, dtype=torch.float64).to(dtype) for _ in range(3)]


def composed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return mg.attend(q, k, v, PATTERN, impl="composed")


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return mg.attend(q, k, v, PATTERN, impl="fused")


WEIGHT = mg.sparsify(torch.randn(24, 8, generator=torch.Generator().manual_seed(5)), "row")
FUNCTIONS = {
    "fused": (fused, nn.functional.scaled_dot_product_attention),
    "composed": (composed, nn.functional.scaled_dot_product_attention),
    "sddmm": (lambda q, k, v: mg.sddmm(q, k, PATTERN).values, lambda q, k, v: q @ k.mT),
    "spmm": (
        lambda q, k, v: mg.spmm(mg.sparsify(k[0, 0] @ k[0, 1].mT, "row"), v),
        lambda q, k, v: (k[0, 0] @ k[0, 1].mT) @ v,
    ),
    "linear": (
        lambda q, k, v: mg.linear(q, WEIGHT.to(q.dtype), torch.ones(24, dtype=q.dtype)),
        lambda q, k, v: nn.functional.linear(q, WEIGHT.to_dense().to(q.dtype)),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_casts_as_torch_does(name: str) -> None:
    mine, theirs = FUNCTIONS[name]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for target in (torch.bfloat16, torch.float16):
            given = tensors(2, 2, dtype=dtype)
            with torch.autocast("cpu", target):
                got = mine(*given)
                assert got.dtype == theirs(*given).dtype
                with torch.autocast("cpu", enabled=False):
                    assert mine(*given).dtype == dtype
    # The same as casting by hand: nothing inside a kernel is cast any further.
    leaves = [t.requires_grad_() for t in tensors(2, 2)]
    cast = [t.bfloat16() for t in leaves]
    if name == "spmm":  # whose operand here comes of a product that autocast casts as well
        return
    with torch.autocast("cpu", torch.bfloat16):
        got = mine(*leaves)
        grads = torch.autograd.grad(got.float().square().sum(), leaves, allow_unused=True)
    wanted = mine(*cast)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    by_hand = torch.autograd.grad(wanted.float().square().sum(), leaves, allow_unused=True)
    torch.testing.assert_close(grads, by_hand, rtol=0, atol=0)


def test_autocast_of_mixed_dtypes_and_of_layers() -> None:
    q, k, v = tensors(2, 2)
    linear = mg.SparseLinear(8, 24, P.random(0.3, seed=0), kind="row")
    attention = mg.SparseAttention(8, 2, PATTERN)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(q.bfloat16(), k, v).dtype == torch.bfloat16
        assert mg.spmm(mg.sddmm(q, k.bfloat16(), PATTERN), v).dtype == torch.bfloat16
        assert mg.softmax(mg.sddmm(q, k, PATTERN)).dtype == torch.bfloat16
        assert mg.sddmm(q, k, PATTERN, out_dtype=torch.float32).dtype == torch.float32
        y = linear(q[0])
        assert y.dtype == torch.bfloat16 and attention(q[0]).dtype == torch.bfloat16
    y.sum().backward()
    assert linear.values.grad.dtype == torch.float32


@pytest.mark.parametrize("f", [fused, composed])
def test_deterministic_algorithms(f) -> None:
    def run() -> list[Tensor]:
        leaves = [t.requires_grad_() for t in tensors(2, 2)]
        o = f(*leaves)
        return [o, *torch.autograd.grad(o.square().sum(), leaves)]

    torch.use_deterministic_algorithms(True)
    try:
        one, other = run(), run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one, run(), strict=True))


@pytest.mark.parametrize("f", [fused, composed])
def test_what_inference_mode_plans_serves_training(f) -> None:
    given = tensors(1, 2)
    with torch.inference_mode():
        inferred = f(*given)
    leaves = [t.requires_grad_() for t in tensors(1, 2)]
    o = f(*leaves)
    assert torch.equal(o, inferred)
    o.sum().backward()
    assert all(t.grad is not None for t in leaves)
    assert not any(t.is_inference() for t in PATTERN.to_layout("mixed", N, N).tensors())


@pytest.mark.parametrize("device", ["meta"])
def test_another_default_device_reaches_no_layout(device: str) -> None:
    given = tensors(1, 2)
    wanted = fused(*given)
    mg.clear_caches()
    with torch.device(device):
        assert torch.equal(fused(*given), wanted)
        assert torch.equal(composed(*given), composed(*given))
        pattern = P.window(3) | P.global_tokens([1, 2])
        assert torch.isfinite(mg.attend(*given, pattern)).all()


@pytest.mark.parametrize("f", [fused, composed])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(f, reentrant: bool) -> None:
    leaves = [t.requires_grad_() for t in tensors(2, 2)]
    wanted = torch.autograd.grad(f(*leaves).square().sum(), leaves)
    o = checkpoint(f, *leaves, use_reentrant=reentrant)
    o.square().sum().backward()
    for leaf, grad in zip(leaves, wanted, strict=True):
        assert torch.equal(leaf.grad, grad)


def test_two_threads_at_once() -> None:
    """Each with its own lengths and with shared ones, cold, forward and backward."""
    patterns = [P.window(n) | P.sinks(1) for n in range(1, 9)]
    wanted = {}

    def run(index: int) -> Tensor:
        q = tensors(1, 2, seed=index)[0].requires_grad_()
        o = mg.attend(q, q, q, patterns[index]) + mg.attend(q, q, q, PATTERN, impl="composed")
        (grad,) = torch.autograd.grad(o.square().sum(), q)
        return torch.stack([o.detach(), grad])

    for index in range(8):
        wanted[index] = run(index)
    mg.clear_caches()
    failures: list[str] = []

    def work() -> None:
        try:
            for _ in range(3):
                for index in range(8):
                    if not torch.equal(run(index), wanted[index]):
                        failures.append(f"pattern {index} differs")
        except BaseException as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and not any(thread.is_alive() for thread in threads)


class Attended(Dataset):
    """Attention in the workers of a DataLoader; hands over a SparseTensor, too."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return fused(*tensors(1, 1, seed=index))


def test_forked_workers() -> None:
    wanted = torch.stack([fused(*tensors(1, 1, seed=index)) for index in range(6)])
    loader = DataLoader(Attended(), batch_size=3, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(torch.cat(list(loader)), wanted)


def test_sparse_tensors_are_copied_and_pickled() -> None:
    q, k, v = tensors(2, 2)
    mask = torch.rand(2, N) < 0.8
    for pattern in (PATTERN, P.nm(2, 4), P.nm(2, 4) & P.window(5)):
        s = mg.sddmm(q, k, pattern, key_mask=mask)
        for other in (copy.deepcopy(s), copy.copy(s), pickle.loads(pickle.dumps(s))):
            assert torch.equal(mg.spmm(mg.softmax(other), v), mg.spmm(mg.softmax(s), v))
    copied = copy.deepcopy(s)
    copied.values.zero_()
    assert s.values.any()
    assert pickle.loads(pickle.dumps(PATTERN)).dense(N, N).equal(PATTERN.dense(N, N))


def test_hooks() -> None:
    leaves = [t.requires_grad_() for t in tensors(1, 2)]
    wanted = [torch.autograd.grad(f(*leaves).sum(), leaves) for f in (fused, composed)]
    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outs = [fused(*leaves), composed(*leaves)]
    # Activations alone: what offloads or compresses them sees no index tensors.
    assert packed and all(t.is_floating_point() for t in packed)
    for o, grads in zip(outs, wanted, strict=True):
        seen: list[Tensor] = []
        o.register_hook(seen.append)
        torch.testing.assert_close(torch.autograd.grad(o.sum(), leaves), grads, rtol=0, atol=0)
        assert len(seen) == 1
    layer = mg.SparseLinear(8, 24, P.window(9), kind="row")
    calls: list[str] = []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer.values.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    layer(leaves[0]).sum().backward()
    assert sorted(calls) == ["accumulated", "backward", "forward"]


def test_grad_modes() -> None:
    leaves = [t.requires_grad_() for t in tensors(1, 2)]
    for f in (fused, composed):
        with torch.no_grad():
            assert not f(*leaves).requires_grad
        one = f(leaves[0], leaves[1].detach(), leaves[2].detach())
        (grad,) = torch.autograd.grad(one.sum(), leaves[0])
        assert torch.isfinite(grad).all()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            changed = leaves[2] * 1
            o = f(leaves[0], leaves[1], changed)
            changed.add_(1)
            o.sum().backward()


def test_layer_in_a_data_parallel_loop_of_threads() -> None:
    """One module, several threads: no state is written in forward."""
    layer = mg.SparseAttention(8, 2, PATTERN)
    xs = [tensors(2, seed=i)[0] for i in range(4)]
    wanted = [layer(x) for x in xs]
    got: dict[int, Tensor] = {}
    mg.clear_caches()
    threads = [
        threading.Thread(target=lambda i=i: got.__setitem__(i, layer(xs[i]))) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(got[i], wanted[i]) for i in range(4))
