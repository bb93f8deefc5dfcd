"""The short way of attend on CUDA: what was seen before goes there, and means the same."""

import os
import subprocess
import sys

import pytest
import torch

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.attention import eager, ops
from mixgrain.formats.errors import LayoutError, MixgrainError, ShapeError, UnsupportedError
from mixgrain.primitives.lately import SIGNATURES

pytestmark = pytest.mark.gpu

N, H, D = 300, 4, 64
SCATTERED = P.longformer(40, [5, 77, 130, 299]) | P.random(0.01, 1)


@pytest.fixture(autouse=True)
def forgotten():
    mg.clear_caches()
    yield
    mg.clear_caches()


@pytest.fixture
def no_operator(monkeypatch):
    """Until it is called, the operator works; from then on the short way is the only one."""

    def refused(*arguments):
        raise AssertionError("the long way was taken")

    return lambda: monkeypatch.setattr(ops, "attention", refused)


def inputs(n: int = N, kv: int = H, dtype: torch.dtype = torch.bfloat16):
    g = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(2, h, n, D, device="cuda", dtype=dtype, generator=g) for h in (H, kv, kv)]


def mask() -> torch.Tensor:
    return torch.rand(2, N, device="cuda", generator=torch.Generator("cuda").manual_seed(1)) < 0.8


@pytest.mark.parametrize("options", ["plain", "mask", "one mask", "sink", "grouped", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equal_calls_give_equal_bits(options, dtype, no_operator) -> None:
    q, k, v = inputs(kv=2 if options in ("grouped", "all") else H, dtype=dtype)
    given = {"enable_gqa": options in ("grouped", "all"), "return_lse": True}
    if options in ("mask", "all"):
        given["key_mask"] = mask()
    if options == "one mask":
        given["key_mask"] = mask()[0]
    if options in ("sink", "all"):
        given["sink_logits"] = torch.randn(H, device="cuda")
    first = mg.attend(q, k, v, SCATTERED, impl="fused", **given)
    mg.attend(q, k, v, SCATTERED, impl="fused", **(given | {"return_lse": False}))
    no_operator()
    again = mg.attend(q, k, v, SCATTERED, impl="fused", **given)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    alone = mg.attend(q, k, v, SCATTERED, impl="fused", **(given | {"return_lse": False}))
    assert torch.equal(alone, first[0])
    # Other data, the same signature.
    q, k, v = (t.flip(2) for t in (q, k, v))
    if "key_mask" in given:
        given["key_mask"] = ~given["key_mask"]
    o, lse = mg.attend(q, k, v, SCATTERED, impl="fused", **given)
    right, logs = mg.attend(q, k, v, SCATTERED, impl="reference", **given)
    torch.testing.assert_close(o, right, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, logs, rtol=1e-3, atol=1e-3)


def test_layouts_take_it_too(no_operator) -> None:
    q, k, v = inputs()
    layout = SCATTERED.to_layout("mixed", N, N, device="cuda")
    first = mg.attend(q, k, v, layout, impl="fused")
    no_operator()
    assert torch.equal(mg.attend(q, k, v, layout, impl="fused"), first)


def test_other_signatures_go_the_long_way() -> None:
    q, k, v = inputs()
    mg.attend(q, k, v, SCATTERED, impl="fused")
    wide = torch.cat([torch.zeros_like(q), q], 3)
    for other in (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        wide[..., D:],
        torch.cat([q.flatten(), q.flatten()])[1 : 1 + q.numel()].view(q.shape).copy_(q),
    ):
        o = mg.attend(other, k, v, SCATTERED, impl="fused")
        right = mg.attend(other, k, v, SCATTERED, impl="reference")
        torch.testing.assert_close(o, right, rtol=2e-2, atol=2e-2)
        assert o.stride() == torch.empty_like(other).stride() or not other.is_contiguous()
    with pytest.raises(ShapeError):
        mg.attend(q, k[:, :2], v[:, :2], SCATTERED, impl="fused")
    with pytest.raises(UnsupportedError):
        mg.attend(q, k, v, SCATTERED, impl="quick")
    with pytest.raises(LayoutError):
        mg.attend(q, k, v, SCATTERED.dense(N, N), impl="fused")


def test_gradients_are_not_forgotten() -> None:
    q, k, v = inputs()
    mg.attend(q, k, v, SCATTERED)
    q.requires_grad_()
    o = mg.attend(q, k, v, SCATTERED)
    assert o.requires_grad
    o.float().sum().backward()
    assert q.grad is not None
    with pytest.raises(UnsupportedError, match="backward"):
        mg.attend(q, k, v, SCATTERED, impl="fused")
    with torch.no_grad():
        assert not mg.attend(q, k, v, SCATTERED, impl="fused").requires_grad


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_pattern_that_changed_in_place_is_another(device) -> None:
    q, k, v = inputs()
    kept = torch.rand(N, N, generator=torch.Generator().manual_seed(2)).to(device) < 0.1
    pattern = P.from_dense(kept)
    mg.attend(q, k, v, pattern, impl="fused")
    mg.attend(q, k, v, pattern, impl="fused")
    kept.logical_not_()
    o = mg.attend(q, k, v, pattern, impl="fused")
    right = mg.attend(q, k, v, P.from_dense(kept.clone()), impl="reference")
    torch.testing.assert_close(o, right, rtol=2e-2, atol=2e-2)


def test_modes_and_transforms_see_the_operator() -> None:
    q, k, v = inputs(dtype=torch.float32)
    first = mg.attend(q, k, v, SCATTERED, impl="fused")
    with torch.autocast("cuda", torch.bfloat16):
        cast = mg.attend(q, k, v, SCATTERED, impl="fused")
    assert cast.dtype == torch.bfloat16
    each = torch.vmap(lambda q, k, v: mg.attend(q, k, v, SCATTERED, impl="fused"))
    many = each(*(torch.stack([t, t]) for t in (q, k, v)))
    torch.testing.assert_close(many[1], first)


def test_capture_of_what_was_seen(no_operator) -> None:
    q, k, v = inputs()
    first = mg.attend(q, k, v, SCATTERED, impl="fused")
    no_operator()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = mg.attend(q, k, v, SCATTERED, impl="fused")
    graph.replay()
    assert torch.equal(o, first)


def test_caches_are_bounded_and_cleared() -> None:
    for n in range(1, SIGNATURES + 8):
        q, k, v = inputs(n)
        mg.attend(q, k, v, P.causal(), impl="fused")
    assert max(len(calls) for calls in eager._calls._values.values()) <= SIGNATURES
    mg.clear_caches()
    assert len(eager._calls) == 0


@pytest.mark.parametrize("place", [0, 1, 2])
def test_wrappers_that_outlive_their_transform(place) -> None:
    tensors = list(inputs())
    expected = mg.attend(*tensors, P.causal(), impl="fused")
    held = []
    torch.func.jvp(
        lambda t: (held.append(t), t * 2)[1], (tensors[place],), (torch.ones_like(tensors[place]),)
    )
    tensors[place] = held[0]
    for _ in range(3):
        assert torch.equal(mg.attend(*tensors, P.causal(), impl="fused"), expected)


def test_tensors_that_are_not_what_they_look_like() -> None:
    q, k, v = inputs()
    sink = torch.zeros(H, device="cuda")
    right = mg.attend(q, k, v, SCATTERED, sink_logits=sink, impl="fused")
    lazy = torch._efficientzerotensor((H,), device="cuda")
    assert torch.equal(mg.attend(q, k, v, SCATTERED, sink_logits=lazy, impl="fused"), right)
    nested = torch.nested.nested_tensor([q[0], q[1]])
    for given in ((nested, k, v), (q, nested, v)):
        with pytest.raises(MixgrainError):
            mg.attend(*given, SCATTERED, impl="fused")


FIRST = """
import os, sys, torch
import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.attention.cuda.warm import compile_together
masked = sys.argv[1] == "True"
q = torch.randn(1, 2, 700, 80, device="cuda", dtype=torch.bfloat16)
mask = torch.ones(1, 700, dtype=torch.bool, device="cuda") if masked else None
compile_together(0, q.dtype, 80, masked)
before = set(os.listdir(os.environ["MIXGRAIN_CACHE_DIR"]))
mg.attend(q, q, q, P.longformer(90, range(64)), key_mask=mask, impl="fused")
torch.cuda.synchronize()
assert len(before) > 7 and set(os.listdir(os.environ["MIXGRAIN_CACHE_DIR"])) == before
"""


@pytest.mark.parametrize("masked", [False, True])
def test_a_first_call_compiles_nothing_after_the_others(masked, tmp_path) -> None:
    """What is not compiled side by side is waited for alone."""
    given = {**os.environ, "MIXGRAIN_CACHE_DIR": str(tmp_path)}
    tmp_path.chmod(0o700)
    command = [sys.executable, "-c", FIRST, str(masked)]
    found = subprocess.run(command, env=given, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
