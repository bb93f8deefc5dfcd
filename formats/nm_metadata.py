"""How N:M metadata is stored: which n of every m neighbours a group keeps, in bits.

Four encodings; in each, a *choice* is the rising indices (0 … m − 1) that one group keeps:

    encoding       one group is         stored as
    "2:4"          4 columns, 2 kept    a nibble i0 | i1 << 2:  4  8  9  12  13  14
    "1:2-half"     2 columns, 1 kept    two pairs share a 2:4 nibble: i0 | (2 + i1) << 2:
                                         8  9  12  13
    "1:2-float32"  2 columns, 1 kept    a nibble per pair: 4 keeps the first, 14 the second
    "bytes"        m columns, n kept    one uint8 per slot

A float32 is two half-precision halves wide, so keeping the first of two floats is keeping halves 0
and 1 of four (nibble 4), the second halves 2 and 3 (nibble 14).

Four nibbles make an int16 word, lowest columns in the lowest bits. The words of a matrix whose rows
come in multiples of 32 are reordered as CUTLASS does (ColumnMajorInterleaved<2> after a swizzle of
2×2 words), which is what torch's semi-structured tensors hold and sparse tensor cores want. Write
row = 32 R + 16 a + 8 b + g and word column = 2 C + d. The order in memory is then simply

    C, R, g, a, d, b        (slowest … fastest)

so that 32 lanes read one int32 each, two neighbouring words, for 32 rows × 2 word columns. Blocks
of 16 rows cannot be swizzled and hold plain row-major words.

Source: PTX ISA, "Sparse matrix storage"; CUTLASS host_reorder.h as restated by
torch.sparse._semi_structured_conversions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import LayoutError

# n, m, columns one int16 word covers, legal nibbles.
_NIBBLES: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "2:4": (2, 4, 16, (4, 8, 9, 12, 13, 14)),
    "1:2-half": (1, 2, 16, (8, 9, 12, 13)),
    "1:2-float32": (1, 2, 8, (4, 14)),
}

# Sparse tensor cores take whole 32 × 64 tiles; a matrix in one of the nibble encodings is padded.
ROWS, COLUMNS = 32, 64


def encoding_for(n: int, m: int, dtype: torch.dtype) -> str:
    """The encoding that hardware reads for values of ``dtype``, "bytes" where there is none."""
    if (n, m) == (2, 4):
        return "2:4"
    if (n, m) == (1, 2):
        return "1:2-half" if dtype.itemsize == 2 else "1:2-float32"
    return "bytes"


def check_encoding(n: int, m: int, encoding: str) -> None:
    """Raise LayoutError unless 1 ≤ n ≤ m ≤ 16 and ``encoding`` can hold n:m."""
    if not (isinstance(n, int) and isinstance(m, int) and 1 <= n <= m <= 16):
        raise LayoutError(
            f"N:M of {n!r:.40}:{m!r:.40}: expected ints 1 ≤ n ≤ m ≤ 16; choose e.g. n=2, m=4"
        )
    if not isinstance(encoding, str):
        raise LayoutError(f"N:M encoding {encoding!r:.40}; choose one of {[*_NIBBLES, 'bytes']}")
    if encoding != "bytes" and _NIBBLES.get(encoding, (0, 0))[:2] != (n, m):
        fits = [name for name, row in _NIBBLES.items() if row[:2] == (n, m)]
        raise LayoutError(
            f"N:M encoding {encoding!r:.40} does not hold {n}:{m}; use one of {[*fits, 'bytes']}"
        )


def padded(rows: int, columns: int, m: int, encoding: str) -> tuple[int, int]:
    """Rows and groups that are stored for a matrix of rows × columns: whole hardware tiles."""
    if encoding == "bytes":
        return rows, -(-columns // m)
    return -(-rows // ROWS) * ROWS, -(-columns // COLUMNS) * COLUMNS // m


def metadata_shape(
    grid: tuple[int, int, int, int], encoding: str, m: int
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the metadata of a grid (matrices, rows, groups, n)."""
    if encoding == "bytes":
        return grid, torch.uint8
    return (*grid[:2], grid[2] * m // _NIBBLES[encoding][2]), torch.int16


def _swizzled(rows: int, words: int) -> bool:
    return rows % ROWS == 0 and words % 2 == 0


def swizzle(words: Tensor) -> Tensor:
    """Row-major words (matrices, rows, words) in hardware order, same shape."""
    count, rows, columns = words.shape
    if not _swizzled(rows, columns):
        return words.contiguous()
    split = words.reshape(count, rows // 32, 2, 2, 8, columns // 2, 2)  # R a b g C d
    return split.permute(0, 5, 1, 4, 2, 6, 3).reshape(count, rows, columns)


def unswizzle(words: Tensor) -> Tensor:
    """The inverse of ``swizzle``."""
    count, rows, columns = words.shape
    if not _swizzled(rows, columns):
        return words
    split = words.reshape(count, columns // 2, rows // 32, 8, 2, 2, 2)  # C R g a d b
    return split.permute(0, 2, 4, 6, 3, 1, 5).reshape(count, rows, columns)


def pack(choice: Tensor, encoding: str) -> Tensor:
    """Metadata of a choice.

    Args:
        choice: uint8 (matrices, rows, groups, n), rising indices within each group, with rows and
            groups as ``padded`` gives them (or one block of 16 … 64 per matrix).
        encoding: one of the four above.

    Returns:
        int16 (matrices, rows, words) in hardware order; for "bytes" the choice itself.
    """
    if encoding == "bytes":
        return choice.contiguous()
    if encoding == "2:4":
        nibble = choice[..., 0] | choice[..., 1] << 2
    elif encoding == "1:2-half":
        nibble = choice[..., 0::2, 0] | (choice[..., 1::2, 0] + 2) << 2
    else:
        nibble = 4 + 10 * choice[..., 0]
    byte = (nibble[..., 0::2] | nibble[..., 1::2] << 4).to(torch.int16)
    return swizzle(byte[..., 0::2] | byte[..., 1::2] << 8)


def _nibbles(metadata: Tensor) -> Tensor:
    """uint8 (matrices, rows, nibbles), lowest columns first."""
    words = unswizzle(metadata)
    return torch.stack([(words >> shift & 15).byte() for shift in (0, 4, 8, 12)], -1).flatten(-2)


def unpack(metadata: Tensor, encoding: str) -> Tensor:
    """The choice that ``pack`` was given: uint8 (matrices, rows, groups, n)."""
    if encoding == "bytes":
        return metadata
    nibble = _nibbles(metadata)
    if encoding == "2:4":
        return torch.stack((nibble & 3, nibble >> 2), dim=-1)
    if encoding == "1:2-half":
        return torch.stack((nibble & 1, nibble >> 2 & 1), dim=-1).flatten(-2)[..., None]
    return (nibble >> 3)[..., None]


def check_metadata(metadata: Tensor, encoding: str, m: int) -> None:
    """Raise LayoutError if some group's stored bits stand for no choice."""
    if encoding == "bytes":
        rising = (metadata[..., 1:] > metadata[..., :-1]).all(-1)
        good = rising & (metadata[..., -1] < m)
        expected = f"rising indices below {m}"
    else:
        legal = torch.zeros(16, dtype=torch.bool, device=metadata.device)
        legal[list(_NIBBLES[encoding][3])] = True
        nibble = _nibbles(metadata)
        good = legal[nibble.int()]
        expected = f"nibbles {', '.join(map(str, _NIBBLES[encoding][3]))}"
    if not bool(good.all()):
        matrix, row, group = (int(i) for i in (~good).nonzero()[0])
        raise LayoutError(
            f"NMLayout.metadata: matrix {matrix}, row {row}, "
            f"{'group' if encoding == 'bytes' else 'nibble'} {group} holds no {encoding!r} choice; "
            f"expected {expected}; build the layout with NMLayout.from_choice"
        )
