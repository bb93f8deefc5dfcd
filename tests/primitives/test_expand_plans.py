"""Tables of RowLayout for the kernel that expands entries to dense tiles, read as it reads them."""

import pytest
import torch
from cases import row_layout
from torch import Tensor

from mixgrain.cuda.device import pretending
from mixgrain.cuda.recording import Launch, Recording, recorded
from mixgrain.primitives.cuda import expand_sm90, launch_code
from mixgrain.primitives.cuda.calls import describe
from mixgrain.primitives.plans import cuda_expand, cuda_row
from mixgrain.primitives.plans.plan import PartPlan

SHAPES = [(203, 331), (16, 16), (700, 5), (5, 1300), (1040, 264)]


def part_of(shape: tuple[int, int], d: float = 0.1) -> tuple[Tensor, PartPlan]:
    """The masks of three entries, the first and the last alike, and their part."""
    g = torch.Generator().manual_seed(0)
    masks = torch.rand(2, *shape, generator=g) < torch.tensor([d, d / 8])[:, None, None]
    masks[:, 1::7] = False
    return masks[[0, 1, 0]], cuda_row.part(row_layout(masks, (0, 1, 0), (1, 3)))


def side_of(part: PartPlan, transposed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Items, splits, indices and order."""
    columns, items, splits, t_rows, order, t_items, t_splits = part.tensors
    return (t_items, t_splits, t_rows, order) if transposed else (items, splits, columns, None)


@pytest.mark.parametrize("tall", [64, 128])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_hold_every_entry_at_its_place(shape, transposed, tall):
    masks, part = part_of(shape)
    numbers = torch.zeros(masks.shape, dtype=torch.int64)
    numbers[masks] = torch.arange(1, int(masks.sum()) + 1)  # slot + 1
    numbers = numbers.mT if transposed else numbers
    rows, inner = numbers.shape[1:]
    items, _, indices, order = side_of(part, transposed)
    made = cuda_expand.table(items, indices, order, 3, rows, inner, tall)
    sizes = cuda_expand.sizes(items, indices, 3, rows, inner, tall)
    everything = torch.ones(len(sizes), dtype=torch.bool)
    records = cuda_expand.taken_records(sizes[:, 1], everything)
    lines = -(-rows // tall)
    assert sorted(records[:, 0].tolist()) == list(range(3 * lines))
    assert int(records[:, 2].sum()) == len(made.chunks) - 3
    found = torch.zeros(3, lines * tall, -(-inner // 64) * 64, dtype=torch.int64)
    for line, first, count in records.tolist():
        positions = 0
        for chunk in range(first, first + count):
            number, begin = made.chunks[chunk].tolist()
            end = int(made.chunks[chunk + 1, 1])
            slot, byte = made.scattered[begin:end].long().T
            assert end > begin and bool((slot.diff() > 0).all())
            byte = byte - 1
            row, piece, within = byte // 128, byte // 16 % 8, byte // 2 % 8
            place = 64 * number + (piece ^ (row % 8)) * 8 + within
            tile = found[line // lines, line % lines * tall :]
            assert not tile[row, place].any()
            tile[row, place] = slot + 1
            positions += end - begin
        assert sizes[line].tolist() == [positions, count]
    assert not made.chunks[-3:, 0].any() and (made.chunks[-3:, 1] == len(indices)).all()
    assert torch.equal(found[:, :rows, :inner], numbers)
    assert int(found.count_nonzero()) == len(indices)


@pytest.mark.parametrize("tall", [64, 128])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (300, 2000)])
def test_what_is_left_are_the_rows_of_the_other_lines(shape, transposed, tall):
    _, part = part_of(shape, d=0.9)
    rows = shape[1 if transposed else 0]
    items, splits, *_ = side_of(part, transposed)
    lines = -(-rows // tall)
    taken = torch.arange(3 * lines) % 2 == 0
    rest, cut, long = cuda_expand.left(items, splits, taken, rows, tall)
    away = {e * rows + r for e in range(3) for r in range(rows) if taken[e * lines + r // tall]}
    assert rest.tolist() == [item for item in items.tolist() if item[0] not in away]
    assert cut.tolist() == [split for split in splits.tolist() if split[0] not in away]
    assert ((rest[:, 1] & 0xFFFF) > cuda_row.SHORT).tolist() == [i < long for i in range(len(rest))]


def test_which_kernel_it_is_depends_on_nothing_beside_a_line():
    sizes = torch.tensor([[52_000, 128], [410, 128], [0, 0], [8192, 1], [60, 1]])
    taken = expand_sm90.chosen(sizes, 8192, 512, 132)
    assert taken.tolist() == [True, False, False, True, False]
    for n in range(len(sizes)):
        assert expand_sm90.chosen(sizes[n : n + 1], 8192, 512, 132).item() == taken[n]
    # A product too small for the device is cheaper to gather.
    assert not expand_sm90.chosen(sizes[:1], 128, 64, 132).any()


HALF, FLOAT = torch.float16, torch.float32


def launched(
    name: str, arch: str, x: Tensor, value: torch.dtype = HALF, keep: Tensor | None = None
) -> list[str]:
    """The kernels of a product with 1000 × 700, half of which is kept in one of two entries."""
    g = torch.Generator().manual_seed(0)
    masks = torch.rand(2, 1000, 700, generator=g) < torch.tensor([0.5, 0.001])[:, None, None]
    plan = cuda_row.cuda(row_layout(masks, (0, 1), (1, 2)))
    values = torch.empty(x.shape[0], plan.dims[0], dtype=value)
    recording = Recording(0)
    described = describe(recording, (values, x, keep, False, *plan, 1.0, x.dtype))
    with pretending(arch), recorded(recording):
        launch_code(name)(*described)
    return [step.kernel.wanted.name for step in recording.steps if isinstance(step, Launch)]


@pytest.mark.parametrize("name, inner", [("spmm", 700), ("spmm_t", 1000)])
def test_dense_lines_are_expanded_and_thin_ones_gathered(name, inner):
    x = torch.empty(1, 2, inner, 1024, dtype=HALF)
    both = launched(name, "90a", x)
    assert both[0] == "spmm_expand_sm90" and set(both[1:]) == {"spmm_row"}
    assert set(launched(name, "90a", x.expand(70, -1, -1, -1))) == set(both)
    odd = torch.empty(1, 2 * inner * 1024 + 3, dtype=HALF)[:, :-3].view(1, 2, inner, 1024)
    assert launched(name, "90a", odd) == both
    # What there is no expansion for: other devices, dtypes, masks, few columns.
    keep = torch.ones(1, 2, 700, dtype=torch.bool)
    for others in (
        launched(name, "90", x),
        launched(name, "90a", x.float(), FLOAT),
        launched(name, "90a", x, FLOAT),
        launched(name, "90a", x, keep=keep),
        launched(name, "90a", x[..., :8].contiguous()),
    ):
        assert "spmm_row" in others and "spmm_expand_sm90" not in others
