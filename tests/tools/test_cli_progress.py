"""Progress: on a terminal, after two seconds, on stderr; otherwise silence."""

from __future__ import annotations

import io
import sys
import time

import pytest

from mixgrain.tools import progress


class Terminal(io.StringIO):
    """A stderr that may be a terminal."""

    def __init__(self, is_one: bool) -> None:
        super().__init__()
        self.is_one = is_one

    def isatty(self) -> bool:
        return self.is_one


def work(kind: str, seconds: float) -> None:
    if kind == "counted":
        assert list(progress.counted(range(5), "counting", 5)) == list(range(5))
        for _ in progress.counted(range(4), "counting"):
            time.sleep(seconds / 4)
        return
    with progress.waiting("counting"):
        time.sleep(seconds)


@pytest.mark.parametrize("kind", ["counted", "waiting"])
@pytest.mark.parametrize(
    ("terminal", "patience", "seconds", "seen"),
    [(True, 0.05, 0.4, True), (True, 60.0, 0.1, False), (False, 0.0, 0.2, False)],
    ids=["slow", "quick", "no terminal"],
)
def test_progress(
    kind: str, terminal: bool, patience: float, seconds: float, seen: bool,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    stream = Terminal(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "PATIENCE", patience)
    monkeypatch.setattr(progress, "TICK", 0.02)
    work(kind, seconds)
    assert ("counting" in stream.getvalue()) == seen
    assert capsys.readouterr().out == ""


def test_nothing_is_left_running_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal(True))
    before = progress.threading.active_count()
    with pytest.raises(KeyboardInterrupt), progress.waiting("counting"):
        raise KeyboardInterrupt
    assert progress.threading.active_count() == before


def test_two_seconds() -> None:
    assert progress.PATIENCE == 2.0
