"""The demo's text rule and its byte-level model: what they promise, on tiny sizes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mixgrain.tools.demo import data
from mixgrain.tools.demo.model import (
    ByteLM,
    Config,
    byte_bits,
    causal,
    dense,
    evaluate,
    load,
    rotary_tables,
    rotate,
    save,
)
from mixgrain.tools.demo.train import main, orthogonalise, rate_at

TINY = Config(context=256, width=64, heads=2, layers=2, hidden=64)


@pytest.fixture
def model() -> ByteLM:
    """A tiny model none of whose weights is zero, so that every path carries signal."""
    torch.manual_seed(0)
    model = ByteLM(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    """A small directory in the standard library's shape, with files on both sides of the rule."""
    root = tmp_path / "python3"
    for i in range(60):
        lines = "".join(f"value_{i}_{j} = compute({i * j})\n" for j in range(40))
        for name in (f"module{i}.py", f"test/test_module{i}.py", f"site-packages/other{i}.py"):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# {name}\n" + lines.replace("value", path.stem))
    return root


def test_held_out_rule_is_the_hash_of_the_path() -> None:
    names = [f"package/module{i}.py" for i in range(500)]
    for name in names:
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")
        assert data.held_out(name) == (digest % 10 == 0)
    assert 25 < sum(map(data.held_out, names)) < 75


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("os.py", False),
        ("test/support/__init__.py", True),
        ("idlelib/idle_test/htest.py", True),
        ("unittest/tests/x.py", True),
        ("distutils/test_x.py", True),
        ("unittest/case.py", False),
        ("pytest/x.py", False),
        ("doctest.py", False),
    ],
)
def test_is_test(name: str, expected: bool) -> None:
    assert data.is_test(name) is expected


def test_listing_leaves_out_installed_packages(stdlib: Path) -> None:
    (stdlib / "lib" / "dist-packages").mkdir(parents=True)
    (stdlib / "lib" / "dist-packages" / "deep.py").write_text("x = 1\n")
    (stdlib / "notes.rst").write_text("notes\n")
    (stdlib / "binary.so").write_bytes(b"\0")
    names = data.stdlib_files(stdlib)
    assert len(names) == 121
    assert "notes.rst" in names
    assert not any("packages" in name or name.endswith(".so") for name in names)


def test_contexts_are_deterministic_and_hold_every_byte_once() -> None:
    files = {f"f{i}": bytes([i]) * (10 * i + 3) for i in range(1, 9)}
    found = data.cut(files, length=16)
    assert found.dtype == torch.uint8
    assert torch.equal(found, data.cut(dict(reversed(files.items())), length=16))
    assert torch.equal(found[:3], data.cut(files, 3, 16))
    lost = sum(map(len, files.values())) - int((found != 0).sum())
    assert 0 <= lost < 16
    whole = sum(len(content) // 16 for content in files.values())
    assert all(len(set(row.tolist())) == 1 for row in found[:whole])


def test_contexts_come_from_held_out_library_files_alone(stdlib: Path) -> None:
    text = bytes(data.contexts(stdlib, length=64).flatten().tolist()).decode()
    names = {f"module{i}" for i in range(60) if data.held_out(f"module{i}.py")}
    assert names
    for i in range(60):
        assert (f"module{i}_{i}_" in text) == (f"module{i}" in names)
    assert "test_module" not in text
    assert data.contexts(stdlib, 0, 64).shape == (0, 64)


def test_copies_of_held_out_text_are_not_trained_on(stdlib: Path) -> None:
    secret = next(n for n in data.stdlib_files(stdlib) if data.held_out(n))
    lines = (stdlib / secret).read_text().splitlines(keepends=True)
    copies = [f"copy{i}.py" for i in range(40) if not data.held_out(f"copy{i}.py")][:3]
    exact, near, larger = copies
    (stdlib / exact).write_text("".join(lines))
    (stdlib / near).write_text("".join(lines[:25]) + "one_new_line_of_some_length = 1\n" * 30)
    own = "".join(f"a_line_of_its_own_number_{i} = {i}\n" for i in range(200))
    (stdlib / larger).write_text(own + "".join(lines))
    selection = data.select([stdlib, stdlib])
    trained = {name.partition("/")[2] for name in selection.train}
    assert trained.isdisjoint({secret, *copies})
    assert not any(map(data.held_out, trained))
    assert {f"python3/{name}" for name in copies} <= set(selection.dropped["repeats held-out text"])
    # The second copy of the same directory adds nothing.
    assert all(name.startswith("python3/") for name in selection.train)
    assert set(selection.heldout) == {n for n in data.stdlib_files(stdlib) if data.held_out(n)}


def test_archive_round_trip(stdlib: Path, tmp_path: Path) -> None:
    selection = data.select([stdlib])
    first, second = tmp_path / "a.tar.xz", tmp_path / "b.tar.xz"
    data.write_archive(selection, first)
    data.write_archive(selection, second)
    assert first.read_bytes() == second.read_bytes()
    assert data.read_archive(first) == selection


def test_logits_do_not_see_later_bytes(model: ByteLM) -> None:
    tokens = torch.randint(256, (2, 64))
    before = model(tokens)
    assert before.shape == (2, 64, 256)
    for t in (1, 7, 40, 63):
        changed = tokens.clone()
        changed[:, t] ^= 1
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-5, atol=1e-5)
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 1e-4


def test_rotary_scores_depend_on_distance_alone() -> None:
    cos, sin = rotary_tables(512, 64, 10_000.0)
    q, k = torch.randn(2, 1, 1, 64).expand(2, 512, 1, 64)
    q, k = rotate(q, cos, sin)[:, 0], rotate(k, cos, sin)[:, 0]
    scores = q.double() @ k.double().T
    for distance in (0, 1, 100, 400):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)
    assert scores[:, 0].std() > 0.1


def test_attend_and_linear_are_used_everywhere(model: ByteLM) -> None:
    shapes: list[torch.Size] = []
    names: dict[str, torch.Tensor] = {}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        shapes.extend((q.shape, k.shape, v.shape))
        return causal(q, k, v)

    def linear(x: torch.Tensor, name: str, weight: torch.Tensor) -> torch.Tensor:
        names[name] = weight
        return dense(x, name, weight)

    tokens = torch.randint(256, (3, 20))
    assert torch.equal(model(tokens, attend=attend, linear=linear), model(tokens))
    assert shapes == [torch.Size((3, 2, 20, 32))] * 6
    matrices = {n: p for n, p in model.named_parameters() if p.dim() == 2 and "taps" not in n}
    assert {n: w.data_ptr() for n, w in names.items()} == {
        n: w.data_ptr() for n, w in matrices.items()
    }


def test_longer_than_the_context_raises(model: ByteLM) -> None:
    with pytest.raises(ValueError, match="257 positions"):
        model(torch.zeros(1, 257, dtype=torch.int64))


def test_save_and_load(model: ByteLM, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save(model, path, {"licence": data.LICENCE})
    again = load(path)
    assert again.config == TINY
    assert not again.training
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight.half().float()), name
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata()["licence"] == data.LICENCE


def test_the_demo_model_fits_its_file_and_its_tiles(tmp_path: Path) -> None:
    model = ByteLM()
    path = tmp_path / "m.safetensors"
    save(model, path, {"licence": data.LICENCE, "held_out_rule": data.HELD_OUT_RULE})
    assert path.stat().st_size <= 8_000_000
    assert model.config.context == 2048
    assert model.config.head_dim == 64
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "taps" not in name:
            assert all(size % 64 == 0 for size in weight.shape), name


def test_both_context_lengths_score_the_same_bytes(model: ByteLM) -> None:
    contexts = torch.randint(256, (3, 256), dtype=torch.uint8)
    result = evaluate(model, contexts)
    assert (result["contexts"], result["scored"]) == (3, 3 * 255)
    assert result["scored_from_128"] == 3 * 128
    # One window of 256 is the whole context here, so seeing 256 bytes costs nothing.
    assert result["cost_of_256"] == pytest.approx(0, abs=1e-6)
    bits = byte_bits(model, contexts, batch=2)
    assert bits.shape == (3, 255)
    logits = model(contexts.long())
    first = -logits[:, 0].log_softmax(-1)[range(3), contexts[:, 1].long()] / 0.6931472
    torch.testing.assert_close(bits[:, 0], first, rtol=1e-4, atol=1e-4)


def test_orthogonalise_evens_out_singular_values() -> None:
    torch.manual_seed(0)
    for shape in ((3, 64, 64), (2, 64, 128), (2, 128, 64)):
        found = torch.linalg.svdvals(orthogonalise(torch.randn(shape)).float())
        assert found.max() < 1.3
        assert found.quantile(0.1) > 0.5


def test_rate_rises_stays_and_falls_to_zero() -> None:
    assert rate_at(0) == 0
    assert rate_at(0.2) == rate_at(0.39) == 1
    assert rate_at(0.7) == pytest.approx(0.5)
    assert rate_at(1) == rate_at(1.1) == 0


def test_pack_train_and_evaluate_run(
    stdlib: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.tar.xz", tmp_path / "out"
    assert main(["pack", "--stdlib", str(stdlib), "--out", str(text)]) == 0
    sizes = "--context 256 --width 64 --heads 2 --layers 1 --hidden 64 --batch 2 --steps 25"
    options = ["train", "--text", str(text), "--out", str(out), "--device", "cpu", "--no-compile"]
    assert main([*options, "--contexts", "2", *sizes.split()]) == 0
    assert load(out / "model.safetensors").config.layers == 1
    log = (out / "train.json").read_text()
    assert all(f'"{key}"' in log for key in ("curve", "result", "bytes_seen", "seed", "device"))
    weights = str(out / "model.safetensors")
    assert main(["evaluate", "--weights", weights, "--stdlib", str(stdlib)]) == 0
    assert "cost_of_256" in capsys.readouterr().out
