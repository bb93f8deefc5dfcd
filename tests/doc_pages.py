"""Code blocks of Markdown pages: found, run from top to bottom, compared with what they print.

    ```python           is executed; all of a page share one namespace
    ```text             straight behind a python block: what that block prints, to the letter
    ```console          lines "$ mixgrain …", each followed by what the command prints
    <!-- gpu -->        on the line before a block: it needs a GPU and is not run

`python tests/doc_pages.py PAGE …` writes into pages what their blocks print.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FENCE = re.compile(
    r"^(?P<mark><!-- gpu -->\n)?(?P<fence>`{3,})(?P<language>[^\n`]*)\n(?P<body>.*?)^(?P=fence)$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    """A fenced block: where its body lies in the text, and what it is."""

    language: str
    body: str
    gpu: bool
    start: int
    stop: int
    line: int


def blocks(text: str, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page, or those of one language."""
    found = [
        Block(
            m["language"], m["body"], bool(m["mark"]), m.start("body"), m.end("body"),
            text.count("\n", 0, m.start("body")) + 1,
        )
        for m in _FENCE.finditer(text)
    ]  # fmt: skip
    return [block for block in found if language in (None, block.language)]


def printed_by(code: Block, name: str, names: dict[str, Any]) -> str:
    """Runs a block in a namespace; what it prints, without blanks at the ends of lines."""
    held = io.StringIO()
    # Lines of the page, so that a traceback leads to them.
    source = "\n" * (code.line - 1) + code.body
    with contextlib.redirect_stdout(held):
        exec(compile(source, name, "exec"), names)
    return tidy(held.getvalue())


def tidy(text: str) -> str:
    """Text without blanks at the ends of its lines, ending with one line break if not empty."""
    lines = "\n".join(line.rstrip() for line in text.splitlines()).rstrip()
    return lines + "\n" if lines else ""


def command_output(command: str) -> str:
    """What a command line of mixgrain prints; stderr stands after stdout."""
    from mixgrain.tools import cli

    program, *arguments = shlex.split(command)
    assert program == "mixgrain", command
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        cli.main(arguments)
    return tidy(out.getvalue() + err.getvalue())


def outputs(text: str, name: str, names: dict[str, Any]) -> Iterator[tuple[Block, str, str]]:
    """Runs a page.

    Yields:
        (block, what the page says it prints, what it prints); for python blocks the block that
        holds the output, or the python block itself if there is none.
    """
    found = blocks(text)
    for n, block in enumerate(found):
        if block.gpu:
            continue
        if block.language == "console":
            made = "".join(
                f"{line}\n{command_output(line[2:])}"
                for line in block.body.splitlines()
                if line.startswith("$ ")
            )
            yield block, block.body, made
        if block.language == "python":
            made = printed_by(block, name, names)
            follows = found[n + 1] if n + 1 < len(found) else None
            between = text[block.stop : follows.start] if follows else ""
            if follows and re.fullmatch(r"`+\s*`+text\n", between):
                yield follows, follows.body, made
            else:
                yield block, "", made


def renewed(text: str, name: str) -> str:
    """The page with what its blocks print written anew.

    Raises:
        ValueError: a block prints something and no text block follows it.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        changes = list(outputs(text, name, {"__name__": "__main__"}))
    for block, _, made in reversed(changes):
        if block.language == "python":
            if made:
                raise ValueError(
                    f"{name}:{block.line}: prints {made!r}; add a text block behind it"
                )
            continue
        text = text[: block.start] + made + text[block.stop :]
    return text


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        page = Path(argument)
        page.write_text(renewed(page.read_text(encoding="utf-8"), argument), encoding="utf-8")
