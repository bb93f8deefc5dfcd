"""What other libraries call sparse, in and out: `mg.interchange`.

    from mixgrain import interchange as X
    s = X.from_scipy(matrix)                          # a SparseTensor
    mask = X.to_block_mask(P.window(256), 8192, 8192)  # a pattern, for FlexAttention

What has values becomes a SparseTensor; what only says which pairs are kept becomes a pattern.

    in and out          what it is                                   becomes
    scipy               csr, csc, coo, bsr arrays                    SparseTensor
    torch               sparse_csr, csc, coo, bsr, bsc               SparseTensor
    semi_structured     torch's 2:4 weights: packed and meta         SparseTensor
    cupy                csr, csc, coo on a GPU                       SparseTensor
    edges               (2, E) edge lists, with or without weights   SparseTensor or pattern
    block_mask          FlexAttention's BlockMask                    pattern
    flash_blocks        FlashAttention-4's block-sparse tensors      pattern
    intervals           cuDNN's interval masks (flex_attention)      pattern
    bsa                 cuDNN's block indices (BSA)                  pattern
    flashmask           FlashMask's startend_row_indices             pattern

Index arrays are checked on the way in: range, order, duplicates, shapes; many of these libraries
check nothing. Everything that takes a pattern takes a layout or a SparseTensor, too; between our
own layouts there is ``s.to_layout(kind)``. Arrays that speak DLPack go through ``from_dlpack``.
"""

from .arrays import from_dlpack
from .cudnn import BlockIndices, from_bsa, from_intervals, to_bsa, to_intervals
from .cupy_sparse import from_cupy, to_cupy
from .edges import Edges, from_edges, to_edges
from .flash_attention import FlashBlocks, from_flash_blocks, to_flash_blocks
from .flashmask import FlashMask, from_flashmask, to_flashmask
from .flex import from_block_mask, to_block_mask
from .scipy_sparse import from_scipy, to_scipy
from .semi_structured import SemiStructured, from_semi_structured, to_semi_structured
from .torch_sparse import from_torch, to_torch

__all__ = [
    "BlockIndices",
    "Edges",
    "FlashBlocks",
    "FlashMask",
    "SemiStructured",
    "from_block_mask",
    "from_bsa",
    "from_cupy",
    "from_dlpack",
    "from_edges",
    "from_flash_blocks",
    "from_flashmask",
    "from_intervals",
    "from_scipy",
    "from_semi_structured",
    "from_torch",
    "to_block_mask",
    "to_bsa",
    "to_cupy",
    "to_edges",
    "to_flash_blocks",
    "to_flashmask",
    "to_intervals",
    "to_scipy",
    "to_semi_structured",
    "to_torch",
]
