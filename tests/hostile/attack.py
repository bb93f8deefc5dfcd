"""A process of its own that loads mutated files: `python -m hostile.attack FOLDER FIRST LAST`.

Its address space is limited to what it has after the imports and 512 MiB more, so that a size that
a file merely claims cannot be allocated. Prints one JSON object: how many files of each mutation
were refused and loaded, the slowest, and every outcome that is neither.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from hostile.forge import corpus
from hostile.mutations import mutate

from mixgrain.formats.errors import FileFormatError
from mixgrain.formats.files import load
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives.spmm import spmm

SMALL = 1 << 16
HEADROOM = 1 << 29


def limit_memory() -> None:
    """Refuse this process more than HEADROOM above what it has mapped now."""
    with Path("/proc/self/status").open() as status:
        size = next(int(line.split()[1]) for line in status if line.startswith("VmSize")) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + HEADROOM, size + HEADROOM))


def use(s: SparseTensor) -> None:
    """What was loaded is whole: its parts agree with each other, its products with torch's."""
    layout = s.layout
    layout.validate()
    nq, nk = layout.shape
    entries = s.values.numel() // max(layout.slots, 1) * layout.entries
    if nq * nk * max(entries, 1) > SMALL:
        return
    assert int(layout.mask().sum()) == layout.nnz, "nnz is not what mask() counts"
    dense = s.to_dense()
    turned = s.T
    turned.layout.validate()
    assert equal(turned.to_dense(), dense.mT), "the transpose differs"
    x = (torch.arange(nk * 3).view(nk, 3) % 7 - 3).double()
    got, expected = spmm(s, x), dense.double() @ x
    if bool(torch.isfinite(dense).all()):
        scale = float(dense.double().abs().amax()) if dense.numel() else 1.0
        worst = float((got - expected).abs().amax()) if got.numel() else 0.0
        assert worst <= 1e-12 * max(nk, 1) * max(scale, 1e-300) * 10, "spmm differs"
    y = spmm(turned, torch.ones(nq, 1, dtype=torch.float64))
    assert y.shape == (*s.lead_shape, nk, 1)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, NaN included."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(words), b.contiguous().view(words))


def attack(folder: Path, first: int, last: int) -> dict:
    """Load the mutated files of these numbers; each follows from its number alone."""
    seeds = corpus(folder)
    names = sorted(seeds)
    path, log = folder / "hostile", (folder / "now").open("w")
    refused, loaded, faults = Counter(), Counter(), []
    slowest, slowest_at = 0.0, 0
    limit_memory()
    for n in range(first, last):
        draw = random.Random(n)
        name, other = draw.choice(names), draw.choice(names)
        kind, content = mutate(draw, seeds[name], seeds[other])
        path.unlink(missing_ok=True)  # a file cut short and written again waits for the disk
        path.write_bytes(content)
        log.seek(0)
        log.write(f"{n:>9} {kind} of {name}\n".ljust(80))  # where to look if the process dies
        log.flush()
        began = time.process_time()
        try:
            use(load(path))
            loaded[kind] += 1
        except FileFormatError as error:
            refused[kind] += 1
            text = str(error)
            vague = "contradict" in text or len(text) < len(str(path)) + 20
            if vague or len(text) > 2000 or not text.startswith(f"{path}: "):
                faults.append((n, kind, name, f"names no fault: {text}"))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            faults.append((n, kind, name, f"{type(error).__name__}: {error!s:.200} at {place}"))
        took = time.process_time() - began
        if took > slowest:
            slowest, slowest_at = took, n
    return {
        "refused": refused, "loaded": loaded, "faults": faults, "files": last - first,
        "slowest": slowest, "slowest_at": slowest_at,
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(attack(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
