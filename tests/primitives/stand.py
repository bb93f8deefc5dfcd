"""What stands in for prepared calls where there is no GPU: the operators of the CPU."""

from __future__ import annotations

import copy
import types

import torch
from torch import Tensor

from mixgrain.formats.cache import clear_caches
from mixgrain.primitives import cuda, eager, looks
from mixgrain.primitives.activations import ACTIVATIONS, CODES
from mixgrain.primitives.cpu import sddmm as cpu_sddmm
from mixgrain.primitives.cpu import spmm as cpu_spmm
from mixgrain.primitives.cuda import calls, tokens


class Runs(list):
    """Names of the prepared calls that ran.

    Attributes:
        prepared: how many were prepared.
    """

    prepared = 0


def like(t):
    """Its description; nothing here keeps a tensor alive that prepared calls would not."""
    return None if t is None else torch.empty_strided(t.shape, t.stride(), device="meta")


class Stand:
    """What a prepared call is to the layers above it."""

    def __init__(self, runs, works, operands, keep, keep_rows, plan, indexed):
        self.runs, self.sizes, self.indexed = runs, None, indexed
        runs.prepared += 1
        self.works, self.rest = works, (keep_rows, plan)
        *self.operands, self.keep = (like(t) for t in (*operands, keep))
        every = self._compute([t for t in (*operands, keep) if t is not None])
        self.shapes = [tuple(t.shape) for t in every]

    def _compute(self, given):
        rest = iter(given)
        every = [None if t is None else next(rest) for t in (*self.operands, self.keep)]
        keep_rows, plan = self.rest
        if self.indexed:
            plan = plan._replace(tensors=[every[-2], *plan.tensors[1:]])
        made = []
        for work in self.works:
            operands = [every[n] for n in work.operands]
            mask = every[-1:] if work.op == "prune" else (every[-1], keep_rows)
            with torch._C._AutoDispatchBelowAutograd():
                found = getattr(torch.ops.mixgrain, work.op)(*operands, *mask, *plan, *work.scalars)
            made += (found if isinstance(found, tuple) else (found,))[: len(work.results)]
        return made

    def shaped(self, sizes):
        other = copy.copy(self)
        other.sizes = sizes
        return other

    def __call__(self, given, pointers):
        assert pointers == [t.data_ptr() for t in given]
        self.runs.append("+".join(work.op for work in self.works))
        # The operators take folded tensors; these are views of the same memory.
        folded = [t for t in (*self.operands, self.keep) if t is not None]
        given = [g.as_strided(f.shape, f.stride()) for g, f in zip(given, folded, strict=True)]
        made = self._compute(given)
        if self.sizes is not None:
            made = [t.reshape(size) for t, size in zip(made, self.sizes, strict=True)]
        return made[0] if len(made) == 1 else tuple(made)


class Alone:
    """A prepared call of launch code, which runs as it is on tensors of the CPU."""

    def __init__(self, runs, name, arguments):
        self.runs, self.name, self.arguments = runs, name, arguments
        self.given = calls.given(arguments)
        runs.prepared += 1
        launch_code(name)(*arguments)  # what cannot be says so now

    def __call__(self, given, pointers):
        assert pointers == [t.data_ptr() for t in given]
        for new, old in zip(given, self.given, strict=True):
            assert new.shape == old.shape and new.dtype == old.dtype
        self.runs.append(self.name)
        rest = iter(given)
        filled = []
        for at, a in enumerate(self.arguments):
            if isinstance(a, Tensor):
                filled.append(next(rest))
            elif isinstance(a, list) and a and isinstance(a[0], Tensor):
                own, fixed = calls._loose(self.arguments, at)
                filled.append([*(next(rest) for _ in own), *fixed])
            else:
                filled.append(a)
        with torch.no_grad():
            return launch_code(self.name)(*filled)


def launch_code(name):
    return getattr(tokens, name)


def turned(t, pitch):
    """What ``cuda.turn`` does."""
    return torch.nn.functional.pad(t.mT, (0, pitch - t.shape[0])).contiguous()


def finish(sums, bias, tokens, dtype, activation):
    """What ``cuda.finish`` does."""
    total = sum(sums)[:, 0, :, :tokens].mT
    total = total if bias is None else total + bias
    for name, code in CODES.items():
        total = ACTIVATIONS[name](total) if code == activation else total
    return total.to(dtype).contiguous()


def usable(t):
    """As of eager, on the CPU."""
    if type(t) not in looks.TENSORS or t.layout is not torch.strided:
        return False
    return not (t.is_neg() or t.is_nested or t._is_zerotensor())


def stand_in(monkeypatch) -> Runs:
    """Let CPU tensors go the short way."""
    seen = Runs()
    clear_caches()
    monkeypatch.setattr(cuda, "together", lambda *given: Stand(seen, *given))
    monkeypatch.setattr(cuda, "alone", lambda *given: Alone(seen, *given))
    products = {**vars(cpu_spmm), "unrounded": lambda *given: [cpu_spmm.spmm(*given)]}
    monkeypatch.setattr(tokens, "spmm", types.SimpleNamespace(**products))
    monkeypatch.setattr(tokens, "finish", finish)
    monkeypatch.setattr(tokens.turn, "turned", turned)
    monkeypatch.setattr(tokens, "sddmm", cpu_sddmm)
    monkeypatch.setattr(eager, "usable", usable)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return seen
