"""`mixgrain finetune`: the demo's model with pruned weights, before and after a masked fine-tuning.

Every variant prunes the same trained weights by magnitude, swaps the blocks' layers by
`mixgrain.sparsify_model`, and trains what was kept for a few steps on this Python's own library,
held-out files apart. The dense model takes the same steps on the same bytes.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import mixgrain as mg

from . import data
from .layers import with_layers
from .model import ByteLM, byte_bits
from .report import WEIGHTS, DemoError, align
from .run import read_contexts, read_model

# What becomes of the blocks' layers; None leaves them dense.
VARIANTS: Mapping[str, Mapping[str, Any] | None] = {
    "dense": None,
    "2:4": {"kind": "2:4", "prune": True},
    "tile 75%": {"kind": "tile", "prune": True, "density": 0.75},
    "tile 50%": {"kind": "tile", "prune": True, "density": 0.5},
}
# Logits through the sparse layers and through dense ones of the same weights, in bits per byte.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RATE = 1e-3
WARM = 4  # steps until the rate is reached, from which it falls linearly to 0
REPLAYS, ROUNDS = 20, 5


@dataclass(frozen=True)
class Settings:
    """How much is trained and measured.

    Attributes:
        seeds: fine-tunings of each variant; a seed chooses the bytes that are trained on.
        steps: of each fine-tuning.
        batch: sequences a step.
        length: bytes of a sequence.
        contexts: held-out contexts that are scored.
        together: contexts in a forward pass that is timed, at most `contexts`.
        device: where all of it runs; on CUDA training is autocast to bfloat16.
        dtype: in which contexts are scored and timed.
    """

    seeds: int = 3
    steps: int = 10
    batch: int = 4
    length: int = 256
    contexts: int = 3
    together: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32


@dataclass
class Outcome:
    """What was measured of one variant.

    Attributes:
        name: the variant's.
        kept: share of the blocks' weights.
        bytes: of the blocks' weights in float32, positions included.
        before: bits per byte after pruning.
        after: bits per byte of each seed after fine-tuning.
        speeds: tokens per second of forward passes, one a round.
        apart: the largest difference from dense layers with the same weights, in bits per byte.
    """

    name: str
    kept: float
    bytes: int
    before: float
    after: list[float] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    apart: float = 0.0


def training_bytes(stdlib: Path) -> Tensor:
    """The library's files that are not held out, uint8.

    Raises:
        DemoError: there is next to nothing.
    """
    selection = data.select([stdlib])
    text = b"".join(data.training_text(selection, False))
    if len(text) < 1 << 14:
        raise DemoError(
            f"{stdlib} has {len(text)} bytes to train on; expected a whole standard library"
        )
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batches(text: Tensor, settings: Settings, seed: int) -> Iterator[Tensor]:
    """Sequences of bytes at random places, int64 (batch, length + 1), one tensor a step."""
    draw = torch.Generator().manual_seed(seed)
    reach = torch.arange(settings.length + 1)
    for _ in range(settings.steps):
        at = torch.randint(len(text) - len(reach), (settings.batch, 1), generator=draw)
        yield text[at + reach].long().to(settings.device)


def tune(model: ByteLM, text: Tensor, settings: Settings, seed: int) -> None:
    """Trains all parameters of a model; of sparse layers these are the values kept, no others."""
    optimiser = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.0)
    cuda = settings.device.type == "cuda"
    model.train()
    for step, tokens in enumerate(batches(text, settings, seed)):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARM) * (1 - step / settings.steps)
        with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
            logits = model(tokens[:, :-1])
        F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()


def for_scoring(model: ByteLM, dtype: torch.dtype) -> ByteLM:
    """A copy in a dtype; the rotary tables stay float32."""
    made = with_layers(model)
    cos, sin = made.cos, made.sin
    made.to(dtype)
    made.cos, made.sin = cos, sin
    return made


def race(models: Mapping[str, ByteLM], tokens: Tensor) -> dict[str, list[float]]:
    """Tokens per second of forward passes, round by round; every model runs in every round.

    On CUDA the passes are captured in graphs, whose replays the device times.
    """
    passes = {name: _pass_of(model, tokens) for name, model in models.items()}
    found: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        # One after the other, so that a machine that slows down is fair to all.
        for name, seconds in passes.items():
            found[name].append(tokens.numel() / seconds())
    return found


@torch.no_grad()
def _pass_of(model: ByteLM, tokens: Tensor) -> Callable[[], float]:
    """A function that runs the forward pass once and returns its seconds."""
    if not tokens.is_cuda:

        @torch.no_grad()
        def timed() -> float:
            began = time.perf_counter()
            model(tokens)
            return time.perf_counter() - began

        timed()
        return timed
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # plans and kernels are made outside the capture
            model(tokens)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(tokens)

    def replayed() -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1000 / REPLAYS

    replayed()
    return replayed


def dense_again(model: ByteLM) -> ByteLM:
    """A copy with dense layers that hold the same weights, zeros where they were pruned."""
    made = with_layers(model)
    for name, layer in list(made.named_modules()):
        if isinstance(layer, mg.SparseLinear):
            owner, _, leaf = name.rpartition(".")
            setattr(made.get_submodule(owner), leaf, layer.to_linear())
    return made


def measure(
    base: ByteLM, text: Tensor, contexts: Tensor, settings: Settings, bar: tqdm[object]
) -> list[Outcome]:
    """Prunes, scores, fine-tunes and scores again, every variant on the same bytes; then times."""
    outcomes: list[Outcome] = []
    last: dict[str, ByteLM] = {}
    for name, choice in VARIANTS.items():
        bar.set_description(f"{name}: pruned")
        pruned = with_layers(base)
        dense = sum(layer.weight.numel() for layer in _linear(pruned))
        outcome = Outcome(name, 1.0, 4 * dense, math.nan)
        if choice is not None:
            report = mg.sparsify_model(pruned, {"blocks.*": choice})
            outcome.kept = report.density
            outcome.bytes = sum(line.after for line in report.converted)
        outcome.before = _look(pruned, contexts, settings, outcome)
        bar.update()
        for seed in range(settings.seeds):
            bar.set_description(f"{name}: seed {seed}")
            model = with_layers(pruned)
            tune(model, text, settings, seed)
            outcome.after.append(_look(model, contexts, settings, outcome))
            last[name] = model
            bar.update()
        outcomes.append(outcome)
    bar.set_description("timing")
    # Positions alone decide the speed, so one model of each variant says it.
    scored = {name: for_scoring(model, settings.dtype) for name, model in last.items()}
    tokens = contexts[: settings.together, :-1].to(settings.device, torch.int64)
    for outcome, speeds in zip(outcomes, race(scored, tokens).values(), strict=True):
        outcome.speeds = speeds
    bar.update()
    return outcomes


def _linear(model: ByteLM) -> list[torch.nn.Linear]:
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear)]


def _look(model: ByteLM, contexts: Tensor, settings: Settings, outcome: Outcome) -> float:
    """Bits per byte of a model; how far it is from dense layers goes into the outcome."""
    scored = for_scoring(model, settings.dtype)
    bits = byte_bits(scored, contexts, batch=1).double().mean(1)
    if outcome.name != "dense":
        plain = byte_bits(dense_again(scored), contexts[:1]).double().mean()
        outcome.apart = max(outcome.apart, abs((plain - bits[0]).item()))
    return bits.mean().item()


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation; of one value the value."""
    mean = f"{statistics.fmean(values):,.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ±{statistics.stdev(values):,.{digits}f}"


def cells(outcomes: list[Outcome]) -> list[list[str]]:
    """The table's rows, heads first; differences are paired, seed by seed."""
    dense = outcomes[0]
    rows = [
        ["weights", "kept", "MB", "pruned", "over dense", "fine-tuned", "over dense", "tokens/s",
         "of dense"]
    ]  # fmt: skip
    for o in outcomes:
        own = o is dense
        paired = [a - b for a, b in zip(o.after, dense.after, strict=True)]
        rows.append(
            [
                o.name, f"{o.kept:.1%}", f"{o.bytes / 1e6:.1f}", f"{o.before:.3f}",
                "" if own else f"{o.before - dense.before:+.3f}", spread(o.after),
                "" if own else "+" * (statistics.fmean(paired) >= 0) + spread(paired),
                spread(o.speeds, 0),
                "" if own else f"{statistics.fmean(o.speeds) / statistics.fmean(dense.speeds):.2f}",
            ]
        )  # fmt: skip
    return rows


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as text."""
    lines = align(cells(outcomes))
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]])


def run(
    settings: Settings,
    weights: Path = WEIGHTS,
    stdlib: Path | None = None,
    threads: int | None = None,
    out: Path | None = None,
) -> int:
    """Runs all of it, and prints the table.

    Args:
        settings: how much, and where.
        weights: the model.
        stdlib: a Python standard library; this Python's own if None.
        threads: CPU threads; None leaves them as they are.
        out: a file for the figures as JSON, or None.

    Returns:
        0, or 1 if sparse and dense layers of the same weights do not agree.

    Raises:
        DemoError: the model or the text is missing, or a device that is not there.
        OSError: the file cannot be written.
    """
    began = time.perf_counter()
    if settings.device.type == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device cuda: torch finds no CUDA device; leave it out to run on the CPU")
    if out is not None and not out.parent.is_dir():
        raise DemoError(f"--out {out}: there is no folder {out.parent}; make it or name another")
    if threads is not None:
        torch.set_num_threads(threads)
    base = read_model(weights).to(settings.device)
    if settings.length > base.config.context:
        raise DemoError(
            f"--length {settings.length}: the model reads at most {base.config.context} bytes"
        )
    if settings.together > settings.contexts:
        raise DemoError(
            f"--together {settings.together}: expected at most --contexts {settings.contexts}"
        )
    library = Path(sysconfig.get_paths()["stdlib"]) if stdlib is None else stdlib
    contexts = read_contexts(library, settings.contexts, base.config.context)
    text = training_bytes(library)
    cuda = settings.device.type == "cuda"
    machine = torch.cuda.get_device_name(settings.device) if cuda else "CPU"
    threaded = "" if cuda else f", {torch.get_num_threads()} threads"
    words = str(settings.dtype).removeprefix("torch.")
    print(
        f"training  {settings.steps} steps of {settings.batch} × {settings.length} bytes, "
        f"{settings.seeds} seeds\n"
        f"scoring   {settings.contexts} held-out contexts of {base.config.context} bytes, {words}\n"
        f"machine   {machine}{threaded}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, mixgrain {mg.__version__}\n",
        flush=True,
    )
    total = len(VARIANTS) * (1 + settings.seeds) + 1
    with tqdm(total=total, disable=None, leave=False, unit="model") as bar:
        outcomes = measure(base, text, contexts, settings, bar)
    print(table(outcomes))
    print(
        "\npruned, fine-tuned: bits per byte, lower is better; ± the standard deviation over seeds,"
        " which choose the bytes\nthat are trained on; differences are paired. MB: the blocks'"
        " weights in float32, positions included. tokens/s:\nthe forward pass, "
        f"{settings.together} × {base.config.context} bytes; ± over {ROUNDS} rounds in turn.\n"
    )
    limit = LIMITS[settings.dtype]
    wrong = [o for o in outcomes if not o.apart <= limit]
    for o in wrong:
        print(f"FAILED: {o.name}: {o.apart:.2g} bits per byte from dense layers of the same"
              f" weights, {limit:.0e} allowed")  # fmt: skip
    if not wrong:
        worst = max(o.apart for o in outcomes)
        print(f"checked: sparse layers and dense ones of the same weights: {worst:.1e} bits per"
              f" byte apart, {limit:.0e} allowed")  # fmt: skip
    if out is not None:
        given = {"device": machine, "dtype": words, "torch": torch.__version__,
                 "mixgrain": mg.__version__, "length scored": base.config.context,
                 **{k: v for k, v in vars(settings).items() if isinstance(v, int)}}  # fmt: skip
        rows = [vars(o) for o in outcomes]
        out.write_text(json.dumps({"settings": given, "rows": rows}, indent=1) + "\n")
    print(f"time      {time.perf_counter() - began:.0f} s")
    return 1 if wrong else 0
