"""Interchange at 65,536 queries and keys, where an array of all pairs would not fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = str(Path(__file__).parents[2] / "src")

# Address space: what there is after the imports, and 1 GiB. All pairs as bits are 512 MiB, as
# bytes 4 GiB.
CHILD = """
import resource, sys
import torch
import torch.nn.attention.flex_attention
import mixgrain as mg
from mixgrain import interchange as X, patterns as P
from mixgrain.formats.relayout import convert_layout
from mixgrain.formats import split
torch.set_num_threads(1)

def check(made, expected):
    assert made == expected, (made, expected)

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)
n = 65536
causal, near = P.causal(), P.causal() & P.longformer(16, [7, 40000])
total = n * (n + 1) // 2

mask = X.to_block_mask(causal, n, n, 128)
check(int(mask.full_kv_num_blocks.sum()), 512 * 511 // 2)
at = torch.tensor([0, 5, 5, 65535, 300]), torch.tensor([0, 5, 6, 65535, 299])
zero = torch.tensor(0)
check(mask.mask_mod(zero, zero, *at).tolist(), [True, True, False, True, True])
check(P.from_block_mask(mask).nnz(n, n), total)

flash = X.to_flash_blocks(near, n, n, 128, compact=True)
check(X.from_flash_blocks(flash, (n, n)).nnz(n, n), near.nnz(n, n))
del mask, flash

for p in (causal, P.window(200), near, causal & P.documents(torch.arange(n) // 1000)):
    ends = X.to_intervals(p, n, n)
    check(X.from_intervals(ends, (n, n)).nnz(n, n), p.nnz(n, n))
    del ends
for p in (causal, P.window(200), P.documents(torch.arange(n) // 1000)):
    rows = X.to_flashmask(p, n, n)
    check(X.from_flashmask(rows.startend_row_indices, (n, n), rows.causal).nnz(n, n), p.nnz(n, n))
try:
    X.to_flashmask(P.random(0.01, 0), n, n)
except mg.LayoutError as error:
    assert "three runs" in str(error)
else:
    raise AssertionError("a random pattern is no FlashMask")

blocks = P.random_blocks(8, 64, 0)
indices = X.to_bsa(blocks, n, n)
back = X.from_bsa(indices.q2k_block_index, (n, n), indices.q2k_block_nums)
check(back.nnz(n, n), blocks.nnz(n, n))

layout = causal.to_layout("block", n, n)
check(P.from_layout(layout).nnz(n, n), total)
check(convert_layout(layout, "mixed").nnz, total)
check(convert_layout(layout, "block", size=128).nnz, total)
del layout, indices, back

layout = near.to_layout("mixed", n, n, size=16)
s = mg.SparseTensor(layout, torch.arange(float(layout.slots)))
row = s.to_layout("row")
check(row.nnz, s.nnz)
edges = X.to_edges(row)
again = X.from_edges(edges.edge_index, (n, n), edges.edge_weight)
assert torch.equal(again.values, row.values)
assert torch.equal(X.from_scipy(X.to_scipy(s)).values, row.values)
assert torch.equal(X.from_torch(X.to_torch(s, torch.sparse_coo)).values, row.values)
del edges, again
assert torch.equal(row.to_layout(layout).to_layout("row").values, row.values)
print("all of it")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_nothing_holds_all_pairs() -> None:
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD],
        capture_output=True, text=True, timeout=600,
        env={"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert found.stdout.strip() == "all of it", found.stderr
