"""The text of the demo: Python's standard library, and the part of it that is never trained on.

Every file is named by its POSIX path relative to the standard library's directory. A file is held
out when a hash of that name says so: any machine can tell without a list. Documentation (`.txt`,
`.rst` and the generated `pydoc_data/topics.py`) is treated like source.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

SUFFIXES = (".py", ".txt", ".rst")
EXCLUDED = frozenset({"site-packages", "dist-packages", "__pycache__"})
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
SEPARATOR = b"\0"
LICENCE = "Python Software Foundation License Version 2 (the text trained on)"
HELD_OUT_RULE = (
    "a file is held out when int(sha256(posix path relative to the standard library).hexdigest(),"
    " 16) % 10 == 0; training files that share over half of their non-trivial lines with held-out"
    " files are dropped"
)

# A line shorter than this says little about where it was copied from (`return self`, `else:`).
_TELLING_LENGTH = 16
# Below this many telling lines, "half of a held-out file" happens by chance.
_TELLING_LINES = 8


def stdlib_files(root: Path) -> list[str]:
    """Lists the text files of a standard library.

    Args:
        root: The directory, e.g. `sysconfig.get_paths()["stdlib"]`.

    Returns:
        Sorted POSIX paths relative to `root`.
    """
    paths = (p.relative_to(root) for p in root.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    return sorted(p.as_posix() for p in paths if EXCLUDED.isdisjoint(p.parts))


def _digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def held_out(relative_path: str) -> bool:
    """Whether the file of this POSIX path in the standard library is never trained on."""
    return _digest(relative_path) % 10 == 0


def is_test(relative_path: str) -> bool:
    """Whether the file of this POSIX path in the standard library belongs to its tests."""
    path = PurePosixPath(relative_path)
    return not TEST_FOLDERS.isdisjoint(path.parts) or path.name.startswith("test_")


def read_files(root: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Reads files below `root`, with line ends as LF so that every platform sees the same bytes."""
    return {name: (root / name).read_bytes().replace(b"\r\n", b"\n") for name in names}


def cut(files: Mapping[str, bytes], n: int | None = None, length: int = 2048) -> Tensor:
    """Cuts files into contexts of equal length, in an order that depends on the files alone.

    Each file gives as many whole contexts as it holds. What is left (short files and ends of files,
    in the order of their names' sha256) is joined with a zero byte between and cut likewise, after
    the others; so every byte stands in one context, but for fewer than `length` at the very end.

    Args:
        files: Name to content.
        n: How many contexts to keep; None keeps all.
        length: Bytes per context.

    Returns:
        uint8 tensor of shape (contexts, length).
    """
    whole: list[tuple[int, bytes]] = []
    rest: list[bytes] = []
    for name in sorted(files, key=_digest):
        content = files[name]
        end = len(content) - len(content) % length
        for start in range(0, end, length):
            # Ordering by a hash, not by file, makes any first n contexts a fair sample.
            whole.append((_digest(f"{name}:{start}"), content[start : start + length]))
        if content[end:]:
            rest.append(content[end:])
    joined = SEPARATOR.join(rest)
    found = [context for _, context in sorted(whole)]
    found += [joined[i : i + length] for i in range(0, len(joined) - length + 1, length)]
    found = found[:n]
    return torch.frombuffer(bytearray(b"".join(found)) or bytearray(1), dtype=torch.uint8)[
        : len(found) * length
    ].view(len(found), length)


def contexts(stdlib: Path, n: int | None = None, length: int = 2048) -> Tensor:
    """Returns the evaluation contexts of a standard library: its held-out files that are no tests.

    Args:
        stdlib: The directory, e.g. `sysconfig.get_paths()["stdlib"]`.
        n: How many contexts to keep; None keeps all.
        length: Bytes per context.

    Returns:
        uint8 tensor of shape (contexts, length); the same on every machine that has the same files.
    """
    names = [name for name in stdlib_files(stdlib) if held_out(name) and not is_test(name)]
    return cut(read_files(stdlib, names), n, length)


def telling_lines(content: bytes) -> frozenset[bytes]:
    """The distinct stripped lines of a file, those long enough to show a copy."""
    lines = (line.strip() for line in content.splitlines())
    return frozenset(line for line in lines if len(line) >= _TELLING_LENGTH)


@dataclass
class Selection:
    """Which files are trained on and which are held out, with the reasons counted.

    Attributes:
        train: Name ("version/path") to content of the training files.
        heldout: Path to content of the first version's held-out files, tests included.
        versions: Names of the standard libraries read, the base first.
        dropped: Reason to the names of files left out of training for it.
    """

    train: dict[str, bytes] = field(default_factory=dict)
    heldout: dict[str, bytes] = field(default_factory=dict)
    versions: list[str] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def summary(self) -> dict[str, object]:
        """Counts for logs: files and bytes on either side, and files dropped by reason."""
        library = [c for name, c in self.train.items() if not is_test(name)]
        measured = [c for name, c in self.heldout.items() if not is_test(name)]
        return {
            "versions": self.versions,
            "train_files": len(self.train),
            "train_bytes": sum(map(len, self.train.values())),
            "train_library_bytes": sum(map(len, library)),
            "heldout_files": len(self.heldout),
            "heldout_library_files": len(measured),
            "heldout_library_bytes": sum(map(len, measured)),
            "dropped": {reason: len(names) for reason, names in self.dropped.items()},
        }


class _HeldOutLines:
    """Tells whether a file repeats held-out text, by the lines it shares with it."""

    def __init__(self, files: Iterable[bytes]) -> None:
        """Indexes the lines of the held-out files."""
        self.contents = frozenset(files)
        self.owners: dict[bytes, list[int]] = {}
        self.sizes: list[int] = []
        for number, content in enumerate(sorted(self.contents)):
            lines = telling_lines(content)
            self.sizes.append(len(lines))
            for line in lines:
                self.owners.setdefault(line, []).append(number)

    def repeated_by(self, content: bytes, lines: frozenset[bytes]) -> bool:
        """Whether a file of these telling lines gives held-out text away.

        True for a copy, for a file over half of whose lines are held out, and for one that has over
        half of the lines of some held-out file.
        """
        if content in self.contents:
            return True
        shared = [line for line in lines if line in self.owners]
        if 2 * len(shared) > len(lines):
            return True
        counts = Counter(owner for line in shared for owner in self.owners[line])
        return any(
            2 * count > self.sizes[owner] >= _TELLING_LINES for owner, count in counts.items()
        )


def select(stdlibs: Sequence[Path]) -> Selection:
    """Chooses the training text from several versions of the standard library.

    Args:
        stdlibs: Directories; the first is the base, whose held-out files are the ones evaluated.
            From the others come only files with over half of their telling lines new.

    Returns:
        The selection. A file whose name is held out, or whose content is held out, exactly or
        nearly, in any version, is in no version's training text.
    """
    selection = Selection()
    read: list[tuple[str, dict[str, bytes]]] = []
    for root in stdlibs:
        version = root.name if root.name not in selection.versions else f"{root.name}-{len(read)}"
        selection.versions.append(version)
        read.append((version, read_files(root, stdlib_files(root))))
    held = _HeldOutLines(c for _, files in read for name, c in files.items() if held_out(name))
    selection.heldout = {name: c for name, c in read[0][1].items() if held_out(name)}
    dropped: dict[str, list[str]] = {"repeats held-out text": [], "same file": [], "little new": []}
    contents: set[bytes] = set()
    seen: set[bytes] = set()
    for place, (version, files) in enumerate(read):
        fresh: list[frozenset[bytes]] = []
        for name, content in files.items():
            if held_out(name) or not content.strip():
                continue
            lines = telling_lines(content)
            if content in contents:
                reason = "same file"
            elif held.repeated_by(content, lines):
                reason = "repeats held-out text"
            elif place and 2 * sum(line not in seen for line in lines) <= len(lines):
                reason = "little new"
            else:
                selection.train[f"{version}/{name}"] = content
                contents.add(content)
                fresh.append(lines)
                continue
            dropped[reason].append(f"{version}/{name}")
        # Only earlier versions count: files of one version may well resemble each other.
        seen.update(*fresh)
    selection.dropped = dropped
    return selection


def write_archive(selection: Selection, path: Path) -> None:
    """Writes a selection as one reproducible `.tar.xz`: train/…, heldout/… and manifest.json."""
    members = {f"train/{name}": content for name, content in selection.train.items()}
    members |= {f"heldout/{name}": content for name, content in selection.heldout.items()}
    manifest = {"licence": LICENCE, "held_out_rule": HELD_OUT_RULE, "summary": selection.summary()}
    manifest |= {key: asdict(selection)[key] for key in ("versions", "dropped")}
    members["manifest.json"] = json.dumps(manifest, indent=1).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:xz", preset=7) as archive:
        for name in sorted(members):
            info = tarfile.TarInfo(name)
            info.size = len(members[name])
            archive.addfile(info, io.BytesIO(members[name]))


def read_archive(path: Path) -> Selection:
    """Reads what `write_archive` wrote."""
    selection = Selection()
    with tarfile.open(path, "r:xz") as archive:
        for member in archive:
            stream = archive.extractfile(member)
            if stream is None:
                continue
            content = stream.read()
            part, _, name = member.name.partition("/")
            if part == "manifest.json":
                manifest = json.loads(content)
                selection.versions = manifest["versions"]
                selection.dropped = manifest["dropped"]
            elif part == "train":
                selection.train[name] = content
            elif part == "heldout":
                selection.heldout[name] = content
    return selection


def training_text(selection: Selection, tests: bool) -> Iterator[bytes]:
    """Yields the training files with separators between, either the library's or its tests'.

    Related files stand together (names are sorted), so that a context that crosses from one file
    to the next still finds something of use behind it.
    """
    for name in sorted(selection.train):
        if is_test(name) == tests:
            yield selection.train[name]
            yield SEPARATOR


class Sampler:
    """Draws training contexts at random offsets of a text that lies on the device.

    Attributes:
        text: uint8, the library's files and then its tests.
        border: Where the tests begin.
    """

    def __init__(self, selection: Selection, length: int, device: torch.device, seed: int) -> None:
        """Puts the selection's text on the device; `length` is bytes per context."""
        parts = [b"".join(training_text(selection, tests)) for tests in (False, True)]
        self.border = len(parts[0])
        self.text = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8).to(device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.reach = torch.arange(length + 1, device=device)
        if min(map(len, parts)) <= length + 1:
            raise ValueError(
                f"the text has {len(parts[0])} bytes of library and {len(parts[1])} of tests;"
                f" both need more than a context of {length}: pack a whole standard library"
            )

    def draw(self, library: int, tests: int) -> Tensor:
        """Returns int64 (library + tests, length + 1): that many contexts from each part."""
        device, span = self.text.device, len(self.reach)
        start = torch.empty(library + tests, dtype=torch.int64, device=device)
        start[:library].random_(0, self.border - span, generator=self.generator)
        start[library:].random_(self.border, len(self.text) - span, generator=self.generator)
        return self.text[start[:, None] + self.reach].long()
