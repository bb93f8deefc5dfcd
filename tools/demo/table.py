"""Evaluates every variant of the demo over many held-out contexts, and writes the table it ships.

    python -m mixgrain.tools.demo.table --contexts 200 --out FILE

Means come with standard errors; differences to dense are paired, context by context.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.attention.attend import Impl
from mixgrain.formats.errors import MixgrainError

from .measure import Result, Runner, masses, mean_and_error, over_dense, record
from .model import ByteLM, byte_bits
from .report import FORMAT, WEIGHTS, DemoError
from .run import read_contexts, read_model
from .variants import Variant, variants


def digest(content: bytes) -> str:
    """The sha256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


@torch.no_grad()
def evaluate(
    model: ByteLM,
    contexts: Tensor,
    chosen: list[Variant],
    impl: Impl = "auto",
    batch: int = 4,
    mass_contexts: int = 16,
) -> list[Result]:
    """Bits per byte and attention mass of every variant.

    Args:
        model: On the device that computes.
        contexts: uint8 (n, length).
        chosen: The variants, the dense one among them.
        impl: As in `mg.attend`; "reference" also makes torch compute products with pruned weights.
        batch: Contexts at a time.
        mass_contexts: How many of the contexts the attention mass is taken over.
    """
    n = contexts.shape[1] - 1
    parts = torch.split(contexts, batch)
    bar = tqdm(total=len(chosen) * len(parts) + mass_contexts * len(chosen), disable=None)
    results = []
    for variant in chosen:
        bar.set_description(variant.name)
        runner = Runner(variant, model, impl)
        result = Result(variant, *runner.kept(n))
        for part in parts:
            bits = byte_bits(model, part, runner.attend, runner.linear, batch)
            result.bits += bits.double().mean(1).tolist()
            bar.update()
        results.append(result)
    patterned = [r for r in results if r.variant.pattern is not None]
    bar.set_description("attention mass")
    found: list[list[float]] = []
    for context in contexts[:mass_contexts]:
        layers = record(model, context[None])
        found.append(masses(layers, [r.variant for r in patterned], impl, bar.update))
    for place, result in enumerate(patterned):
        result.mass = mean_and_error([masses[place] for masses in found])[0] if found else None
    bar.close()
    return results


def row(result: Result, baseline: Result) -> dict[str, Any]:
    """One variant as JSON."""
    variant = result.variant
    pruning = variant.pruning
    bits, error = mean_and_error(result.bits)
    extra, extra_error = over_dense(result, baseline)
    return {
        "name": variant.name,
        "words": variant.words,
        "pattern": None if variant.pattern is None else repr(variant.pattern),
        "pruning": None if pruning is None else {"kind": pruning.kind, **pruning.options},
        "kept_causal": result.kept_causal,
        "kept_full": result.kept_full,
        "mass": result.mass,
        "bits": {"mean": bits, "se": error},
        "extra": {"mean": extra, "se": extra_error},
    }


def describe(
    results: list[Result],
    model: ByteLM,
    contexts: Tensor,
    options: argparse.Namespace,
    seconds: float,
) -> dict[str, Any]:
    """The whole table: what was run, on what, and what was found."""
    baseline = next(r for r in results if r.variant.dense)
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    reference = options.impl == "reference"
    return {
        "format": FORMAT,
        "model": {
            "sha256": digest(options.weights.read_bytes()),
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "contexts": len(contexts),
        "length": contexts.shape[1],
        "mass_contexts": min(options.mass_contexts, len(contexts)),
        "text": f"held-out library files of Python {options.text_version}",
        "text_sha256": digest(contexts.numpy().tobytes()),
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU ({platform.machine()})",
        "attention": f"mg.attend(impl={options.impl!r}); dense: scaled_dot_product_attention",
        "products": "torch, with the pruned weights as dense matrices"
        if reference
        else "mg.linear",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "cuda": torch.version.cuda if cuda else None,
            "mixgrain": mg.__version__,
        },
        "seconds": round(seconds, 1),
        "kept_full_of_causal": P.causal().density(contexts.shape[1] - 1, contexts.shape[1] - 1),
        "variants": [row(result, baseline) for result in results],
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m mixgrain.tools.demo.table", description=(__doc__ or "").splitlines()[0]
    )
    top.add_argument("--contexts", type=int, default=200, help="how many, at least 2")
    top.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    top.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    top.add_argument(
        "--impl",
        choices=get_args(Impl),
        help="default: auto on cpu, reference on cuda",
    )
    top.add_argument("--batch", type=int, default=4, help="contexts at a time (default: 4)")
    top.add_argument("--mass-contexts", type=int, default=16, help="for the mass (default: 16)")
    top.add_argument("--weights", type=Path, default=WEIGHTS, help="the model")
    top.add_argument(
        "--stdlib",
        type=Path,
        default=Path(sysconfig.get_paths()["stdlib"]),
        help="the standard library whose held-out files are scored",
    )
    top.add_argument("--text-version", default=platform.python_version(), help="its version")
    return top


def main(argv: list[str] | None = None) -> int:
    """Evaluates and writes; returns the exit status."""
    options = parser().parse_args(argv)
    if options.impl is None:
        options.impl = "reference" if options.device.startswith("cuda") else "auto"
    began = time.perf_counter()
    try:
        if options.contexts < 2:
            raise DemoError(f"--contexts {options.contexts} given, at least 2 expected")
        model = read_model(options.weights)
        contexts = read_contexts(options.stdlib, options.contexts, model.config.context)
        model = model.to(options.device)
        results = evaluate(
            model, contexts, variants(), options.impl, options.batch, options.mass_contexts
        )
        table = describe(results, model, contexts, options, time.perf_counter() - began)
        partial = options.out.with_suffix(".partial")
        partial.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
        partial.replace(options.out)
    except (MixgrainError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.out}: {len(results)} variants, {len(contexts)} contexts, {table['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
