"""sparsify: bit-exact round trips, live slots, pruning, sampling, gradients, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mixgrain.formats import patterns as P
from mixgrain.formats.errors import DtypeError, LayoutError, ShapeError
from mixgrain.formats.sparsify import sparsify

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}
KINDS = ["tile", "nm", "block", "row", "panel", "mixed"]
SHAPES = [(0, 0), (0, 5), (5, 0), (1, 1), (16, 16), (17, 31), (64, 128), (70, 33)]
LEADS = [(), (1,), (3,), (1, 1), (1, 3), (2, 1), (2, 3), (0,), (2, 0)]


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.detach().contiguous().view(INTEGER[t.dtype.itemsize])


def odd_values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random bits: NaNs with payloads, infinities, denormals and −0 among them; sparse."""
    info = torch.iinfo(INTEGER[dtype.itemsize])
    raw = torch.randint(info.min, info.max, shape, dtype=INTEGER[dtype.itemsize])
    special = torch.tensor(
        [-0.0, math.nan, -math.inf, 1.0, torch.finfo(dtype).tiny / 2], dtype=dtype
    )
    pick = bits(special)[torch.randint(5, shape)]
    raw = torch.where(torch.rand(shape) < 0.3, pick, raw)
    return torch.where(torch.rand(shape) < 0.2, raw, 0).view(dtype)


def fit_nm(dense: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Zero what n:m cannot hold: all but the first n of each group."""
    columns = dense.shape[-1]
    raw = torch.nn.functional.pad(bits(dense), (0, -columns % m))
    groups = raw.reshape(*raw.shape[:-1], raw.shape[-1] // m, m)
    groups = torch.where((groups != 0).cumsum(-1) <= n, groups, 0)
    return groups.flatten(-2)[..., :columns].contiguous().view(dense.dtype)


@pytest.mark.parametrize(
    "kind, dtype, lead",
    [
        (kind, dtype, lead)
        for kind, dtype, lead in itertools.product(KINDS, DTYPES, LEADS)
        if not lead or (dtype == torch.float32 and kind not in ("tile", "panel"))
    ],
    ids=str,
)
def test_round_trip_to_the_bit(kind, dtype, lead) -> None:
    torch.manual_seed(0)
    for shape in SHAPES:
        dense = odd_values((*lead, *shape), dtype)
        options = [{}]
        if kind == "nm":
            options = [{"n": 2, "m": 4}, {"n": 1, "m": 2}, {"n": 3, "m": 7}]
        elif kind in ("block", "mixed"):
            options = [{"size": 16}, {"size": 64}]
        for option in options:
            x = fit_nm(dense, option["n"], option["m"]) if kind == "nm" else dense
            s = sparsify(x, kind, **option)
            s.layout.validate()
            assert s.shape == tuple(x.shape)
            assert torch.equal(bits(s.to_dense()), bits(x)), (shape, option)
            if dtype.itemsize < 8:  # the bits as numbers, which float64 holds exactly
                raw = sparsify(bits(x).double(), layout=s.layout).values
                assert torch.equal(bits(s.values), raw.to(bits(x).dtype))
            live = s.layout.live()
            if live is not None:
                assert not bits(s.values[..., ~live]).any()


@pytest.mark.parametrize("kind", ["row", "mixed"])
def test_fine_layouts_keep_exactly_what_is_not_plus_zero(kind) -> None:
    x = odd_values((2, 3, 40, 50), torch.float32)
    s = sparsify(x, kind)
    assert torch.equal(s.layout.mask(), bits(x) != 0)
    assert s.nnz == int((bits(x) != 0).sum())


@pytest.mark.parametrize("kind, side", [("tile", 16), ("block", 16), ("block", 32)])
def test_coarse_layouts_keep_whole_units(kind, side) -> None:
    x = torch.zeros(70, 90)
    x[20, 33], x[69, 89] = 1.0, -0.0
    s = sparsify(x, kind, size=side)
    expected = torch.zeros(70, 90, dtype=torch.bool)
    for i, j in ((20, 33), (69, 89)):
        i, j = i // side * side, j // side * side
        expected[i : i + side, j : j + side] = True
    assert torch.equal(s.layout.mask()[0, 0], expected)


def test_panel_is_the_kept_rows_times_the_kept_columns() -> None:
    x = torch.zeros(7, 9)
    x[2, 3], x[5, 8], x[5, 1] = 1.0, -0.0, 2.0
    s = sparsify(x, "panel")
    expected = torch.zeros(7, 9, dtype=torch.bool)
    expected[torch.tensor([2, 5])[:, None], torch.tensor([1, 3, 8])] = True
    assert torch.equal(s.layout.mask()[0, 0], expected) and s.nnz == 6
    assert sparsify(torch.zeros(7, 9), "panel").nnz == 0
    assert int(sparsify(torch.ones(7, 9), "panel").layout.row_list.numel()) == 0  # a range


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_panel_prunes_whole_rows_or_columns_by_norm(axis) -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 50)
    turned = x if axis == "rows" else x.T
    turned[3], turned[7] = math.nan, 0.0
    s = sparsify(x, "panel", prune=True, density=0.29, axis=axis)
    s.layout.validate()
    norms = turned.double().square().sum(1).nan_to_num(math.inf)
    count = math.floor(0.29 * len(norms))
    kept = norms >= norms.sort(descending=True).values[count - 1]
    mask = s.layout.mask()[0, 0]
    assert torch.equal(mask if axis == "rows" else mask.T, kept[:, None].expand(turned.shape))
    assert torch.equal(bits(s.to_dense()), bits(torch.where(mask, x, 0.0)))
    everything = sparsify(torch.ones(4, 4), "panel", prune=True, density=1, axis=axis)
    assert everything.nnz == 16
    assert sparsify(torch.ones(4, 4), "panel", prune=True, density=0, axis=axis).nnz == 0


def test_nm_keeps_n_of_every_group_inside_the_shape() -> None:
    x = torch.tensor([[0.0, 0, 5, 0, 0, 0, 0, 0, 0, 7]])
    s = sparsify(x, "nm")
    assert s.layout.mask().int().tolist() == [[[[1, 0, 1, 0, 1, 1, 0, 0, 1, 1]]]]


def test_equal_entries_are_stored_once() -> None:
    x = torch.where(torch.rand(20, 40) < 0.3, torch.randn(2, 3, 20, 40), 0.0)
    x[1, 1] = 0
    for kind in ("row", "block"):
        s = sparsify(x, kind, size=16)
        assert s.layout.lead == (2, 3)
        assert s.layout.entry == (0, 0, 0, 0, 1, 0)


def test_strided_views_and_gradients_of_positions() -> None:
    base = torch.randn(40, 30, 2, requires_grad=True)
    x = (base * (torch.rand(40, 30, 1) < 0.3)).permute(2, 1, 0)
    s = sparsify(x, "row")
    assert torch.equal(s.to_dense(), x)
    s.values.sum().backward()
    assert base.grad is not None


def test_magnitude_pruning_of_groups() -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 9, 22)
    x[0, 0, 4:8] = torch.tensor([1.0, -1.0, 1.0, 0.5])
    x[0, 1, 4:8] = torch.tensor([0.0, -0.0, 0.0, 0.0])
    x[0, 2, 4:8] = torch.tensor([3.0, math.inf, math.nan, 4.0])
    s = sparsify(x, "nm", prune=True)
    kept = s.layout.mask()[0]
    for e, i, g in itertools.product(range(2), range(9), range(5)):
        members = list(range(4 * g, 4 * g + 4))
        sizes = [math.inf if math.isnan(v) else abs(v) for v in x[e, i, members].tolist()]
        best = sorted(range(4), key=lambda p: (-sizes[p], p))[:2]
        assert sorted(best) == kept[e, i, members].nonzero().flatten().tolist()
    assert kept[..., 20:].all()  # a short group keeps all it has
    assert torch.equal(bits(s.to_dense()), bits(torch.where(kept, x, 0.0)))
    fits = fit_nm(x, 2, 4)
    assert torch.equal(bits(sparsify(fits, "nm", prune=True).to_dense()), bits(fits))


@pytest.mark.parametrize("kind", ["row", "mixed"])
def test_magnitude_pruning_of_elements(kind) -> None:
    torch.manual_seed(2)
    x = torch.randn(3, 20, 50)
    x[1] = 0
    x[1, 3, 4] = -0.0
    x[2] = 1.0
    x[2, 5, 5] = math.nan
    s = sparsify(x, kind, prune=True, density=0.29)
    kept = s.layout.mask()[0]
    assert kept.flatten(1).sum(1).tolist() == [290, 1, 290]
    smallest = x[0].abs()[kept[0]].min()
    assert bool((x[0].abs()[~kept[0]] <= smallest).all())
    assert bool(kept[1, 3, 4]) and bool(kept[2, 5, 5])
    ones = kept[2].flatten().nonzero().flatten().tolist()
    assert ones == [*range(289), 255] or ones == sorted({*range(289), 255} | {289})
    assert torch.equal(bits(s.to_dense()), bits(torch.where(kept, x, 0.0)))


@pytest.mark.parametrize("kind, side", [("tile", 16), ("block", 32)])
@pytest.mark.parametrize("density", [0, 0.1, 0.5, 0.7, 1])
def test_norm_pruning_of_units(kind, side, density) -> None:
    torch.manual_seed(3)
    nq, nk = 150, 107
    x = torch.randn(nq, nk)
    s = sparsify(x, kind, prune=True, density=density, size=side)
    norms = {}
    for i, j in itertools.product(range(0, nq, side), range(0, nk, side)):
        norms[i, j] = float(x[i : i + side, j : j + side].double().square().sum())
    count = {0: 0, 0.1: len(norms) // 10, 0.5: len(norms) // 2, 0.7: len(norms) * 7 // 10,
             1: len(norms)}[density]  # fmt: skip
    expected = torch.zeros(nq, nk, dtype=torch.bool)
    for i, j in sorted(norms, key=lambda unit: -norms[unit])[:count]:
        expected[i : i + side, j : j + side] = True
    assert torch.equal(s.layout.mask()[0, 0], expected)
    assert torch.equal(s.to_dense(), torch.where(expected, x, 0.0))


def test_units_of_plus_zero_are_never_kept() -> None:
    x = torch.zeros(64, 64)
    x[0, 0] = -0.0
    assert sparsify(x, "tile", prune=True, density=0.5).layout.slots == 256
    assert sparsify(x, "block", prune=True, density=1, size=16).layout.slots == 256


LAYOUTS = {
    "row": lambda p: p.to_layout("row", 30, 44),
    "block": lambda p: p.to_layout("block", 30, 44, size=16),
    "mixed": lambda p: p.to_layout("mixed", 30, 44, size=16),
}
PATTERN = P.window(4) | P.global_keys([3, 40])
HEADS = P.per_head([PATTERN, P.causal(), PATTERN])


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(
    "pattern, lead",
    [
        (PATTERN, ()),
        (PATTERN, (2, 3)),
        (HEADS, (3,)),
        (HEADS, (2, 3)),
        (P.per_batch([PATTERN, P.causal()]), (2, 3)),
        (P.per_batch([HEADS, HEADS & P.causal()]), (2, 3)),
    ],
)
def test_sampling(kind, pattern, lead) -> None:
    layout = LAYOUTS[kind](pattern)
    x = torch.randn(*lead, 30, 44, dtype=torch.float64, requires_grad=True)
    s = sparsify(x, layout=layout)
    kept = layout.mask().expand(*((1,) * (2 - len(lead))), *lead, 30, 44).reshape(x.shape)
    assert s.layout is layout
    assert torch.equal(s.to_dense(), torch.where(kept, x, 0.0))
    weight = torch.randn_like(s.values)
    (s.values * weight).sum().backward()
    expected = s.with_values(weight).to_dense()
    assert torch.equal(x.grad, expected)
    again = sparsify(x.detach(), kind, layout=layout)
    assert torch.equal(again.values, s.values)


def test_sampling_tiles_and_groups() -> None:
    w = torch.randn(40, 24)
    for kind, option in (("tile", {"density": 0.5}), ("nm", {})):
        layout = sparsify(w, kind, prune=True, **option).layout
        x = torch.randn(40, 24, requires_grad=True)
        s = sparsify(x, layout=layout)
        kept = layout.mask()[0, 0]
        assert torch.equal(s.to_dense(), torch.where(kept, x, 0.0))
        s.to_dense().sum().backward()
        assert torch.equal(x.grad, kept.float())
        assert torch.equal(sparsify(x.T, layout=layout.T).to_dense(), s.to_dense().T)


def test_gradcheck_of_values() -> None:
    layout = sparsify(torch.randn(5, 9), "nm", prune=True, n=1, m=2).layout
    x = torch.randn(2, 5, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: sparsify(t, layout=layout).values, x)


@hypothesis.given(data=st.data())
def test_conversions_commute(data) -> None:
    """The same positions reach the same dense matrix through every kind."""
    shape = (data.draw(st.integers(0, 40)), data.draw(st.integers(0, 40)))
    raw = data.draw(st.lists(st.integers(-2, 2), min_size=9, max_size=9))
    x = torch.tensor(raw, dtype=torch.float32).repeat(200)[: shape[0] * shape[1]].reshape(shape)
    for kind in KINDS:
        s = sparsify(x, kind, prune=kind == "nm", n=3, m=3)
        assert torch.equal(s.to_dense(), x)
        assert torch.equal(sparsify(s.to_dense(), layout=s.layout).values, s.values)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes(dtype) -> None:
    with pytest.raises(
        DtypeError, match=r"float16, torch\.bfloat16, torch\.float32, torch\.float64"
    ):
        sparsify(torch.zeros(4, 4).to(dtype), "row")
    with pytest.raises(DtypeError, match="list"):
        sparsify([[1.0]], "row")


def test_errors_say_where_and_what_to_do() -> None:
    x = torch.randn(2, 20, 40)
    row = P.causal().to_layout("row", 20, 40)
    heads = P.per_head([P.causal()] * 2 + [P.window(1)]).to_layout("row", 20, 40)
    batch = P.per_batch([P.causal(), P.window(1)]).to_layout("row", 20, 40)
    y = torch.zeros(2, 3, 20, 42)
    y[1, 2, 5, 41], y[1, 2, 5, 40], y[1, 2, 7, :3] = 1, 1, 1
    cases = [
        (lambda: sparsify(x, "coo"), LayoutError, "choose one of"),
        (lambda: sparsify(x), LayoutError, "choose one of"),
        (lambda: sparsify(x, "tile"), LayoutError, "one 2-D weight"),
        (lambda: sparsify(x, "panel"), LayoutError, "'panel' holds one 2-D weight"),
        (lambda: sparsify(x[0], "panel", axis="rows"), LayoutError, "axis='rows' has no effect"),
        (lambda: sparsify(x[0], "row", axis="rows"), LayoutError, "axis='rows' has no effect"),
        (lambda: sparsify(x[0], "panel", prune=True, density=0.5), LayoutError, "axis=None; c"),
        (lambda: sparsify(x[0], "panel", prune=True, density=0.5, axis=0), LayoutError, "axis=0"),
        (lambda: sparsify(x[0, 0], "row"), ShapeError, "nq, nk"),
        (lambda: sparsify(x[None, None], "row"), ShapeError, "0-2 leading"),
        (lambda: sparsify(x, "block", size=17), LayoutError, "size 17"),
        (lambda: sparsify(x, "nm", n=3, m=2), LayoutError, "1 ≤ n ≤ m"),
        (lambda: sparsify(x, "nm", n=1, m=0), LayoutError, "1 ≤ n ≤ m"),
        (lambda: sparsify(y, "nm", n=2), LayoutError,
         r"3 elements .* batch 1, head 2, row 7, columns 0 to 3 \(group 0\), one of 1 .*prune=Tr"),
        (lambda: sparsify(y, "nm", n=1), LayoutError, "row 5, columns 40 to 41 .*one of 2"),
        (lambda: sparsify(x, "row", density=0.5), LayoutError, "pass prune=True"),
        (lambda: sparsify(x, "row", prune=True), LayoutError, "from 0 to 1"),
        (lambda: sparsify(x, "row", prune=True, density=1.5), LayoutError, "from 0 to 1"),
        (lambda: sparsify(x, "nm", prune=True, density=0.5), LayoutError, "n and m say"),
        (lambda: sparsify(x, layout=P.causal()), LayoutError, "to_layout"),
        (lambda: sparsify(x, "block", layout=row), LayoutError, "leave kind out"),
        (lambda: sparsify(x, prune=True, layout=row), LayoutError, "already says"),
        (lambda: sparsify(x[:, :19], layout=row), ShapeError, r"matrices of \(20, 40\)"),
        (lambda: sparsify(x, layout=heads), ShapeError, r"leading dimensions \(any, 3\)"),
        (lambda: sparsify(x[0], layout=heads), ShapeError, "leading dimensions"),
        (lambda: sparsify(x, layout=batch), ShapeError, r"leading dimensions \(2, any\)"),
    ]  # fmt: skip
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()
