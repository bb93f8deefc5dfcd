"""The commands about weights: `mixgrain convert` and `mixgrain finetune`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from mixgrain.formats.errors import UnsupportedError

from .numbers import share, whole

if TYPE_CHECKING:
    Verbs: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]

LAYOUTS = ("tile", "nm", "block", "row", "panel", "mixed", "dense")


def add_convert(verbs: Verbs) -> None:
    """The grammar of `mixgrain convert`."""
    convert = verbs.add_parser(
        "convert",
        help="turn a file of dense weights into a sparse layout, or back",
        description="Reads dense weights, holds the chosen ones in a sparse layout, checks that "
        "they come back bit for bit, and prints a table. The result is a folder: "
        "OUT/sparse/NAME.safetensors for each converted tensor, which mixgrain.load reads, and "
        "OUT/dense.safetensors for all others. An OUT that ends in .safetensors is one file with "
        "one tensor. `--to dense` turns either back into an ordinary safetensors file. --rule, "
        "once for each group of layers, gives them different layouts; mixgrain.load_model loads "
        "the result into the model it came from.",
    )
    convert.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        help=".safetensors (or .safetensors.index.json of several), .npy, .npz or .pt (a state "
        "dict) with dense weights; with --to dense, what this command wrote",
    )
    what = convert.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", choices=LAYOUTS, metavar="LAYOUT", help=", ".join(LAYOUTS))
    what.add_argument(
        "--rule",
        action="append",
        metavar="GLOB=KIND[,OPTION=VALUE…]",
        help="what the tensors or layers of these names become, e.g. '*.up=tile,density=0.25', "
        "'*.qkv=2:4', 'head=dense'; may be repeated, the first that matches decides, others stay "
        "dense; options: density, n, m, size, axis, prune",
    )
    convert.add_argument(
        "--out", type=Path, help="the result (default: beside FILE, named after it and the layout)"
    )
    convert.add_argument(
        "--tensors",
        action="append",
        metavar="GLOB",
        help="names of tensors to convert, e.g. 'layers.*.weight'; may be repeated "
        "(default: all matrices of floating-point numbers)",
    )
    convert.add_argument(
        "--prune",
        action="store_true",
        help="keep the largest values and drop the others; without it nothing may be lost",
    )
    convert.add_argument(
        "--density",
        type=share,
        metavar="PART",
        help="with --prune, the part of tiles, blocks or elements to keep, 0 to 1",
    )
    convert.add_argument("--n", type=whole(1, 256), help="nm: kept of m (default: 2)")
    convert.add_argument("--m", type=whole(1, 256), help="nm: a group (default: 4)")
    convert.add_argument(
        "--size",
        type=int,
        choices=(16, 32, 64, 128),
        help="side of the blocks of block and mixed (default: 64)",
    )
    convert.add_argument(
        "--axis", choices=("rows", "columns"), help="panel: what is pruned, with --prune"
    )
    convert.add_argument("--force", action="store_true", help="replace an OUT that exists")
    convert.set_defaults(run=_convert)


def add_finetune(verbs: Verbs) -> None:
    """The grammar of `mixgrain finetune`."""
    finetune = verbs.add_parser(
        "finetune",
        help="prune the demo's language model, fine-tune it briefly, and compare",
        description="Prunes the demo's model to 2:4 and to tiles, scores it, trains what was kept "
        "for a few steps on this machine's Python library, held-out files apart, and scores it "
        "again: bits per byte and tokens per second, over several seeds. No network is used.",
    )
    finetune.add_argument(
        "--seeds", type=whole(1, 100), default=3, help="fine-tunings of each (default: 3)"
    )
    finetune.add_argument(
        "--steps", type=whole(1, 1 << 20), default=10, help="of each (default: 10)"
    )
    finetune.add_argument(
        "--batch", type=whole(1, 1 << 12), default=4, help="sequences a step (default: 4)"
    )
    finetune.add_argument(
        "--length", type=whole(2, 2048), default=256, help="bytes of a sequence (default: 256)"
    )
    finetune.add_argument(
        "--contexts",
        type=whole(1, 4096),
        default=3,
        help="how many contexts of 2048 bytes to score (default: 3)",
    )
    finetune.add_argument(
        "--together",
        type=whole(1, 4096),
        default=1,
        help="contexts in a forward pass that is timed (default: 1)",
    )
    finetune.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where it runs (default: cpu)"
    )
    finetune.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="what contexts are scored in (default: float32)",
    )
    finetune.add_argument(
        "--threads", type=whole(1, 1024), help="CPU threads (default: what torch chooses)"
    )
    finetune.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    finetune.set_defaults(run=_finetune)


def _convert(options: argparse.Namespace) -> int:
    from .convert import Rule, to_dense, to_sparse
    from .rule_text import parse_rules

    if options.to == "dense":
        return to_dense(options.file, options.out, options.force)
    flags = {
        name: getattr(options, name)
        for name in ("density", "n", "m", "size", "axis")
        if getattr(options, name) is not None
    }
    if options.rule:
        beside = [*flags, *(["tensors"] if options.tensors else [])]
        if beside:
            raise UnsupportedError(
                f"--{beside[0]} beside --rule; expected it in the rule: GLOB=KIND,OPTION=VALUE"
            )
        rule = Rule(parse_rules(options.rule, options.prune), "sparse")
    else:
        choice = {"kind": options.to, "prune": options.prune, **flags}
        globs = options.tensors or ["*"]
        rule = Rule(dict.fromkeys(globs, choice), options.to, bool(options.tensors))
    return to_sparse(options.file, options.out, options.force, rule)


def _finetune(options: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    from .demo.finetune import DTYPES, Settings, run

    settings = Settings(
        options.seeds, options.steps, options.batch, options.length, options.contexts,
        options.together, torch.device(options.device), DTYPES[options.dtype],
    )  # fmt: skip
    return run(settings, threads=options.threads, out=options.out)
