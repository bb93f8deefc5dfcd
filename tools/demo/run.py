"""`mixgrain demo`: one small language model, run dense and sparse, measured and checked."""

from __future__ import annotations

import platform
import sysconfig
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

import mixgrain as mg
from mixgrain.formats.layout import Layout

from . import data
from .convert import Conversion, convert
from .figure import draw_demo
from .measure import Check, Result, Runner, check_attention, check_weights, masses, record
from .model import ByteLM, load
from .report import TABLE, WEIGHTS, DemoError, footnotes, read_table, results_table
from .variants import TILES, Variant, matrices, variants

# The attention mass is taken over every layer of this many contexts.
MASS_CONTEXTS = 1


def read_contexts(stdlib: Path, n: int, length: int) -> torch.Tensor:
    """The first n held-out contexts of a standard library, uint8 (n, length).

    Raises:
        DemoError: there are fewer.
    """
    found = data.contexts(stdlib, n, length)
    if len(found) < n:
        raise DemoError(
            f"the held-out files of {stdlib} fill {len(found)} contexts of {length} bytes, {n} were"
            f" asked for; ask for fewer, or use a Python that has its whole standard library"
        )
    return found


def read_model(path: Path) -> ByteLM:
    """The demo's model.

    Raises:
        DemoError: it is not there, or is not such a model.
    """
    if not path.is_file():
        raise DemoError(
            f"the demo's weights {path} are missing; install mixgrain again, or train them with "
            "python -m mixgrain.tools.demo.train"
        )
    try:
        return load(path)
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise DemoError(f"{path} does not hold the demo's model: {error}") from None


def pattern_title(variant: Variant) -> str:
    """The title of a pattern's picture."""
    return {"Longformer": "Longformer, mixed grain", "BigBird": "BigBird, blocks of 64"}.get(
        variant.name, variant.name
    )


def measure(
    model: ByteLM, contexts: torch.Tensor, chosen: list[Variant], bar: tqdm[object]
) -> tuple[list[Result], list[Conversion], list[torch.Tensor]]:
    """Runs, checks and times every variant.

    Returns:
        The results in the order given, the conversions, and the (q, k, v) of the middle layer.
    """
    n = contexts.shape[1] - 1
    bar.set_description("weights to every layout and back")
    conversions = []
    for conversion in convert(model):
        conversions.append(conversion)
        bar.update()

    bar.set_description("dense run")
    layers = record(model, contexts[:MASS_CONTEXTS])
    middle = layers[len(layers) // 2]
    bar.update()

    runners = [Runner(variant, model) for variant in chosen]
    results = [Result(r.variant, *r.kept(n)) for r in runners]
    bar.set_description("attention mass")
    patterned = [r for r in results if r.variant.pattern is not None]
    found = masses(layers, [r.variant for r in patterned], "auto", bar.update)
    for result, mass in zip(patterned, found, strict=True):
        result.mass = mass
    for runner, result in zip(runners, results, strict=True):
        bar.set_description(f"checking {runner.variant.name}")
        result.check = (
            check_weights(runner, contexts[0])
            if runner.weights
            else check_attention(runner.variant, middle)
        )
        bar.update()

    # Once unmeasured: the first pass pays for plans and for touching memory.
    for runner in runners:
        bar.set_description(f"warming {runner.variant.name}")
        runner.score(contexts[0][: max(2, n // 8)])
        bar.update()
    for place, context in enumerate(contexts, 1):
        # Every variant on one context before the next: a machine that slows down is fair to all.
        for runner, result in zip(runners, results, strict=True):
            bar.set_description(f"context {place}: {runner.variant.name}")
            bits, times = runner.score(context)
            result.bits.append(bits)
            result.times.append(times)
            bar.update()
    return results, conversions, list(middle)


def steps(chosen: list[Variant], contexts: int) -> int:
    """How often `measure` moves the progress bar."""
    patterned = sum(v.pattern is not None for v in chosen)
    return 5 + 1 + patterned + 2 * len(chosen) + contexts * len(chosen)


def print_checks(conversions: list[Conversion], results: list[Result]) -> bool:
    """Prints what was checked; returns whether all of it holds."""
    checks: list[Check] = [r.check for r in results if r.check is not None]
    for conversion in conversions:
        if not conversion.passed:
            print(
                f"FAILED: {conversion.done - conversion.exact} of {conversion.done} matrices came"
                f" back changed from the layout '{conversion.kind}'"
            )
    for check in checks:
        if not check.passed:
            print(f"FAILED: {check.what}: {check.error:.2g} apart, {check.limit:.0e} allowed")
    good = [c for c in conversions if c.passed]
    if good:
        each = ", ".join(f"{c.kind} {c.exact}" for c in good)
        print(f"checked: real weights to a layout and back, bit for bit: {each}")
    for check in checks:
        if check.passed:
            print(f"checked: {check.what}: {check.error:.1e} apart, {check.limit:.0e} allowed")
    return all(c.passed for c in conversions) and all(c.passed for c in checks)


def run(
    contexts: int = 8,
    out: Path = Path("mixgrain-demo.png"),
    threads: int | None = None,
    weights: Path = WEIGHTS,
    stdlib: Path | None = None,
    table: Path = TABLE,
    chosen: list[Variant] | None = None,
) -> int:
    """Runs the demo and prints and draws its results.

    Args:
        contexts: How many held-out contexts to score.
        out: Where the picture goes.
        threads: CPU threads; None leaves them as they are.
        weights: The model.
        stdlib: A Python standard library; this Python's own if None.
        table: The shipped evaluation.
        chosen: What to compare, the dense variant included; the demo's own list if None.

    Returns:
        0, or 1 if a check failed.

    Raises:
        DemoError: the model or the text is missing.
        OSError: the picture cannot be written.
    """
    began = time.perf_counter()
    if not out.parent.is_dir():
        raise DemoError(f"--out {out}: there is no folder {out.parent}; make it or name another")
    if out.is_dir():
        raise DemoError(f"--out {out}: a folder given, a file for the picture expected")
    if threads is not None:
        torch.set_num_threads(threads)
    model = read_model(weights)
    library = Path(sysconfig.get_paths()["stdlib"]) if stdlib is None else stdlib
    text = read_contexts(library, contexts, model.config.context)
    shipped = read_table(table)
    chosen = [v for v in variants() if v.demo] if chosen is None else chosen

    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"model    {parameters / 1e6:.1f} million parameters, {config.layers} layers of "
        f"{config.heads} heads of {config.head_dim}, next byte from {config.context}\n"
        f"text     {contexts} held-out contexts of {config.context} bytes from {library}\n"
        f"machine  CPU, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, mixgrain {mg.__version__}\n",
        flush=True,
    )
    # disable=None: no bar where nobody watches.
    with tqdm(total=steps(chosen, contexts), disable=None, leave=False, unit="step") as bar:
        results, conversions, middle = measure(model, text, chosen, bar)
        bar.set_description("drawing")
        n = config.context - 1
        static = [v for v in chosen if v.pattern is not None and not v.dynamic]
        layouts: list[tuple[str, Layout]] = [
            (pattern_title(v), v.pattern.to_layout("mixed", n, n)) for v in static if v.pattern
        ]
        name = f"blocks.{config.layers // 2}.qkv"
        tile = mg.sparsify(matrices(model)[name], "tile", prune=True, density=TILES)
        q, k, v = middle
        draw_demo(out, results, layouts, (q, k, v), tile, shipped)

    print(results_table(results, shipped))
    print()
    print(footnotes(results, shipped, MASS_CONTEXTS))
    print()
    passed = print_checks(conversions, results)
    print(f"\npicture  {out}\ntime     {time.perf_counter() - began:.0f} s")
    if not passed:
        print("\nthe demo FAILED its checks: please report the lines above", flush=True)
    return 0 if passed else 1
