"""Adversarial values and memory, where the tests of each floor do not look already.

Leaks of dropped keys, strided views, empty results and overflow of scores stand in the leak, shape
and cell tests of primitives and attention. Here: memory that was never written, user memory beside
what is written, denormals, −0, huge logits in every dtype, and sizes beyond 2³¹.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mixgrain as mg
from mixgrain import patterns as P

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = {
    "longformer": P.longformer(3, [0, 17]),  # blocks and panels
    "random": P.random(0.15, seed=3),  # single entries
    "row of nothing": P.global_queries([5]) - P.global_keys([2]),  # almost every row is empty
    "nothing": P.window(3) & ~P.window(4),
    "one row": P.global_queries([0]),
}
KINDS = ["row", "block", "mixed"]
N, M, D = 37, 45, 5


def operands(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    return [torch.randn(2, 3, n, D, generator=g).to(dtype) for n in (N, M, M)]


def composed(pattern: object, kind: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """All three primitives, their gradients, and a product with the transpose."""
    q, k, v = (t.requires_grad_() for t in operands(dtype))
    s = mg.sddmm(q, k, pattern.to_layout(kind, N, M, size=16), scale=0.5)
    p, lse = mg.softmax(s, return_lse=True)
    o = mg.spmm(p, v)
    grads = torch.autograd.grad(o.sum() + lse[lse > -torch.inf].sum(), (q, k, v))
    return [s.values, p.values, lse, o, mg.spmm(p.T, q), p.to_dense(), *grads]


def attended(pattern: object, impl: str, dtype: torch.dtype) -> list[torch.Tensor]:
    q, k, v = (t.requires_grad_() for t in operands(dtype))
    o, lse = mg.attend(q, k, v, pattern, return_lse=True, impl=impl, sink_logits=torch.zeros(3))
    return [o, lse, *torch.autograd.grad(o.sum() + lse.sum(), (q, k, v))]


def multiplied(kind: str, dtype: torch.dtype) -> list[torch.Tensor]:
    w = mg.sparsify(operands(dtype)[0][0, 0], kind, prune=True, **(
        {} if kind == "nm" else {"density": 0.5}))  # fmt: skip
    x = operands(dtype)[1][0].requires_grad_()
    y = mg.linear(x, w, torch.ones(N, dtype=dtype))
    return [w.values, w.to_dense(), y, *torch.autograd.grad(y.sum(), x)]


class Poison:
    """Memory that torch hands out unwritten holds NaN (or zero), or the largest integer."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.value, self.count = 0.0, 0
        for owner, names in (
            (torch, ("empty", "empty_like", "empty_strided")),
            (torch.Tensor, ("new_empty", "new_empty_strided")),
        ):
            for name in names:
                patch.setattr(owner, name, self._filled(getattr(owner, name)))

    def _filled(self, function):
        def made(*arguments, **options) -> torch.Tensor:
            t = function(*arguments, **options)
            if t.device.type == "cpu" and t.numel() and t.layout is torch.strided:
                self.count += 1
                with torch.no_grad():
                    if t.is_floating_point():
                        t.fill_(self.value)
                    elif t.dtype != torch.bool:
                        t.fill_(torch.iinfo(t.dtype).max if self.value else 0)
            return t

        return made


@pytest.fixture
def poison(monkeypatch) -> Poison:
    return Poison(monkeypatch)


CASES = {
    **{f"{kind}, {name}": (lambda kind=kind, name=name:
                           composed(PATTERNS[name], kind, torch.float32))
       for kind in KINDS for name in PATTERNS},
    **{f"{impl}, {name}": (lambda impl=impl, name=name:
                           attended(PATTERNS[name], impl, torch.float32))
       for impl in ("fused", "composed") for name in PATTERNS},
    **{f"{impl}, nm": (lambda impl=impl: attended(P.nm(2, 4), impl, torch.float32))
       for impl in ("fused", "composed")},
    **{f"weight, {kind}": (lambda kind=kind: multiplied(kind, torch.float32))
       for kind in ("tile", "nm", "block", "row", "mixed")},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_memory_that_was_never_written_reaches_nothing(case: str, poison: Poison) -> None:
    results = []
    for poison.value in (0.0, torch.nan):
        mg.clear_caches()
        results.append(CASES[case]())
    assert poison.count
    for clean, poisoned in zip(*results, strict=True):
        assert not torch.isnan(clean).any()
        assert torch.equal(clean, poisoned), "a result depends on memory that was never written"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PATTERNS)
def test_nothing_beside_the_operands_is_written(kind: str, name: str) -> None:
    """Operands lie between guards of a pattern of bits; neither they nor the guards change."""
    room = [torch.full((64 + t.numel() + 64,), -7.25) for t in operands()]
    inside = []
    for memory, t in zip(room, operands(), strict=True):
        memory[64:-64] = t.flatten()
        inside.append(memory[64:-64].view(t.shape))
    before = [memory.clone() for memory in room]
    s = mg.sddmm(inside[0], inside[1], PATTERNS[name].to_layout(kind, N, M, size=16))
    p, lse = mg.softmax(s, return_lse=True)
    mg.spmm(p, inside[2])
    mg.spmm(p.T, inside[0])
    for impl in ("fused", "composed"):
        mg.attend(*inside, PATTERNS[name], impl=impl)
    mg.merge(inside[0], lse, inside[0], lse)
    for memory, old in zip(room, before, strict=True):
        assert torch.equal(memory, old)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("impl", ["fused", "composed", "reference"])
@pytest.mark.parametrize("logit", [2.0**14, -(2.0**14)])
def test_huge_logits(impl: str, dtype: torch.dtype, logit: float) -> None:
    """Scores of ±16384: all equal in a row, so that the result is the mean of the values."""
    q = torch.full((1, 1, N, 1), 128.0, dtype=dtype)
    k = torch.full((1, 1, M, 1), logit / 128, dtype=dtype)
    v = torch.arange(M, dtype=dtype)[None, None, :, None]
    pattern = P.window(2)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    o, lse = mg.attend(*inputs, pattern, scale=1.0, return_lse=True, impl=impl)
    mask = pattern.dense(N, M)
    mean = (mask.double() @ torch.arange(M).double()) / mask.sum(1)
    torch.testing.assert_close(o[0, 0, :, 0].double(), mean, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse[0, 0].double(), logit + mask.sum(1).double().log(), rtol=1e-3,
                               atol=0)  # fmt: skip
    for grad in torch.autograd.grad(o.sum() + lse.sum(), inputs):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_denormals_are_not_flushed(kind: str, dtype: torch.dtype) -> None:
    """The smallest numbers there are, summed exactly."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    layout = P.window(2).to_layout(kind, N, M, size=16)
    q = torch.full((N, 1), tiny, dtype=dtype)
    ones = torch.ones(M, 1, dtype=dtype)
    s = mg.sddmm(q, ones, layout)
    kept = P.window(2).dense(N, M)
    assert torch.equal(s.to_dense() / tiny, kept.to(dtype))
    assert torch.equal(mg.spmm(s, ones)[:, 0] / tiny, kept.sum(1).to(dtype))


@pytest.mark.parametrize("kind", ["tile", "block", "row", "mixed"])
def test_minus_zero_survives(kind: str) -> None:
    dense = torch.zeros(N, M)
    dense[3, 4] = -0.0
    s = mg.sparsify(dense, kind, **({} if kind in ("tile", "row") else {"size": 16}))
    assert s.layout.nnz
    back = s.to_dense()
    assert torch.equal(back.view(torch.int32), dense.view(torch.int32))
    assert torch.equal(s.T.to_dense().view(torch.int32), dense.mT.contiguous().view(torch.int32))


def test_more_positions_than_2_to_the_31() -> None:
    """N · M beyond 2³¹ with a handful of entries, the farthest of them at the end."""
    n, m = 2**17, 2**17
    pattern = P.window(0) & P.global_keys([0, 77, n - 1])
    for kind in ("row", "block", "mixed"):
        layout = pattern.to_layout(kind, n, m, size=16)
        assert layout.nnz == 3
        x = torch.zeros(m, 2)
        x[[0, 77, n - 1]] = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        s = mg.SparseTensor(layout, torch.ones(layout.slots))
        y = mg.spmm(s, x)
        assert torch.equal(y, x) and torch.equal(mg.spmm(s.T, x), x)
        row, column = (t[slice(None) if layout.live() is None else layout.live()]
                       for t in layout.indices())  # fmt: skip
        assert row.tolist() == column.tolist() == [0, 77, n - 1]


OVERFLOW = """
import torch, mixgrain as mg
from mixgrain.formats.errors import MixgrainError
offsets, columns = torch.tensor([0, 1, 2]), torch.tensor([0, 1])
for bad in (3, 2**31 - 1, 2**31, 2**40, -1, -2**31, 2**62):
    for at in (0, 1):
        c, o = columns.clone(), offsets.clone()
        c[at] = bad
        o[at + 1] = bad
        for make in (
            lambda: mg.RowLayout.from_csr((2, 3), offsets, c),
            lambda: mg.RowLayout.from_csr((2, 3), o, columns),
            lambda: mg.BlockLayout.from_blocks((32, 48), 16, offsets, c),
            lambda: mg.BlockLayout.from_blocks((32, 48), 16, o, columns),
            lambda: mg.TileLayout.from_tiles(c, columns, (32, 48)),
            lambda: mg.TileLayout.from_tiles(columns, c, (32, 48)),
        ):
            try:
                make()
            except MixgrainError:
                continue
            raise SystemExit(f"accepted {bad} at {at}")
print("refused")
"""


def test_indices_far_outside_do_not_crash() -> None:
    """In a child: what is not refused writes outside of its memory."""
    child = subprocess.run(
        [sys.executable, "-c", OVERFLOW],
        env={"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert child.stdout == "refused\n", f"{child.returncode}: {child.stdout}{child.stderr[-800:]}"
