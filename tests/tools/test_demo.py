"""The demo: what it measures is what it says, and a failed check fails it. On a tiny model."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mixgrain as mg
from mixgrain import patterns as P
from mixgrain.tools.demo import convert, data, measure, report, run, table
from mixgrain.tools.demo.model import ByteLM, Config, byte_bits, save
from mixgrain.tools.demo.variants import Pruning, Variant, matrices, variants

ROOT = Path(__file__).resolve().parents[2]
TINY = Config(context=256, width=64, heads=2, layers=2, hidden=64)


@pytest.fixture(scope="module")
def model() -> ByteLM:
    torch.manual_seed(0)
    model = ByteLM(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def folder(model: ByteLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny weights and a tiny standard library."""
    root = tmp_path_factory.mktemp("demo")
    save(model, root / "model.safetensors")
    (root / "lib").mkdir()
    for i in range(60):
        lines = "".join(f"value_{i}_{j} = compute({i * j})\n" for j in range(60))
        (root / "lib" / f"module{i}.py").write_text(lines)
    return root


def arguments(folder: Path, **more: object) -> dict[str, object]:
    given: dict[str, object] = {
        "contexts": 3,
        "out": folder / "demo.png",
        "weights": folder / "model.safetensors",
        "stdlib": folder / "lib",
        "table": folder / "none.json",
    }
    return given | more


# Variants


def test_variants_are_those_promised() -> None:
    found = variants()
    assert found[0].dense and sum(v.dense for v in found) == 1
    assert len({v.name for v in found}) == len(found)
    shown = [v.name for v in found if v.demo]
    assert shown == [
        "dense", "window 128", "Longformer", "BigBird", "2:4 scores", "1:2 scores",
        "2:4 weights", "tile weights 90%",
    ]  # fmt: skip
    assert [v.name for v in found if v.dynamic] == ["2:4 scores", "1:2 scores"]


@pytest.mark.parametrize("variant", variants(), ids=lambda v: v.name)
def test_patterns_are_causal_and_counted(variant: Variant) -> None:
    n = 300
    share, full = variant.kept(n)
    future = torch.ones(n, n).triu(1).bool()
    if variant.pattern is None or variant.dynamic:
        kept = n * (n + 1) // 2 if variant.pattern is None else 0
        group = variant.pattern.m if variant.dynamic else 1
        for i in range(n if variant.dynamic else 0):
            live = [min(group, i + 1 - start) for start in range(0, i + 1, group)]
            kept += sum(min(variant.pattern.n, x) for x in live)
    else:
        mask = variant.pattern.dense(n, n)
        assert not (mask & future).any()
        kept = int(mask.sum())
    assert share == pytest.approx(kept / (n * (n + 1) / 2))
    assert full == pytest.approx(kept / n**2)


def test_pruned_weights_are_the_largest(model: ByteLM) -> None:
    weights = matrices(model)
    assert len(weights) == 4 * TINY.layers
    assert all(name.startswith("blocks.") and w.dim() == 2 for name, w in weights.items())
    for name, sparse in Pruning("nm").apply(model).items():
        groups = weights[name].unflatten(-1, (-1, 4)).abs()
        kept = sparse.to_dense().unflatten(-1, (-1, 4)) != 0
        assert (kept.sum(-1) == 2).all()
        smallest = groups.masked_fill(~kept, torch.inf).amin(-1)
        assert (smallest >= groups.masked_fill(kept, 0).amax(-1)).all()
    for sparse in Pruning("tile", {"density": 0.75}).apply(model).values():
        assert sparse.density == 0.75


# Measurements


def test_means_and_errors() -> None:
    values = [1.0, 2.5, 4.0, 3.0]
    mean, error = measure.mean_and_error(values)
    assert mean == pytest.approx(np.mean(values))
    assert error == pytest.approx(np.std(values, ddof=1) / 2)
    assert math.isnan(measure.mean_and_error([1.0])[1])
    a = measure.Result(variants()[0], 1, 1, bits=[1.0, 2.0, 3.0])
    b = measure.Result(variants()[1], 1, 1, bits=[1.5, 2.25, 3.75])
    assert measure.over_dense(b, a) == pytest.approx(measure.mean_and_error([0.5, 0.25, 0.75]))
    assert measure.median([3.0, 1.0, 2.0]) == 2.0


def test_check_fails_on_nan() -> None:
    assert measure.Check("x", 0.5, 1.0).passed
    assert not measure.Check("x", 1.5, 1.0).passed
    assert not measure.Check("x", math.nan, 1.0).passed


def test_mass_is_the_share_of_the_dense_softmax(model: ByteLM) -> None:
    contexts = torch.randint(256, (2, 256), dtype=torch.uint8)
    layers = measure.record(model, contexts)
    assert len(layers) == TINY.layers and layers[0][0].shape == (2, 2, 255, 32)
    every = Variant("all", "", P.causal())
    window = Variant("w", "", P.causal() & P.window(20))
    calls = []
    found = measure.masses(layers, [every, window], "auto", lambda: calls.append(0))
    assert len(calls) == 2
    assert found[0] == pytest.approx(1, abs=1e-6)
    shares = []
    for q, k, _ in layers:
        s = q.double() @ k.double().mT / 32**0.5
        p = s.masked_fill(torch.ones(255, 255).triu(1).bool(), -torch.inf).softmax(-1)
        shares.append((p * (P.causal() & P.window(20)).dense(255, 255)).sum(-1).mean().item())
    assert found[1] == pytest.approx(np.mean(shares), rel=1e-5)


def test_score_is_bits_per_byte(model: ByteLM) -> None:
    context = torch.randint(256, (256,), dtype=torch.uint8)
    bits, times = measure.Runner(variants()[0], model).score(context)
    assert bits == pytest.approx(byte_bits(model, context[None]).mean().item())
    assert 0 < times.attention < times.forward and 0 < times.products < times.forward


def test_sparse_runs_differ_from_dense_and_agree_with_masked(model: ByteLM) -> None:
    contexts = torch.randint(256, (2, 256), dtype=torch.uint8)
    dense = byte_bits(model, contexts)
    window = P.causal() & P.window(16)
    mask = window.dense(255, 255)

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    sparse = byte_bits(model, contexts, Variant("w", "", window).attend())
    torch.testing.assert_close(sparse, byte_bits(model, contexts, masked), atol=1e-3, rtol=1e-3)
    assert (sparse - dense).abs().max() > 0.01


def test_conversions(model: ByteLM) -> None:
    found = list(convert.convert(model))
    assert [c.kind for c in found] == ["tile", "nm", "block", "row", "mixed"]
    assert all(c.passed and c.done >= 4 * TINY.layers for c in found)
    zero = torch.zeros(1)
    assert not convert.same_bits(zero, -zero)
    assert convert.same_bits(zero / zero, zero / zero)


# The demo


def test_demo(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.run(**arguments(folder)) == 0
    text = capsys.readouterr().out
    for variant in variants():
        assert variant.demo == any(line.startswith(variant.name) for line in text.splitlines())
    assert text.count("checked: ") == 1 + sum(v.demo for v in variants())
    assert "FAILED" not in text
    assert "3 held-out contexts" in text
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_with_one_context(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = [v for v in variants() if v.name in ("dense", "window 128", "2:4 weights")]
    assert run.run(**arguments(folder, contexts=1, chosen=few)) == 0
    text = capsys.readouterr().out
    assert "nan" not in text and "±0" not in text


def test_demo_reads_held_out_files_alone(folder: Path) -> None:
    text = bytes(run.read_contexts(folder / "lib", 3, 256).flatten().tolist()).decode()
    for i in range(60):
        if f"value_{i}_" in text:
            assert data.held_out(f"module{i}.py")


FAULTS = {
    "attention": ("FLOAT32_LIMIT", "window 128: fused float32"),
    "dynamic attention": ("FLOAT64_LIMIT", "2:4 scores: fused float64"),
    "weights": ("LOGIT_LIMIT", "2:4 weights: logits"),
}


@pytest.mark.parametrize("limit, words", FAULTS.values(), ids=FAULTS)
def test_failed_check_fails_the_demo(
    limit: str,
    words: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(measure, limit, -1.0)
    assert run.run(**arguments(folder, contexts=1)) == 1
    text = capsys.readouterr().out
    assert f"FAILED: {words}" in text
    assert text.rstrip().endswith("please report the lines above")


def test_wrong_attention_fails_its_check(model: ByteLM, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = measure.record(model, torch.randint(256, (1, 256), dtype=torch.uint8))[0]
    variant = Variant("w", "", P.causal() & P.window(16))
    assert measure.check_attention(variant, layer).passed
    true = mg.attend

    def wrong(q, k, v, pattern, impl):  # one key too few
        return true(q, k, v, pattern if impl == "reference" else P.causal() & P.window(15))

    monkeypatch.setattr(mg, "attend", wrong)
    assert not measure.check_attention(variant, layer).passed


def test_wrong_product_fails_its_check(model: ByteLM, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = measure.Runner(Variant("t", "", pruning=Pruning("tile", {"density": 0.5})), model)
    context = torch.randint(256, (256,), dtype=torch.uint8)
    assert measure.check_weights(runner, context).passed
    true = mg.linear
    monkeypatch.setattr(mg, "linear", lambda x, w: true(x, w) * 1.001)
    assert not measure.check_weights(runner, context).passed


def test_lossy_conversion_fails_the_demo(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = [convert.Conversion("tile", 8, 7), convert.Conversion("row", 8, 8)]
    monkeypatch.setattr(run, "convert", lambda model: iter(lost))
    few = [v for v in variants() if v.name in ("dense", "window 128", "2:4 weights")]
    assert run.run(**arguments(folder, contexts=1, chosen=few)) == 1
    assert "FAILED: 1 of 8 matrices came back changed" in capsys.readouterr().out


def test_what_the_demo_lacks(folder: Path, tmp_path: Path) -> None:
    def fails(**more: object) -> str:
        with pytest.raises(report.DemoError) as found:
            run.run(**arguments(folder, **more))
        return str(found.value)

    assert "are missing" in fails(weights=tmp_path / "none")
    (tmp_path / "torn").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    assert "does not hold" in fails(weights=tmp_path / "torn")
    assert "1000 were asked for" in fails(contexts=1000)
    assert "fill 0 contexts" in fails(stdlib=tmp_path)
    assert "no folder" in fails(out=tmp_path / "no" / "demo.png")
    (tmp_path / "table.json").write_text('{"format": 99}')
    assert "format 99" in fails(table=tmp_path / "table.json")


# The large evaluation


@pytest.fixture(scope="module")
def evaluated(folder: Path) -> dict[str, object]:
    out = folder / "table.json"
    status = table.main(
        ["--contexts", "5", "--mass-contexts", "2", "--batch", "2", "--out", str(out),
         "--weights", str(folder / "model.safetensors"), "--stdlib", str(folder / "lib")]
    )  # fmt: skip
    assert status == 0
    found = report.read_table(out)
    assert found is not None
    return found


def test_table(evaluated: dict[str, object], folder: Path, model: ByteLM) -> None:
    rows = {row["name"]: row for row in evaluated["variants"]}
    assert list(rows) == [v.name for v in variants()]
    contexts = run.read_contexts(folder / "lib", 5, 256)
    weights = run.read_model(folder / "model.safetensors")  # saved in float16
    bits = byte_bits(weights, contexts).double().mean(1).numpy()
    sparse = byte_bits(weights, contexts, variants()[1].attend()).double().mean(1).numpy()
    extra = rows["window 32"]["extra"]
    assert rows["dense"]["bits"]["mean"] == pytest.approx(bits.mean(), rel=1e-5)
    assert rows["dense"]["extra"] == {"mean": 0.0, "se": 0.0}
    assert extra["mean"] == pytest.approx((sparse - bits).mean(), abs=1e-5)
    assert extra["se"] == pytest.approx(np.std(sparse - bits, ddof=1) / 5**0.5, abs=1e-5)
    assert rows["window 1024"]["mass"] == pytest.approx(1, abs=1e-6)
    assert 0 < rows["window 32"]["mass"] < rows["window 64"]["mass"] < 1


def test_table_by_the_oracle_agrees(evaluated: dict[str, object], folder: Path) -> None:
    weights = run.read_model(folder / "model.safetensors")
    contexts = run.read_contexts(folder / "lib", 2, 256)
    chosen = [v for v in variants() if not v.dynamic][::3]
    assert chosen[0].dense
    fast = table.evaluate(weights, contexts, chosen, "auto", 2, 1)
    exact = table.evaluate(weights, contexts, chosen, "reference", 1, 1)
    for a, b in zip(fast, exact, strict=True):
        assert a.bits == pytest.approx(b.bits, abs=1e-4)
        assert a.mass is None or a.mass == pytest.approx(b.mass, abs=1e-5)


def test_demo_prints_the_shipped_table(
    evaluated: dict[str, object], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [v for v in variants() if v.name in ("dense", "window 128", "2:4 weights")]
    given = arguments(folder, contexts=1, chosen=few, table=folder / "table.json")
    assert run.run(**given) == 0
    text = capsys.readouterr().out
    assert "of 5" in text and "the shipped evaluation" in text
    assert max(map(len, text.split("checked")[0].splitlines()[4:])) <= 100
    (row,) = (r for r in evaluated["variants"] if r["name"] == "2:4 weights")
    assert f"{row['bits']['mean']:.3f}" in text


def test_table_mistakes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = ["--weights", str(folder / "model.safetensors"), "--stdlib", str(folder / "lib")]
    assert table.main(["--out", str(tmp_path / "t"), "--contexts", "1", *weights]) == 2
    assert table.main(["--out", str(tmp_path / "t"), "--contexts", "999", *weights]) == 2
    assert "999 were asked for" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# What is shipped


def test_shipped_table_is_of_the_shipped_model() -> None:
    found = report.read_table()
    assert found is not None, "run python -m mixgrain.tools.demo.table --out tools/demo/table.json"
    assert found["model"]["sha256"] == hashlib.sha256(report.WEIGHTS.read_bytes()).hexdigest()
    assert found["contexts"] >= 200 and found["length"] == 2048
    rows = {row["name"]: row for row in found["variants"]}
    for variant in variants():
        row = rows.pop(variant.name)
        assert row["words"] == variant.words
        assert row["pattern"] == (None if variant.pattern is None else repr(variant.pattern))
        if variant.pattern is not None:
            assert row["kept_causal"] == pytest.approx(variant.kept(2047)[0])
        assert math.isfinite(row["extra"]["se"]) and math.isfinite(row["bits"]["mean"])
    assert not rows
    json.dumps(found, allow_nan=False)


@pytest.mark.slow
def test_demo_as_shipped(tmp_path: Path) -> None:
    """No network, the base installation, this Python's own files."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""}
    quiet = os.getloadavg()[0] < 0.5
    done = subprocess.run(
        [sys.executable, "-m", "mixgrain", "demo", "--threads", "2", "--out", "demo.png"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("checked: ") == 9
    assert "8 held-out contexts of 2048 bytes" in done.stdout
    assert (tmp_path / "demo.png").stat().st_size > 50_000
    seconds = float(done.stdout.split("time ")[-1].split()[0])
    if quiet:  # other work on the machine would be timed with it
        assert seconds <= 90
