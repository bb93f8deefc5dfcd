"""The documentation: its code runs and prints what the pages say, and the site builds strictly."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from doc_pages import Block, blocks, outputs, renewed, tidy

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.formats.layout import Layout
from mixgrain.primitives.dispatch import TABLE
from mixgrain.tools import cli

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if not {"generated", "_build"} & set(path.parts))
NAMES = [str(path.relative_to(DOCS)) for path in PAGES]

# Blocks that need a GPU and are not run here, page by page; anything else runs.
GPU_BLOCKS = {"start.md": 1}
LANGUAGES = {"python", "text", "console", "sh", "{toctree}", "{include} ../CHANGELOG.md"}


@pytest.mark.parametrize("name", NAMES)
def test_page_prints_what_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text, names = (DOCS / name).read_text(encoding="utf-8"), {"__name__": "__main__"}
    for block, said, made in outputs(text, name, names):
        assert made == tidy(said), (
            f"docs/{name}:{block.line} is out of date: python tests/doc_pages.py docs/{name}"
        )


def test_every_block_is_of_a_known_kind() -> None:
    """A block under another name ("py", say) would be run by nobody."""
    for name, path in zip(NAMES, PAGES, strict=True):
        text = path.read_text(encoding="utf-8")
        found = blocks(text)
        assert {block.language for block in found} <= LANGUAGES, name
        # Every fence line belongs to a block that was found.
        fences = re.findall(r"^\s*(?:`{3,}|~{3,}|:{3,})", text, re.M)
        assert len(fences) == 2 * len(found), name


def test_blocks_for_gpus_are_counted() -> None:
    marked = {
        name: sum(block.gpu for block in blocks(path.read_text(encoding="utf-8")))
        for name, path in zip(NAMES, PAGES, strict=True)
    }
    assert {name: count for name, count in marked.items() if count} == GPU_BLOCKS


def test_commands_of_the_shell_parse() -> None:
    commands = [
        line
        for path in PAGES
        for block in blocks(path.read_text(encoding="utf-8"), "sh")
        for line in block.body.splitlines()
        if re.match(r"(\.venv/bin/)?mixgrain ", line)
    ]
    assert len(commands) >= 5
    for command in commands:
        assert cli.parser().parse_args(shlex.split(command)[1:]).run


@pytest.mark.parametrize("kind", [c for c in TABLE["spmm"] if c.kind != "panel"])
def test_guides_say_which_operations_take_a_layout(kind: type[Layout]) -> None:
    """The "Works with" line of each layout's guide, against the table of what exists."""
    text = (DOCS / "layouts" / f"{kind.kind}.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"\*\*Works with\*\* (.*?)(?:, forward|, and their|\.)", text, re.S)
    exists = {op for op, layouts in TABLE.items() if kind in layouts} - {"softmax_backward"}
    assert set(re.findall(r"`(\w+)`", line)) - {"attend"} == exists
    attends = kind in (mg.BlockLayout, mg.RowLayout, mg.MixedLayout)
    assert ("`attend`" in line) == attends


# What the tests above stand on

PAGE = """# Page

```python
x = 1
print("one")
```

```text
{said}
```

<!-- gpu -->
```python
raise SystemError
```

```python
x += 1
print(x)
```
```text
2
```
"""


def results(text: str) -> list[tuple[Block, str, str]]:
    return list(outputs(text, "page", {}))


def test_output_is_compared_and_written() -> None:
    good = PAGE.format(said="one")
    assert [(said, made) for _, said, made in results(good)] == [("one\n", "one\n"), ("2\n", "2\n")]
    stale = PAGE.format(said="two")
    assert [said == made for _, said, made in results(stale)] == [False, True]
    assert renewed(stale, "page") == good == renewed(good, "page")
    with pytest.raises(ValueError, match="page:3: prints 'a"):
        renewed("\n```python\nprint('a')\n```\n", "page")
    with pytest.raises(ZeroDivisionError):
        results("```python\n1 / 0\n```\n")


def test_console_block_runs_the_command(tmp_path: Path) -> None:
    text = "```console\n$ mixgrain --version\nmixgrain old\n$ mixgrain sing\n```\n"
    ((_, said, made),) = results(text)
    assert said != made
    assert made.startswith(f"$ mixgrain --version\nmixgrain {mg.__version__}\n$ mixgrain sing\n")
    assert "invalid choice" in made


# The site


@pytest.fixture(scope="module")
def generate() -> Any:
    with contextlib.chdir(DOCS):
        sys.path.insert(0, str(DOCS))
        try:
            import generate as module
        finally:
            sys.path.remove(str(DOCS))
    return module


def test_reference_has_every_public_name(generate: Any) -> None:
    pages = generate.api_pages()
    text = "\n".join(pages.values())
    named = set(re.findall(r"^\.\. auto\w+:: mixgrain\.[\w.]*?(\w+)(?:\(.*)?$", text, re.M))
    assert "return_lse: bool = False, impl: Impl = 'auto') -> Tensor | tuple" in text
    modules = {name for name in mg.__all__ if f"api-{name}.rst" in pages}
    assert modules >= {"patterns"}
    assert named >= set(mg.__all__) - modules
    assert named >= set(P.__all__)


def test_reference_has_every_command(generate: Any) -> None:
    text = generate.command_line()
    for name in ("demo", "show", "explain", "convert", "bench", "warm"):
        assert f"## mixgrain {name}\n" in text and f"usage: mixgrain {name} " in text
    assert max(map(len, text.split("```text", 1)[1].splitlines())) <= generate.HELP_WIDTH


def test_docstrings_are_read_as_text(generate: Any) -> None:
    lines = ["Of *leading and ``*this``:", "", "    . #0 *x", "    #1", "", "Args:", "    x: (*a).",
             "    e: E.", "    h: (H) int64, 2 * H."]  # fmt: skip
    generate.plain_text(None, "function", "f", None, None, lines)
    assert lines == [
        r"Of \*leading and ``*this``:", "", "::", "", "    . #0 *x", "    #1", "", "Args:",
        r"    x: (\*a).", r"    e: \E.", r"    h: \(H) int64, 2 * H.",
    ]  # fmt: skip


OFFLINE = """
import socket, sys
def refuse(*_, **__):
    raise RuntimeError("the build reached for the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_site_builds_strictly_and_offline(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="builds the site: pip install -e .[docs]")
    options = ["-W", "--keep-going", "-n", "-q", "-E", "-d", str(tmp_path / "trees")]
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, *options, str(DOCS), str(tmp_path / "html")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    site = tmp_path / "html"
    for name in (*NAMES, "generated/cli.md", "generated/api-patterns.rst"):
        assert (site / name).with_suffix(".html").exists(), name
    pictures = {path.name for path in (site / "_images").iterdir()}
    assert pictures >= {f"{name}.png" for name in ("tile", "nm", "block", "row", "mixed")}
    # Nothing that a page shows or runs comes from elsewhere.
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'(?:<script|<img)[^>]+src="(?:https?:)?//', text), page
        assert not re.search(r'<link[^>]+stylesheet[^>]+href="(?:https?:)?//', text), page
