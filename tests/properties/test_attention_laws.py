"""attend and merge: implementations agree, splits merge, and what attention does not depend on."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis")
from drawn import close, real, same_bits, seeds, whole
from expressions import Expression, expressions, ids_of, mask_of, pattern_of, sides
from hypothesis import example
from hypothesis import strategies as st
from laws import law
from torch import Tensor

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.formats.pattern import Pattern

SIDES = st.sampled_from((5, 0, 1, 2, 8, 13, 17, 24))
HEADS = st.sampled_from(((1, 1), (2, 1), (2, 2), (4, 2), (3, 3)))
BATCH = st.sampled_from((1, 2, 0))
DIMS = st.sampled_from((3, 1, 2, 8, 0))
KINDS = st.sampled_from(("row", "block", "mixed"))
FLOATS = st.sampled_from((torch.float32, torch.float64, torch.bfloat16))
IMPLS = st.sampled_from(("fused", "composed"))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(
    seed: int, batch: int, heads: tuple[int, int], nq: int, nk: int, d: int, dv: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, normal in float64."""
    g = generator(seed)
    return (
        real(g, batch, heads[0], nq, d),
        real(g, batch, heads[1], nk, d),
        real(g, batch, heads[1], nk, dv),
    )


@law(0.6, e=expressions(), nq=sides, nk=sides, batch=BATCH, heads=HEADS, d=DIMS, seed=seeds,
     masked=st.booleans(), sunk=st.booleans(), kind=KINDS)  # fmt: skip
@example(e=("window", 1, 1), nq=5, nk=5, batch=1, heads=(1, 1), d=0, seed=0, masked=False,
         sunk=False, kind="row")  # fmt: skip
def test_implementations_agree(
    e: Expression, nq: int, nk: int, batch: int, heads: tuple[int, int], d: int, seed: int,
    masked: bool, sunk: bool, kind: str,
) -> None:  # fmt: skip
    """Fused, composed, and dense torch on the mask that the predicates give."""
    q, k, v = tensors(seed, batch, heads, nq, nk, d)
    g = generator(seed + 1)
    keep = torch.rand(batch, nk, generator=g) < 0.7 if masked else None
    sink = real(g, heads[0]) if sunk else None
    pattern, mask = pattern_of(e, nq, nk), mask_of(e, nq, nk)
    layout = pattern.to_layout(kind, nq, nk, size=16)
    rest = {"key_mask": keep, "sink_logits": sink, "enable_gqa": True, "return_lse": True}
    live = mask.expand(batch, 1, nq, nk)
    if keep is not None:
        live = live & keep[:, None, None]
    wide_k, wide_v = (t.repeat_interleave(heads[0] // heads[1], 1) for t in (k, v))
    s = torch.where(live, q @ wide_k.mT / max(d, 1) ** 0.5, -torch.inf)
    if sink is not None:
        s = torch.cat([s, sink[:, None, None].expand(batch, -1, nq, 1)], -1)
    expected = torch.logsumexp(s, -1) if s.shape[-1] else s.new_full(s.shape[:-1], -torch.inf)
    top = torch.where(expected == -torch.inf, 0.0, expected)
    expected_o = torch.exp(s - top[..., None])[..., :nk] @ wide_v
    for impl in ("fused", "composed"):
        o, lse = mg.attend(q, k, v, layout, impl=impl, **rest)
        close(o, expected_o)
        close(lse, expected)
    o, lse = mg.attend(q, k, v, pattern, impl="reference", **rest)
    close(o, expected_o)
    close(lse, expected)


@law(0.5, a=st.lists(expressions(fixed=False, most=2), min_size=2, max_size=3), nq=SIDES, nk=SIDES,
     batch=st.booleans(), shared=st.booleans(), seed=seeds, impl=IMPLS)  # fmt: skip
def test_tables_attend_entry_by_entry(
    a: list[Expression], nq: int, nk: int, batch: bool, shared: bool, seed: int, impl: str
) -> None:
    """One pattern for each batch entry or query head, key heads shared or not."""
    patterns = [pattern_of(e, nq, nk) for e in a]
    b, h = (len(a), 2) if batch else (2, len(a))
    q, k, v = tensors(seed, b, (h, 1 if shared else h), nq, nk, 3)
    table = (P.per_batch if batch else P.per_head)(patterns)
    rest = {"return_lse": True, "enable_gqa": shared}
    o, lse = mg.attend(q, k, v, table, impl=impl, **rest)
    for n, one in enumerate(patterns):
        at = (slice(n, n + 1),) if batch else (slice(None), slice(n, n + 1))
        of = at if batch or not shared else (slice(None),)
        alone, alone_lse = mg.attend(q[at], k[of], v[of], one, impl="reference", **rest)
        close(o[at], alone)
        close(lse[at], alone_lse)


def partials(seed: int, count: int, rows: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Random (o, lse), some rows without keys."""
    g = generator(seed)
    made = []
    for _ in range(count):
        lse = real(g, 2, rows, dtype=dtype) * 20
        empty = torch.rand(2, rows, generator=g) < 0.3
        o = torch.where(empty[..., None], 0.0, real(g, 2, rows, 3, dtype=dtype))
        made.append((o, torch.where(empty, -torch.inf, lse)))
    return made


_merge = {"seed": seeds, "rows": st.sampled_from((3, 0, 1, 7)),
          "dtype": st.sampled_from((torch.float64, torch.float32))}  # fmt: skip


@law(8, **_merge)
def test_merge_commutes(seed: int, rows: int, dtype: torch.dtype) -> None:
    a, b = partials(seed, 2, rows, dtype)
    assert all(map(same_bits, mg.merge(*a, *b), mg.merge(*b, *a)))


@law(8, **_merge)
def test_merge_is_associative(seed: int, rows: int, dtype: torch.dtype) -> None:
    a, b, c = partials(seed, 3, rows, dtype)
    left = mg.merge(*mg.merge(*a, *b), *c)
    right = mg.merge(*a, *mg.merge(*b, *c))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for one, other in zip(left, right, strict=True):
        close(one, other, tolerance)


@law(8, junk=st.sampled_from((0.0, torch.nan, torch.inf)), **_merge)
def test_a_partial_without_keys_is_the_identity_of_merge(
    seed: int, rows: int, dtype: torch.dtype, junk: float
) -> None:
    """Bit for bit, whatever its rows hold."""
    ((o, lse),) = partials(seed, 1, rows, dtype)
    nothing = torch.full_like(o, junk), torch.full_like(lse, -torch.inf)
    assert all(map(same_bits, mg.merge(o, lse, *nothing), (o, lse)))
    assert all(map(same_bits, mg.merge(*nothing, o, lse), (o, lse)))


@law(6, **_merge, by=st.sampled_from((3.0, -100.0, 1e4)))
def test_merge_follows_a_shift_of_both(seed: int, rows: int, dtype: torch.dtype, by: float) -> None:
    """Scores enter by their differences; the merged output is a mean of the two."""
    a, b = partials(seed, 2, rows, torch.float64)
    o, lse = mg.merge(*a, *b)
    shifted, more = mg.merge(a[0], a[1] + by, b[0], b[1] + by)
    close(shifted, o, 1e-9)
    close(more, lse + by, 1e-9)
    low, high = torch.minimum(a[0], b[0]), torch.maximum(a[0], b[0])
    assert bool(((o >= low - 1e-12) & (o <= high + 1e-12)).all())
    assert bool((lse >= torch.maximum(a[1], b[1])).all())


@law(0.5, e=expressions(), cut=expressions(most=2), nq=SIDES, nk=SIDES, heads=HEADS, seed=seeds,
     sunk=st.booleans(), impl=IMPLS)  # fmt: skip
def test_merged_splits_are_the_whole(
    e: Expression, cut: Expression, nq: int, nk: int, heads: tuple[int, int], seed: int, sunk: bool,
    impl: str,
) -> None:  # fmt: skip
    """Any pattern cut in two by any other; a sink goes to one part."""
    q, k, v = tensors(seed, 2, heads, nq, nk, 3)
    p, c = pattern_of(e, nq, nk), pattern_of(cut, nq, nk)
    sink = real(generator(seed + 1), heads[0]) if sunk else None
    rest = {"enable_gqa": True, "return_lse": True, "impl": impl}
    whole_o, whole_lse = mg.attend(q, k, v, p, sink_logits=sink, **rest)
    one = mg.attend(q, k, v, p & c, sink_logits=sink, **rest)
    other = mg.attend(q, k, v, p - c, **rest)
    o, lse = mg.merge(*one, *other)
    close(o, whole_o)
    close(lse, whole_lse)


@law(0.5, how=st.sampled_from(("runs", "squares")), n=st.integers(1, 4), nk=SIDES, seed=seeds,
     causal=st.booleans(), impl=IMPLS)  # fmt: skip
def test_documents_do_not_see_each_other(
    how: str, n: int, nk: int, seed: int, causal: bool, impl: str
) -> None:
    """Attention of packed documents is that of each alone."""
    ids = torch.tensor(ids_of(how, n, nk), dtype=torch.int64)
    q, k, v = tensors(seed, 2, (2, 2), nk, nk, 3)
    inner: Pattern = P.causal() if causal else P.full()
    o, lse = mg.attend(q, k, v, P.documents(ids) & inner, return_lse=True, impl=impl)
    for one in ids.unique():
        at = (ids == one).nonzero().flatten()
        alone = mg.attend(*(t[:, :, at] for t in (q, k, v)), inner, return_lse=True, impl=impl)
        close(o[:, :, at], alone[0])
        close(lse[:, :, at], alone[1])


@law(0.6, e=expressions(fixed=False), nk=SIDES, cut=st.integers(0, 24), seed=seeds, impl=IMPLS)
def test_fewer_queries_give_the_last_rows(
    e: Expression, nk: int, cut: int, seed: int, impl: str
) -> None:
    """The suffix law for attention: decoding is the end of prefilling."""
    q, k, v = tensors(seed, 1, (2, 2), nk, nk, 3)
    p, nq = pattern_of(e, nk, nk), min(cut, nk)
    o, lse = mg.attend(q, k, v, p, return_lse=True, impl=impl)
    last, last_lse = mg.attend(q[:, :, nk - nq :], k, v, p, return_lse=True, impl=impl)
    close(last, o[:, :, nk - nq :])
    close(last_lse, lse[:, :, nk - nq :])


@law(0.5, e=expressions(fixed=False, causal=True), nk=SIDES, cut=st.integers(0, 24), seed=seeds,
     impl=IMPLS)  # fmt: skip
def test_causal_rows_do_not_know_the_future(
    e: Expression, nk: int, cut: int, seed: int, impl: str
) -> None:
    """What stands later changes no bit of a causal row."""
    q, k, v = tensors(seed, 1, (2, 2), nk, nk, 3)
    p, n = pattern_of(e, nk, nk), min(cut, nk)
    o, lse = mg.attend(q, k, v, p, return_lse=True, impl=impl)
    later = torch.arange(nk)[:, None] >= n
    g = generator(seed + 1)
    k2, v2 = (torch.where(later, real(g, *t.shape), t) for t in (k, v))
    other, other_lse = mg.attend(q, k2, v2, p, return_lse=True, impl=impl)
    assert torch.equal(other[:, :, :n], o[:, :, :n])
    assert torch.equal(other_lse[:, :, :n], lse[:, :, :n])


@law(0.6, e=expressions(), nq=SIDES, nk=SIDES, seed=seeds, impl=IMPLS, b=st.integers(0, 1),
     h=st.integers(0, 3), dtype=FLOATS)  # fmt: skip
def test_a_row_does_not_depend_on_its_batch(
    e: Expression, nq: int, nk: int, seed: int, impl: str, b: int, h: int, dtype: torch.dtype
) -> None:
    """Bit for bit: one batch entry and head alone, and everything again."""
    q, k, v = (t.to(dtype) for t in tensors(seed, 2, (4, 2), nq, nk, 5, 3))
    p = pattern_of(e, nq, nk)
    rest = {"return_lse": True, "impl": impl}
    o, lse = mg.attend(q, k, v, p, enable_gqa=True, **rest)
    at, of = (slice(b, b + 1), slice(h, h + 1)), (slice(b, b + 1), slice(h // 2, h // 2 + 1))
    one = q[at].clone(), k[of].clone(), v[of].clone()  # at another place in memory
    alone, alone_lse = mg.attend(*one, p, **rest)
    assert same_bits(alone, o[at]) and same_bits(alone_lse, lse[at])
    mg.clear_caches()
    again = mg.attend(q, k, v, p, enable_gqa=True, **rest)
    assert same_bits(again[0], o) and same_bits(again[1], lse)


@law(0.5, e=expressions(), nq=SIDES, nk=SIDES, seed=seeds, impl=IMPLS, kind=KINDS)
def test_keys_in_another_order(
    e: Expression, nq: int, nk: int, seed: int, impl: str, kind: str
) -> None:
    """Keys and values permuted under a mask permuted alike change nothing; queries permute rows."""
    q, k, v = tensors(seed, 2, (2, 2), nq, nk, 3)
    mask, g = mask_of(e, nq, nk), generator(seed + 1)
    rows, columns = torch.randperm(nq, generator=g), torch.randperm(nk, generator=g)
    before = P.from_dense(mask).to_layout(kind, nq, nk, size=16)
    after = P.from_dense(mask[rows][:, columns]).to_layout(kind, nq, nk, size=16)
    o, lse = mg.attend(q, k, v, before, return_lse=True, impl=impl)
    moved = mg.attend(
        q[:, :, rows], k[:, :, columns], v[:, :, columns], after, return_lse=True, impl=impl
    )
    close(moved[0], o[:, :, rows])
    close(moved[1], lse[:, :, rows])


@law(0.6, e=expressions(), nq=SIDES, nk=SIDES, seed=seeds, impl=IMPLS)
def test_outputs_are_means_of_kept_values(
    e: Expression, nq: int, nk: int, seed: int, impl: str
) -> None:
    """Equal scores: exactly the mean of whole values, and lse the logarithm of their number."""
    g, mask = generator(seed), mask_of(e, nq, nk)
    q, k, v = torch.zeros(1, 1, nq, 2).double(), real(g, 1, 1, nk, 2), whole(g, 1, 1, nk, 3)
    o, lse = mg.attend(q, k, v, pattern_of(e, nq, nk), return_lse=True, impl=impl)
    count = mask.sum(-1)
    assert torch.equal(torch.exp(lse[0, 0]).round().long(), count)
    close(o[0, 0] * count[:, None], mask.double() @ v[0, 0])


@law(0.6, e=expressions(), more=expressions(most=2), nq=SIDES, nk=SIDES, seed=seeds, impl=IMPLS)
def test_more_keys_never_lower_lse(
    e: Expression, more: Expression, nq: int, nk: int, seed: int, impl: str
) -> None:
    q, k, v = tensors(seed, 1, (2, 2), nq, nk, 3)
    p = pattern_of(e, nq, nk)
    low = mg.attend(q, k, v, p, return_lse=True, impl=impl)[1]
    high = mg.attend(q, k, v, p | pattern_of(more, nq, nk), return_lse=True, impl=impl)[1]
    assert bool((high >= low - 1e-12).all())


@law(0.5, e=expressions(), nq=SIDES, nk=SIDES, heads=HEADS, seed=seeds, impl=IMPLS)
def test_a_key_mask_is_a_pattern_without_those_keys(
    e: Expression, nq: int, nk: int, heads: tuple[int, int], seed: int, impl: str
) -> None:
    """For each batch entry apart; what dropped keys hold, NaN too, reaches nothing."""
    q, k, v = tensors(seed, 2, heads, nq, nk, 3)
    keep = torch.rand(2, nk, generator=generator(seed + 1)) < 0.6
    p, rest = pattern_of(e, nq, nk), {"enable_gqa": True, "return_lse": True, "impl": impl}
    lost = (~keep)[:, None, :, None]
    got = mg.attend(
        q, k.masked_fill(lost, torch.nan), v.masked_fill(lost, torch.inf), p, key_mask=keep, **rest
    )
    cut = P.per_batch([p & P.global_keys(row.nonzero().flatten()) for row in keep])
    expected = mg.attend(q, k, v, cut, **rest)
    close(got[0], expected[0])
    close(got[1], expected[1])


@law(0.4, batch=BATCH, n=st.integers(1, 4), m=st.sampled_from((4, 2, 1, 3, 8, 16)), nq=SIDES,
     nk=SIDES, e=expressions(most=2), within=st.booleans(), masked=st.booleans(), heads=HEADS,
     seed=seeds, odd=st.sampled_from((None, torch.inf, -torch.inf, torch.nan)))  # fmt: skip
@example(batch=1, n=1, m=4, nq=1, nk=8, e=("full",), within=False, masked=False, heads=(1, 1),
         seed=0, odd=torch.nan)  # fmt: skip
@example(batch=1, n=1, m=4, nq=1, nk=1, e=("full",), within=False, masked=False, heads=(1, 1),
         seed=0, odd=-torch.inf)  # fmt: skip
def test_dynamic_nm_implementations_agree(
    batch: int, n: int, m: int, nq: int, nk: int, e: Expression, within: bool, masked: bool,
    heads: tuple[int, int], seed: int, odd: float | None,
) -> None:  # fmt: skip
    """Whole scores with many ties, so that the choice itself is compared; and one key whose scores
    are infinite or no numbers, which are the largest where they are kept.
    """
    n = min(n, m)
    within = within and 64 % m == 0
    g = generator(seed)
    q, k = whole(g, batch, heads[0], nq, 2), whole(g, batch, heads[1], nk, 2)
    v = real(g, batch, heads[1], nk, 3)
    keep = torch.rand(batch, nk, generator=g) < 0.7 if masked else None
    if odd is not None and nk and nq:
        q = q.abs() + 1
        k[:, :, nk // 2] = odd
    pattern = P.nm(n, m) & pattern_of(e, nq, nk) if within else P.nm(n, m)
    rest = {"key_mask": keep, "enable_gqa": True, "return_lse": True, "scale": 0.25}
    results = [
        mg.attend(q, k, v, pattern, impl=impl, **rest)
        for impl in ("reference", "fused", "composed")
    ]
    for o, lse in results[1:]:
        # A row that kept +inf or NaN has no number to give: NaN, its lse NaN or +inf.
        lost = ~(results[0][1] < torch.inf)
        assert torch.equal(~(lse < torch.inf), lost)
        assert bool(o[lost].isnan().all())
        close(lse[~lost], results[0][1][~lost])
        close(o[~lost], results[0][0][~lost])


@law(0.3, e=expressions(), nq=SIDES, nk=SIDES, heads=HEADS, seed=seeds, masked=st.booleans(),
     sunk=st.booleans())  # fmt: skip
def test_gradients_of_implementations_agree(
    e: Expression, nq: int, nk: int, heads: tuple[int, int], seed: int, masked: bool, sunk: bool
) -> None:
    inputs = [t.requires_grad_() for t in tensors(seed, 2, heads, nq, nk, 3)]
    g = generator(seed + 1)
    if sunk:
        inputs.append(real(g, heads[0]).requires_grad_())
    keep = torch.rand(2, nk, generator=g) < 0.7 if masked else None
    up, up_lse = real(g, 2, heads[0], nq, 2), real(g, 2, heads[0], nq)
    p, found = pattern_of(e, nq, nk), []
    for impl in ("reference", "fused", "composed"):
        o, lse = mg.attend(
            *inputs[:3], p, key_mask=keep, sink_logits=inputs[3] if sunk else None,
            enable_gqa=True, return_lse=True, impl=impl,
        )  # fmt: skip
        grads = torch.autograd.grad([o, lse], inputs, [up, up_lse], allow_unused=True)
        found.append([torch.zeros_like(t) if d is None else d
                      for t, d in zip(inputs, grads, strict=True)])  # fmt: skip
    for other in found[1:]:
        for one, reference in zip(other, found[0], strict=True):
            close(one, reference, 1e-10)
    # No gradient for queries without keys and for keys nobody sees.
    mask = mask_of(e, nq, nk)
    live = mask[None] & keep[:, None] if keep is not None else mask[None]
    dq, dk, dv = found[1][:3]
    assert bool((dq.transpose(1, 2)[~live.any(2).expand(2, nq)] == 0).all())
    for d in (dk, dv):
        assert bool((d.transpose(1, 2)[~live.any(1).expand(2, nk)] == 0).all())


@law(0.5, e=expressions(), nq=SIDES, nk=SIDES, seed=seeds, impl=IMPLS, size=DIMS)
def test_a_sink_is_a_key_without_a_value(
    e: Expression, nq: int, nk: int, seed: int, impl: str, size: int
) -> None:
    q, k, v = tensors(seed, 2, (2, 2), nq, nk, 3, size)
    p, sink = pattern_of(e, nq, nk), real(generator(seed + 1), 2)
    o, lse = mg.attend(q, k, v, p, return_lse=True, impl=impl)
    sunk, sunk_lse = mg.attend(q, k, v, p, sink_logits=sink, return_lse=True, impl=impl)
    logit = sink[:, None].expand(lse.shape)
    expected = mg.merge(o, lse, torch.zeros_like(o), logit)
    close(sunk, expected[0])
    close(sunk_lse, expected[1])
    without = torch.full_like(sink, -torch.inf)
    same = mg.attend(q, k, v, p, sink_logits=without, return_lse=True, impl=impl)
    close(same[0], o)
    close(same[1], lse)
