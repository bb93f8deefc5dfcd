"""`mixgrain show` draws any pattern at any length, within bounds of time and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mixgrain import patterns as P
from mixgrain.formats.panel import PanelLayout
from mixgrain.formats.pattern import Pattern
from mixgrain.tools import cli, picture, plot, survey
from mixgrain.tools.cells import cell_for, cell_sizes, count_cells, countable
from mixgrain.tools.expression import parse

ROOT = Path(__file__).resolve().parents[2]
MIXED = P.longformer(9, [0, 50]) | P.random(0.05, 1) | P.blocks(torch.eye(5).bool(), 64)
PANELS = PanelLayout.from_panels(
    (300, 290),
    [
        (range(40, 44), range(290), None),
        (torch.tensor([0, 7, 299]), torch.tensor([3, 64, 289]), None),
        (range(100, 180), torch.arange(0, 290, 7), torch.arange(80 * 42).view(80, 42) % 3 > 0),
    ],
)


def dense_cells(mask: torch.Tensor, cell: tuple[int, int]) -> torch.Tensor:
    """Kept positions of each cell, from the mask."""
    high, wide = cell
    padded = torch.nn.functional.pad(
        mask.long(), (0, -mask.shape[1] % wide, 0, -mask.shape[0] % high)
    )
    return padded.view(padded.shape[0] // high, high, -1, wide).sum((1, 3))


LAYOUTS = {
    "blocks of 16": MIXED.to_layout("block", 300, 290, size=16),
    "blocks of 64": MIXED.to_layout("block", 300, 290, size=64),
    "rows": MIXED.to_layout("row", 300, 290),
    "panels": PANELS,
    "mixed": MIXED.to_layout("mixed", 300, 290, size=16),
    "several entries": P.per_head([P.full(), MIXED]).to_layout("mixed", 300, 290),
}


@pytest.mark.parametrize("cell", [(4, 4), (16, 64), (128, 128), (64, 8), (48, 30)], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_parts_are_counted_as_the_mask_says(name: str, cell: tuple[int, int]) -> None:
    layout, sizes = LAYOUTS[name], cell_sizes((300, 290), cell)
    counted = list(count_cells(layout, cell))
    assert torch.equal(sum(c.kept for c in counted), dense_cells(layout.mask()[0, 0], cell))
    assert [c.kind for c in counted] == [part.kind for part in layout.parts]
    # Padding of panels, and of blocks in odd cells, names positions that are there already.
    if layout is not PANELS and cell != (48, 30):
        assert all(((c.kept <= c.held) & (c.held <= sizes)).all() for c in counted)


@pytest.mark.parametrize("name", [*LAYOUTS, "panels without masks"])
def test_large_parts_are_counted_by_their_structure(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way for many slots gives what the way for few gives."""
    shared = (range(300), torch.tensor([3, 77, 200]), None)
    layout = LAYOUTS.get(name) or PanelLayout.from_panels((300, 290), [shared])
    few = [(c.kind, c.kept) for c in count_cells(layout, 32)]
    monkeypatch.setattr("mixgrain.tools.cells.FEW_SLOTS", 100)
    many = [(c.kind, c.kept) for c in count_cells(layout, 32)]
    for (kind, kept), (other_kind, other) in zip(few, many, strict=True):
        assert kind == other_kind and torch.equal(kept, other)


def test_entry_drawn_is_the_first_of_several() -> None:
    both = P.per_head([P.window(1), P.full()]).to_layout("block", 70, 70, size=16)
    alone = P.window(1).to_layout("block", 70, 70, size=16)
    ((a,), (b,)) = list(count_cells(both, 8)), list(count_cells(alone, 8))
    assert torch.equal(a.kept, b.kept) and torch.equal(a.held, b.held)


@pytest.mark.parametrize(
    ("shape", "most", "cell"),
    [((1, 1), 32, (1, 1)), ((1024, 1024), 32, (32, 32)), ((1000, 1030), 32, (64, 64)),
     ((1, 1 << 20), 32, (1, 1 << 15)), ((1 << 20, 3), 512, (2048, 1)),
     ((4096, 1024), 32, (128, 128))],
)  # fmt: skip
def test_cells_fit(shape: tuple[int, int], most: int, cell: tuple[int, int]) -> None:
    assert cell_for(shape, most) == cell
    assert max(-(-n // c) for n, c in zip(shape, cell, strict=True)) <= most


# Patterns drawn from their runs


@pytest.mark.parametrize("cell", [(1, 1), (16, 16), (7, 33), (512, 512)], ids=str)
@pytest.mark.parametrize("shape", [(300, 290), (1, 70), (290, 300)], ids=str)
def test_whole_patterns_are_counted_exactly(shape: tuple[int, int], cell: tuple[int, int]) -> None:
    pattern = (P.longformer(9, [0, 50, 280]) | P.random(0.05, 1)) - P.dilated(4, 3)
    counts, whole = survey.sampled_cells(pattern, *shape, cell, runs=1.0)
    assert whole
    assert torch.equal(counts.long(), dense_cells(pattern.dense(*shape), cell))


def test_sample_is_near_and_counts_named_rows_exactly() -> None:
    pattern, n, cell = P.random(0.02, 3) | P.global_queries([777]), 2048, (256, 256)
    counts, whole = survey.sampled_cells(pattern, n, n, cell, runs=8.0 * survey.MOST_SAMPLED)
    exact = dense_cells(pattern.dense(n, n), cell)
    assert not whole
    # 32 of 256 rows: the estimate's standard error is about 3% of a cell.
    assert ((counts - exact).abs() < 0.2 * exact).all()
    full = P.full()
    counts, _ = survey.sampled_cells(full, n, n, cell, runs=8.0 * survey.MOST_SAMPLED)
    assert torch.equal(counts.long(), dense_cells(full.dense(n, n), cell))
    # One full row among 256 is not lost between the rows of a sample, nor taken for many.
    lone = P.global_queries([777])
    counts, _ = survey.sampled_cells(lone, n, n, cell, runs=8.0 * survey.MOST_SAMPLED)
    assert torch.equal(counts.long(), dense_cells(lone.dense(n, n), cell))


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("each", [1, 3, 64, 1000])
def test_strata(each: int, others: bool) -> None:
    listed, every = torch.arange(5, 700, 3), torch.arange(704)
    rows = every[~torch.isin(every, listed)] if others else listed
    members = survey.Members(listed, 704, others)
    assert members.count == len(rows)
    assert torch.equal(members.at(torch.arange(len(rows))), rows)
    bounds = torch.arange(0, 705, 64)
    chosen, weight = survey.stratified(members, bounds, each)
    assert torch.isin(chosen, rows).all() and (chosen.diff() > 0).all()
    assert weight.sum() == len(rows)
    in_stratum = torch.zeros(11, dtype=torch.float64).index_add_(0, chosen // 64, weight)
    assert torch.equal(in_stratum.long(), torch.bincount(rows // 64, minlength=11))
    assert torch.bincount(chosen // 64).max() <= each


def test_survey_counts_or_estimates() -> None:
    exact = survey.survey(P.window(4), 5000, 5000)
    assert exact.exact and exact.kept == P.window(4).nnz(5000, 5000) and exact.affordable
    drawn = survey.survey(P.random(0.01, 0), 1 << 20, 1 << 20)
    assert not drawn.exact and not drawn.affordable
    assert drawn.kept == pytest.approx(0.01 * 2**40, rel=0.1)
    chosen = survey.survey(P.causal() & P.nm(2, 4), 100, 100)
    assert chosen.kept == (P.causal() & P.nm(2, 4)).nnz(100, 100)


# The command

EVERY = [
    "full()", "causal()", "window(256)", "window(0, inf)", "dilated(8, 1000)", "sinks(3)",
    "global_tokens(range(0, 1048576, 4096))", "random(0.01, 0)", "random_blocks(2, 64, 0)",
    "bigbird(64, 1, 2, 1, 0)", "per_head([causal(), window(9)])", "nm(2, 4)",
    "per_batch([per_head([causal(), window(9)]), full()]) & nm(1, 2)", "~causal()",
    "causal() & longformer(256, range(0, 1048576, 4096))", "dilated(inf, 2) - sinks(9)",
]  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (1, 300), (257, 64), (64, 257)], ids=str)
def test_every_pattern_small(
    shape: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nq, nk = shape
    for text in EVERY:
        assert cli.main(["show", text, "--nq", str(nq), "--nk", str(nk), "--no-png"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == str(parse(text))
        assert lines[1].startswith("┌") and sum(line.startswith("│") for line in lines) <= 32
    assert not list(tmp_path.iterdir())


def shown(pattern: Pattern, nq: int, nk: int, **at: int) -> list[str]:
    """Lines of the picture, without its frame."""
    lines = picture.draw_subject(picture.subject(pattern, nq, nk, **at)).splitlines()
    return [line[1:-1] for line in lines[1:-2]]


def test_picture_by_shares_says_what_is_kept() -> None:
    assert shown(P.causal() & P.nm(2, 4), 32, 32) == [
        "██" * (i + 1) + "  " * (31 - i) for i in range(32)
    ]
    assert shown(P.window(0) & P.nm(2, 4), 4096, 4096)[5] == "  " * 5 + "··" + "  " * 26


def test_batch_and_head_choose() -> None:
    pattern = P.per_batch([P.per_head([P.window(0), P.full()]), P.causal()])
    diagonal, lower = shown(pattern, 4, 4), shown(pattern, 4, 4, batch=1, head=1)
    assert diagonal == ["██      ", "  ██    ", "    ██  ", "      ██"]
    assert lower == ["██      ", "████    ", "██████  ", "████████"]
    assert shown(pattern, 4, 4, head=1) == ["████████"] * 4


def test_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from matplotlib.image import imread

    for n, (text, size) in enumerate(
        {"window(4)": ["--n", "64"], "nm(2, 4) & causal()": ["--nq", "8", "--nk", "300"]}.items()
    ):
        out = tmp_path / f"{n}.png"
        assert cli.main(["show", text, *size, "--png", str(out)]) == 0
        image = imread(out)
        assert image.shape[0] <= 1300 and image.shape[1] == 1080
        assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 3
        assert f"picture: {out}" in capsys.readouterr().out


def test_png_is_written_where_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["show", "causal()", "--n", "8"]) == 0
    assert (tmp_path / "mixgrain-show.png").read_bytes().startswith(b"\x89PNG")


def test_shares_as_an_image() -> None:
    shares = torch.tensor([[0.0, 1e-6], [0.5, 1.0]], dtype=torch.float64).numpy()
    image = plot.share_image(shares, "kept")
    assert (image[0, 0] == 1).all()
    assert image[0, 1].min() < 0.8  # a sliver is seen
    assert (np.diff(image.min(axis=-1).flatten()) < 0).all()  # the more, the darker
    np.testing.assert_allclose(image[1, 1], plot.rgb(plot.COLOURS["kept"]))


LIMITED = """
import resource, sys, time
import torch, matplotlib.figure, matplotlib.backends.backend_agg
from mixgrain.tools import cli, plot, picture
import mixgrain.attention.attend
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + (1536 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
n = str(1 << 20)
for k, text in enumerate(sys.argv[2:]):
    shape = ["--n", n] if k % 3 else ["--nq", "65536", "--nk", n]
    if "2147483646" in text:
        shape = ["--n", "2147483647"]
    begin = time.perf_counter()
    assert cli.main(["show", text, *shape, "--png", sys.argv[1]]) == 0, text
    print(f"took {time.perf_counter() - begin:.1f} {text}", file=sys.stderr)
"""


@pytest.mark.slow
def test_a_million_tokens_in_little_memory(tmp_path: Path) -> None:
    """A bool per pair would take 1 TB, a bit 128 GiB; each picture takes seconds and < 1.5 GiB."""
    # The last at the greatest length there is, where a list of the rows alone takes 16 GB.
    heavy = [*(EVERY[n] for n in (2, 7, 9, 11, 14)), "window(99) | global_queries([2147483646])"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "p.png"), *heavy],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONUTF8": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    seconds = [float(line.split()[1]) for line in done.stderr.splitlines() if "took" in line]
    assert len(seconds) == len(heavy) and max(seconds) < 30, done.stderr


def test_layouts_that_are_quick_to_count() -> None:
    assert countable(P.window(256).to_layout("mixed", 1 << 17, 1 << 17))
    assert countable(MIXED.to_layout("mixed", 300, 290))
