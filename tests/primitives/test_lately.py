"""Calls that are found again by their tensors as they are, on the CPU."""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from mixgrain.primitives import lately
from mixgrain.primitives.lately import Signatures


def pair(shape=(2, 8, 16), dtype=torch.float16):
    return torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)


def kept(tensors, rest="op", call="the call", calls=None):
    calls = Signatures() if calls is None else calls
    calls.keep(tensors, [t.data_ptr() for t in tensors], rest, call)
    return calls


def remembered(tensors, rest="op"):
    """Calls that are found as those made lately, or not at all."""
    calls = kept(tensors, rest)
    calls.find(tensors, rest)
    dict.clear(calls)
    return calls


def test_equal_calls_are_found_with_the_addresses_of_now():
    calls = remembered(pair())
    other = pair()
    assert calls.find(other, "op") == ("the call", [t.data_ptr() for t in other])
    assert calls.find(other, "another") is None
    assert Signatures().find(other, "op") is None


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


CHANGES = {
    "shape": lambda t: t[:, :4],
    "strides": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "dtype": lambda t: t.bfloat16(),
    "dimensions": lambda t: t[None],
    "address": lambda t: torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape),
    "gradient": lambda t: t.clone().requires_grad_(),
    "parameter": lambda t: torch.nn.Parameter(t),
    "negative": lambda t: torch._neg_view(t),
    "zeros": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "freed": lambda t: (t.untyped_storage().resize_(0), t)[1],
    "no tensor": lambda t: t.tolist(),
    "nothing": lambda t: None,
}


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("change", CHANGES)
def test_other_tensors_are_not_taken_for_those(change, place):
    tensors = list(pair())
    calls = remembered(tensors)
    tensors[place] = CHANGES[change](tensors[place])
    assert calls.find(tensors, "op") is None


AROUND = {
    "dispatch": Watching,
    "fake": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "functional": FunctionalTensorMode,
    "functions": lambda: torch.device("cpu"),
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "forward mode": forward_ad.dual_level,
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_not_found_where_operators_mean_something_else(around):
    tensors = pair()
    calls = remembered(tensors)
    with around():
        assert calls.find(tensors, "op") is None
    assert calls.find(tensors, "op") is not None


def test_not_found_inside_transforms():
    tensors = pair((2, 8, 16), torch.float32)
    calls = remembered(tensors)
    found = []

    def look(t):
        found.append(calls.find((t, tensors[1]), "op"))
        found.append(calls.find(tensors, "op"))
        return t.sum()

    torch.func.grad(look)(tensors[0])
    torch.vmap(look)(tensors[0][None])
    assert found == [None] * 4


def test_not_found_while_traced():
    tensors = pair((2, 8, 16), torch.float32)
    calls = remembered(tensors)
    found = []

    def look(t):
        found.append(calls.find(tensors, "op"))
        return t + 1

    torch.jit.trace(look, tensors[0], check_trace=False)
    assert found
    assert found == [None] * len(found)


def test_a_tensor_that_changes_in_place_is_another():
    tensors = pair()
    calls = remembered(tensors)
    tensors[0].resize_(2, 4, 16)
    assert calls.find(tensors, "op") is None


def test_the_switch_of_float32_products_counts():
    tensors = pair(dtype=torch.float32)
    calls = remembered(tensors)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision, there in (("tf32", False), ("ieee", False), (before, True)):
            torch.backends.cuda.matmul.fp32_precision = precision
            assert (calls.find(tensors, "op") is not None) == (there or precision == before)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_calls_of_several_kinds_are_found():
    made = [pair((2, n, 16)) for n in range(1, 5)]
    calls = Signatures()
    for n, tensors in enumerate(made):
        kept(tensors, n % 2, n, calls)
        calls.find(tensors, n % 2)
    dict.clear(calls)
    for n, tensors in enumerate(made):
        assert calls.find(tensors, n % 2)[0] == n
        assert calls.find(tensors, 1 - n % 2) is None


def test_calls_of_too_many_kinds_make_guards_only_so_often(monkeypatch):
    made = []
    plain = lately._check
    monkeypatch.setattr(lately, "_check", lambda tensors: (made.append(1), plain(tensors))[1])
    calls, kinds = Signatures(), [pair((1, n, 16)) for n in range(1, 2 * lately._MOST)]
    for n, tensors in enumerate(kinds):
        kept(tensors, call=n, calls=calls)
    assert not made  # calls of ever new kinds make none
    for _ in range(20):  # in turn, so that none is still among the last ones
        for n, tensors in enumerate(kinds):
            assert calls.find(tensors, "op")[0] == n
            assert len(calls._seen) <= lately._MOST
    assert len(made) == lately._TRIES
    assert not calls._seen
    kept(pair(), call="new", calls=calls)  # another signature lets guards be made again
    assert calls.find(pair(), "op")[0] == "new"
    assert calls._seen


def test_of_too_many_signatures_all_are_forgotten():
    calls = Signatures()
    for n in range(lately.SIGNATURES + 1):
        kept(pair(), n, n, calls)
        assert calls.find(pair(), n)[0] == n
    assert len(calls) <= lately.SIGNATURES


FINER = {
    "gradient": True,  # whoever records calls asks for themselves
    "parameter": True,
    "address": False,
    "strides": False,
    "shape": False,
    "dtype": False,
    "negative": False,
    "zeros": False,
    "sparse": False,
    "nested": False,
    "no tensor": False,
}


@pytest.mark.parametrize("change", FINER)
def test_a_signature_is_all_that_launch_code_looks_at(change):
    tensors = list(pair())
    calls = kept(tensors)
    tensors[0] = CHANGES[change](tensors[0])
    assert (calls.find(tensors, "op") is not None) == FINER[change]


def test_no_tensor_is_kept_alive():
    tensors = list(pair())
    calls = remembered(tensors)
    alive = [weakref.ref(t) for t in tensors]
    tensors.clear()
    assert calls._seen
    assert [ref() for ref in alive] == [None, None]


def test_what_lies_at_odd_addresses_or_comes_twice_is_not_kept():
    odd = CHANGES["address"](pair()[0])
    twice = (odd.clone(),) * 2
    for tensors in ((odd, odd.clone()), twice):
        calls = kept(tensors)
        assert not calls._seen
        assert calls._tries == lately._TRIES
        assert calls.find(tensors, "op")[0] == "the call"  # by its signature


@pytest.mark.parametrize("guards", [None, lambda *tensors: None])
def test_without_the_guards_of_torch_signatures_find(guards, monkeypatch):
    monkeypatch.setattr(lately, "_guards", guards)
    assert remembered(pair()).find(pair(), "op") is None
    assert kept(pair()).find(pair(), "op")[0] == "the call"


@pytest.mark.gpu
def test_on_cuda_autocast_and_other_devices_are_seen():
    tensors = [t.cuda() for t in pair((2, 8, 16), torch.float32)]
    calls = remembered(tensors)
    assert calls.find(tensors, "op") is not None
    with torch.autocast("cuda", torch.bfloat16):
        assert calls.find(tensors, "op") is None
    with torch.inference_mode():
        assert calls.find(tensors, "op") is None
    assert calls.find([tensors[0], tensors[1].cpu()], "op") is None
    assert calls.find([t.cpu() for t in tensors], "op") is None
