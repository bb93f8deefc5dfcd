"""What a user gets: a light import, one version; checkout, sdist and wheel that hold the same."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import types
import zipfile
from pathlib import Path

import pytest

import mixgrain as mg

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("formats", "cuda", "primitives", "attention", "tools")
FACE = ("__init__.py", "__main__.py", "py.typed")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HATCH = PROJECT["tool"]["hatch"]["build"]["targets"]


# The face


def test_every_public_name_loads() -> None:
    assert {name: type(getattr(mg, name)) for name in mg.__all__}
    assert set(mg.__all__) <= set(dir(mg))
    assert isinstance(mg.patterns, types.ModuleType)


def test_functions_are_not_hidden_by_the_modules_of_their_names() -> None:
    for floor, name in [
        *(("primitives", name) for name in ("sddmm", "softmax", "spmm", "linear")),
        *(("attention", name) for name in ("attend", "merge", "explain")),
        ("formats", "sparsify"),
    ]:
        module = importlib.import_module(f"mixgrain.{floor}.{name}")
        assert getattr(mg, name) is getattr(module, name), name
        assert callable(getattr(mg, name)), name


def test_the_three_lists_of_names_agree() -> None:
    """Checkers read the imports, users read __all__, the interpreter reads _HOMES."""
    text = (ROOT / "src/mixgrain/__init__.py").read_text()
    imports = re.findall(r"from mixgrain\.([\w.]+) import (.+)", text)
    typed = {name: home for home, names in imports for name in names.split(", ")}
    for module in ("huggingface", "interchange", "patterns"):
        typed[module] += f".{module}"
    assert typed == mg._HOMES
    assert sorted(typed) == sorted(mg.__all__)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'sdmm'"):
        _ = mg.sdmm


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_alone_loads_nothing() -> None:
    code = "import sys; old = set(sys.modules); import mixgrain; print(*set(sys.modules) - old)"
    assert set(python(code).split()) <= {"mixgrain", "typing", "importlib"} | set(
        python(code.replace("import mixgrain", "import typing, importlib")).split()
    )


# Loads every public name beside torch: time added to torch's own, then what came along.
EVERYTHING = """
import gc, sys, time, torch
gc.collect()
gc.freeze()  # a pass over torch's own objects falls into whoever comes next
before = set(sys.modules)
start = time.process_time()  # of the wall clock a busy machine takes more
import mixgrain
for name in mixgrain.__all__:
    getattr(mixgrain, name)
print(time.process_time() - start)
heavy = {"cupy", "cuda", "scipy", "matplotlib", "transformers", "triton"}
print(*heavy & (set(sys.modules) - before))
print(torch.cuda.is_initialized())
"""


def test_import_is_light_and_touches_nothing(tmp_path: Path) -> None:
    """At most 0.2 s of one processor beside torch; no CuPy, no driver, no home to write to."""
    (tmp_path / "file").touch()
    nowhere = str(tmp_path / "file" / "home")  # below a file: not even root can make it
    places = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), nowhere)
    places["PYTHONDONTWRITEBYTECODE"] = ""  # else every run compiles: that is not what is measured
    seconds = []
    for _ in range(5):  # the least of several: others on the machine only add
        lines = python(EVERYTHING, CUDA_VISIBLE_DEVICES="", **places).splitlines()
        assert lines[1:] == ["", "False"]
        seconds.append(float(lines[0]))
        if seconds[-1] <= 0.2:
            break
    assert min(seconds) <= 0.2, seconds
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


# The tree


def test_links() -> None:
    for floor in FLOORS:
        link = ROOT / "src/mixgrain" / floor
        assert link.is_symlink(), f"ln -s ../../{floor} src/mixgrain/{floor}"
        assert link.readlink() == Path("../..") / floor
        assert link.resolve() == ROOT / floor


def test_every_floor_is_packaged() -> None:
    elsewhere = {"tests", "benchmarks", "docs"}
    folders = {path.parent.name for path in ROOT.glob("[!.]*/*.py")}
    assert folders - elsewhere == set(FLOORS)
    files = {*FLOORS, *(f"src/mixgrain/{name}" for name in FACE)}
    assert set(HATCH["wheel"]["only-include"]) == files
    assert set(HATCH["sdist"]["only-include"]) >= {*files, "tests"}
    assert HATCH["wheel"]["sources"] == {
        "src/mixgrain": "mixgrain",
        **{floor: f"mixgrain/{floor}" for floor in FLOORS},
    }
    for floor in FLOORS:
        assert (ROOT / floor / "py.typed").exists(), floor


def test_one_version() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert re.search(
        rf"^## \[{re.escape(mg.__version__)}\]", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    try:
        installed = importlib.metadata.version("mixgrain")
    except importlib.metadata.PackageNotFoundError:
        return  # a checkout with nothing installed
    assert installed == mg.__version__


def test_constraints_pin_what_the_project_names() -> None:
    """Every base and dev requirement has one tested version, so that a fresh install repeats."""
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    dev = [name for name in extras["dev"] if not name.startswith("mixgrain[")]
    wanted = [*project["dependencies"], *dev, *extras["docs"], *extras["hf"]]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert sorted(pins) == sorted(re.match(r"[\w-]+", name)[0] for name in wanted)


@pytest.mark.parametrize("command", ['pip install -c constraints.txt -e ".[dev]"', "bin/pytest"])
def test_ci_runs_the_readme(command: str) -> None:
    for name in ("README.md", ".ci/run"):
        assert command in (ROOT / name).read_text(), f"{name} lacks {command}"


def test_wheel_from_sdist_holds_every_file(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="builds the wheel: pip install -e .[dev]")

    def build(target: str, where: Path, name: str) -> Path:
        command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(tmp_path)]
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return next(tmp_path.glob(name))

    with tarfile.open(build("sdist", ROOT, "*.tar.gz")) as archive:
        # By attribute: Python before 3.11.4 knows no filter, and takes no argument of that name.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(tmp_path)
    (unpacked,) = tmp_path.glob("mixgrain-*/")
    with zipfile.ZipFile(build("wheel", unpacked, "*.whl")) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = [name for name in wheel.namelist() if ".dist-info/" in name]
    expected = {f"mixgrain/{name}" for name in FACE} | {
        f"mixgrain/{path.relative_to(ROOT)}"
        for floor in FLOORS
        for path in (ROOT / floor).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".pyo")
    }
    assert packed == expected
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
    assert any(name.endswith("entry_points.txt") for name in metadata)
