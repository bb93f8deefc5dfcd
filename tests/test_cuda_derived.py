"""Things made in threads of their own: one for each thread that asks, none for what that asks."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch

from mixgrain.cuda import derived
from mixgrain.cuda.recording import Recording, current, recorded


class Source(torch.Tensor):
    """A tensor that says it lies on a device."""

    @property
    def is_cuda(self) -> bool:
        return True


class Stream(NamedTuple):
    """Of a device; 0 is the default one."""

    cuda_stream: int


@pytest.fixture(autouse=True)
def no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(1))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(derived, "_thread", derived._Thread())


def source() -> torch.Tensor:
    return torch.zeros(1).as_subclass(Source)


def test_a_thread_of_its_own_that_stays() -> None:
    one = source()
    made = [derived.derived(one, n, threading.get_ident) for n in range(3)]
    assert len(set(made)) == 1 and made[0] != threading.get_ident()
    assert derived.derived(one, 0, lambda: 0) == made[0]  # kept


def test_no_thread_on_the_default_stream(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(0))
    assert derived.derived(source(), "it", threading.get_ident) == threading.get_ident()


@pytest.mark.parametrize("default", [False, True])
def test_what_is_made_is_no_step_of_a_recording(default, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(int(not default)))
    mine = Recording(0)
    with recorded(mine):
        assert derived.derived(source(), "it", current) is None
        assert current() is mine


def test_what_is_asked_for_while_making_is_made_there() -> None:
    def outer() -> tuple[int, int]:
        return threading.get_ident(), derived.derived(source(), "inner", threading.get_ident)

    first, second = derived.derived(source(), "outer", outer)
    assert first == second


def test_threads_do_not_wait_for_each_other() -> None:
    """As where one waits for a device that goes on only after what another makes."""
    free, waiting = threading.Event(), threading.Event()

    def waits() -> bool:
        waiting.set()
        return free.wait(20)

    def frees() -> bool:
        assert waiting.wait(20)
        free.set()
        return True

    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(derived.derived, source(), "it", make) for make in (waits, frees)]
        assert all(call.result(timeout=30) for call in calls)


def test_errors_reach_the_caller_and_nothing_is_kept() -> None:
    one = source()

    def fails() -> None:
        raise RuntimeError("as it happens")

    with pytest.raises(RuntimeError, match="as it happens"):
        derived.derived(one, "it", fails)
    assert derived.derived(one, "it", lambda: 7) == 7
