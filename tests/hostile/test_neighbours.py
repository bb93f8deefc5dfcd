"""Objects of other libraries whose fields contradict each other: refused, or read as they are.

scipy, torch, CuPy and FlexAttention check little of what they are made of, so all of these exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, noop_mask

import mixgrain as mg
from mixgrain import interchange as X
from mixgrain import patterns as P
from mixgrain.formats.errors import MixgrainError

sp = pytest.importorskip("scipy.sparse")
T = torch.tensor
META = torch.device("meta")


def ints(*numbers: Any) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def scipy(form: str = "csr", **fields: Any) -> Callable[[], object]:
    """from_scipy of the identity, some of its fields replaced."""

    def call() -> object:
        if form == "bsr":
            matrix = sp.bsr_array(np.eye(32, dtype=np.float32), blocksize=(16, 16))
        else:
            matrix = sp.eye_array(4, dtype=np.float32, format=form)
        for name, value in fields.items():
            setattr(matrix, name, value)
        return X.from_scipy(matrix)

    return call


def compressed(offsets: Any, inner: Any, data: Any, shape: tuple[int, ...],
               make: Any = torch.sparse_csr_tensor) -> Callable[[], object]:  # fmt: skip
    def call() -> object:
        data_ = torch.as_tensor(data)
        made = make(T(offsets), T(inner), data_, shape, check_invariants=False)
        return X.from_torch(made)

    return call


def coo(place: Any, shape: tuple[int, ...], **claims: Any) -> torch.Tensor:
    data = torch.arange(1.0, 1.0 + len(place[0]))
    return torch.sparse_coo_tensor(T(place), data, shape, check_invariants=False, **claims)


def grid(*rows: Any) -> torch.Tensor:
    return T(rows, dtype=torch.int32)[None, None]


ONE_EACH, LISTS = grid(1, 1), grid([0, 0], [1, 0])


def flex(
    counts: Any = ONE_EACH,
    columns: Any = LISTS,
    full: Any = (None, None),
    size: Any = (16, 16),
    shape: Any = (32, 32),
    mask_mod: Any = noop_mask,
) -> BlockMask:
    return BlockMask(shape, counts, columns, *full, None, None, None, None, size, mask_mod)


def kept(*fields: Any, **named: Any) -> Callable[[], int]:
    return lambda: P.from_block_mask(flex(*fields, **named)).nnz(32, 32)


def lying(**fields: Any) -> Any:
    return type("Lying", (), fields)()


def edges(index: Any, shape: Any = (2, 2), **named: Any) -> Callable[[], object]:
    return lambda: X.from_edges(index, shape, **named)


def bsa(index: Any, **named: Any) -> Callable[[], object]:
    return lambda: X.from_bsa(grid(index), (16, 32), size=16, **named)


def ends(*numbers: int, dtype: torch.dtype = torch.int32) -> Callable[[], object]:
    return lambda: X.from_intervals(T(numbers, dtype=dtype).reshape(1, -1, 1), (1, 5))


def flashmask(*numbers: int, causal: bool) -> Callable[[], object]:
    given = T(numbers).expand(1, 1, 5, len(numbers))
    return lambda: X.from_flashmask(given, (5, 5), causal)


def flash(*tensors: Any) -> Callable[[], object]:
    return lambda: X.from_flash_blocks(tensors, (32, 32), 16, noop_mask)


CSC, BSR = torch.sparse_csc_tensor, torch.sparse_bsr_tensor
BLOCKS = torch.ones(2, 16, 16)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "csr: offsets fall": (scipy(indptr=ints(0, 3, 1, 3, 4)), "fall from 3 to 1 at row 1"),
    "csr: offsets from below": (scipy(indptr=ints(0, -1, 2, 3, 4)), "fall from 0 to -1"),
    "csr: offsets beyond": (scipy(indptr=ints(0, 1, 2, 3, 900)), "from 0 to 900"),
    "csr: offsets end early": (scipy(indptr=ints(0, 4)), "2 offsets, 5 expected"),
    "csr: no offsets": (scipy(indptr=ints()), "0 offsets"),
    "csr: offsets 2-D": (scipy(indptr=ints(0, 1, 2, 3, 4)[None]), "1-D expected"),
    "csr: below 0": (scipy(indices=ints(0, -1, 2, 3)), "column -1 at 1"),
    "csr: far outside": (scipy(indices=ints(0, 2**40, 2, 3)), "column 1099511627776"),
    "csr: floats": (scipy(indices=np.ones(4)), "integers expected"),
    "csr: twice": (scipy(indptr=ints(0, 2, 2, 3, 4), indices=ints(1, 1, 2, 3)), "given twice"),
    "csr: too few values": (scipy(data=np.ones(3, np.float32)), r"\(3,\), expected \(4,\)"),
    "csr: a list of values": (scipy(data=[1.0, 2.0, 3.0, 4.0]), "values of None"),
    "csr: claims columns": (scipy(_shape=(4, 2**40)), r"2\*\*31 - 1"),
    "csr: claims rows": (scipy(_shape=(2**30, 4)), "5 offsets, 1073741825 expected"),
    "csr: no shape": (scipy(_shape=None), "2-D scipy array"),
    "csr: a shape below 0": (scipy(_shape=(4, -4)), r"\(4, -4\) given"),
    "csc: far outside": (scipy("csc", indices=ints(0, 9, 2, 3)), "row 9"),
    "bsr: oblong": (scipy("bsr", data=np.ones((2, 16, 8), np.float32)), "16×8"),
    "bsr: 1-D values": (scipy("bsr", data=np.ones(2, np.float32)), r"\(2,\); \(blocks"),
    "bsr: blocks of nothing": (scipy("bsr", data=np.ones((2, 0, 0), np.float32)), "blocks, rows"),
    "bsr: outside": (scipy("bsr", indices=ints(0, 2)), "column 2 at 1"),
    "bsr: another shape": (scipy("bsr", _shape=(33, 32)), "do not divide"),
    "coo: outside": (scipy("coo", coords=(ints(0, 1, 2, 3), ints(0, 1, 2, 9))), "column 9"),
    "coo: fewer columns": (scipy("coo", coords=(ints(0, 1, 2, 3), ints(0))), "as many of each"),
    "coo: no columns": (scipy("coo", coords=(ints(0, 1, 2, 3),)), "without rows and columns"),
    "torch csr: offsets end early": (compressed([0, 3, 1], [0, 1], [1.0, 2], (2, 3)), "end at 2"),
    "torch csr: offsets from 1": (compressed([1, 2, 2], [0, 1], [1.0, 2], (2, 3)), "first of them"),
    "torch csr: below 0": (compressed([0, 1, 2], [0, -1], [1.0, 2], (2, 3)), "column -1"),
    "torch csr: far outside": (compressed([0, 1, 2], [0, 2**40], [1.0, 2], (2, 3)), "column 1099"),
    "torch csr: twice": (compressed([0, 2, 2], [2, 2], [1.0, 2], (2, 3)), "given twice"),
    "torch csr: fewer rows": (compressed([0, 2], [0, 1], [1.0, 2], (2, 3)), "3 offsets expected"),
    "torch csr: fewer values": (compressed([0, 1, 2], [0, 1], [1.0], (2, 3)), r"values \(1,\)"),
    "torch csr: claims": (compressed([0, 1, 2], [0, 1], [1.0, 2], (2, 2**40)), r"2\*\*31 - 1"),
    "torch csc: below 0": (compressed([0, 1, 2], [0, -1], [1.0, 2], (3, 2), CSC), "row -1"),
    "torch bsr: outside": (compressed([0, 1, 2], [0, 7], BLOCKS, (32, 32), BSR), "column 7"),
    "torch bsr: odd": (compressed([0, 1, 2], [0, 1], BLOCKS, (33, 32), BSR), "do not divide"),
    "torch csr: meta": (lambda: X.from_torch(torch.eye(3).to_sparse_csr().to(META)), "meta"),
    "torch coo: outside": (lambda: X.from_torch(coo([[0, 9], [0, 1]], (2, 2))), "0 9 at 1"),
    "torch coo: below 0": (lambda: X.from_torch(coo([[0, -1], [0, 1]], (2, 2))), "0 -1 at 1"),
    "torch coo: twice, as coalesced": (
        lambda: X.from_torch(coo([[1, 1], [0, 0]], (2, 2), is_coalesced=True)), "given twice"),
    "torch coo: claims": (lambda: X.from_torch(coo([[0], [0]], (4, 2**40))), r"2\*\*31 - 1"),
    "cupy: offsets beyond": (
        lambda: X.from_cupy(lying(shape=(2, 3), format="csr", indptr=ints(0, 1, 9),
                                  indices=ints(0, 1), data=np.ones(2))), "from 0 to 9"),
    "cupy: no shape": (
        lambda: X.from_cupy(lying(shape=None, format="csr", indptr=ints(0, 1, 2),
                                  indices=ints(0, 1), data=np.ones(2))), "shape None given"),
    "edges: outside": (edges(T([[0, 5], [1, 0]])), "column 5"),
    "edges: below 0": (edges(T([[0, -1], [1, 0]])), "column -1"),
    "edges: twice": (edges(T([[0, 0], [1, 1]])), r"edge \(1, 0\) is given twice"),
    "edges: weights on meta": (
        edges(T([[0, 1], [1, 0]]), edge_weight=torch.ones(2, device=META)), "on meta"),
    "edges: on meta": (edges(torch.zeros(2, 3, dtype=torch.int64, device=META)), "on meta"),
    "block mask: a count below 0": (kept(grid(-1, 1)), "counts from -1 to 1"),
    "block mask: a count beyond": (kept(grid(3, 1)), "counts from 1 to 3"),
    "block mask: below 0": (kept(columns=grid([-1, 0], [1, 0])), r"within \[0, 2\)"),
    "block mask: outside": (kept(columns=grid([2, 0], [1, 0])), r"within \[0, 2\)"),
    "block mask: twice": (kept(grid(2, 1)), "listed twice"),
    "block mask: full and partial": (kept(full=(ONE_EACH, LISTS)), "both as full and as partial"),
    "block mask: floats": (kept(ONE_EACH.float()), "kv_num_blocks is torch.float32"),
    "block mask: on meta": (kept(ONE_EACH.to(META), LISTS.to(META)), "on meta"),
    "block mask: heads of full ones": (
        kept(full=(ONE_EACH.expand(1, 2, 2), LISTS.expand(1, 2, 2, 2))), r"expected \(1, 1, 2\)"),
    "block mask: no heads": (kept(ONE_EACH[0], LISTS[0]), "3 dimensions"),
    "block mask: no entries": (
        kept(ONE_EACH.expand(1, 1, 2)[:0], LISTS[:0]), "no entry to keep"),
    "block mask: blocks of 0": (kept(size=(0, 16)), r"BLOCK_SIZE \(0, 16\)"),
    "block mask: claims": (kept(shape=(32, 2**40)), r"2\*\*31 - 1"),
    "block mask: numbers for a mask": (
        kept(mask_mod=lambda b, h, q, k: q - k), "mask_mod gives torch.int64"),
    "block mask: True for a mask": (kept(mask_mod=lambda b, h, q, k: True), "gives a bool"),
    "block mask: half of one": (
        lambda: P.from_block_mask(lying(kv_num_blocks=3, mask_mod=None)), "BlockMask expected"),
    "flashmask: outside": (flashmask(6, causal=True), "row 6"),
    "flashmask: below 0": (flashmask(-1, causal=True), "row -1"),
    "bsa: below 0": (bsa([0, -1]), "column -1"),
    "bsa: twice": (bsa([1, 1]), "listed twice"),
    "bsa: more than listed": (bsa([0, 1], q2k_block_nums=grid(3)), "count 3"),
    "bsa: larger than a block": (bsa([0, 1], block_sizes=T([17, 1])), "block size 17"),
    "bsa: sizes of other heads": (bsa([0, 1], block_sizes=torch.ones(3, 2).int()), "block_sizes"),
    "intervals: fall": (ends(3, 1, 2), "less than the 3 before"),
    "intervals: fall, in 8 bits": (ends(3, 1, 2, dtype=torch.uint8), "less than the 3 before"),
    "intervals: outside": (ends(1, 2, 9), "end 9"),
    "flash blocks: outside": (flash(ONE_EACH, grid([0, 9], [3, 0])), "column 3"),
    "flash blocks: other heads": (
        flash(ONE_EACH.expand(1, 2, 2), LISTS.expand(1, 2, 2, 2), ONE_EACH.expand(1, 3, 2),
              LISTS.expand(1, 3, 2, 2)), r"\(1, 3\); expected the same"),
    "flash blocks: full ones without a list": (flash(ONE_EACH, LISTS, ONE_EACH, None), "NoneType"),
    "2:4: no choice": (
        lambda: X.from_semi_structured(torch.ones(32, 32).half(), torch.zeros(32, 4).short()),
        "nibble 0"),
    "dlpack: a number": (
        lambda: X.from_dlpack(lying(__dlpack__=lambda s, **k: 3,
                                    __dlpack_device__=lambda s: (1, 0))), "cannot be shared"),
    "dlpack: nowhere": (
        lambda: X.from_dlpack(lying(__dlpack__=3, __dlpack_device__=lambda s: None)), "on None"),
    "dlpack: half of it": (lambda: X.from_dlpack(lying(__dlpack__=3)), "cannot be shared"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:Sparse BSR tensor")
@pytest.mark.parametrize("what", REFUSED)
def test_what_contradicts_itself_is_refused(what: str) -> None:
    call, words = REFUSED[what]
    with pytest.raises((MixgrainError, TypeError), match=words) as caught:
        call()
    assert len(str(caught.value)) < 700


def test_what_is_never_read_may_be_anything() -> None:
    columns = grid([0, 99], [1, -7])
    assert kept(columns=columns)() == kept()() == 2 * 16 * 16
    assert torch.equal(
        X.from_flash_blocks((ONE_EACH, columns), (32, 32), 16, noop_mask).dense(32, 32),
        P.from_block_mask(flex()).dense(32, 32),
    )


def test_claims_of_order_are_not_believed() -> None:
    matrix = coo([[1, 0], [0, 1]], (2, 2), is_coalesced=True)
    assert X.from_torch(matrix).to_dense().tolist() == [[0, 2], [1, 0]]
    unsorted = compressed([0, 2, 2], [2, 0], [1.0, 2.0], (2, 3))()
    assert unsorted.to_dense().tolist() == [[2, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_limits_that_the_dtype_of_an_index_cannot_hold(dtype: torch.dtype) -> None:
    """Compared in eight bits, a limit of 256 would be 0."""
    side = {torch.uint8: 300, torch.int16: 40000, torch.int32: 2**31 - 1}[dtype]
    pattern = X.from_edges(T([[200], [1]], dtype=dtype), (2, side))
    assert pattern.row(1, 2, side).tolist() == [200]
    runs = X.from_intervals(T([1, 2, 200], dtype=dtype).reshape(1, 3, 1), (1, side))
    assert runs.nnz(1, side) == 199


def test_empty_things() -> None:
    none = torch.empty(2, 0, dtype=torch.int64)
    for shape in ((0, 0), (0, 3), (3, 0)):
        assert X.from_edges(none, shape).nnz(*shape) == 0
        assert X.from_edges(none, shape, torch.empty(0)).to_dense().shape == shape
        assert X.from_scipy(sp.csr_array(shape, dtype=np.float32)).to_dense().shape == shape
        assert X.from_torch(torch.zeros(shape).to_sparse_csr()).to_dense().shape == shape
    assert X.from_flashmask(torch.zeros(1, 1, 0, 1).int(), (5, 0), True).nnz(5, 0) == 0
    assert X.from_intervals(torch.zeros(1, 1, 0).int(), (0, 5)).nnz(0, 5) == 0


def test_views_of_numpy() -> None:
    """Negative strides and read-only memory give what their copies give, and are left alone."""
    index = np.array([[0, 1], [2, 0]])
    turned = index[::-1, ::-1]
    frozen = np.broadcast_to(np.array([2.0, 3.0], np.float32), (2,))
    flow = "target_to_source"
    got, copied = (
        X.from_edges(pairs, (3, 2), weights, flow=flow).to_dense()
        for pairs, weights in ((turned, frozen), (turned.copy(), frozen.copy()))
    )
    assert torch.equal(got, copied) and got.tolist() == [[0, 2], [0, 0], [3, 0]]
    assert index.tolist() == [[0, 1], [2, 0]] and frozen.tolist() == [2, 3]


def test_a_layout_has_arrays_of_its_own() -> None:
    """What was checked stays so, whatever becomes of the arrays it was made from."""
    row = T([0, 1, 2]), T([0, 1], dtype=torch.int32)
    masks = torch.full((1, 16, 2), 7, dtype=torch.uint8)
    block = tuple(T(a, dtype=torch.int32) for a in ([0, 1, 2], [0, 1], [0, 0]))
    choice = T([0, 1], dtype=torch.uint8).repeat(1, 4, 2, 1)
    tile = T([0, 1]), T([0, 1])
    made = {
        mg.RowLayout.from_csr((2, 3), *row): row,
        mg.BlockLayout.from_blocks((32, 48), 16, *block, masks): (*block, masks),
        mg.NMLayout.from_choice(choice, (4, 8), 2, 4): (choice,),
        mg.TileLayout.from_tiles(*tile, (32, 48)): tile,
    }
    for layout, arrays in made.items():
        before = layout.mask()
        for array in arrays:
            array.fill_(113)
        layout.validate()
        assert torch.equal(layout.mask(), before), layout
