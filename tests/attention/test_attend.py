"""attend against the dense float64 definition: values, lse, gradients, arguments."""

import math

import numpy as np
import pytest
import torch
from attention_cases import (
    PATTERNS,
    SHAPES,
    bernoulli,
    blocks_of,
    error,
    operands,
    run,
    wide,
)

import mixgrain as mg
from mixgrain import patterns as P

# float32 sums of at most 130 products of normal numbers; float64 likewise.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-12}


def compare(impl, q, k, v, kept, reference=None, tolerance=None, **rest):
    """impl against the reference, outputs and all gradients."""
    got = run(impl, q, k, v, kept, **rest)
    expected = run("reference", *wide(q, k, v), kept if reference is None else reference, **rest)
    limit = TOLERANCE[q.dtype] if tolerance is None else tolerance
    names = ("o", "lse", "dq", "dk", "dv", "dsink")
    for name, a, b in zip(names, (*got[:2], *got[2]), (*expected[:2], *expected[2]), strict=False):
        assert error(a, b) <= limit, name


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", ["fused", "composed"])
def test_every_pattern_matches_the_definition(impl, name, shape) -> None:
    q, k, v = operands(shape, torch.float64)
    compare(impl, q, k, v, PATTERNS[name](*shape[:2]))


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_in_float32(name) -> None:
    q, k, v = operands((150, 131, 16, 16), torch.float32)
    compare("fused", q, k, v, PATTERNS[name](150, 131))


@pytest.mark.parametrize("kind", ["block", "row", "mixed"])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("name", ["longformer", "from_dense", "causal", "random"])
def test_every_layout_matches_the_definition(kind, size, name) -> None:
    q, k, v = operands((200, 260, 8, 8))
    pattern = PATTERNS[name](200, 260)
    layout = pattern.to_layout(kind, 200, 260, size)
    compare("fused", q, k, v, layout, pattern)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 1), (6, 3)])
@pytest.mark.parametrize("impl", ["fused", "composed"])
def test_grouped_heads(impl, heads) -> None:
    q, k, v = operands((40, 50, 8, 4), heads=heads)
    compare(impl, q, k, v, P.window(7) | P.global_keys([1]), sink=torch.randn(heads[0]).double())


@pytest.mark.parametrize("impl", ["fused", "composed"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: P.per_head([P.window(3), P.causal(), P.window(3), P.random(0.1, seed=1)]),
        lambda: P.per_batch([P.window(3), P.longformer(2, [5])]),
        lambda: P.per_batch([P.per_head([P.window(i + b) for i in range(4)]) for b in range(2)]),
        lambda: P.documents(torch.arange(60).repeat(2, 1) // torch.tensor([[7], [20]])),
        lambda: P.per_head([P.full(), P.full() - P.full(), P.window(0), P.sinks(1)]),
        lambda: P.blocks(blocks_of(60, 60, 16, 3, heads=4), 16),
    ],
    ids=["heads", "batch", "batch of heads", "documents", "empty head", "block masks"],
)
def test_patterns_that_differ_over_heads_and_batch(impl, make) -> None:
    q, k, v = operands((60, 60, 8, 8))
    compare(impl, q, k, v, make())


@pytest.mark.parametrize("impl", ["fused", "composed"])
@pytest.mark.parametrize("name", ["longformer", "random", "causal", "from_dense"])
def test_key_masks_and_sinks_together(impl, name) -> None:
    q, k, v = operands((70, 90, 8, 8))
    keep = bernoulli(2, 90, 0.6, 3)
    keep[1] = False  # a batch entry without any key: only the sink is left
    compare(impl, q, k, v, PATTERNS[name](70, 90), key_mask=keep, sink=torch.randn(4).double())


@pytest.mark.parametrize("impl", ["fused", "composed", "reference"])
def test_rows_without_keys(impl) -> None:
    q, k, v = operands((20, 20, 8, 8))
    pattern = P.window(2) & P.global_queries([3, 11])
    o, lse, (dq, dk, dv) = run(impl, q, k, v, pattern)
    empty = ~pattern.dense(20, 20).any(1)
    assert empty.sum() == 18
    assert (o[:, :, empty] == 0).all() and (lse[:, :, empty] == -math.inf).all()
    assert (dq[:, :, empty] == 0).all()
    unseen = ~pattern.dense(20, 20).any(0)
    assert (dk[:, :, unseen] == 0).all() and (dv[:, :, unseen] == 0).all()

    sink = torch.tensor([0.5, -1.0, 3.0, -math.inf], dtype=torch.float64)
    o, lse = mg.attend(
        q, k, v, pattern, enable_gqa=True, sink_logits=sink, return_lse=True, impl=impl
    )
    assert (o[:, :, empty] == 0).all()
    assert (lse[:, :, empty] == sink[None, :, None]).all()


@pytest.mark.parametrize("impl", ["fused", "composed"])
def test_a_sink_of_minus_infinity_is_no_sink(impl) -> None:
    q, k, v = operands((20, 20, 8, 8))
    none = torch.full((4,), -math.inf, dtype=torch.float64)
    with_sink = run(impl, q, k, v, P.window(3), sink=none)
    without = run(impl, q, k, v, P.window(3))
    for a, b in zip((*with_sink[:2], *with_sink[2][:3]), (*without[:2], *without[2]), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-14)
    assert (with_sink[2][3] == 0).all()


@pytest.mark.parametrize("impl", ["fused", "composed", "reference"])
@pytest.mark.parametrize("shape", [(0, 9, 4, 4), (9, 0, 4, 4), (0, 0, 4, 4)], ids=str)
def test_no_queries_or_no_keys(impl, shape) -> None:
    q, k, v = operands(shape)
    o, lse, grads = run(impl, q, k, v, P.window(2))
    assert o.shape == (2, 4, shape[0], 4) and (o == 0).all()
    assert lse.shape == (2, 4, shape[0]) and (lse == -math.inf).all()
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("impl", ["fused", "composed", "reference"])
def test_an_empty_batch(impl) -> None:
    q, k, v = operands((8, 8, 4, 4), batch=0)
    o, lse = mg.attend(q, k, v, P.causal(), enable_gqa=True, return_lse=True, impl=impl)
    assert o.shape == (0, 4, 8, 4) and lse.shape == (0, 4, 8)


@pytest.mark.parametrize("impl", ["fused", "composed", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [8, 5])
def test_dtypes_and_stride_order(impl, dtype, width) -> None:
    q = torch.randn(2, 30, 4, 8).to(dtype).transpose(1, 2)  # (B, N, H, D) in memory
    k = torch.randn(2, 4, 8, 30).to(dtype).transpose(2, 3)
    v = torch.randn(2, 4, 60, 2 * width).to(dtype)[:, :, ::2, ::2]
    o, lse = mg.attend(q, k, v, P.window(4), return_lse=True, impl=impl)
    assert o.dtype == dtype and o.shape == (2, 4, 30, width)
    assert o.transpose(1, 2).is_contiguous()
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = mg.attend(*wide(q, k, v), P.window(4), impl="reference")
    assert error(o, expected) < {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-6)


def test_scale_is_one_over_the_root_of_the_head_dimension() -> None:
    q, k, v = operands((20, 20, 9, 4))
    given = mg.attend(q, k, v, P.causal(), scale=1 / 3, enable_gqa=True)
    assert torch.equal(mg.attend(q, k, v, P.causal(), enable_gqa=True), given)
    compare("fused", q, k, v, P.causal(), scale=-2.5)


@pytest.mark.parametrize("impl", ["fused", "composed"])
def test_lse_makes_partials_that_merge(impl) -> None:
    q, k, v = operands((50, 50, 8, 8), heads=(2, 2))
    left, right = P.window(5), P.causal() - P.window(5)
    sink = torch.randn(2).double()
    a = mg.attend(q, k, v, left, return_lse=True, impl=impl, sink_logits=sink)
    b = mg.attend(q, k, v, right, return_lse=True, impl=impl)
    o, lse = mg.merge(*a, *b)
    expected = mg.attend(q, k, v, left | right, return_lse=True, sink_logits=sink)
    assert error(o, expected[0]) < 1e-13 and error(lse, expected[1]) < 1e-13


def test_scores_far_apart_do_not_overflow_or_vanish() -> None:
    q, k, v = operands((40, 80, 8, 8), torch.float32)
    compare("fused", q * 300, k, v, P.longformer(9, [0, 30]), tolerance=1e-4)
    # All scores far below zero: a row must not lose its keys to underflow.
    q, k = torch.full_like(q, 30.0), torch.full_like(k, -30.0)
    o, lse = mg.attend(q, k, v, P.window(3), return_lse=True, enable_gqa=True)
    assert torch.isfinite(lse).all()
    mean = mg.attend(torch.zeros_like(q), k, v, P.window(3), enable_gqa=True)
    assert error(o, mean) < 1e-6


def _bad_calls():
    q, k, v = torch.randn(2, 4, 10, 8), torch.randn(2, 2, 10, 8), torch.randn(2, 2, 10, 8)
    eq = torch.randn(2, 2, 10, 8)
    w = P.window(1)
    block = w.to_layout("block", 12, 10)
    return {
        "heads differ": ((q, k, v, w), {}, ValueError, "enable_gqa=True"),
        "not a multiple": (
            (torch.randn(2, 3, 10, 8), k, v, w), {"enable_gqa": True}, ValueError, "multiple",
        ),
        "three dimensions": ((eq[0], k, v, w), {}, ValueError, "q \\(B, Hq, Nq, D\\)"),
        "other head dimension": ((eq[..., :4], k, v, w), {}, ValueError, "must agree"),
        "other dtype": ((eq.double(), k, v, w), {}, TypeError, "one dtype"),
        "integers": ((eq.int(), k.int(), v.int(), w), {}, TypeError, "float16"),
        "dense mask": ((eq, k, v, torch.ones(10, 10, dtype=torch.bool)), {}, ValueError,
                       "P.from_dense"),
        "no pattern": ((eq, k, v, "window"), {}, ValueError, "give a pattern"),
        "layout of another shape": ((eq, k, v, block), {}, ValueError, "build the layout"),
        "too many heads": ((eq, k, v, P.per_head([w] * 2 + [P.causal()])), {}, ValueError,
                           "one for all"),
        "mask of another length": ((eq, k, v, w), {"key_mask": torch.ones(2, 9).bool()},
                                   ValueError, "P.from_dense"),
        "mask of numbers": ((eq, k, v, w), {"key_mask": torch.ones(2, 10)}, TypeError, "bool"),
        "sinks for other heads": ((eq, k, v, w), {"sink_logits": torch.ones(4)}, ValueError,
                                  "each query head"),
        "integer sinks": ((eq, k, v, w), {"sink_logits": torch.ones(2).int()}, TypeError, "float"),
        "unknown impl": ((eq, k, v, w), {"impl": "flash"}, NotImplementedError, "composed"),
    }  # fmt: skip


@pytest.mark.parametrize("case", _bad_calls())
def test_errors_say_what_to_do(case) -> None:
    args, options, kind, says = _bad_calls()[case]
    with pytest.raises(kind, match=says):
        mg.attend(*args, **options)


def test_a_given_nm_layout_raises_and_names_the_pattern() -> None:
    s = mg.sparsify(torch.randn(32, 64), "nm", n=2, m=4, prune=True)
    x = torch.randn(1, 1, 32, 8)
    y = torch.randn(1, 1, 64, 8)
    with pytest.raises(mg.LayoutError, match=r"P\.nm\(n, m\)"):
        mg.attend(x, y, y, s.layout)


def test_other_devices_raise_and_name_the_reference() -> None:
    x = torch.empty(1, 1, 8, 8, device="meta")
    for impl in ("auto", "fused", "composed"):
        with pytest.raises(NotImplementedError, match='impl="reference"'):
            mg.attend(x, x, x, P.causal(), impl=impl)


def test_indices_handed_in_are_validated_once() -> None:
    layout = mg.RowLayout.from_csr(
        (4, 4), torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 1, 2, 3])
    )
    object.__setattr__(layout, "columns", torch.tensor([0, 1, 2, 9], dtype=torch.int32))
    x = torch.randn(1, 1, 4, 8)
    with pytest.raises(mg.LayoutError, match="columns"):
        mg.attend(x, x, x, layout)


@pytest.mark.parametrize("how", ["numpy", "data", "tensor"])
def test_a_mask_that_changed_in_place_is_another(how) -> None:
    """Also where torch counts no version: memory shared with numpy, and `.data`."""
    array = np.random.default_rng(0).random((64, 64)) < 0.2
    mask = torch.from_numpy(array)
    before = mask.clone()
    q, k, v = (
        torch.randn(1, 1, 64, 16, generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3)
    )
    pattern = P.from_dense(mask)
    mg.attend(q, k, v, pattern)
    if how == "numpy":
        array[:, :8] = True
    elif how == "data":
        mask.data[:, :8] = True
    else:
        mask[:, :8] = True
    for one in (pattern, P.from_dense(before), P.from_dense(mask.clone())):
        right = mg.attend(q, k, v, one, impl="reference")
        torch.testing.assert_close(mg.attend(q, k, v, one), right, rtol=1e-5, atol=1e-5)
