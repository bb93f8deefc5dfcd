"""Every cell at N = 65,536, where one N × N float32 array would be 16 GiB, within 1 GiB.

A child process limits its address space to what it has after the imports plus 1 GiB and runs all
cells of one layout class, forward and backward. Anything quadratic dies there.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cases import kinds_of

from mixgrain.primitives.dispatch import TABLE

ROOT = Path(__file__).parents[2]
KINDS = sorted({kind for cells in TABLE.values() for cls in cells for kind in kinds_of(cls)})

CHILD = """
import gc, resource, sys
import torch

torch.set_num_threads(1)
from mixgrain.formats import patterns as P
from mixgrain.formats.block import BlockLayout
from mixgrain.formats.mixed import MixedLayout
from mixgrain.formats.panel import PanelLayout
from mixgrain.formats.sparse import SparseTensor
from mixgrain.formats.tile import TileLayout
import mixgrain.formats.split
from mixgrain.primitives.dispatch import TABLE
from mixgrain.primitives.linear import linear
from mixgrain.primitives.sddmm import sddmm
from mixgrain.primitives.softmax import softmax, softmax_backward
from mixgrain.primitives.spmm import spmm

kind, N, D = sys.argv[1], 65536, 64
def status(what):
    # KiB, from a line such as "VmSize:   123456 kB".
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1])

size = status("VmSize")
limit = size * 1024 + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

window = P.window(128)
nk = 1024 if kind == "nm" else N
if kind == "block":
    layout = window.to_layout("block", N, N)
elif kind == "row":
    layout = P.window(64).to_layout("row", N, N)
elif kind == "mixed":
    layout = P.longformer(128, torch.arange(0, N, N // 16)).to_layout("mixed", N, N)
    assert len(layout.parts) > 1, layout.parts
elif kind == "panel":
    everywhere, few = range(N), torch.arange(0, N, N // 64)
    layout = PanelLayout.from_panels((N, N), [(few, everywhere, None)])
elif kind == "tile":
    at = torch.arange(N // 16)
    nk = N + 16
    columns = (at[:, None] + torch.tensor([0, 1])).flatten()
    layout = TileLayout.from_tiles(at.repeat_interleave(2), columns, (N, nk))
else:
    pattern = P.nm(2, 4) if kind == "nm" else window & P.nm(2, 4)
    q, k = torch.randn(N, D), torch.randn(nk, D)
    layout = sddmm(q, k, pattern).layout
cls = type(layout)
assert cls.kind == kind.split()[0]

def report(what):
    gc.collect()
    print(what, (status("VmPeak") - size) // 1024, "MiB", flush=True)

report("layout")
q, k = torch.randn(N, D, requires_grad=True), torch.randn(nk, D, requires_grad=True)
if cls in TABLE["softmax"]:
    s = sddmm(q, k, layout, scale=0.125)
    assert s.values.numel() == layout.slots
    report("sddmm")
    p, lse = softmax(s, return_lse=True)
    report("softmax")
    o = spmm(p, k)
    (o.sum() + lse.sum()).backward()
    report("backward")
    assert torch.isfinite(q.grad).all() and torch.isfinite(k.grad).all()
    del o, lse
    p, s = p.with_values(p.values.detach()), s.with_values(s.values.detach())
    softmax_backward(p, s)
    del p
    report("softmax_backward")
else:
    s = SparseTensor(layout, torch.randn(layout.slots))
s = s.with_values(s.values.detach().requires_grad_())
q.grad = k.grad = None
spmm(s, k).sum().backward()
report("spmm")
s = SparseTensor(layout, s.values.detach())
x = q.detach()
del q, k
spmm(s.T, x)
report("spmm of T")
x = torch.randn(8, nk, requires_grad=True)
linear(x, s).sum().backward()
report("linear")
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_needs_one_gibibyte(kind: str) -> None:
    child = subprocess.run(
        [sys.executable, "-c", CHILD, kind],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0 and child.stdout.endswith("done\n"), child.stdout + child.stderr
