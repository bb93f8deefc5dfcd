"""What a hostile file may look like: every mutation, drawn from one random generator.

The first five leave the digest as it was, so that mostly the container is tested; those after them
sign what they have changed, so that only the checks of fields and the layout's own ``validate``
stand between them and a kernel.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable

import numpy as np
from hostile.forge import SIZES, Forged, frame, take_apart

NUMPY = {"I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "U8": "u1", "BOOL": "u1"}
NUMBERS = (
    -(2**63), -(2**31), -129, -2, -1, 0, 1, 2, 3, 7, 8, 16, 17, 35, 36, 64, 127, 128, 255, 2**15,
    2**31 - 1, 2**31, 2**32, 2**40, 2**48, 2**48 + 1, 2**62, 2**63 - 1, 2**64,
)  # fmt: skip
VALUES = (*NUMBERS, 1.0, 1.5, 1e400, float("nan"), None, True, False, "", "row", "bytes", "2:4",
          [], [0], [1, 1], [0, 0], [7, 9], [2**40, 2**40], [[1]], [1, None], ["1", "2"], {},
          {"kind": "row"})  # fmt: skip


# The container


def flip(draw: random.Random, content: bytes, other: bytes) -> bytes:
    """One to four bytes of another value, half of the time in the header."""
    broken = bytearray(content)
    end = 8 + int.from_bytes(content[:8], "little") if draw.random() < 0.5 else len(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        broken[draw.randrange(end)] ^= 1 << draw.randrange(8) if draw.random() < 0.5 else 255
    return bytes(broken)


def cut(draw: random.Random, content: bytes, other: bytes) -> bytes:
    """Shorter, longer, or with a piece missing or doubled."""
    a, b = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    return draw.choice(
        (
            content[:a],
            content[a:],
            content[:a] + content[b:],
            content[:b] + content[a:],
            content + content[:a],
            content + bytes(draw.randrange(1, 64)),
        )
    )


def splice(draw: random.Random, content: bytes, other: bytes) -> bytes:
    """The beginning of one file and the end of another, or header and body of two."""
    if draw.random() < 0.5:
        return content[: draw.randrange(len(content))] + other[draw.randrange(len(other)) :]
    size = int.from_bytes(content[:8], "little")
    theirs = int.from_bytes(other[:8], "little")
    return content[: 8 + size] + other[8 + theirs :]


def length(draw: random.Random, content: bytes, other: bytes) -> bytes:
    """Another length of the header."""
    size = int.from_bytes(content[:8], "little")
    new = draw.choice((0, 1, size - 1, size + 8, len(content), 2**31, 2**63, 2**64 - 1))
    return new.to_bytes(8, "little") + content[8:]


def header(draw: random.Random, content: bytes, other: bytes) -> bytes:
    """A field of the container's own header: dtype, shape, offsets, names, metadata."""
    size = int.from_bytes(content[:8], "little")
    found, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    name = draw.choice(sorted(set(found) - {"__metadata__"}))
    entry = found[name]
    choice = draw.randrange(9)
    if choice == 0:
        entry["dtype"] = draw.choice((*SIZES, "F4", "", 3, None))
    elif choice == 1:
        entry["shape"] = draw.choice(([], [2**40], [2**62, 4], [0], [1], [-1], [1.5], None, "x"))
    elif choice == 2:
        entry["shape"] = entry["shape"][::-1] or [1]
    elif choice == 3:
        entry["data_offsets"] = draw.choice(([0, 0], [0, 8], [8, 0], [0], [0, 2**62], [-8, 0], {}))
    elif choice == 4:
        twin = draw.choice(sorted(set(found) - {"__metadata__"}))
        entry["data_offsets"] = found[twin]["data_offsets"]  # two tensors over the same bytes
    elif choice == 5:
        found[draw.choice(("layout", "layout.", "VALUES", "é", "x" * 5000))] = found.pop(name)
    elif choice == 6:
        key = draw.choice(sorted(found["__metadata__"]))
        found["__metadata__"][key] = draw.choice(("", "1", "\ud800", "[" * 9999, "{}", 3, None))
    elif choice == 7:
        found["__metadata__"] = draw.choice((None, [], {}, "format", {"format": "mixgrain"}))
    else:
        text = json.dumps(found)
        text = text[:1] + text[1:].replace("{", '{"dtype":"I32",', 1)  # a key given twice
        return frame(text.encode(), body)
    return frame(json.dumps(found).encode(), body)


# What the library reads, signed


def static(draw: random.Random, content: bytes, other: bytes) -> bytes:
    """One field of the description: another value of any type."""
    forged = take_apart(content)
    target = draw.choice([forged.tensor, *forged.layouts()])
    field = draw.choice(sorted(target))
    kind = draw.random()
    if kind < 0.15:
        del target[field]
    elif kind < 0.25:
        target[draw.choice(("more", "key", "kind", "lead", "masks"))] = draw.choice(VALUES)
    else:
        target[field] = draw.choice(VALUES)
    return forged.write()


def number(draw: random.Random, content: bytes, other: bytes) -> bytes:
    """One number of the description, nudged or replaced: sizes that almost fit."""
    forged = take_apart(content)
    target = draw.choice(forged.layouts())
    fields = [f for f, v in target.items() if isinstance(v, int | list) and v != []]
    field = draw.choice(fields)
    value = target[field]
    change = draw.choice((lambda n: n + 1, lambda n: n - 1, lambda n: 2 * n, lambda n: 0, lambda n:
                          draw.choice(NUMBERS)))  # fmt: skip
    if isinstance(value, int):
        target[field] = change(int(value))
    elif draw.random() < 0.6:
        value[draw.randrange(len(value))] = change(draw.choice(value))
    else:
        target[field] = draw.choice((value[::-1], value[:-1], value * 2, [*value, *value[-1:]]))
    return forged.write()


def element(draw: random.Random, content: bytes, other: bytes) -> bytes:
    """Elements of one index array: out of range, not rising, doubled, exchanged, nudged."""
    forged = take_apart(content)
    if not forged.index_names:
        return number(draw, content, other)
    _elements(draw, forged, draw.choice(forged.index_names))
    return forged.write()


def pair(draw: random.Random, content: bytes, other: bytes) -> bytes:
    """Two fields at once, so that one may excuse the other."""
    forged = take_apart(content)
    for _ in range(2):
        if forged.index_names and draw.random() < 0.6:
            _elements(draw, forged, draw.choice(forged.index_names))
        else:
            target = draw.choice(forged.layouts())
            field = draw.choice([f for f in target if f != "kind"])
            if isinstance(target[field], int):
                target[field] += draw.choice((-1, 1, 8, 16, 128, 256))
            elif isinstance(target[field], list) and target[field]:
                at = draw.randrange(len(target[field]))
                target[field][at] += draw.choice((-1, 1, 8, 16, 128, 256))
    return forged.write()


def _elements(draw: random.Random, forged: Forged, name: str) -> None:
    entry = forged.tensors[name]
    array = np.frombuffer(entry[2], NUMPY.get(entry[0], "u1")).copy()
    at, to = draw.randrange(array.size), draw.randrange(array.size)
    choice, limits = draw.randrange(8), np.iinfo(array.dtype)
    if choice == 0:
        array[at] = max(limits.min, min(limits.max, draw.choice(NUMBERS)))
    elif choice == 1:
        array[at] = array[to]
    elif choice == 2:
        array[at], array[to] = array[to], array[at]
    elif choice == 3:
        array[at:] = array[at:][::-1].copy()
    elif choice == 4:
        with np.errstate(over="ignore"):
            array[at:] += array.dtype.type(draw.choice((1, 2, 16)))
    elif choice == 5:
        array[:] = array[at]
    elif choice == 6:
        with np.errstate(over="ignore"):
            array[at] -= array.dtype.type(1)
    else:
        raw = bytearray(array.tobytes())
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        array = np.frombuffer(bytes(raw), array.dtype)
    entry[2] = array.tobytes()


def recast(draw: random.Random, content: bytes, other: bytes) -> bytes:
    """A tensor of another dtype, shape or length, its bytes to match."""
    forged = take_apart(content)
    name = draw.choice(sorted(forged.tensors))
    dtype, shape, raw = forged.tensors[name]
    choice = draw.randrange(6)
    if choice == 0:
        width = SIZES[dtype]
        forged.tensors[name][0] = draw.choice([d for d, size in SIZES.items() if size == width])
    elif choice == 1:
        keep = draw.randrange(4)
        forged.tensors[name] = [dtype, [keep], (raw * 4)[: keep * SIZES[dtype]].ljust(
            keep * SIZES[dtype], b"\0")]  # fmt: skip
    elif choice == 2:
        forged.tensors[name][1] = draw.choice(([1, *shape], [*shape, 1], shape[::-1]))
    elif choice == 3:
        forged.tensors[name] = [dtype, [0, 2**40], b""]
    elif choice == 4:
        forged.tensors[name] = [dtype, [2 * shape[0], *shape[1:]] if shape else [], raw * 2
                                if shape else raw]  # fmt: skip
    else:
        twin = draw.choice(sorted(forged.tensors))
        forged.tensors[name] = copy.deepcopy(forged.tensors[twin])
    return forged.write()


def stranger(draw: random.Random, content: bytes, other: bytes) -> bytes:
    """Tensors or description of another file, some missing, some to spare."""
    forged, theirs = take_apart(content), take_apart(other)
    choice = draw.randrange(5)
    if choice == 0:
        forged.tensor = theirs.tensor
    elif choice == 1:
        forged.tensors.pop(draw.choice(sorted(forged.tensors)))
    elif choice == 2:
        forged.tensors[draw.choice(("stray", "key_mask", "layout.T", "layout.within.masks"))] = (
            draw.choice(list(theirs.tensors.values()))
        )
    elif choice == 3:
        for name in sorted(set(forged.tensors) & set(theirs.tensors) - {"values"}):
            if draw.random() < 0.5:
                forged.tensors[name] = theirs.tensors[name]
    else:
        forged.tensor["layout"] = {"kind": "mixed", "blocks": None, "panels": None, "rest": None,
            "shape": [draw.choice((5, 2**40)), 5], "lead": [1, 1], "entry": [0], "nnz": 0,
            "entry_slots": [0, 0], "starts": [0], draw.choice(("rest", "blocks", "panels")):
            forged.tensor["layout"]}  # fmt: skip
    return forged.write()


MUTATIONS: tuple[tuple[Callable[[random.Random, bytes, bytes], bytes], int], ...] = (
    (flip, 5), (cut, 3), (splice, 2), (length, 1), (header, 5),
    (static, 12), (number, 12), (element, 30), (pair, 15), (recast, 8), (stranger, 7),
)  # fmt: skip


def mutate(draw: random.Random, content: bytes, other: bytes) -> tuple[str, bytes]:
    """A mutation's name and what it made of ``content``; ``other`` is a second, whole file."""
    functions, weights = zip(*MUTATIONS, strict=True)
    (chosen,) = draw.choices(functions, weights)
    return chosen.__name__, chosen(draw, content, other)
