"""`mixgrain finetune`: masked, paired, repeatable, and what it prints is what it measured."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mixgrain as mg
from mixgrain.tools import cli
from mixgrain.tools.demo import data, finetune
from mixgrain.tools.demo.layers import with_layers
from mixgrain.tools.demo.model import ByteLM, Config, byte_bits, save
from mixgrain.tools.demo.report import DemoError

TINY = Config(context=256, width=64, heads=2, layers=2, hidden=64)
SETTINGS = finetune.Settings(seeds=2, steps=6, batch=4, length=64, contexts=2)
Streams = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny weights and a tiny standard library."""
    root = tmp_path_factory.mktemp("finetune")
    torch.manual_seed(0)
    model = ByteLM(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save(model, root / "model.safetensors")
    (root / "lib").mkdir()
    for i in range(60):
        lines = "".join(f"value_{i}_{j} = compute({i * j})\n" for j in range(60))
        (root / "lib" / f"module{i}.py").write_text(lines)
    return root


@pytest.fixture(scope="module")
def base(folder: Path) -> ByteLM:
    return finetune.read_model(folder / "model.safetensors")


def test_layers_compute_as_the_bare_matrices(base: ByteLM) -> None:
    tokens = torch.randint(256, (2, 64))
    model = with_layers(base)
    assert torch.equal(model(tokens), base(tokens))
    names = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert names == {
        f"blocks.{i}.{name}" for i in range(2) for name in ("qkv", "out", "up", "down")
    }
    with torch.no_grad():
        model.blocks[0].qkv.weight.zero_()
    assert base.blocks[0].qkv.any()  # a copy
    again = with_layers(model)
    assert (
        torch.equal(again(tokens), model(tokens)) and again.blocks[0].qkv is not model.blocks[0].qkv
    )


def test_seeds_choose_the_bytes(folder: Path) -> None:
    text = finetune.training_bytes(folder / "lib")
    for i in range(60):
        held = f"value_{i}_7 ".encode() in bytes(text.tolist())
        assert held != data.held_out(f"module{i}.py")
    one, same, other = (
        torch.stack(list(finetune.batches(text, SETTINGS, seed))) for seed in (0, 0, 1)
    )
    assert one.shape == (6, 4, 65) and torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("name", finetune.VARIANTS)
def test_tuning_helps_and_keeps_the_positions(name: str, base: ByteLM, folder: Path) -> None:
    text = finetune.training_bytes(folder / "lib")
    contexts = finetune.read_contexts(folder / "lib", 2, 256)
    model = with_layers(base)
    if finetune.VARIANTS[name] is not None:
        mg.sparsify_model(model, {"blocks.*": finetune.VARIANTS[name]})
    before = byte_bits(model, contexts).mean()
    masks = {
        at: layer.weight.layout.mask()[0, 0]
        for at, layer in model.named_modules()
        if isinstance(layer, mg.SparseLinear)
    }
    finetune.tune(model, text, replace(SETTINGS, steps=20), 0)
    assert byte_bits(model, contexts).mean() < before - 0.1
    for at, mask in masks.items():
        assert not model.get_submodule(at).to_dense()[~mask].any()
    plain = finetune.dense_again(model)
    assert not any(isinstance(m, mg.SparseLinear) for m in plain.modules())
    torch.testing.assert_close(byte_bits(plain, contexts), byte_bits(model, contexts),
                               rtol=1e-4, atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_runs_and_repeats(
    dtype: torch.dtype, folder: Path, capsys: Streams, base: ByteLM
) -> None:
    settings = replace(SETTINGS, dtype=dtype)
    given = {"weights": folder / "model.safetensors", "stdlib": folder / "lib"}
    found = []
    for n in range(2):
        assert finetune.run(settings, **given, out=folder / f"{n}.json") == 0
        text = capsys.readouterr().out
        assert "checked: " in text and "FAILED" not in text and "nan" not in text
        found.append(json.loads((folder / f"{n}.json").read_text()))
    for one, two in zip(found[0]["rows"], found[1]["rows"], strict=True):
        assert one["after"] == two["after"] and one["before"] == two["before"]
        assert len(one["after"]) == 2 and len(one["speeds"]) == finetune.ROUNDS
        line = next(line for line in text.splitlines() if line.startswith(one["name"]))
        assert f"{one['before']:.3f}" in line
        mean, sd = statistics.fmean(one["after"]), statistics.stdev(one["after"])
        assert f"{mean:.3f} ±{sd:.3f}" in line
    dense = found[0]["rows"][0]
    assert dense["name"] == "dense" and dense["kept"] == 1.0 and dense["apart"] == 0
    contexts = finetune.read_contexts(folder / "lib", 2, 256)
    if dtype == torch.float32:
        assert dense["before"] == pytest.approx(byte_bits(base, contexts).mean().item(), rel=1e-5)
    assert [round(row["kept"], 2) for row in found[0]["rows"]] == [1.0, 0.5, 0.75, 0.5]


def test_a_wrong_product_fails(
    folder: Path, capsys: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = mg.SparseLinear.forward
    monkeypatch.setattr(mg.SparseLinear, "forward", lambda self, x: true(self, x) * 1.01)
    given = {"weights": folder / "model.safetensors", "stdlib": folder / "lib"}
    assert finetune.run(replace(SETTINGS, seeds=1, steps=1), **given) == 1
    assert "FAILED: 2:4" in capsys.readouterr().out


def test_mistakes(folder: Path, tmp_path: Path, capsys: Streams) -> None:
    given = {"weights": folder / "model.safetensors", "stdlib": folder / "lib"}
    cases = [
        (replace(SETTINGS, length=300), {}, "at most 256 bytes"),
        (replace(SETTINGS, together=3), {}, "at most --contexts 2"),
        (SETTINGS, {"out": tmp_path / "no" / "x.json"}, "no folder"),
        (SETTINGS, {"stdlib": tmp_path}, "fill 0 contexts"),
        (SETTINGS, {"weights": tmp_path / "none"}, "are missing"),
    ]
    for settings, more, words in cases:
        with pytest.raises(DemoError, match=words):
            finetune.run(settings, **{**given, **more})
    if not torch.cuda.is_available():
        assert cli.main(["finetune", "--device", "cuda"]) == 2
        assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(dtype: torch.dtype, folder: Path, capsys: Streams) -> None:
    settings = replace(SETTINGS, device=torch.device("cuda"), dtype=dtype, together=2)
    given = {"weights": folder / "model.safetensors", "stdlib": folder / "lib"}
    assert finetune.run(settings, **given) == 0
    assert "checked: " in capsys.readouterr().out
