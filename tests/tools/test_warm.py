"""`mixgrain warm` compiles what a call asks for, once."""

import argparse

import pytest

from mixgrain.cuda import compile as service
from mixgrain.cuda import nvrtc
from mixgrain.cuda.errors import MissingError
from mixgrain.formats.errors import BackendUnavailableError
from mixgrain.tools import warm

try:
    nvrtc.library()
    nvrtc.header_folder()
except MissingError as missing:
    pytest.skip(str(missing), allow_module_level=True)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXGRAIN_CACHE_DIR", str(tmp_path / "cubins"))
    service.cache_folder.cache_clear()
    yield tmp_path / "cubins"
    service.cache_folder.cache_clear()


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    warm.add_arguments(parser)
    return parser.parse_args(words)


def test_the_second_time_nothing_is_left_to_do(cache, capsys, monkeypatch):
    asked = options("--arch", "90a", "--dtype", "float16", "--width", "64", "--threads", "2")
    some = warm.wanted(asked)[::12]
    monkeypatch.setattr(warm, "wanted", lambda _: some)
    assert warm.run(asked) == 0
    assert f"{len(some)} kernels compiled" in capsys.readouterr().out
    assert len(list(cache.iterdir())) == len(some)
    assert warm.run(asked) == 0
    assert f"0 kernels compiled in 0.0 s, {len(some)} were there, 0 failed" in (
        capsys.readouterr().out
    )


def test_options_choose_kernels():
    few = warm.wanted(options("--arch", "80", "--dtype", "float16", "--width", "64"))
    more = warm.wanted(options("--arch", "80", "--dtype", "float16", "--width", "64", "--masks"))
    both = warm.wanted(options("--arch", "80", "--arch", "90a", "--dtype", "float16"))
    assert set(few) < set(more)
    assert {arch for _, arch in both} == {"80", "90a"}
    names = {(request.name, arch) for request, arch in both}
    assert ("spmm_block_sm90", "90a") in names
    assert ("spmm_block_sm90", "80") not in names


def test_a_kernel_that_does_not_compile_is_counted(cache, capsys, monkeypatch):
    asked = options("--arch", "90a")
    bad = (service.request("spmm_join", {"OUT": 7, "TWO": 1}), "90a")
    monkeypatch.setattr(warm, "wanted", lambda _: [bad])
    assert warm.run(asked) == 1
    assert "1 failed" in capsys.readouterr().out


def test_without_a_device_an_architecture_is_asked_for(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="--arch, one of 80"):
        warm.run(options())
