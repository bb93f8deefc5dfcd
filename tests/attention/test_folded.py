"""One query of grouped heads reads its keys once for a group, and means the same."""

import pytest
import torch

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.attention import folded
from mixgrain.attention.attend import static_layout
from mixgrain.attention.cuda.choice import split_costs
from mixgrain.attention.cuda.plan import plan, unpack

GPU = pytest.mark.gpu
PATTERNS = {
    "causal": P.causal(),
    "full": P.full(),
    "wide window": P.causal() & P.window(2000),
    "first keys": P.sinks(100),
}


def inputs(nk=333, hq=8, hk=2, d=64, dv=None, dtype=torch.float32, device="cpu", batch=2):
    g = torch.Generator().manual_seed(0)
    shapes = (batch, hq, 1, d), (batch, hk, nk, d), (batch, hk, nk, dv or d)
    return [torch.randn(s, generator=g).to(device, dtype) for s in shapes]


def mask_of(nk, device="cpu", batch=2):
    mask = torch.rand(batch, nk, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[-1] = False  # an entry without keys
    return mask.to(device)


def right(q, k, v, pattern, mask=None):
    return mg.attend(
        q, k, v, pattern, key_mask=mask, enable_gqa=True, return_lse=True, impl="reference"
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("order", ["heads first", "queries first"])
def test_a_group_is_a_head_of_more_queries(pattern, masked, order):
    q, k, v = inputs(dv=48)
    if order == "queries first":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    mask = mask_of(333) if masked else None
    keys = folded.shared_keys(pattern, q, k, v, None)
    assert keys == (100 if pattern is PATTERNS["first keys"] else 333)
    call = folded.Call(mg.attend, keys, 1 / 8, True)
    o, lse = call([q, k, v] if mask is None else [q, k, v, mask], [])
    expected, sums = right(q, k, v, pattern, mask)
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, sums, rtol=1e-5, atol=1e-6)
    assert o.stride(3) == 1
    if masked:
        assert (o[-1] == 0).all()
        assert (lse[-1] == -torch.inf).all()
    alone, none = folded.Call(mg.attend, keys, 1 / 8, False)([q, k, v], [])
    assert none is None
    torch.testing.assert_close(alone, right(q, k, v, pattern)[0], rtol=1e-5, atol=1e-6)


OTHERS = {
    "two queries": lambda q, k, v: (P.full(), q.expand(-1, -1, 2, -1), k, v, None),
    "no groups": lambda q, k, v: (P.full(), q[:, :2], k, v, None),
    "sinks": lambda q, k, v: (P.full(), q, k, v, torch.zeros(8)),
    "scattered keys": lambda q, k, v: (P.random(0.5, 0), q, k, v, None),
    "gradients": lambda q, k, v: (P.full(), q, k.requires_grad_(), v, None),
    "a layout": lambda q, k, v: (P.full().to_layout("row", 1, 333), q, k, v, None),
    "later keys": lambda q, k, v: (P.causal() & P.window(100), q, k, v, None),
    "a large group": lambda q, k, v: (P.full(), q[:, :1].expand(-1, 65, -1, -1), k[:, :1], v, None),
    "heads that differ": lambda q, k, v: (P.per_head([P.full(), P.causal()] * 4), q, k, v, None),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_calls_are_not_folded(other):
    assert folded.shared_keys(P.causal(), *inputs(), None) == 333
    kept, *tensors = OTHERS[other](*inputs())
    assert folded.shared_keys(kept, *tensors) is None


@pytest.mark.parametrize("nk", [1, 64, 333, 4096, 32768])
@pytest.mark.parametrize("group", [2, 8, 64])
def test_keys_are_cut_as_for_a_head_alone(nk, group):
    def cut(pattern, nq, nk):
        layout = static_layout(pattern, nq, nk, torch.device("cpu"), split_costs(128))
        made = unpack(*plan(layout, 128, torch.device("cpu"), 3))
        return made.items.tolist(), made.steps.tolist()

    alone = cut(P.causal(), 1, nk)
    assert cut(P.full(), group, nk) == alone
    assert cut(P.sinks(nk), 1, nk + 200) == alone
    if nk == 4096:  # not for any group: two units of queries are shared out otherwise
        assert cut(P.full(), 65, nk) != alone


def test_what_watches_sees_the_call_as_it_is():
    with torch.device("cpu"):
        assert folded.shared_keys(P.causal(), *inputs(), None) is None


@pytest.fixture
def calls(monkeypatch):
    """Groups that were folded."""
    seen = []
    run = folded.Call.__call__

    def watched(self, given, addresses):
        seen.append(len(given))
        return run(self, given, addresses)

    monkeypatch.setattr(folded.Call, "__call__", watched)
    mg.clear_caches()
    yield seen
    mg.clear_caches()


@GPU
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize(
    ("heads", "d", "dtype"),
    [
        ((32, 8), 128, torch.bfloat16),
        ((8, 1), 64, torch.float16),
        ((64, 1), 64, torch.bfloat16),
        ((14, 2), 256, torch.float16),
        ((6, 2), 96, torch.float32),
    ],
)
def test_on_cuda(heads, d, dtype, pattern, masked, calls):
    q, k, v = inputs(777, *heads, d, dtype=dtype, device="cuda")
    mask = mask_of(777, "cuda") if masked else None
    if masked:
        k.masked_fill_(~mask[:, None, :, None], torch.nan)
        v.masked_fill_(~mask[:, None, :, None], torch.inf)
    expected, sums = right(q, k, v, pattern, mask)
    for _ in range(3):
        o, lse = mg.attend(
            q, k, v, pattern, key_mask=mask, enable_gqa=True, return_lse=True, impl="fused"
        )
        atol = 1e-5 if dtype == torch.float32 else 5e-3
        torch.testing.assert_close(o, expected, rtol=1e-2 if atol > 1e-4 else 1e-4, atol=atol)
        torch.testing.assert_close(lse, sums, rtol=1e-4, atol=2e-4)
        alone = mg.attend(q, k, v, pattern, key_mask=mask, enable_gqa=True, impl="fused")
        assert torch.equal(alone, o)
    assert len(calls) == 6
    # A group alone: the same bits.
    size = heads[0] // heads[1]
    for group in (0, heads[1] - 1):
        mine = slice(group * size, (group + 1) * size)
        one = q[:, mine], k[:, group : group + 1], v[:, group : group + 1]
        some = mg.attend(*one, pattern, key_mask=mask, enable_gqa=True, impl="fused")
        assert torch.equal(some, o[:, mine])


@GPU
def test_on_cuda_captured_and_grown(calls):
    q, k, v = inputs(600, 32, 8, 128, dtype=torch.bfloat16, device="cuda")
    mask = mask_of(600, "cuda", 1)[0].logical_not()
    for n in range(500, 600, 20):
        o = mg.attend(q, k[:, :, :n], v[:, :, :n], P.causal(), key_mask=mask[:n], enable_gqa=True)
        expected = right(q, k[:, :, :n], v[:, :, :n], P.causal(), mask[:n])[0]
        torch.testing.assert_close(o, expected, rtol=1e-2, atol=5e-3)
    first = mg.attend(q, k, v, P.causal(), key_mask=mask, enable_gqa=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = mg.attend(q, k, v, P.causal(), key_mask=mask, enable_gqa=True)
    again.zero_()
    graph.replay()
    assert torch.equal(again, first)
    assert len(calls) == 7
    sink = torch.zeros(32, device="cuda")
    mg.attend(q, k, v, P.causal(), enable_gqa=True, sink_logits=sink)
    assert len(calls) == 7
