"""What the fused attention on CUDA records of a call; no GPU."""

import pytest
import torch
from fused_interpreter import tables

from mixgrain import patterns as P
from mixgrain.attention.cuda import choice, forward, kernel
from mixgrain.attention.cuda.plan import build
from mixgrain.cuda.device import pretending
from mixgrain.cuda.recording import Recording, recorded
from mixgrain.cuda.steps import Launch, Work, addresses
from mixgrain.primitives.cuda import calls

N = 4096
SOME = range(3, N, 61)
#: Pattern, kind of layout, kernels in the order of their launches.
PATTERNS = {
    "window": (P.window(100), "mixed", ["units"]),
    "scattered": (
        P.longformer(64, list(SOME)), "mixed", ["gather_rows", "units", "fused_merge"]
    ),
    "entries": (P.random(0.002, 1), "row", ["fused_row"]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_walk(monkeypatch) -> None:
    """Tables are made by a kernel."""
    monkeypatch.setattr(forward, "tables", tables)


def record(name: str, arch: str, dtype: torch.dtype, masked: bool, *, d: int = 64, dv: int = 64):
    """The recording, its results, and how many tensors the call is given."""
    pattern, kind, _ = PATTERNS[name]
    n, batch, heads = N, 2, 4
    with pretending(arch):
        units = kernel.groups(d) if choice.unit_kernel(0, dtype) == "sm90" else 2
        costs = {"costs": choice.split_costs(d)} if kind == "mixed" else {}
        layout = pattern.to_layout(kind, n, n, **costs)
        plan, ints = build(layout, d, groups=units)
        q = torch.empty(batch, n, heads, d, dtype=dtype, device="meta").transpose(1, 2)
        k = torch.empty(batch, 2, n, d, dtype=dtype, device="meta")
        v = torch.empty(batch, 2, n, dv, dtype=dtype, device="meta")
        keep = torch.ones(batch, n, dtype=torch.bool, device="meta") if masked else None
        sink = torch.zeros(heads, device="meta")
        arguments = (q, k, v, keep, sink, 0.125, list(plan), tuple(ints), "fused")
        recording = Recording(0)
        described = calls.describe(recording, arguments)
        with recorded(recording):
            results = forward._launches(*described)
    return recording, results, len(calls.given(arguments))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", ["90a", "80"])
@pytest.mark.parametrize("name", PATTERNS)
def test_kernels_of_a_call(name, arch, dtype, masked) -> None:
    recording, (out, lse), given = record(name, arch, dtype, masked)
    assert tuple(out.shape) == (2, 4, N, 64)
    assert out.dtype == dtype
    assert tuple(lse.shape) == (2, 4, N)
    assert lse.dtype == torch.float32
    assert out.is_contiguous()
    assert lse.is_contiguous()
    units = "fused_sm90" if arch == "90a" and dtype == torch.bfloat16 else "fused_mma"
    launches = [step for step in recording.steps if isinstance(step, Launch)]
    names = [units if wanted == "units" else wanted for wanted in PATTERNS[name][2]]
    found = [launch.kernel.wanted.name for launch in launches]
    assert [n for n, after in zip(found, [*found[1:], ""], strict=True) if n != after] == names
    # Every tensor that a kernel touches is given, allocated by the call, or made by torch before.
    made = set(range(given)) | {n for n, s in enumerate(recording.slots) if s is not None}
    for step in recording.steps:
        if isinstance(step, Work):
            assert {a.slot for a in step.arguments if hasattr(a, "slot")} <= made
            made.add(step.slot)
        else:
            assert {a.slot for given in step.arguments for a in addresses(given)} <= made
    assert {out.slot, lse.slot} <= {
        a.slot for x in launches for g in x.arguments for a in addresses(g)
    }


def test_values_of_another_width_are_padded() -> None:
    _, (out, _), _ = record("window", "90a", torch.bfloat16, False, d=20, dv=36)
    assert tuple(out.shape) == (2, 4, N, 40)
