"""The command line: answers at once, explains mistakes in one line, never shows a traceback."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.formats.pattern import Pattern
from mixgrain.tools import cells, cli, picture, plot
from mixgrain.tools.expression import ExpressionError, parse

ROOT = Path(__file__).resolve().parents[2]


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONUTF8": "1", **environment}
    command = [sys.executable, "-m", "mixgrain", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


# Expressions

EXPRESSIONS = {
    "window(3)": P.window(3),
    "P.window(3, 0)": P.window(3, 0),
    "window(left=3, right=inf)": P.window(3, float("inf")),
    "window(2) | global_tokens([0, 7])": P.window(2) | P.global_tokens([0, 7]),
    "causal() & ~window(1) & (sinks(2) | full())": P.causal() & ~P.window(1) & P.full(),
    "causal() - window(1)": P.causal() - P.window(1),
    "longformer(2, range(0, 12, 5))": P.longformer(2, [0, 5, 10]),
    "documents((0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2))": P.documents([0] * 2 + [1] * 3 + [2] * 7),
    "per_head([causal(), full()])": P.per_head([P.causal(), P.full()]),
    " random(0.5, -3) ": P.random(0.5, -3),
}  # fmt: skip


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_expression(text: str) -> None:
    found, expected = parse(text), EXPRESSIONS[text]
    assert isinstance(found, Pattern)
    assert torch.equal(found.dense(12, 12), expected.dense(12, 12))


def test_printed_patterns_are_expressions() -> None:
    for text in EXPRESSIONS:
        pattern = parse(text)
        if "documents" in text:  # prints its ids in a shape of its own
            continue
        assert torch.equal(parse(repr(pattern)).dense(12, 12), pattern.dense(12, 12))


MISTAKES = {
    "windo(3)": "did you mean 'window'",
    "window": r"did you mean 'window\(…\)'",
    "3": "a pattern expected",
    "": "no expression",
    "window(3": "never closed",
    "window(-1)": "-1 given",
    "window(1.5)": "1.5 given",
    "window(x=1)": "unexpected keyword",
    "window(*[1])": "write the arguments out",
    "window(**[1])": "write the arguments out",
    "window(2) | 3": "a pattern expected on both sides",
    "-window(2)": "'~' for the complement",
    "window(2) + window(3)": "not known here",
    "window(2) if 1 else window(3)": "not known here",
    "nm(2, 4) | causal()": "combine it with static patterns by &",
    "nm(5, 4)": "1 <= n <= m expected",
    "__import__('os').system('true')": "only the names of mixgrain.patterns",
    "().__class__": "not known here",
    "open('x')": "not known here",
    "eval(1)": "no such pattern",
    "P.Pattern()": "no such pattern",
    "window((lambda: 3)())": "only the names",
    "window([x for x in (1, 2)])": "not known here",
    "global_tokens(range(10000000000000000000000))": "more than",
    "global_tokens(range(0, 5, 0))": "step not 0",
    "global_tokens([-1])": "negative|-1",
    "~" * 9000 + "causal()": "nests too deeply",
    "(" * 9000: "no expression|nests too deeply",
    "causal()" + " | causal()" * 2000: "at most 10000 expected|at most 10,000 expected",
    "window(\0)": "no expression",
}


@pytest.mark.parametrize("text", MISTAKES, ids=lambda text: repr(text[:30]))
def test_mistake_in_an_expression(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExpressionError, match=MISTAKES[text]):
        parse(text)
    assert cli.main(["show", "--nq", "8", "--", text]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert len(streams.err.splitlines()) == 1
    assert len(streams.err) < 700


def test_no_text_shows_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """Pieces of expressions in any order: a picture, or one line and status 2."""
    draw, seen = random.Random(0), {0: 0, 2: 0}
    pieces = [
        *"()[]|&~-,.: =", "causal()", "window", "(3)", "nm(2, 4)", "per_head", "per_batch", "P.",
        "documents", "blocks", "from_csr", "from_dense", "random", "bigbird", "range",
        "inf", "None", "True", "1e400", "9" * 30, "0.5", "-1", "[0, 7]", "[[True]]", "'x'", "é",
        "global_tokens([1])", "longformer(2, [0])", "size=64", "seed=0", "lambda: 0", "*[1]", "\\",
    ]  # fmt: skip
    texts = ["".join(draw.choices(pieces, k=draw.randint(1, 6))) for _ in range(400)]
    texts += [f"{name}({argument})" for name in P.__all__ for argument in (
        "", "None", "inf", "-1", "[]", "[[]]", "causal()", "[causal()]", "True, True", "1e400",
        "10**9", "2, 3", "2, 3, 4", "[0, 1], [0], (1, 1)", "[[True]]", "[[True]], 4", "9" * 30,
    )]  # fmt: skip
    for n, text in enumerate(texts):
        verb = ["explain"] if n % 3 == 0 else ["show", "--no-png"]
        status = cli.main([*verb, "--n", "9", "--", text])
        streams = capsys.readouterr()
        seen[status] += 1
        if status:
            assert streams.out == "" and len(streams.err.splitlines()) == 1, (text, streams.err)
    assert min(seen.values()) >= 10, seen


# Commands


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from mixgrain.tools.cli import main; status = main(['--help']);"
        "print(sorted({'torch', 'numpy', 'matplotlib', 'tqdm'} & set(sys.modules)), status)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    seconds = []
    for _ in range(6):  # the least of several: a loaded machine only adds
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
        )
        seconds.append(time.perf_counter() - begin)
        assert done.stdout.endswith("[] 0\n"), done.stdout + done.stderr
        if seconds[-1] <= 0.5:
            break
    assert min(seconds) <= 0.5, seconds


def test_help_lists_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("demo", "show", "explain", "convert", "bench", "warm"):
        assert f"    {name} " in text
        assert cli.main([name, "--help"]) == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mixgrain {mg.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sing"],
        ["show"],
        ["show", "causal()", "--nq", "0"],
        ["show", "causal()", "--nq", "many"],
        ["show", "causal()", "--size", "63"],
        ["show", "causal()", "--png", "/nowhere/at/all.png"],
        ["show", "causal()", "--nq", "2147483648"],
        ["show", "from_dense([[1]])"],
        ["show", "per_head([causal(), full()])", "--head", "2"],
        ["show", "documents([0, 0, 1])", "--n", "4"],
        ["explain", "full()", "--n", "1048576"],
        ["explain", "random(0.5, 0)", "--n", "1048576"],
        ["explain", "causal()", "--head-dim", "257"],
        ["explain", "from_dense([[1]])"],
        ["demo", "--contexts", "0"],
        ["demo", "--contexts", "1", "--out", "/nowhere/at/all.png"],
        ["demo", "--contexts", "1", "--out", "/"],
    ],
    ids=" ".join,
)
def test_mistakes_end_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error and "Traceback" not in error


def test_process_exits_with_the_status_and_no_traceback() -> None:
    done = start("show", "window(1", "--nq", "8")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr and done.stderr.startswith("mixgrain: ")


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_demo", interrupted)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "mixgrain: interrupted\n"


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(options: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "_demo", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["demo"])


@pytest.mark.parametrize("arguments", ["show 'window(9)' --nq 64 --no-png", "show --help"])
def test_reader_that_stops_early(arguments: str) -> None:
    command = f"{sys.executable} -m mixgrain {arguments} | true"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_show(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "pattern.png"
    text = "causal() & longformer(96, range(0, 1024, 64)) | random(0.01, 0)"
    assert cli.main(["show", text, "--nq", "1000", "--nk", "1024", "--png", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(parse(text))
    pattern = parse(text).to_layout("mixed", 1000, 1024)
    assert repr(pattern) in lines
    assert len([line for line in lines if line.startswith("│")]) == 32
    assert out.read_bytes().startswith(b"\x89PNG")


def test_show_on_a_plain_terminal() -> None:
    done = start(
        "show", "window(9)", "--n", "100", "--no-png", PYTHONIOENCODING="ascii", PYTHONUTF8="0"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert "|%%" in done.stdout


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "causal() & window(256)", "--n", "2048"]) == 0
    expected = str(mg.explain(P.causal() & P.window(256), 2048, 2048, head_dim=64))
    assert capsys.readouterr().out.rstrip() == expected.rstrip()


# Pictures


@pytest.mark.parametrize("shape", [(64, 64), (100, 70), (1, 33), (130, 257)])
def test_cells_count_what_is_kept(shape: tuple[int, int]) -> None:
    pattern = P.longformer(9, [0, 50]) | P.random(0.05, 1)
    layout = pattern.to_layout("mixed", *shape, size=16)
    mask = pattern.dense(*shape)
    for cell in (1, 8, 30):
        total = sum(counted.kept for counted in cells.count_cells(layout, cell))
        sizes = cells.cell_sizes(shape, cell)
        assert total.shape == sizes.shape
        for i, j in torch.cartesian_prod(*map(torch.arange, sizes.shape)).reshape(-1, 2).tolist():
            piece = mask[i * cell : (i + 1) * cell, j * cell : (j + 1) * cell]
            assert (total[i, j], sizes[i, j]) == (piece.sum(), piece.numel())


def test_picture_in_text() -> None:
    layout = P.causal().to_layout("block", 8, 8, size=16)
    lines = picture.draw(layout).splitlines()
    assert lines[1:9] == ["│" + "██" * (i + 1) + "  " * (7 - i) + "│" for i in range(8)]
    assert "all kept" in lines[-1] and "1 × 1" in lines[-1]
    assert picture.draw(P.from_dense(torch.zeros(3, 3, dtype=torch.bool)).to_layout("mixed", 3, 3))


def test_picture_of_heads_shows_the_first() -> None:
    layout = P.per_head([P.window(0), P.full()]).to_layout("mixed", 4, 4, size=16)
    rows = picture.draw(layout).splitlines()[1:5]
    assert rows[0] == "│██      │"
    assert "2 entries" in picture.summary(layout)


def test_picture_as_image() -> None:
    image = plot.layout_image(P.window(3).to_layout("mixed", 64, 64), 512)
    mask = P.window(3).dense(64, 64).numpy()
    assert image.shape == (64, 64, 3)
    assert (image[~mask].min(axis=-1) > 0.8).all()  # dropped: white or pale
    assert (image[mask].min(axis=-1) < 0.3).all()


def test_bench_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "nothing"]) == 2
    assert "spmm-row-n64-fp16" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main(["bench", "spmm-row*"]) == 2
        assert "CUDA GPU" in capsys.readouterr().err
