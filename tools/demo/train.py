"""Trains the demo's byte-level model, on one GPU in a few minutes.

    python -m mixgrain.tools.demo.train pack --stdlib DIR [DIR …] --out text.tar.xz
    python -m mixgrain.tools.demo.train train --text text.tar.xz --minutes 6 --out DIR
    python -m mixgrain.tools.demo.train evaluate --weights FILE --stdlib DIR

`pack` gathers the text of several versions of the standard library, so that training needs neither
a network nor those versions. `train` writes model.safetensors (averaged weights, float16) and
train.json (the log), every minute and at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import data
from .model import Block, ByteLM, Config, byte_bits, evaluate, load, save

SYNC_EVERY = 20
# Seconds between two looks at held-out text, each of which also saves.
REPORT_EVERY = 60.0
# The sizes that the command line may set.
SIZES = ("context", "width", "heads", "layers", "hidden", "taps")


def orthogonalise(matrices: Tensor) -> Tensor:
    """Moves all singular values of each matrix to about 1, by five Newton-Schulz steps in bfloat16.

    Args:
        matrices: (n, rows, columns), any float dtype.

    Returns:
        Same shape, bfloat16.
    """
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        odd = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, odd, x, beta=3.4445)
    return x.mT if tall else x


class Muon:
    """Momentum whose step is orthogonalised: for weight matrices, in few steps better than AdamW.

    Matrices of one shape are updated as one batch; a parameter that stacks several matrices
    (queries, keys and values, say) is treated as several.
    """

    def __init__(self, model: ByteLM, decay: float, momentum: float = 0.95) -> None:
        """Takes the matrices of all blocks; `decay` is weight decay per unit of learning rate."""
        self.decay = decay
        self.momentum = momentum
        self.groups: dict[tuple[int, int], list[tuple[Tensor, int]]] = {}
        self.buffers: dict[tuple[int, int], Tensor] = {}
        for block in model.blocks:
            for name, stacked in Block.STACKED.items():
                parameter = block.get_parameter(name)
                shape = (parameter.shape[0] // stacked, parameter.shape[1])
                self.groups.setdefault(shape, []).append((parameter, stacked))

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step at learning rate `rate`; forgets the gradients."""
        for shape, members in self.groups.items():
            parts = [p.grad.view(-1, *shape) for p, _ in members if p.grad is not None]
            gradient = torch.cat(parts)
            buffer = self.buffers.setdefault(shape, torch.zeros_like(gradient))
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp_(buffer, self.momentum))
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            steps = torch.split(update.float(), [stacked for _, stacked in members])
            parameters = [p for p, _ in members]
            torch._foreach_mul_(parameters, 1 - rate * self.decay)
            torch._foreach_add_(
                parameters,
                [s.reshape(p.shape) for s, p in zip(steps, parameters, strict=True)],
                alpha=-rate * scale,
            )
            for p in parameters:
                p.grad = None


def rate_at(fraction: float, warm: float = 0.01, hold: float = 0.4) -> float:
    """Relative learning rate at a fraction of the time: up, level until `hold`, linearly to 0."""
    if fraction < warm:
        return fraction / warm
    return min(1.0, max(0.0, 1 - fraction) / (1 - hold))


@contextmanager
def swapped(model: ByteLM, weights: list[Tensor]) -> Iterator[None]:
    """Runs the body with other weights in the model's place, then puts its own back."""
    parameters: list[Tensor] = list(model.parameters())
    with torch.no_grad():
        own = [p.clone() for p in parameters]
        torch._foreach_copy_(parameters, weights)
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, own)


def write(out: Path, model: ByteLM, log: dict[str, object]) -> Path:
    """Saves the weights and the log below `out`; each file appears whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    weights = out / "model.safetensors"
    metadata = {"licence": data.LICENCE, "held_out_rule": data.HELD_OUT_RULE}
    save(model, weights.with_suffix(".partial"), metadata)
    weights.with_suffix(".partial").replace(weights)
    (out / "train.partial").write_text(json.dumps(log, indent=1))
    (out / "train.partial").replace(out / "train.json")
    return weights


def table(rows: Iterable[tuple[str, object]]) -> str:
    """Two aligned columns."""
    return "\n".join(f"{name:28} {value}" for name, value in rows)


def report(result: dict[str, float]) -> str:
    """The table of what `evaluate` found."""
    return table((k, f"{v:.4f}" if isinstance(v, float) else v) for k, v in result.items())


def describe(
    options: argparse.Namespace, model: ByteLM, selection: data.Selection, device: torch.device
) -> dict[str, object]:
    """The log's beginning: all that a run depends on."""
    cuda = device.type == "cuda"
    return {
        "config": asdict(model.config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "text": selection.summary(),
        "seed": options.seed,
        # Numbers only: paths would tell where it ran, not how.
        "options": {k: v for k, v in vars(options).items() if isinstance(v, int | float)},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
    }


class Trainer:
    """A model, its optimisers and the running average of its weights.

    Attributes:
        average: The averaged parameters, in the model's order.
    """

    def __init__(self, model: ByteLM, sampler: data.Sampler, options: argparse.Namespace) -> None:
        """Starts at the model's weights; `options` are those of the verb `train`."""
        self.model = model
        self.sampler = sampler
        self.options = options
        self.library = round(options.batch * options.library_share)
        self.cuda = sampler.text.is_cuda
        self.parameters: list[Tensor] = list(model.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.muon = Muon(model, options.decay)
        matrices = {id(p) for members in self.muon.groups.values() for p, _ in members}
        others = [p for p in self.parameters if id(p) not in matrices]
        self.adam = torch.optim.AdamW(
            others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=self.cuda
        )
        self._loss_of = self._loss
        if options.compile:
            self._loss_of = torch.compile(self._loss, fullgraph=True, dynamic=False)

    def _loss(self, tokens: Tensor) -> Tensor:
        # Autocast stands in here so that the compiled graph holds the casts of the weights too.
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.cuda):
            logits = self.model(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    def gradients(self) -> Tensor:
        """Draws a batch, adds its gradients, returns its loss in nats per byte."""
        tokens = self.sampler.draw(self.library, self.options.batch - self.library)
        loss: Tensor = self._loss_of(tokens)
        loss.backward()
        return loss.detach()

    def step(self, fraction: float, number: int) -> Tensor:
        """Trains on one batch and returns its loss.

        Args:
            fraction: How much of the run is over, 0…1.
            number: Steps made before.
        """
        loss = self.gradients()
        relative = rate_at(fraction)
        self.muon.step(self.options.rate * relative)
        for group in self.adam.param_groups:
            group["lr"] = self.options.adam_rate * relative
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        # Averages over about the last thirtieth of the run, so early weights are soon forgotten.
        torch._foreach_lerp_(self.average, self.parameters, 1 / max(1, number // 30))
        return loss


def train(options: argparse.Namespace) -> dict[str, float]:
    """Trains until the time is over, saves, and measures what was saved."""
    began = time.perf_counter()
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    selection = data.read_archive(options.text)
    config = Config(**{name: getattr(options, name) for name in SIZES})
    measured = {name: c for name, c in selection.heldout.items() if not data.is_test(name)}
    heldout = data.cut(measured, options.contexts, config.context)
    if not len(heldout):
        raise ValueError(
            f"the held-out files of {options.text} fill no context of {config.context}"
        )
    sampler = data.Sampler(selection, config.context, device, options.seed)
    model = ByteLM(config).to(device).train()
    for block in model.blocks:
        block.dropout = options.dropout
    trainer = Trainer(model, sampler, options)
    log = describe(options, model, selection, device)
    print(json.dumps({k: log[k] for k in ("config", "parameters", "device", "text")}), flush=True)
    curve: list[dict[str, float]] = []
    log["curve"] = curve

    # Compiles; its gradients are thrown away, since the clock of the schedule starts after it.
    trainer.gradients().item()
    model.zero_grad(set_to_none=True)
    started = reported = time.perf_counter()
    budget = began + 60 * options.minutes - options.reserve - started
    if budget <= 0:
        raise RuntimeError(
            f"reading and compiling took {started - began:.0f} s of {60 * options.minutes:.0f} s"
            f" and {options.reserve:.0f} s are reserved: give more --minutes"
        )
    log["seconds_before_training"] = started - began
    step, losses = 0, torch.zeros((), device=device)
    while True:
        fraction = (time.perf_counter() - started) / budget
        if options.steps:
            fraction = max(fraction, step / options.steps)
        if fraction >= 1:
            break
        losses += trainer.step(fraction, step)
        step += 1
        if step % SYNC_EVERY:
            continue
        # Waits for the device: else the host would run ahead and read the clock too early.
        mean = losses.item() / SYNC_EVERY / math.log(2)
        now = time.perf_counter()
        losses.zero_()
        if not math.isfinite(mean):
            raise RuntimeError(f"the loss is {mean} after {step} steps: lower --rate")
        point = {"seconds": now - began, "step": step, "train": mean}
        curve.append(point)
        if now - reported > REPORT_EVERY or step == SYNC_EVERY:
            reported = now
            with swapped(model.eval(), trainer.average):
                point["heldout"] = byte_bits(model, heldout[:64]).mean().item()
                write(options.out, model, log)
            model.train()
            print("  ".join(f"{k} {v:.5g}" for k, v in point.items()), flush=True)
    if trainer.cuda:
        torch.cuda.synchronize()
        log["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    seconds = time.perf_counter() - started
    seen = step * options.batch * config.context
    log |= {"steps": step, "bytes_seen": seen, "bytes_per_second": seen / seconds}
    log["epochs"] = seen / len(sampler.text)
    with swapped(model, trainer.average):
        weights = write(options.out, model, log)
    # The saved file is what is measured: float16 weights, float32 arithmetic.
    result = evaluate(load(weights, device), heldout)
    log |= {"result": result, "seconds": time.perf_counter() - began}
    log["weight_bytes"] = weights.stat().st_size
    (options.out / "train.json").write_text(json.dumps(log, indent=1))
    keys = ("parameters", "weight_bytes", "steps", "bytes_per_second", "epochs", "seconds")
    print(table((key, log[key]) for key in keys))
    print(report(result))
    return result


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="train.py", description=__doc__.splitlines()[0])
    verbs = top.add_subparsers(dest="verb", required=True)
    pack = verbs.add_parser("pack", help="gather the text into one archive")
    pack.add_argument(
        "--stdlib", type=Path, nargs="+", required=True, help="the base version first"
    )
    pack.add_argument("--out", type=Path, required=True, help="the archive, a .tar.xz")
    run = verbs.add_parser("train", help="train, save and measure")
    run.add_argument("--text", type=Path, required=True, help="an archive written by pack")
    run.add_argument("--out", type=Path, required=True, help="folder of the weights and the log")
    run.add_argument("--minutes", type=float, default=6.0, help="all in: compiling, measuring")
    run.add_argument("--reserve", type=float, default=15.0, help="seconds kept for measuring")
    run.add_argument("--steps", type=int, default=0, help="stop after so many steps; 0: by time")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--batch", type=int, default=64, help="contexts a step")
    run.add_argument("--library-share", type=float, default=0.5, help="of contexts not from tests")
    run.add_argument("--rate", type=float, default=0.02, help="of Muon")
    run.add_argument("--adam-rate", type=float, default=0.004, help="of embedding, gains and taps")
    run.add_argument("--decay", type=float, default=0.05, help="Muon's, per unit of its rate")
    run.add_argument("--dropout", type=float, default=0.0)
    run.add_argument("--contexts", type=int, default=None, help="measure only so many")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    for name in SIZES:
        run.add_argument(f"--{name}", type=int, default=getattr(Config, name))
    again = verbs.add_parser("evaluate", help="measure weights on a standard library")
    again.add_argument("--weights", type=Path, required=True)
    again.add_argument("--stdlib", type=Path, required=True)
    again.add_argument("--contexts", type=int, default=None, help="measure only so many")
    again.add_argument("--device", default="cpu")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Runs one verb; returns the exit status."""
    options = parser().parse_args(arguments)
    if options.verb == "pack":
        selection = data.select(options.stdlib)
        data.write_archive(selection, options.out)
        print(table([*selection.summary().items(), ("archive_bytes", options.out.stat().st_size)]))
    elif options.verb == "train":
        train(options)
    else:
        model = load(options.weights, options.device)
        few = data.contexts(options.stdlib, options.contexts, model.config.context)
        result = evaluate(model, few)
        print(report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
