"""README.md: its code runs and is right, its links lead somewhere, its numbers were measured."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from doc_pages import blocks as blocks_of
from doc_pages import outputs

from mixgrain.tools import cli, readme
from mixgrain.tools.demo.report import TABLE, read_table

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return [block.body for block in blocks_of(TEXT, language)]


def code_lines(block: str) -> list[str]:
    return [line for line in block.splitlines() if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What all Python of the README leaves behind, run from top to bottom."""
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    for block, said, made in outputs(TEXT, "README.md", found):
        assert made == said, f"README.md:{block.line} prints something else"
    return found


def dense_attention(names: dict[str, Any], custom: bool) -> torch.Tensor:
    """The tour's attention, written without mixgrain."""
    q, k, v = (names[x].double() for x in "qkv")
    i, j = torch.meshgrid(torch.arange(1024), torch.arange(1024), indexing="ij")
    listed = torch.tensor([0, 7, 500])
    kept = (i - j).abs() <= 128
    kept = (kept | torch.isin(i, listed) | torch.isin(j, listed)) & (j <= i)
    s = q @ k.mT / 8
    if custom:
        slopes = torch.tensor([2.0 ** -(h + 1) for h in range(8)]).double()
        s = 30 * torch.tanh(s / 30) - slopes[:, None, None] * (i - j)
    return torch.where(kept, s, -torch.inf).softmax(-1) @ v


def test_attention_of_the_tour(names: dict[str, Any]) -> None:
    torch.testing.assert_close(
        names["o"].double(), dense_attention(names, False), atol=1e-5, rtol=0
    )


def test_custom_attention_of_the_tour(names: dict[str, Any]) -> None:
    expected = dense_attention(names, True)
    torch.testing.assert_close(names["custom"].double(), expected, atol=1e-5, rtol=0)
    (block,) = (b for b in blocks("python") if "mg.sddmm" in b)
    (setting,) = (b for b in blocks("python") if "import mixgrain" in b)
    assert len(code_lines(block)) + len(code_lines(setting)) <= 15


def test_nm_of_the_tour(names: dict[str, Any]) -> None:
    q, k, v = (names[x].double() for x in "qkv")
    s = (q @ k.mT / 8).masked_fill(~torch.ones(1024, 1024).tril().bool(), -torch.inf)
    groups = s.unflatten(-1, (-1, 4))
    second = groups.topk(2, dim=-1).values[..., 1:]
    exact = torch.where(groups >= second, groups, -torch.inf).flatten(-2).softmax(-1) @ v
    # In float32 a few choices between nearly equal scores may go the other way.
    close = (names["pruned"].double() - exact).abs().amax(-1) < 1e-4
    assert close.float().mean() > 0.99


def test_weights_of_the_tour(names: dict[str, Any]) -> None:
    dense = names["w24"].to_dense()
    assert ((dense.view(256, 128, 4) != 0).sum(-1) <= 2).all()
    assert torch.equal(dense[dense != 0], names["w"][dense != 0])
    assert names["y"].shape == (3, 256)
    assert names["tiles"].density == 0.5


def test_commands_parse() -> None:
    commands = [line for b in blocks("sh") for line in b.splitlines() if "bin/mixgrain" in line]
    assert len(commands) >= 3
    import shlex

    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == ".venv/bin/mixgrain"
        assert cli.parser().parse_args(arguments).command == arguments[0]


def test_set_up_is_two_commands_then_one_each() -> None:
    commands = [line for block in blocks("sh")[:3] for line in block.splitlines()]
    assert commands == [
        "python3 -m venv .venv",
        '.venv/bin/pip install -c constraints.txt -e ".[dev]"',
        ".venv/bin/mixgrain demo",
        ".venv/bin/pytest",
    ]


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_numbers_are_those_of_the_table() -> None:
    assert readme.SPEED_BEGIN in TEXT
    speed, tuned = (readme.read_measured(path) for path in (readme.SPEED, readme.TUNED))
    new = readme.renewed(TEXT, read_table(TABLE), speed, tuned)
    assert new == TEXT, "run python -m mixgrain.tools.readme"


TABLE_EXAMPLE: dict[str, Any] = {
    "format": 1, "contexts": 7, "length": 64, "text": "text", "device": "CPU", "mass_contexts": 2,
    "attention": "a", "products": "b", "versions": {"torch": "2", "mixgrain": "0"},
    "model": {"parameters": 1000},
    "variants": [
        {"name": "dense", "words": "x", "pruning": None, "mass": None, "kept_causal": 1.0,
         "bits": {"mean": 1.25, "se": 0.1}, "extra": {"mean": 0.0, "se": 0.0}},
        {"name": "2:4 weights", "words": "y", "pruning": {"kind": "nm"}, "mass": None,
         "kept_causal": 0.5, "bits": {"mean": 1.5, "se": 0.1}, "extra": {"mean": 0.25, "se": 0.01}},
    ],
}  # fmt: skip


def test_section_is_written_between_its_marks(tmp_path: Path) -> None:
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    new = readme.renewed(text, TABLE_EXAMPLE)
    assert new.startswith(f"before\n{readme.BEGIN}\n") and new.endswith(f"{readme.END}\nafter\n")
    assert "old" not in new
    assert "| **2:4 weights**: y | 1.5000 | +0.250 ±0.010 |  | 50.0% of weights |" in new
    assert readme.renewed(new, TABLE_EXAMPLE) == new
    with pytest.raises(ValueError, match="once each"):
        readme.renewed("no marks", TABLE_EXAMPLE)


def test_what_was_tuned_is_written_between_its_marks() -> None:
    rows = [
        {"name": name, "kept": kept, "bytes": 2 * 10**6, "before": before, "after": after,
         "speeds": speeds, "apart": 0.0}
        for name, kept, before, after, speeds in (
            ("dense", 1.0, 0.5, [0.5, 0.25], [100.0, 100.0]),
            ("2:4", 0.5, 2.5, [0.75, 0.5], [150.0, 150.0]),
        )
    ]  # fmt: skip
    settings = {"seeds": 2, "steps": 3, "batch": 4, "length": 64, "contexts": 5, "together": 1,
                "length scored": 128, "dtype": "bfloat16", "device": "G", "torch": "2",
                "mixgrain": "0"}  # fmt: skip
    text = f"{readme.BEGIN}\n{readme.END}\n{readme.TUNED_BEGIN}\nold\n{readme.TUNED_END}\n"
    new = readme.renewed(text, TABLE_EXAMPLE, None, {"settings": settings, "rows": rows})
    assert "old" not in new
    assert (
        "| 2:4 | 50.0% | 2.0 | 2.500 | +2.000 | 0.625 ±0.177 | +0.250 ±0.000 | 150 ±0 | 1.50 |"
        in new
    )
    assert "scored on 5 held-out contexts of 128 bytes in bfloat16" in new


def test_check_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"{readme.BEGIN}\n{readme.END}\n")
    before = path.read_text()
    assert readme.main(["--check", "--readme", str(path)]) == 1
    assert path.read_text() == before
    assert "out of date" in capsys.readouterr().out
    assert readme.main(["--readme", str(path)]) == 0
    assert readme.main(["--check", "--readme", str(path)]) == 0
    assert readme.main(["--readme", str(tmp_path / "none")]) == 2


def test_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mixgrain.tools.readme", "--check"],
        cwd=ROOT / "src", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_layers_have_a_table_of_their_own() -> None:
    def rows(work: str, shape: str, ours: float | None, dense: str = "F.linear") -> list[Any]:
        figures = {} if ours is None else {"ms": ours, "floor_ms": ours / 2}
        return [
            {"work": work, "engine": "mixgrain", "shape": shape, **figures},
            {"work": work, "engine": dense, "shape": shape, "ms": 0.02, "floor_ms": 0.001},
        ]

    blocks = "4096 -> 4096 float16, 20 % of 64-blocks"
    measured = {
        "rows": [
            *rows("tile-decode-1", "8192 -> 8192 float16, 20 % of 16×16 tiles, 1 tokens", 0.013),
            *rows("layer-block64-1", f"{blocks}, 1 tokens", 0.008),
            *rows("layer-block64-1024", f"{blocks}, 1024 tokens", 0.04),
            *rows("layer-nm24-16", "16 tokens, 4096² float16, 2:4", 0.016, "cuBLAS dense"),
            *rows("layer-row-16", "4096 -> 4096 float16, 10 % of the elements, 16 tokens", None),
            *rows("training-block64-64", f"{blocks}, 64 tokens, forward and backward", 0.01),
        ],
        **dict.fromkeys(("device", "torch", "cuda", "cupy", "mixgrain"), "x"),
    }
    text = readme.speed_section(measured)
    assert "| tile-decode-1 |" in text and text.count("layer-") == 1 and "training-" not in text
    assert (
        "| layer-row-16 | 4096 -> 4096 float16, 10 % of the elements, 16 tokens | failed |" in text
    )
    lines = [line for line in text.splitlines() if line.startswith("|")][-7:]
    assert lines == [
        "| of W is kept | 1 | 16 | 1,024 |",
        "| --- | ---: | ---: | ---: |",
        "| 20 % of 64-blocks | 8.0 µs (2.50×) |  | 40.0 µs (0.50×) |",
        "| 2:4 |  | 16.0 µs (1.25×) |  |",
        "| of W is kept | 64 |",
        "| --- | ---: |",
        "| 20 % of 64-blocks | 10.0 µs (2.00×) |",
    ]
    measured["rows"] = measured["rows"][:2]
    assert "by tokens" not in readme.speed_section(measured)
