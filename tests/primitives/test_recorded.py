"""The short way of the public functions on the CPU: a stand-in runs for prepared calls."""

import contextlib
import itertools
import types

import pytest
import torch
from cases import BUILDERS, Case, density, masks_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mixgrain.formats.cache import clear_caches
from mixgrain.formats.errors import DtypeError
from mixgrain.formats.sparse import SparseTensor
from mixgrain.primitives import eager, lately, looks, ops
from mixgrain.primitives.sddmm import sddmm
from mixgrain.primitives.softmax import softmax
from mixgrain.primitives.spmm import spmm

CASES = {
    "shared": Case((20, 28), density(0.4), free=(2, 3)),
    "per head": Case((20, 28), density(0.4), lead=(1, 3), free=(2,)),
    "per batch": Case((20, 28), density(0.4), lead=(2, 1), free=(3,)),  # results are views
    "both": Case((20, 28), density(0.4), lead=(2, 3)),
    "plain": Case((20, 28), density(0.4)),
}


def operands(case: Case, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    make = lambda n: torch.randn(*case.lead_shape, n, 5, generator=g, dtype=torch.float64)  # noqa: E731
    return [make(n).requires_grad_() for n in (case.shape[0], case.shape[1], case.shape[1])]


def attention(q, k, v, layout, mask=None):
    p, lse = softmax(sddmm(q, k, layout, 0.3, mask), return_lse=True)
    return spmm(p, v), lse


def mask_of(case: Case) -> Tensor:
    batch = case.lead_shape[-2:-1] if len(case.lead_shape) > 1 else ()
    return torch.rand(*batch, case.shape[1], generator=torch.Generator().manual_seed(9)) < 0.8


def test_tiles_go_the_short_way(runs):
    case = CASES["plain"]
    layout = BUILDERS["tile"](case, *masks_of(case))
    found = []
    for n in range(3):
        runs.clear()
        with torch.device("cpu") if n == 0 else contextlib.nullcontext():
            v = operands(case)[2]
            values = torch.linspace(-1, 1, layout.slots, dtype=v.dtype).requires_grad_()
            s = SparseTensor(layout, values)
            out, turned = spmm(s, v), spmm(s.T, v[: case.shape[0]])
            total = (out * out).sum() + (turned * turned).sum()
            found.append([out, turned, *torch.autograd.grad(total, (values, v))])
        assert bool(runs) == (n > 0)
    for given in found[1:]:
        for a, b in zip(given, found[0], strict=True):
            assert torch.equal(a, b) and a.shape == b.shape


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["block", "row", "mixed"])
@pytest.mark.parametrize("name", CASES)
def test_the_short_way_equals_the_long_way(name, kind, masked, runs):
    case = CASES[name]
    layout = BUILDERS[kind](case, *masks_of(case))
    mask = mask_of(case) if masked else None
    found = []
    for n in range(4):
        runs.clear()
        # The first time something watches: the operators.
        with torch.device("cpu") if n == 0 else contextlib.nullcontext():
            q, k, v = operands(case)
            with torch.no_grad():
                plain = attention(q, k, v, layout, mask)
            assert runs == ([] if n == 0 else ["sddmm", "softmax", "spmm"])
            o, lse = attention(q, k, v, layout, mask)
        assert runs.prepared == (0 if n == 0 else 3 if n == 1 else 6)
        assert o.requires_grad
        assert torch.equal(o, plain[0])
        assert torch.equal(lse, plain[1])
        total = o.square().sum() + (torch.where(lse.isfinite(), lse, 0) ** 2).sum()
        runs.clear()
        first = torch.autograd.grad(total, (q, k, v), retain_graph=True)
        assert runs == ([] if n == 0 else ["sddmm+spmm_t", "softmax_backward", "spmm+spmm_t"])
        runs.clear()
        (again,) = torch.autograd.grad(total, q, create_graph=True)
        assert runs == []  # to be differentiated: the operators
        torch.testing.assert_close(again, first[0], rtol=1e-12, atol=1e-12)
        second = torch.autograd.grad(again.square().sum(), (q, k, v))
        found.append([o, lse, *first, *second])
    for made in found[1:]:
        assert all(map(torch.equal, made, found[0]))


def test_only_the_gradients_that_are_wanted_are_computed(runs):
    case = CASES["both"]
    layout = BUILDERS["mixed"](case, *masks_of(case))
    q, k, v = operands(case)
    plain = [t.detach() for t in (q, k, v)]
    sddmm(*plain[:2], layout)
    p = softmax(sddmm(*plain[:2], layout))
    spmm(p, plain[2])
    values = p.values.clone().requires_grad_()
    other = p.with_values(values)
    whole = {
        "sddmm": torch.autograd.grad(sddmm(q, k, layout).values.square().sum(), (q, k)),
        "spmm": torch.autograd.grad(spmm(other, v).square().sum(), (values, v)),
    }
    for name, alone, inputs, call in (
        ("sddmm", "spmm", (q, None), lambda: sddmm(q, plain[1], layout).values),
        ("sddmm", "spmm_t", (None, k), lambda: sddmm(plain[0], k, layout).values),
        ("spmm", "sddmm", (values, None), lambda: spmm(other, plain[2])),
        ("spmm", "spmm_t", (None, v), lambda: spmm(p, v)),
    ):
        for _ in range(2):
            runs.clear()
            n = 0 if inputs[1] is None else 1
            (made,) = torch.autograd.grad(call().square().sum(), inputs[n])
            assert runs == [name, alone]
            torch.testing.assert_close(made, whole[name][n], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("warm", [False, True])
def test_checkpoints(warm, runs):
    """What is saved is alike, the first time and when a checkpoint makes the call again."""
    case = CASES["both"]
    layout = BUILDERS["mixed"](case, *masks_of(case))
    given = operands(case)
    if warm:
        attention(*given, layout)
    o = checkpoint(lambda *t: attention(*t, layout)[0], *given, use_reentrant=False)
    found = torch.autograd.grad(o.square().sum(), given)
    right = torch.autograd.grad(attention(*given, layout)[0].square().sum(), given)
    assert all(map(torch.equal, found, right))


def test_saved_tensors_that_hooks_replace(runs):
    case = CASES["shared"]
    layout = BUILDERS["block"](case, *masks_of(case))
    q, k, _ = operands(case)
    right = torch.autograd.grad(sddmm(q, k, layout).values.square().sum(), (q, k))
    unpack = {
        "as they were": lambda t: t,
        "other strides": lambda t: t.mT.contiguous().mT,
    }
    for name, back in unpack.items():
        runs.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), back):
            s = sddmm(q, k, layout)
        made = torch.autograd.grad(s.values.square().sum(), (q, k))
        assert runs == ["sddmm", "spmm+spmm_t"], name
        for a, b in zip(made, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_have_the_dtypes_of_what_they_are_of(runs):
    case = CASES["plain"]
    layout = BUILDERS["row"](case, *masks_of(case))
    q, k, _ = operands(case)
    for _ in range(2):
        runs.clear()
        s = sddmm(q, k, layout, out_dtype=torch.float32)
        values = s.values.detach().requires_grad_()
        p = softmax(s.with_values(values), out_dtype=torch.float64)
        (grad,) = torch.autograd.grad(p.values.square().sum(), values)
        of_q, of_k = torch.autograd.grad(s.values.square().sum(), (q, k))
        assert (p.dtype, grad.dtype, of_q.dtype, of_k.dtype) == (
            torch.float64, torch.float32, torch.float64, torch.float64,
        )  # fmt: skip
    assert runs == ["sddmm", "softmax", "softmax_backward", "spmm+spmm_t"]


def test_every_part_of_a_signature_counts(runs):
    case = CASES["shared"]
    layout = BUILDERS["block"](case, *masks_of(case))
    q, k, _ = (t.detach() for t in operands(case))
    sddmm(q, k, layout)
    assert sddmm(q, k, layout) is not None
    assert runs == ["sddmm"] * 2
    assert runs.prepared == 1
    runs.clear()
    base = torch.zeros(q.numel() + 2, dtype=torch.float64)
    shifted = base[1 : 1 + q.numel()].view(q.shape)
    others = {
        "scale": lambda: sddmm(q, k, layout, 2.0),
        "dtype": lambda: sddmm(q, k, layout, out_dtype=torch.float32),
        "mask": lambda: sddmm(q, k, layout, key_mask=torch.ones(28, dtype=torch.bool)),
        "shape": lambda: sddmm(q[:1], k[:1], layout),
        "strides": lambda: sddmm(q.mT.contiguous().mT, k, layout),
        "alignment": lambda: sddmm(
            shifted if (shifted.data_ptr() ^ q.data_ptr()) & 15 else base[2:].view(q.shape),
            k,
            layout,
        ),
    }
    for count, (name, call) in enumerate(others.items()):
        call()
        assert runs.prepared == count + 2, name
    runs.clear()
    for _ in range(2):
        sddmm(q, k, layout, 0.0)
    with pytest.raises(DtypeError):
        sddmm(q, k.float(), layout)
    with pytest.raises(TypeError):
        sddmm(q, k, layout, torch.tensor(1.0))
    with pytest.raises(DtypeError):
        sddmm(q, k, layout, out_dtype=["float32"])
    assert runs == []


def test_what_watches_sees_the_operators(runs):
    from torch.utils._python_dispatch import TorchDispatchMode

    case = CASES["shared"]
    layout = BUILDERS["block"](case, *masks_of(case))
    q, k, _ = (t.detach() for t in operands(case))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    for _ in range(2):
        sddmm(q, k, layout)
    runs.clear()
    with Watch():
        sddmm(q, k, layout)
    with torch.device("cpu"):
        sddmm(q, k, layout)
    with torch.autocast("cpu", torch.bfloat16):
        sddmm(q, k, layout)
    torch.func.vmap(lambda a: sddmm(a, k[0, 0], layout).values)(q[0])
    torch.func.grad(lambda a: sddmm(a, k, layout).values.sum())(q)
    sddmm(q.as_subclass(type("Own", (Tensor,), {})), k, layout)
    assert runs == []
    sddmm(torch.nn.Parameter(q), k, layout)
    assert runs == ["sddmm"]


def test_what_has_no_memory_of_its_own_goes_the_long_way(runs):
    case = CASES["shared"]
    layout = BUILDERS["block"](case, *masks_of(case))
    q, k, v = (t.detach() for t in operands(case))
    s = sddmm(q, k, layout)
    spmm(softmax(s), v)
    runs.clear()
    zero = torch._efficientzerotensor(q.shape, dtype=q.dtype)
    imaginary = torch.complex(q, q).conj().imag
    assert imaginary.is_neg()
    assert torch.equal(sddmm(imaginary, k, layout).values, sddmm(-q, k, layout).values)
    assert runs == ["sddmm"]
    for call in (
        lambda: sddmm(zero, k, layout),
        lambda: sddmm(q.to_sparse(), k, layout),
        lambda: spmm(s, v.to_sparse()),
    ):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            call()
    assert runs == ["sddmm"]


def test_broadcast_operands_are_not_recorded(runs):
    case = CASES["shared"]
    layout = BUILDERS["block"](case, *masks_of(case))
    q, k, v = operands(case)
    single = k.detach()[:, :1].requires_grad_()
    grads = []
    for _ in range(3):
        s = sddmm(q, single, layout)
        grads.append(torch.autograd.grad(s.values.square().sum(), (q, single)))
    assert runs == []
    assert runs.prepared == 1
    assert all(torch.equal(a, b) for made in grads[1:] for a, b in zip(made, grads[0], strict=True))
    with torch.no_grad():
        short = sddmm(q, single, layout)
    assert runs == ["sddmm"]
    assert torch.equal(short.values, s.values)
    assert v.requires_grad


def test_caches_are_bounded_and_cleared(runs):
    case = CASES["plain"]
    x = torch.zeros(28, 5, dtype=torch.float64)
    kept = []
    for _ in range(eager.LAYOUTS + 3):
        layout = BUILDERS["row"](case, *masks_of(case))
        kept.append(SparseTensor(layout, torch.zeros(layout.slots, dtype=torch.float64)))
        spmm(kept[-1], x)
    assert len(eager._layouts) == eager.LAYOUTS
    assert runs.prepared == eager.LAYOUTS + 3
    spmm(kept[0], x)  # dropped: the long way
    assert runs.prepared == eager.LAYOUTS + 4
    spmm(kept[-1], x)
    assert runs.prepared == eager.LAYOUTS + 4
    for width in range(1, lately.SIGNATURES + 5):
        spmm(kept[-1], x[:, :1].expand(28, width).contiguous())
    assert max(map(len, eager._layouts._values.values())) <= lately.SIGNATURES
    clear_caches()
    assert len(eager._layouts) == 0


def test_conditions_are_those_of_torch():
    assert looks.plain()
    with torch.autocast("cpu", torch.bfloat16):
        assert not looks.plain()
    with torch.autograd.forward_ad.dual_level():
        assert not looks.plain()
    with torch.device("cpu"):
        assert not looks.plain()
    assert looks.plain()
    assert not looks.usable(torch.zeros(2))  # not on CUDA
    assert isinstance(ops, types.ModuleType)
    assert list(itertools.islice(looks.TENSORS, 2)) == [Tensor, torch.nn.Parameter]


def test_addresses_are_of_what_tensors_look_like() -> None:
    t = torch.arange(6.0)
    assert looks.address(t) == t.data_ptr() and looks.address(t[1:]) == t[1:].data_ptr()
    assert looks.address(torch.nn.Parameter(t)) == t.data_ptr()
    assert looks.address(torch.zeros(0)) == 0
    wrapped = []
    torch.func.grad(lambda x: (wrapped.append(x), x.sum())[1])(t)

    class Mine(torch.Tensor):
        pass

    for other in (
        None, 3, t.as_subclass(Mine), torch._efficientzerotensor(3), torch._neg_view(t),
        torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(), wrapped[0],
        torch.nested.nested_tensor([t, t[1:]]),
    ):  # fmt: skip
        assert looks.address(other) == -1
