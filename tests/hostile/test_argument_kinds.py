"""Any argument of any public function given anything: a result, or an error that says what to do.

Never a crash, a hang, an error of torch's insides, or a changed input.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile.calls import ELSEWHERE, calls
from hostile.exchange_calls import exchange_calls
from hostile.forge import NAMES, example
from hostile.kinds import KINDS, PLAIN

import mixgrain as mg
from mixgrain.formats.errors import MixgrainError
from mixgrain.formats.layout import Layout, next_key
from mixgrain.formats.sparse import SparseTensor

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

LONGEST = 700
# Words of errors that torch and Python raise about their own affairs.
INSIDES = ("aten::", "Could not run", "INTERNAL ASSERT", "has no attribute", "object is not",
           "ambiguous", "Expected all tensors", "unexpected keyword", "not subscriptable",
           "dispatch")  # fmt: skip
# What Python says of an operator between two types, naming both.
OPERATORS = ("unsupported operand", "can't multiply sequence", "does not support ufuncs",
             "bad operand", "can only concatenate", "can't concat")  # fmt: skip


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="mixgrain-hostile-"))


# The same calls twice: what is handed over, and what it was.
GOOD, COPY = ({**calls(folder()), **exchange_calls()} for _ in range(2))
CALLS = {name: sorted(kwargs) for name, (_, kwargs) in GOOD.items()}


def explained(error: Exception, words: tuple[str, ...]) -> bool:
    """The message is short, of the library's making, and names the function or the argument."""
    text = str(error)
    if isinstance(error, TypeError) and any(part in text for part in OPERATORS):
        return True
    mine = isinstance(error, MixgrainError) or (type(error) is TypeError and "expected" in text)
    named = any(word.lower() in text.lower() for word in words)
    return mine and named and len(text) < LONGEST and not any(part in text for part in INSIDES)


def same(a: Any, b: Any) -> bool:
    """Equal bits; what is no tensor or layout is not looked at."""
    if isinstance(a, SparseTensor):
        return same(a.values, b.values) and same(a.layout, b.layout)
    if isinstance(a, Layout):
        return all(same(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))
    if not isinstance(a, torch.Tensor) or a.layout is not torch.strided or a.is_nested:
        return True
    if a.device.type == "meta" or a.is_quantized or not a.numel():
        return True
    a, b = (t.detach().resolve_neg().resolve_conj().contiguous().view(-1) for t in (a, b))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def attempt(name: str, changes: dict[str, str]) -> None:
    """Call with some arguments replaced; assert the outcome."""
    function, kwargs = GOOD[name]
    given = {**kwargs, **{argument: KINDS[kind]() for argument, kind in changes.items()}}
    words = (*changes, *name.replace(".", " ").replace(",", "").split(), "layout", "values",
             "device", "sparse operand", "tensors", "encoding", "metadata", "N:M", "indices",
             "panel", "entries", "map", "global_tokens", "block", "NMLayout")  # fmt: skip
    try:
        function(**given)
    except OSError as error:
        assert name in ("load", "save", "load_model"), f"{name}({changes}): {error!r}"
    except Exception as error:
        # What a function that was given says of its arguments is its own.
        if changes.get("mask_mod") in ("a function", "a class"):
            return
        assert explained(error, words), f"{name}({changes}): {type(error).__name__}: {error}"
    for key, value in given.items():
        before = KINDS[changes[key]]() if key in changes else COPY[name][1][key]
        assert same(value, before), f"{name}({changes}) changed {key}"


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_given_everything(name: str, monkeypatch) -> None:
    monkeypatch.chdir(folder())  # save takes a string for a path
    function, kwargs = GOOD[name]
    function(**kwargs)  # the call itself is good
    for argument in CALLS[name]:
        tensors = isinstance(kwargs[argument], torch.Tensor | list | SparseTensor | Layout)
        for kind in KINDS if tensors else PLAIN:
            attempt(name, {argument: kind})


@hypothesis.given(
    st.sampled_from(sorted(CALLS)).flatmap(
        lambda name: st.tuples(
            st.just(name),
            st.dictionaries(
                st.sampled_from(CALLS[name]), st.sampled_from(sorted(KINDS)), min_size=1, max_size=3
            ),
        )
    )
)
@hypothesis.settings(max_examples=200)
def test_several_arguments_at_once(drawn: tuple[str, dict[str, str]]) -> None:
    """Whatever is looked at first, what is wrong is said."""
    name, changes = drawn
    if name != "save":
        attempt(name, changes)


def test_no_public_function_is_missing() -> None:
    public = set(mg.__all__)
    for module in ("patterns", "interchange", "huggingface"):
        public |= {f"{module}.{n}" for n in getattr(mg, module).__all__}
    covered = {name.split(",")[0] for name in CALLS} | ELSEWHERE
    covered |= {name.split(".")[0] for name in covered if not name.startswith("patterns")}
    assert public - covered == set()


@pytest.mark.parametrize("name", [n for n in NAMES if ", " not in n or n == "nm, within"])
def test_any_field_of_a_layout_given_anything(name: str) -> None:
    """validate names the field, whatever stands in it."""
    layout = example(name, torch.float32).layout
    for field in dataclasses.fields(layout):
        if field.name == "key":
            continue
        for kind, make in KINDS.items():
            broken = dataclasses.replace(layout, **{field.name: make(), "key": next_key()})
            try:
                broken.validate()
            except Exception as error:
                words = (type(layout).__name__, "N:M")
                assert explained(error, words), f"{field.name} = {kind}: {error!r}"
