"""Recording and running calls, with a stand-in for the driver that reads arguments as it would."""

import contextlib
import ctypes
import threading
import types

import numpy as np
import pytest
import torch

from mixgrain.cuda import early, launch, prepared, recording, steps, streams, tma
from mixgrain.cuda.compile import request
from mixgrain.cuda.errors import CudaError
from mixgrain.cuda.recording import Operand, Recording, recorded
from mixgrain.cuda.steps import Address, Map, by_value


class Driver:
    """Notes launches: the function, sizes, stream, and the bytes its arguments point to."""

    def __init__(self) -> None:
        self.seen: list[tuple] = []
        self.widths: dict[int, list[int]] = {}

    def launch(self, handle, gx, gy, gz, bx, by, bz, shared, stream, table, extra):
        assert extra == 0
        places = (ctypes.c_uint64 * len(self.widths[handle])).from_address(table)
        read = [ctypes.string_at(at, n) for at, n in zip(places, self.widths[handle], strict=True)]
        self.seen.append((handle, (gx, gy, gz), bx, shared, stream, read))


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    note = lambda name: lambda *a: made.seen.append((name, *a))  # noqa: E731
    numbers = iter(range(100, 10_000))

    class Numbered:
        def __init__(self, **_):
            self.ptr = next(numbers)

    cuda = types.SimpleNamespace(
        driver=types.SimpleNamespace(launchKernel=made.launch),
        runtime=types.SimpleNamespace(eventRecord=note("record"), streamWaitEvent=note("wait")),
        Event=Numbered,
        Stream=Numbered,
        Device=lambda index: contextlib.nullcontext(),
    )
    for module in (prepared, streams, launch):
        monkeypatch.setattr(module, "cupy", lambda: types.SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(prepared, "_current_device", lambda: 0)
    monkeypatch.setattr(prepared, "_raw_stream", lambda device: 7)
    monkeypatch.setattr(prepared, "_thread", types.SimpleNamespace(devices=frozenset({0})))
    empty = torch.empty_strided
    monkeypatch.setattr(
        prepared, "_empty", lambda shape, strides, dtype: empty(shape, strides, dtype=dtype)
    )
    streams._side.cache_clear()
    yield made
    streams._side.cache_clear()


class Fake:
    """A kernel that needs no compiler."""

    def __init__(self, driver: Driver, handle: int, *widths: int) -> None:
        driver.widths[handle] = list(widths)
        self.handle = handle

    def function(self, shared: int) -> int:
        return self.handle


def pointer(raw: bytes) -> int:
    return int.from_bytes(raw, "little")


def run(call, *tensors):
    return call(tensors, [t.data_ptr() for t in tensors])


def test_constants_and_addresses_reach_the_driver(driver):
    x = torch.zeros(3, 8)
    rec = Recording(0)
    a = rec.given(x, 0)
    out = a.new_empty(3, 8, dtype=torch.float16)
    kernel = Fake(driver, 1, 8, 4, 8, 4, 8, 8)
    plan = 12345
    arguments = (
        out.data_ptr(),
        np.int32(-7),
        a[1:].data_ptr() + 4,
        np.float32(0.5),
        plan,
        np.int64(2**40),
    )
    rec.launch(kernel, (5, 2), 96, arguments, 1024)
    call = prepared.Prepared(rec, out)
    for given in (x, torch.zeros(3, 8)):
        made = run(call, given)
        assert made.shape == (3, 8)
        assert made.dtype == torch.float16
        handle, grid, threads, shared, stream, read = driver.seen.pop()
        assert (handle, grid, threads, shared, stream) == (1, (5, 2, 1), 96, 1024, 7)
        assert pointer(read[0]) == made.data_ptr()
        assert np.frombuffer(read[1], np.int32)[0] == -7
        assert pointer(read[2]) == given.data_ptr() + 8 * 4 + 4
        assert np.frombuffer(read[3], np.float32)[0] == 0.5
        assert pointer(read[4]) == plan
        assert pointer(read[5]) == 2**40


def test_addresses_inside_structs(driver):
    layout = np.dtype([("from", np.int64), ("size", np.int32), ("to", np.int64)], align=True)
    fields = np.zeros(1, layout)
    fields["size"] = 77
    rec = Recording(0)
    a = rec.given(torch.zeros(4), 0)
    out = a.new_empty(4)
    scratch = a.new_empty(100)
    kernel = Fake(driver, 1, 24, 4, 8)
    struct = by_value(fields, [(0, a[1:].data_ptr()), (16, scratch[2:].data_ptr())])
    rec.launch(kernel, (1,), 32, (struct, np.int32(5), out.data_ptr()), 0)
    call = prepared.Prepared(rec, out)
    for given in (torch.zeros(4), torch.ones(4)):
        made = run(call, given)
        read = driver.seen.pop()[5]
        found = np.frombuffer(read[0], layout)[0]
        assert found["from"] == given.data_ptr() + 4
        assert found["size"] == 77
        assert found["to"] not in (0, given.data_ptr(), made.data_ptr())
        assert np.frombuffer(read[1], np.int32)[0] == 5
        assert pointer(read[2]) == made.data_ptr()
    known = by_value(fields, [(0, 11), (16, 22)])
    assert known.nbytes == layout.itemsize
    assert known.view(layout)[["from", "size", "to"]].tolist() == (11, 77, 22)


def test_the_same_tensor_twice_has_two_roles(driver):
    rec = Recording(0)
    x = torch.zeros(4)
    a, b = rec.given(x, 0), rec.given(x, 0)
    rec.launch(Fake(driver, 1, 8, 8), (1,), 32, (a.data_ptr(), b.data_ptr()), 0)
    call = prepared.Prepared(rec, a.new_empty(1))
    y = torch.zeros(4)
    for first, second in ((x, x), (x, y), (y, x)):
        run(call, first, second)
        read = driver.seen.pop()[-1]
        assert [pointer(r) for r in read] == [first.data_ptr(), second.data_ptr()]


def test_torch_steps_come_in_their_place(driver):
    x = torch.arange(24.0).view(4, 6)
    rec = Recording(0)
    a = rec.given(x.t(), 0)
    copy = a.contiguous()
    padded = torch.nn.functional.pad(copy[:, :3], (0, 5))
    made = a.new_empty(2, 8)
    made[:, 2:4].zero_()
    rec.launch(Fake(driver, 1, 8, 8), (1,), 32, (copy.data_ptr(), padded.data_ptr()), 0)
    result = rec.work(torch.Tensor.to, (padded, torch.float64), {})
    call = prepared.Prepared(rec, (result, made, padded[:2]))
    for t in (x.t(), (x + 100).t()):
        out, gaps, part = run(call, t)
        assert torch.equal(out, torch.nn.functional.pad(t[:, :3], (0, 5)).double())
        assert (gaps[:, 2:4] == 0).all()
        assert torch.equal(part, out[:2].float())
        assert part.data_ptr() == pointer(driver.seen.pop()[-1][1])


@pytest.mark.parametrize("shape, strides", [((2, 3, 4), (12, 4, 1)), ((2, 3, 4), (0, 4, 1))])
def test_an_operand_answers_as_a_tensor(shape, strides):
    t = torch.zeros(100).as_strided(shape, strides)
    rec = Recording(0)
    a = rec.given(t, t.data_ptr() % 16)
    assert (a.shape, a.stride(), a.stride(1), a.dim(), a.numel(), a.element_size()) == (
        tuple(t.shape), t.stride(), t.stride(1), t.dim(), t.numel(), 4,
    )  # fmt: skip
    assert a.is_contiguous() == t.is_contiguous()
    for index in ((slice(1, 2),), (slice(None), slice(1, 9)), (..., slice(2, 3)), slice(0, 0)):
        mine, theirs = a[index], t[index]
        assert (mine.shape, mine.stride()) == (tuple(theirs.shape), theirs.stride())
        if theirs.numel():
            assert mine.data_ptr().offset == theirs.data_ptr() - t.data_ptr()
    for unit in (4, 8, 16):
        assert a.data_ptr() % unit == t.data_ptr() % unit
        assert (a.data_ptr() + 4) % unit == (t.data_ptr() + 4) % unit
    assert a[:1].expand(5, -1, -1).stride() == t[:1].expand(5, -1, -1).stride()


def test_strides_of_single_elements_do_not_count():
    rec = Recording(0)
    odd = torch.zeros(100).as_strided((1, 3, 1, 8), (7, 8, 5, 1))
    assert rec.given(odd, 0).stride() == (24, 8, 8, 1)
    apart = torch.zeros(100).as_strided((2, 3, 1, 8), (48, 16, 5, 1))
    assert rec.given(apart, 0).stride() == (48, 16, 8, 1)


def test_two_lanes_fork_and_join_once(driver):
    rec = Recording(0)
    a = rec.given(torch.zeros(4), 0)
    coarse, fine, last = (Fake(driver, n, 8) for n in (1, 2, 3))
    with rec.fork():
        with rec.side():
            # What the side reads is made before the fork, on the current stream.
            copy = a.clone()
            rec.launch(fine, (1,), 32, (copy.data_ptr(),), 0)
        rec.launch(coarse, (1,), 32, (a.data_ptr(),), 0)
    rec.launch(last, (1,), 32, (a.data_ptr(),), 0)
    assert isinstance(rec.steps[0], steps.Work)
    call = prepared.Prepared(rec, a.new_empty(1))
    run(call, torch.zeros(4))
    split, wait, two, one, together, join, three = driver.seen
    side = wait[1]
    assert (split[0], split[2], wait[0], wait[2]) == ("record", 7, "wait", split[1])
    assert (two[0], two[4], one[0], one[4]) == (2, side, 1, 7)
    assert (together[0], together[2], join) == ("record", side, ("wait", 7, together[1]))
    assert (three[0], three[4]) == (3, 7)


def test_lanes_go_on_until_both_are_needed(driver):
    """Two forks inside are one; what reads both waits for both, and both wait for it."""
    rec = Recording(0)
    a = rec.given(torch.zeros(4), 0)
    kernels = [Fake(driver, n, 8) for n in range(7)]

    def at(n: int) -> None:
        rec.launch(kernels[n], (1,), 32, (a.data_ptr(),), 0)

    with rec.lanes():
        for fine, coarse in ((1, 2), (3, 4)):
            with rec.fork():
                with rec.side():
                    at(fine)
                at(coarse)
        with rec.together():
            at(5)
        with rec.fork():
            at(6)
    seen = []
    run(prepared.Prepared(rec, a.new_empty(1)), torch.zeros(4))
    for event in driver.seen:
        seen.append(event[0] if isinstance(event[0], str) else (event[0], event[4] == 7))
    fork = join = ["record", "wait"]
    lanes = [(1, False), (2, True), (3, False), (4, True)]
    assert seen == [*fork, *lanes, *join, (5, True), (6, True)]


def test_lanes_wait_for_what_torch_writes(driver):
    """A copy of what is given is made before the fork; one of what a kernel wrote, after both."""
    rec = Recording(0)
    a, kernel = rec.given(torch.zeros(4), 0), Fake(driver, 1, 8)
    made = a.new_empty(4)
    with rec.lanes():
        with rec.fork(), rec.side():
            rec.launch(kernel, (1,), 32, (made.data_ptr(),), 0)
        with rec.fork():
            rec.launch(kernel, (1,), 32, (a.clone().data_ptr(),), 0)
        made.clone()
    kinds = [step if isinstance(step, str) else type(step).__name__ for step in rec.steps]
    assert kinds == ["Work", "fork", "Launch", "Launch", "join", "Work"]


def test_a_lane_with_nothing_to_do_forks_nothing(driver):
    for on_side in (True, False):
        rec = Recording(0)
        a = rec.given(torch.zeros(4), 0)
        with rec.fork(), rec.side() if on_side else contextlib.nullcontext():
            rec.launch(Fake(driver, 1, 8), (1,), 32, (a.data_ptr(),), 0)
        assert [type(step) for step in rec.steps] == [steps.Launch]
        assert not rec.steps[0].side


def test_descriptors_are_encoded_for_each_address(driver, monkeypatch):
    rec = Recording(0)
    x = torch.zeros(64, 64, dtype=torch.float16)
    a = rec.given(x, x.data_ptr() % 16)
    wanted = tma.descriptor(a.data_ptr(), a.dtype, (64, 64), (128,), (64, 64))
    assert isinstance(wanted, Map)
    encoded = []

    def descriptor(address, *rest):
        encoded.append(address)
        return np.frombuffer(address.to_bytes(8, "little") * 16, np.uint8).view("V128")

    monkeypatch.setattr(tma, "descriptor", descriptor)
    rec.launch(Fake(driver, 1, 128, 8), (1,), 32, (wanted, a.data_ptr()), 0)
    call = prepared.Prepared(rec, a.new_empty(1))
    others = [torch.zeros(64, 64, dtype=torch.float16) for _ in range(100)]
    for t in (x, others[0], x, others[0], *others):
        run(call, t)
        raw, address = driver.seen.pop()[-1]
        assert raw == t.data_ptr().to_bytes(8, "little") * 16
        assert pointer(address) == t.data_ptr()
    assert encoded.count(x.data_ptr()) == 1
    assert len(encoded) == 101


def test_threads_do_not_share_arguments(driver):
    rec = Recording(0)
    a = rec.given(torch.zeros(4), 0)
    rec.launch(Fake(driver, 1, 8), (1,), 32, (a.data_ptr(),), 0)
    call = prepared.Prepared(rec, a.new_empty(4))
    inside, wait = threading.Barrier(2), []
    found: dict[int, int] = {}
    plain = driver.launch

    def slow(*given):
        inside.wait(5)  # both threads have filled in their addresses before either is read
        plain(*given)
        with lock:
            found[threading.get_ident()] = pointer(driver.seen.pop()[-1][0])

    lock = threading.Lock()
    prepared.cupy().cuda.driver.launchKernel = slow
    driver.seen.clear()
    tensors = [torch.zeros(4) for _ in range(2)]
    workers = []
    for t in tensors:
        workers.append(threading.Thread(target=lambda t=t: wait.append((t, run(call, t)))))
    prepared._thread.devices = frozenset({0})
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert {t.data_ptr() for t in tensors} == set(found.values())


def test_launch_code_is_recorded_per_thread():
    rec = Recording(0)
    kernel = launch.Kernel(request("sddmm_row", {}), 0)
    with recorded(rec):
        kernel((2, 0), 32, ())  # an empty grid launches nothing
        kernel((2, 3), 32, (np.int32(1),))
        seen = []
        worker = threading.Thread(target=lambda: seen.append(recording.current()))
        worker.start()
        worker.join()
    assert seen == [None]
    assert recording.current() is None
    (step,) = rec.steps
    assert (step.kernel, step.grid, step.arguments) == (kernel, (2, 3), (np.int32(1),))


def test_results_take_another_shape(driver):
    rec = Recording(0)
    a = rec.given(torch.zeros(2, 6), 0)
    out = a.new_empty(2, 6)
    unused = a.new_empty(1000, 1000)
    call = prepared.Prepared(rec, out)
    assert call.shapes == [(2, 6)]
    assert len(call._empties) == 1, unused
    shaped = call.shaped([(1, 2, 6)])
    assert run(shaped, torch.zeros(2, 6)).shape == (1, 2, 6)
    assert run(call, torch.zeros(2, 6)).shape == (2, 6)
    part = prepared.Prepared(rec, out[:, :3])
    assert part.shaped([(6,)]) is None
    assert run(part, torch.zeros(2, 6)).stride() == (6, 1)
    assert isinstance(out, Operand)
    assert isinstance(out.data_ptr(), Address)


def test_scratch_is_one_allocation(driver, monkeypatch):
    made = []
    plain = prepared._empty
    monkeypatch.setattr(prepared, "_empty", lambda *a: (made.append(plain(*a)), made[-1])[1])
    rec = Recording(0)
    a = rec.given(torch.zeros(4), 0)
    out, first, second = (a.new_empty(n) for n in (6, 100, 3))
    seen = a.new_empty(5)  # torch looks at it
    seen.zero_()
    arguments = tuple(t.data_ptr() for t in (out, first, second, seen, first[64:]))
    rec.launch(Fake(driver, 1, *[8] * 5), (1,), 32, arguments, 0)
    call = prepared.Prepared(rec, out)
    for _ in range(2):
        made.clear()
        result = run(call, torch.zeros(4))
        whole, apart, scratch = made
        assert whole is result
        assert torch.equal(apart, torch.zeros(5))
        at = [pointer(r) for r in driver.seen.pop()[-1]]
        base = scratch.data_ptr()
        assert at == [whole.data_ptr(), base, base + 512, apart.data_ptr(), base + 256]
        assert scratch.nbytes == 512 + 256


def test_a_stream_is_part_of_what_is_kept(driver, monkeypatch):
    rec = Recording(0)
    a = rec.given(torch.zeros(4), 0)
    rec.launch(Fake(driver, 1, 8), (1,), 32, (a.data_ptr(),), 0)
    call = prepared.Prepared(rec, a.new_empty(1))
    x = torch.zeros(4)
    for stream in (7, 8, 7):
        monkeypatch.setattr(prepared, "_raw_stream", lambda device, stream=stream: stream)
        run(call, x)
        assert driver.seen.pop()[4] == stream


def test_an_early_launch_tells_the_driver(driver, monkeypatch):
    rec = Recording(0)
    a = rec.given(torch.zeros(4), 0)
    rec.launch(Fake(driver, 1, 8), (3, 2), 32, (a.data_ptr(),), 16, early=True)
    call = prepared.Prepared(rec, a.new_empty(1))
    seen, status = [], 0

    def launch_kernel_ex(config, function, table, extra):
        config = config._obj
        attribute = config.attributes[0]
        argument = ctypes.cast(table.value, ctypes.POINTER(ctypes.c_void_p))[0]
        seen.append((*config.grid, *config.block, config.shared, config.stream, config.count))
        seen.append((attribute.id, attribute.value[0], function.value))
        seen.append(ctypes.cast(argument, ctypes.POINTER(ctypes.c_void_p))[0])
        return status

    library = types.SimpleNamespace(cuLaunchKernelEx=launch_kernel_ex)
    monkeypatch.setattr(early, "driver", lambda: library)
    monkeypatch.setattr(prepared, "_raw_stream", lambda device: 7)
    x = torch.zeros(4)
    run(call, x)
    assert not driver.seen
    # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION is 6.
    assert seen == [(3, 2, 1, 32, 1, 1, 16, 7, 1), (6, 1, 1), x.data_ptr()]
    status = 400
    with pytest.raises(CudaError, match="driver error 400"):
        run(call, x)
