"""Gradients of a layer's blocks, tiles and 2:4 on Hopper, from rows of tokens, on wgmma."""

import pytest
import torch
from test_cuda_block import poisoned as poisoned  # a fixture
from torch import Tensor

from mixgrain.cuda.device import facts
from mixgrain.formats import patterns as P
from mixgrain.formats.cache import clear_caches
from mixgrain.formats.layout import Layout
from mixgrain.formats.sparse import SparseTensor
from mixgrain.formats.sparsify import sparsify
from mixgrain.formats.tile import TileLayout
from mixgrain.primitives.cuda import (
    block_weights_sm90,
    dense_tile_sm90,
    nm_weights_sm90,
    tile_sddmm,
    tile_weights_sm90,
)
from mixgrain.primitives.linear import linear
from mixgrain.primitives.plans import cuda_tile
from mixgrain.primitives.sddmm import sddmm

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
HALVES = (torch.float16, torch.bfloat16)
BLOCKS = ("block16", "block32", "block64", "block128")
# Blocks of 16 go two ways; those with dead elements, and at edges, only one.
KINDS = (*BLOCKS, "picked16", "tile", "2:4", "1:2")


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """Names of the kernels of gradients, which take all that they can, whatever they gain."""
    if not facts(0).hopper:
        pytest.skip("no Hopper")
    found = []
    for module in (block_weights_sm90, nm_weights_sm90, tile_weights_sm90):
        monkeypatch.setattr(module, "kernel", _noting(module.kernel, found))
    monkeypatch.setattr(block_weights_sm90, "LAUNCHES", 1e12)
    monkeypatch.setattr(tile_sddmm, "CALL", 1e12)
    clear_caches()
    yield found
    clear_caches()


def _noting(kernel, names):
    def noting(wanted, device):
        names.append(wanted.name)
        return kernel(wanted, device)

    return noting


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    cost = 1e11 if request.param == "picked16" else 0.0
    monkeypatch.setattr(block_weights_sm90, "_cost", lambda *_: cost)
    return request.param


def name_of(kind: str, layout: Layout | None = None) -> str:
    if ":" in kind:
        return "sddmm_pick_nm_sm90"
    dead = layout is not None and layout.live() is not None
    whole = kind == "tile" or (kind == "picked16" and not dead)
    return "sddmm_pick_tile_sm90" if whole else "sddmm_tokens_sm90"


def integers(*shape: int, seed: int = 0) -> Tensor:
    """Small integers as float32 on the CPU."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def layout_of(kind: str, rows: int, columns: int, d: float = 0.4) -> Layout:
    """Some lines keep nothing; on the CPU."""
    g = torch.Generator().manual_seed(rows)
    if ":" in kind:
        n = int(kind[0])
        dense = torch.randn(rows, columns, generator=g).half()
        return sparsify(dense, "nm", prune=True, n=n, m=2 * n).layout
    size = 16 if kind == "tile" else int(kind.removeprefix("block").removeprefix("picked"))
    kept = torch.rand(-(-rows // size), -(-columns // size), generator=g) < d
    kept[1::5], kept[:, 2::7], kept[0, 0] = False, False, True
    if kind == "tile":
        return TileLayout.from_tile_mask(kept, (rows, columns))
    return P.blocks(kept, size).to_layout("block", rows, columns, size=size)


def partial(kind: str, rows: int, columns: int) -> Layout:
    """Blocks with dead elements; all others have none but at the edges."""
    if not kind.startswith("block"):
        return layout_of(kind, rows, columns)
    pattern = P.dilated(60, 3) | P.random(0.002, 0)
    return pattern.to_layout("block", rows, columns, size=int(kind[5:]))


def gradient(x: Tensor, layout: Layout, values: Tensor, grad: Tensor) -> Tensor:
    """Of the values of a layer."""
    values = values.detach().requires_grad_()
    y = linear(x, SparseTensor(layout, values))
    return torch.autograd.grad(y, values, grad)[0]


def exact(layout: Layout, count: int, dtype: torch.dtype, lead=()) -> None:
    """As the reference on the CPU, to the bit; zero at dead slots."""
    rows, columns = layout.shape
    values = integers(layout.slots, seed=1)
    x, grad = (integers(*lead, count, n, seed=2) for n in (columns, rows))
    right = gradient(x, layout, values, grad)
    there = (t.to(DEVICE, dtype) for t in (values, grad))
    ours = gradient(x.to(DEVICE, dtype), layout.to(DEVICE), *there)
    assert ours.is_contiguous() and torch.equal(ours.cpu(), right.to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("count", [1, 65, 700])
@pytest.mark.parametrize("shape", [(640, 768), (8, 40), (128, 4096), (4096, 128), (208, 2056)])
def test_gradients_are_exact(shape, count, dtype, kind, poisoned, taken):
    layout = layout_of(kind, *shape)
    exact(layout, count, dtype)
    # One token is a row as well: kernels of scores take that of 2:4.
    assert taken == [] if count == 1 and ":" in kind else taken == [name_of(kind, layout)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("count", [40, 257])
@pytest.mark.parametrize("shape", [(584, 760), (136, 1400), (1400, 136)])
def test_dead_elements_and_edges_are_exact(shape, count, dtype, kind, poisoned, taken):
    layout = partial(kind, *shape)
    exact(layout, count, dtype)
    assert taken == [name_of(kind, layout)]


@pytest.mark.parametrize("d", [0.02, 1.0])
def test_lines_of_every_length(d, kind, taken):
    """A panel alone; as many as a CTA takes, and more."""
    layouts = [layout_of(kind, *shape, d) for shape in ((512, 2048), (264, 1000))]
    exact(layouts[0], 70, torch.float16)
    exact(layouts[1], 9, torch.float16, lead=(2, 3))
    assert taken == [name_of(kind, layout) for layout in layouts]


@pytest.mark.parametrize("wide", dense_tile_sm90.STAGES)
@pytest.mark.parametrize("kind", ["picked16", "tile", "2:4", "1:2"], indirect=True)
@pytest.mark.parametrize("shape", [(640, 768), (8, 40), (136, 1400)])
def test_tiles_of_both_widths_are_exact(shape, wide, kind, monkeypatch, poisoned, taken):
    for module in (nm_weights_sm90, tile_weights_sm90):
        monkeypatch.setattr(module, "wide_of", lambda *_: wide)
    exact(layout_of(kind, *shape), 130, torch.float16)
    assert taken


def test_large_layers_are_exact(kind, taken):
    """More CTAs than multiprocessors."""
    layout = layout_of(kind, 4096, 4096, 0.2).to(DEVICE)
    g = torch.Generator(DEVICE).manual_seed(0)
    x, grad = (
        torch.randint(-2, 3, (600, 4096), device=DEVICE, generator=g).half() for _ in range(2)
    )
    ours = gradient(x, layout, torch.ones(layout.slots, device=DEVICE).half(), grad)
    places = SparseTensor(layout, torch.arange(1.0, layout.slots + 1, device=DEVICE).double())
    kept = places.to_dense() != 0
    right = torch.where(kept, grad.double().T @ x.double(), 0).half()
    assert torch.equal(SparseTensor(layout, ours).to_dense(), right) and taken


def test_what_is_not_kept_does_not_matter(kind, taken):
    """A value meets its row of gradients and its column of x, nothing else; dead slots nothing."""
    layout = layout_of(kind, 200, 344)
    there, ones = layout.to(DEVICE), torch.ones(layout.slots)
    x, grad = (integers(200, n, seed=2).to(DEVICE).half() for n in (344, 200))
    values = ones.to(DEVICE).half()
    right = gradient(x, there, values, grad)
    x[150, 171], grad[3, 104] = torch.nan, torch.inf
    broken = gradient(x, there, values, grad)
    dead = layout.live()
    if dead is not None:
        assert not broken[~dead.to(DEVICE)].any()
    ours, right = (SparseTensor(there, t).to_dense() for t in (broken, right))
    touched = torch.zeros(200, 344, dtype=torch.bool, device=DEVICE)
    touched[104], touched[:, 171] = True, True
    assert torch.equal(ours[~touched], right[~touched])
    kept = SparseTensor(layout, ones).to_dense().to(DEVICE) != 0
    assert not ours[touched & kept].isfinite().any() and taken


def test_the_long_way_has_the_same_bits(kind, taken):
    """Operators, which torch.compile traces."""
    layout, g = layout_of(kind, 208, 336).to(DEVICE), torch.Generator(DEVICE).manual_seed(0)
    x, grad = (torch.randn(70, n, device=DEVICE, generator=g).half() for n in (336, 208))
    values = torch.randn(layout.slots, device=DEVICE, generator=g).half()
    short = gradient(x, layout, values, grad)
    with torch.device(DEVICE):  # something watches: the operators
        long = gradient(x, layout, values, grad)
    assert torch.equal(short, long) and taken == [name_of(kind)] * 2


@pytest.mark.parametrize("kind", [*BLOCKS, "picked16", "2:4"], indirect=True)
def test_products_of_rows_of_tokens(kind, taken):
    """Sddmm, scaled; of blocks so many matrices that CTAs take several tiles."""
    layout = layout_of(kind, 208, 336)
    lead = () if ":" in kind else (70,)
    q, k = integers(*lead, 70, 208, seed=3), integers(*lead, 70, 336, seed=2)
    right = sddmm(q.mT, k.mT, layout, scale=0.5).values.half()
    ours = sddmm(*(t.to(DEVICE).half().mT for t in (q, k)), layout.to(DEVICE), scale=0.5).values
    assert torch.equal(ours.cpu(), right) and taken == [name_of(kind)]


@pytest.mark.parametrize("wide", dense_tile_sm90.STAGES)
def test_many_matrices_of_tiles(wide, monkeypatch, poisoned, taken):
    """CTAs take tiles of several of them, and edges."""
    monkeypatch.setattr(tile_weights_sm90, "wide_of", lambda *_: wide)
    layout, free, tokens = layout_of("tile", 200, 344).to(DEVICE), 70, 130
    q, k = (integers(free, 1, tokens, n, seed=n).to(DEVICE).half().mT for n in layout.shape)
    part = cuda_tile.part(layout)
    ours = tile_sddmm.sddmm(q, k, None, False, part, 0.5, torch.float16)
    kept = SparseTensor(layout, torch.ones(layout.slots, device=DEVICE)).to_dense() != 0
    for n in range(free):
        right = torch.where(kept, 0.5 * (q[n, 0].double() @ k[n, 0].double().T), 0).half()
        assert torch.equal(SparseTensor(layout, ours[n]).to_dense(), right)
    assert taken == ["sddmm_pick_tile_sm90"]


@pytest.mark.parametrize("count", [3, 300])
def test_no_read_is_too_early(count, kind, taken):
    """Operands change from call to call and caches are cold: what was there before shows."""
    g = torch.Generator(DEVICE).manual_seed(0)
    junk = torch.empty(1 << 27, dtype=torch.uint8, device=DEVICE)
    layers = []
    for n in range(3):
        layout = layout_of(kind, 1024, 1536 + 64 * n)
        x, grad = (
            torch.randint(-2, 3, (count, size), device=DEVICE, generator=g)
            for size in (layout.shape[1], 1024)
        )
        layout = layout.to(DEVICE)
        places = SparseTensor(layout, torch.ones(layout.slots, device=DEVICE)).to_dense() != 0
        right = torch.where(places, grad.double().T @ x.double(), 0).half()
        values = torch.ones(layout.slots, device=DEVICE).half()
        layers.append((x.half(), layout, values, grad.half(), right))
    for n in range(60):
        *given, right = layers[n % 3]
        if n % 20 == 0:
            clear_caches()
        junk.fill_(n)
        ours = SparseTensor(given[1], gradient(*given)).to_dense()
        assert torch.equal(ours, right)
    assert taken


@pytest.mark.parametrize("shape", [(640, 2048), (2056, 4104)])
def test_repeats_are_alike(shape, kind, taken):
    """A race would move a bit in one of 250; CTAs take a tile, and several with edges."""
    layout, g = layout_of(kind, *shape).to(DEVICE), torch.Generator(DEVICE).manual_seed(0)
    x, grad = (torch.randn(200, n, device=DEVICE, generator=g).half() for n in shape[::-1])
    values = torch.randn(layout.slots, device=DEVICE, generator=g).half()
    first = gradient(x, layout, values, grad)
    assert all(torch.equal(gradient(x, layout, values, grad), first) for _ in range(250))
    assert taken
