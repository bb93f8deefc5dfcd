"""The fused attention on CUDA at lengths where nothing dense exists, and inside torch.compile."""

import pytest
import torch
from torch import Tensor

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.formats.cache import clear_caches

pytestmark = pytest.mark.gpu


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)


@pytest.mark.parametrize("n", [131_072, 1_048_576])
def test_long_sequences(n: int) -> None:
    reach, d = 256, 64
    everywhere = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:64].sort().values
    pattern = P.longformer(reach, everywhere)
    q, k, v = (random(1, 1, n, d, seed=s) for s in range(3))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o, lse = mg.attend(q, k, v, pattern, impl="fused", return_lse=True)
    # Gathered and partial results are few beside Q, K, V and the output.
    assert torch.cuda.max_memory_allocated() - before < 4 * q.numel() * 2
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(1))[:60].tolist()
    for row in [0, n - 1, *everywhere[:3].tolist(), *chosen]:
        near = torch.arange(max(row - reach, 0), min(row + reach + 1, n))
        keys = torch.arange(n) if row in everywhere else torch.cat([near, everywhere]).unique()
        keys = keys.cuda()
        s = k[0, 0, keys].double() @ q[0, 0, row].double() * d**-0.5
        right = s.softmax(0) @ v[0, 0, keys].double()
        assert abs(float(lse[0, 0, row]) - float(s.logsumexp(0))) <= 2e-5
        torch.testing.assert_close(o[0, 0, row].double(), right, rtol=1e-2, atol=4e-3)


def test_long_graphs() -> None:
    """Edges of a graph: every row has keys of its own, some rows many, some none."""
    n, heads, d = 131_072, 2, 64
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 6, (n,), generator=draw)
    counts[7], counts[n - 1] = 50_000, 3000
    columns = [torch.randperm(n, generator=draw)[: int(c)].sort().values for c in counts[[7, -1]]]
    few = torch.randint(0, n // 8, (n, 6), generator=draw) * 8 + torch.arange(6)
    few = few.sort(1).values
    rows = [columns[0] if i == 7 else few[i, :c] for i, c in enumerate(counts[:-1].tolist())]
    rows.append(columns[1])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    layout = mg.RowLayout.from_csr((n, n), offsets.cuda(), torch.cat(rows).int().cuda())
    q, k, v = (random(1, heads, n, d, seed=s) for s in range(3))
    o, lse = mg.attend(q, k, v, layout, impl="fused", return_lse=True)
    empty = (counts == 0).cuda()
    assert not o[0, :, empty].any() and (lse[0, :, empty] == -torch.inf).all()
    for row in [7, n - 1, *range(100, 160)]:
        if counts[row]:
            keys = rows[row].cuda()
            s = torch.einsum("hd,hkd->hk", q[0, :, row].double(), k[0][:, keys].double()) * d**-0.5
            right = torch.einsum("hk,hkd->hd", s.softmax(1), v[0][:, keys].double())
            torch.testing.assert_close(lse[0, :, row].double(), s.logsumexp(1), rtol=0, atol=2e-5)
            torch.testing.assert_close(o[0, :, row].double(), right, rtol=1e-2, atol=4e-3)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("name", ["window", "scattered", "entries"])
def test_under_compile(name: str, mode: str | None) -> None:
    """Planned when it is traced; calls after the first plan nothing and equal eager ones."""
    clear_caches()
    torch._dynamo.reset()
    pattern = {
        "window": P.window(100),
        "scattered": P.longformer(64, [5, 130, 700]),
        "entries": P.window(40) | P.random(0.01, 1),
    }[name]
    k, v = (random(2, 4, 1000, 64, seed=s) for s in range(2))
    compiled = torch.compile(
        lambda a, b, c: mg.attend(a + 1, b, c, pattern, impl="fused") * 2, mode=mode, fullgraph=True
    )
    for n in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        other = random(2, 4, 1000, 64, seed=10 + n)
        right = mg.attend(other + 1, k, v, pattern, impl="fused") * 2 if n else None
        found = compiled(other, k, v).clone()  # the first call of all is compiled
        if right is None:
            right = mg.attend(other + 1, k, v, pattern, impl="fused") * 2
        assert torch.equal(found, right)
    torch._dynamo.reset()
