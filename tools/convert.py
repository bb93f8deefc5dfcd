"""`mixgrain convert`: dense weights into a sparse layout and back, every bit checked.

A converted model is a folder of ordinary files:

    OUT/sparse/NAME.safetensors    one for each converted tensor, for mixgrain.load; NAME is the
                                   tensor's name with odd characters as %XX
    OUT/dense.safetensors          all other tensors, unchanged, with the metadata of the original

mixgrain.load_model loads such a folder into the model it came from.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import mixgrain as mg
from mixgrain.formats.errors import FileFormatError, MixgrainError, UnsupportedError
from mixgrain.primitives.load_model import DENSE, SPARSE
from mixgrain.primitives.load_model import ENDING as ONE_FILE
from mixgrain.primitives.model_report import ConvertedWeight, table
from mixgrain.primitives.rule import Choice, check_used, first_match

from .progress import counted
from .weights import Entry, Weights, ending_of, open_weights, read_tensor

# Integers of the same width: only they tell −0 from +0 and one NaN from another.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Rule:
    """What becomes of the tensors of a file.

    Attributes:
        choices: by globs over tensors' names, or their layers' ("up" for "up.weight"), the first
            that matches; None leaves a tensor dense.
        name: of the folder that is written, "tile" say.
        named: the globs are a user's: each must name something, and may name stacks of matrices.
    """

    choices: Mapping[str, Choice]
    name: str
    named: bool = True


def words_of(choice: Mapping[str, Any]) -> str:
    """A choice in a few words, "nm 2:4" say."""
    kind = choice["kind"]
    if kind == "nm":
        return f"nm {choice.get('n', 2)}:{choice.get('m', 4)}"
    grain = {"block": choice.get("size", 64), "mixed": choice.get("size", 64)}.get(kind)
    return f"{kind} {grain or choice.get('axis') or ''}".strip()


class _InexactError(Exception):
    """A tensor did not come back bit for bit; names it."""


def to_sparse(path: Path, out: Path | None, force: bool, rule: Rule) -> int:
    """Converts the chosen tensors of a file and prints a table.

    Args:
        path: a file of dense weights.
        out: a folder, or a name in .safetensors for a file with one tensor; beside `path` if None.
        force: replace `out` if it exists.
        rule: which tensors, and what they become.

    Returns:
        0, or 1 when a tensor did not come back bit for bit; nothing is written then.

    Raises:
        MixgrainError: the file, the choice or a tensor does not fit; says which and why.
        OSError: a file cannot be read or written.
    """
    weights = open_weights(path)
    chosen = _chosen(weights, path, rule)
    out = out or path.with_name(f"{path.name.removesuffix(ending_of(path))}.{rule.name}")
    single = out.suffix == ONE_FILE
    if single and (len(chosen) != 1 or len(weights.entries) != 1):
        raise UnsupportedError(
            f"{out}: one file holds one tensor, {path} has {len(weights.entries)} and "
            f"{len(chosen)} of them chosen; name a folder instead, e.g. {out.with_suffix('')}"
        )
    lines, others = [], [name for name in weights.entries if name not in chosen]
    try:
        with _written(out, force, path) as made:
            if not single:
                (made / SPARSE).mkdir(parents=True)
            for name in counted(chosen, "converting"):
                file = made if single else made / SPARSE / f"{quote(name, safe='')}{ONE_FILE}"
                lines.append(_convert_one(weights, path, name, file, chosen[name]))
            if others:
                rest = {name: read_tensor(weights, path, name) for name in others}
                save_file(rest, made / DENSE, metadata=weights.metadata or None)
    except _InexactError as wrong:
        print(f"{wrong}: does not come back bit for bit; nothing was written")
        return 1
    print(table(lines, "tensor"))
    for words, entries in _untouched(weights, others).items():
        print(f"left dense: {len(entries)} {words}, e.g. {entries[0]}")
    pruned = any(choice.get("prune") for choice in chosen.values())
    print(f"every converted tensor came back bit for bit{' where kept' if pruned else ''}")
    print(f"written: {out}")
    return 0


def to_dense(path: Path, out: Path | None, force: bool) -> int:
    """Turns what `to_sparse` wrote, or any file of mixgrain.save, into one safetensors file.

    Args:
        path: the folder, or the file of one tensor.
        out: the file; beside `path` if None.
        force: replace `out` if it exists.

    Returns:
        0, or 1 when a tensor did not come back bit for bit; nothing is written then.

    Raises:
        MixgrainError: a file is not what it should be.
        OSError: a file cannot be read or written.
    """
    out = out or path.with_name(f"{path.stem}.dense{ONE_FILE}")
    if out.suffix != ONE_FILE:
        raise UnsupportedError(f"{out}: a name that ends in {ONE_FILE} expected")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {"format": "pt"}
    files = {path.stem: path}
    if path.is_dir():
        found = sorted((path / SPARSE).glob(f"*{ONE_FILE}"))
        files = {unquote(file.name.removesuffix(ONE_FILE)): file for file in found}
        if not files:
            raise FileFormatError(
                f"{path}: no {SPARSE}/*{ONE_FILE} in this folder; give what mixgrain convert wrote"
            )
        if (path / DENSE).exists():
            rest = open_weights(path / DENSE)
            tensors = {name: read_tensor(rest, path / DENSE, name) for name in rest.entries}
            metadata = rest.metadata or metadata
    lines = []
    for name, file in counted(files.items(), "reading", len(files)):
        if name in tensors:
            raise FileFormatError(f"{file}: {DENSE} has a tensor {name!r}, too; remove one of them")
        s = mg.load(file)
        tensors[name] = s.to_dense().contiguous()
        before, shape = file.stat().st_size, tuple(tensors[name].shape)
        after = tensors[name].nbytes
        lines.append(ConvertedWeight(name, shape, s.layout.kind, s.nnz, s.density, before, after))
    try:
        with _written(out, force, path) as made:
            save_file(tensors, made, metadata=metadata)
            back = open_weights(made)
            for name, tensor in counted(tensors.items(), "checking", len(tensors)):
                if not _same_bits(read_tensor(back, made, name), tensor):
                    raise _InexactError(name)
    except _InexactError as wrong:
        print(f"{wrong}: does not come back bit for bit; nothing was written")
        return 1
    print(table(lines, "tensor"))
    print(f"written: {out}, {len(tensors)} tensors")
    return 0


def _chosen(weights: Weights, path: Path, rule: Rule) -> dict[str, Mapping[str, Any]]:
    """The tensors to convert and how: matrices, and stacks of them where a glob names them."""
    if rule.named:
        check_used(str(path), rule.choices, weights.entries, "tensor")
    deepest = 3 if rule.named else 2
    chosen = {}
    for name, entry in weights.entries.items():
        glob = first_match(rule.choices, name)
        choice = None if glob is None else rule.choices[glob]
        if not isinstance(choice, Mapping) or entry.dtype is None:
            continue
        # A glob that names a layer means its weight, however it is written: no bias, no stack.
        whole = glob is not None and fnmatchcase(name, glob)
        if 2 <= len(entry.shape) <= (deepest if whole else 2):
            chosen[name] = choice
    if not chosen:
        raise UnsupportedError(
            f"{path}: nothing to convert: {len(weights.entries)} tensors, no matrix of float16, "
            "bfloat16, float32 or float64 among those named"
        )
    return chosen


def _untouched(weights: Weights, others: list[str]) -> dict[str, list[str]]:
    """Names of the tensors left as they are, by what they are."""
    groups: dict[str, list[str]] = {}
    for name in others:
        groups.setdefault(_what(weights.entries[name]), []).append(name)
    return groups


def _what(entry: Entry) -> str:
    if entry.dtype is None:
        return "of a dtype that layouts do not hold"
    return "not chosen" if len(entry.shape) == 2 else "not matrices"


def _convert_one(
    weights: Weights, path: Path, name: str, file: Path, choice: Mapping[str, Any]
) -> ConvertedWeight:
    dense = read_tensor(weights, path, name)
    try:
        s = mg.sparsify(dense, **choice)
    except MixgrainError as error:
        words = str(error).replace("prune=True", "--prune").removeprefix("sparsify: ")
        raise UnsupportedError(f"{path}: {name}: {words}") from None
    mg.save(file, s)
    back = mg.load(file).to_dense()
    # What was pruned is +0; everything else has the bits it had.
    kept = _bits(back) != 0 if choice.get("prune") else torch.ones_like(back, dtype=torch.bool)
    if back.shape != dense.shape or not _same_bits(back[kept], dense[kept]):
        raise _InexactError(name)
    size = file.stat().st_size
    shape = tuple(dense.shape)
    return ConvertedWeight(name, shape, words_of(choice), s.nnz, s.density, dense.nbytes, size)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_BITS[tensor.element_size()])


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@contextmanager
def _written(out: Path, force: bool, source: Path) -> Iterator[Path]:
    """A place to write to that becomes `out` when all went well, and vanishes otherwise."""
    if out.resolve() == source.resolve():
        raise UnsupportedError(f"{out}: is FILE itself; give another --out")
    if out.exists() and not force:
        raise UnsupportedError(f"{out}: exists; give --force to replace it, or another --out")
    if out.is_dir() and not {entry.name for entry in out.iterdir()} <= {SPARSE, DENSE}:
        raise UnsupportedError(f"{out}: a folder with other things in it; give another --out")
    if not out.absolute().parent.is_dir():
        raise UnsupportedError(f"{out}: there is no folder {out.parent}; make it, or give another")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".mixgrain-") as scratch:
        made = Path(scratch) / f"made{out.suffix}"
        try:
            yield made
        except (SafetensorError, OSError) as error:  # a full disk, a name too long
            reason = str(error).replace(str(made), str(out))
            raise OSError(f"{out}: cannot be written ({reason})") from None
        if out.is_dir():  # moved, not removed: nothing is lost if the next line fails
            out.replace(Path(scratch) / "old")
        made.replace(out)
