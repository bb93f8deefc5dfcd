"""What launch code passes is what kernels take: no compiler sees both."""

import re
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from test_layer_plans import entries, launched, tiles, weight

from mixgrain.cuda.compile import Request, request, source
from mixgrain.cuda.recording import Recording, recorded
from mixgrain.cuda.steps import Launch
from mixgrain.primitives.cuda import launch_code, warm
from mixgrain.primitives.cuda.calls import describe

# Of a scalar parameter, the numpy type that has its size.
SCALARS = {
    "int": np.int32, "i32": np.int32, "u32": np.uint32, "i64": np.int64, "u64": np.uint64,
    "float": np.float32,
}  # fmt: skip


@cache
def parameters(wanted: Request) -> list[str]:
    """Types of a kernel's parameters: "map", "pointer" or a scalar's."""
    text, name = re.sub(r"//[^\n]*", "", source(wanted.name)), wanted.name
    found = re.search(rf"__global__.*?\b{name}\s*\((.*?)\)\s*\{{", text, re.DOTALL)
    assert found, name
    # What constants leave of it.
    values, lines, live = {f"MG_{key}": value for key, value in wanted.constants}, [], True
    for line in found[1].splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "#if":
            live = bool(values[rest.strip()])
        elif word == "#else":
            live = not live
        elif word == "#endif":
            live = True
        elif live:
            lines.append(line)
    kinds = []
    for parameter in " ".join(lines).split(","):
        if "TensorMap" in parameter:
            kinds.append("map")
        elif "*" in parameter:
            kinds.append("pointer")
        elif "__grid_constant__" in parameter:
            kinds.append("struct")
        else:
            *_, kind, _ = parameter.split()
            kinds.append(kind)
    return kinds


def fits(kind: str, argument: object) -> bool:
    if kind in SCALARS:
        wide = isinstance(argument, np.generic) and argument.dtype.itemsize
        return wide == SCALARS[kind]().itemsize and (
            isinstance(argument, np.floating) == (kind == "float")
        )
    if kind == "struct":
        return isinstance(argument, np.void)
    # Addresses and maps may be made when a call is.
    return not isinstance(argument, (np.generic, float))


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_arguments_are_the_parameters(arch, monkeypatch):
    seen = set()

    def asked(name, arguments):
        recording = Recording(0)
        described = describe(recording, arguments)
        with recorded(recording):
            launch_code(name)(*described)
        steps = [step for step in recording.steps if isinstance(step, Launch)]
        check(steps)
        return [step.kernel.wanted for step in steps]

    def check(steps):
        for step in steps:
            kinds = parameters(step.kernel.wanted)
            assert len(step.arguments) == len(kinds), step.kernel.wanted
            for kind, argument in zip(kinds, step.arguments, strict=True):
                assert fits(kind, argument), (step.kernel.wanted, kind, argument)
            seen.add(step.kernel.wanted.name)

    monkeypatch.setattr(warm, "_asked", asked)
    listed = {wanted.name for wanted in warm.requests(arch)}
    layers = [weight(4096, 4096, size, 0.2) for size in (16, 32, 64, 128)]
    for layout in (*layers, tiles(4096, 4096, 0.2), entries(64, 1024, 0.1).layout):
        for tokens in (1, 16, 4096):
            check(launched(layout, tokens, arch))
            for of in (0, 1):
                check(launched(layout, tokens, arch, "token_gradients", of))
    assert listed - seen == set()


def test_what_does_not_fit():
    kinds = parameters(request("turn", {"DTYPE": 0}))
    assert kinds == ["pointer", "pointer", "i64", "i32", "i32", "i32"]
    assert not fits("int", np.int64(1)) and not fits("float", np.int32(1))
    assert (
        not fits("i64", np.float32(1)) and not fits("int", 1) and not fits("pointer", np.int32(1))
    )
    assert fits("u32", np.uint32(1)) and fits("pointer", 0) and fits("float", np.float32(0))


def test_launch_code_comes_with_the_first_operator():
    """No later one waits for modules, only for its kernels."""
    code = (
        "import sys; from mixgrain.primitives.cuda import MODULES, launch_code; "
        "launch_code('sddmm'); old = set(sys.modules); "
        "[launch_code(name) for name in MODULES]; print(len(set(sys.modules) - old))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
