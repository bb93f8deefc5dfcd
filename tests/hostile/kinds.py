"""Values that no argument expects, by name; each is made anew so that no call can spoil another."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import torch


class Labelled(torch.Tensor):
    """A subclass of Tensor without any behaviour of its own."""


def _numbers(*shape: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.randn(*shape, generator=g)


# What is no tensor.
PLAIN: dict[str, Callable[[], object]] = {
    "None": lambda: None,
    "an int": lambda: 3,
    "a negative int": lambda: -3,
    "a huge int": lambda: 2**70,
    "a float": lambda: 2.5,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "a bool": lambda: True,
    "a complex": lambda: 1j,
    "a string": lambda: "abc",
    "bytes": lambda: b"ab",
    "a list": lambda: [1, 2],
    "a list of lists": lambda: [[1.0, 2.0], [3.0, 4.0]],
    "a ragged list": lambda: [[1], [2, 3]],
    "an empty list": list,
    "a tuple": lambda: (1, 2),
    "a dict": lambda: {"a": 1},
    "a set": lambda: {1, 2},
    "a range": lambda: range(3),
    "a huge range": lambda: range(2**62),
    "an iterator": lambda: iter([1]),
    "a function": lambda: lambda: 0,
    "an object": object,
    "a class": lambda: torch.Tensor,
    "a dtype": lambda: torch.float16,
    "another dtype": lambda: torch.int8,
    "a device": lambda: torch.device("meta"),
    "a device that is not there": lambda: torch.device("xpu", 3),
    "a numpy integer": lambda: np.int64(3),
    "a numpy float": lambda: np.float32(0.5),
    "a numpy matrix": lambda: np.ones((4, 4), np.float32),
    "a numpy view with negative strides": lambda: np.arange(12.0).reshape(3, 4)[::-1, ::-1],
    "a read-only numpy array": lambda: np.broadcast_to(np.float32(1), (3, 4)),
    "numpy strings": lambda: np.array(["a", "b"]),
}

# What is one, of a dtype, layout or shape that hardly anything expects.
TENSORS: dict[str, Callable[[], object]] = {
    **{
        str(dtype): lambda dtype=dtype: (_numbers(20, 8) * 3).to(dtype)
        for dtype in (
            torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.uint16,
            torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e4m3fn,
            torch.float8_e5m2,
        )
    },
    "0-D": lambda: torch.tensor(1.0),
    "1-D": lambda: torch.ones(3),
    "2-D": lambda: torch.ones(20, 8),
    "5-D": lambda: torch.ones(1, 1, 2, 20, 8),
    "empty": lambda: torch.empty(0),
    "without rows": lambda: torch.empty(1, 2, 0, 8),
    "without columns": lambda: torch.empty(1, 2, 20, 0),
    "without a batch": lambda: torch.empty(0, 2, 20, 8),
    "indices in any order": lambda: torch.tensor([3, 1, 2, 2, 0]),
    "negative indices": lambda: torch.tensor([0, -1]),
    "indices far outside": lambda: torch.tensor([0, 2**40]),
    "on meta": lambda: torch.empty(1, 2, 20, 8, device="meta"),
    "integers on meta": lambda: torch.zeros(3, dtype=torch.int64, device="meta"),
    "sparse COO": lambda: torch.eye(20).to_sparse(),
    "sparse CSR": lambda: torch.eye(20).to_sparse_csr(),
    "mkldnn": lambda: torch.ones(20, 8).to_mkldnn(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(20, 8), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)]),
    "nested, jagged": lambda: torch.nested.nested_tensor(
        [torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged
    ),
    "with the negative bit": lambda: torch.imag(torch.complex(_numbers(20, 8), _numbers(20, 8))
                                                .conj()),
    "with the conjugate bit": lambda: torch.complex(_numbers(20, 8), _numbers(20, 8)).conj(),
    "expanded": lambda: torch.ones(()).expand(1, 2, 20, 8),
    "overlapping": lambda: torch.arange(30.0).as_strided((20, 8), (1, 1)),
    "misaligned": lambda: torch.ones(1 + 2 * 20 * 8)[1:].view(1, 2, 20, 8),
    "a parameter": lambda: torch.nn.Parameter(_numbers(1, 2, 20, 8)),
    "of a subclass": lambda: _numbers(1, 2, 20, 8).as_subclass(Labelled),
}  # fmt: skip

KINDS = {**PLAIN, **TENSORS}
# Torch announces the end of some of them.
for _words in ("torch.quantize_per_tensor", "TypedStorage", "The PyTorch API of nested"):
    warnings.filterwarnings("ignore", _words)
