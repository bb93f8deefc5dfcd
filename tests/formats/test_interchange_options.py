"""Options of the interchange that cannot be: refused by name, whatever their type."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import mixgrain as mg
from mixgrain.formats import interchange as X
from mixgrain.formats import patterns as P
from mixgrain.formats.errors import MixgrainError

N = 32
S = mg.sparsify(torch.eye(N), "row")
EDGES = X.to_edges(S)
WHOLE = P.blocks(torch.ones(2, 2, dtype=torch.bool), 16)
FLASH = X.to_flash_blocks(P.window(3), N, N, 16)
MASK = X.to_flashmask(P.causal(), N, N)

CALLS: dict[str, tuple[Callable[[object], object], str]] = {
    "to_scipy": (lambda x: X.to_scipy(S, x), "format"),
    "to_cupy": (lambda x: X.to_cupy(S, x), "format"),
    "to_torch": (lambda x: X.to_torch(S, x), "layout"),
    "from_edges": (lambda x: X.from_edges(EDGES[0], (N, N), flow=x), "flow"),
    "from_edges, shape": (lambda x: X.from_edges(EDGES[0], x), "shape"),
    "to_edges": (lambda x: X.to_edges(S, flow=x), "flow"),
    "to_block_mask": (lambda x: X.to_block_mask(P.full(), N, N, x), "blocks of"),
    "to_flash_blocks": (lambda x: X.to_flash_blocks(P.full(), N, N, x), "blocks of"),
    "to_flash_blocks, compact": (lambda x: X.to_flash_blocks(P.full(), N, N, 16, x), "compact"),
    "from_flash_blocks": (lambda x: X.from_flash_blocks(FLASH[:4], (N, N), x), "block_size"),
    "to_intervals": (lambda x: X.to_intervals(P.full(), N, N, max_intervals=x), "max_intervals"),
    "to_bsa, size": (lambda x: X.to_bsa(WHOLE, N, N, x), "size"),
    "to_bsa, batch": (lambda x: X.to_bsa(WHOLE, N, N, 16, batch=x), "batch"),
    "to_bsa, heads": (lambda x: X.to_bsa(WHOLE, N, N, 16, heads=x), "heads"),
    "to_flashmask": (lambda x: X.to_flashmask(P.causal(), N, N, x), "causal"),
    "to_flashmask, columns": (lambda x: X.to_flashmask(P.causal(), N, N, columns=x), "columns"),
    "from_flashmask": (lambda x: X.from_flashmask(MASK[0], (N, N), x), "causal"),
}
WRONG = {
    "text": "abc",
    "a fraction": 2.5,
    "a list": [3],
    "a set": {1, 2, 3},
    "an array": np.ones((4, 4)),
    "a large tensor": torch.zeros(50, 50),
    "an object": object(),
}


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("name", CALLS)
def test_the_error_names_the_option(name: str, value: str) -> None:
    call, word = CALLS[name]
    words = rf"(?s){word}.*(expected|choose|multiples)"
    with pytest.raises((MixgrainError, TypeError), match=words) as caught:
        call(WRONG[value])
    assert len(str(caught.value)) < 300
