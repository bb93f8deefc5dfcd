"""Sparse attention and linear layers: any pattern, exact to the element, paying for what it keeps.

Names load on first use, so that `import mixgrain` costs nothing and needs no GPU, driver or CuPy.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "BlockLayout", "Costs", "LayoutError", "LayoutModule", "MixedLayout", "MixgrainError",
    "NMLayout", "RowLayout", "SparseAttention", "SparseLinear", "SparseTensor", "TileLayout",
    "attend", "clear_caches", "explain", "huggingface", "interchange", "linear", "load",
    "load_model", "merge", "patterns", "save", "sddmm", "softmax", "sparsify", "sparsify_model",
    "spmm",
]  # fmt: skip

if TYPE_CHECKING:
    from mixgrain.attention import huggingface
    from mixgrain.attention.attend import attend
    from mixgrain.attention.explain import explain
    from mixgrain.attention.merge import merge
    from mixgrain.attention.modules import SparseAttention
    from mixgrain.formats import interchange, patterns
    from mixgrain.formats.block import BlockLayout
    from mixgrain.formats.cache import clear_caches
    from mixgrain.formats.costs import Costs
    from mixgrain.formats.errors import LayoutError, MixgrainError
    from mixgrain.formats.files import load, save
    from mixgrain.formats.mixed import MixedLayout
    from mixgrain.formats.nm import NMLayout
    from mixgrain.formats.row import RowLayout
    from mixgrain.formats.sparse import SparseTensor
    from mixgrain.formats.sparsify import sparsify
    from mixgrain.formats.tile import TileLayout
    from mixgrain.primitives.layout_module import LayoutModule
    from mixgrain.primitives.linear import linear
    from mixgrain.primitives.load_model import load_model
    from mixgrain.primitives.sddmm import sddmm
    from mixgrain.primitives.softmax import softmax
    from mixgrain.primitives.sparse_linear import SparseLinear
    from mixgrain.primitives.sparse_model import sparsify_model
    from mixgrain.primitives.spmm import spmm
else:
    from importlib import import_module

    _HOMES = {
        "BlockLayout": "formats.block", "MixedLayout": "formats.mixed", "NMLayout": "formats.nm",
        "RowLayout": "formats.row", "TileLayout": "formats.tile", "SparseTensor": "formats.sparse",
        "LayoutError": "formats.errors", "MixgrainError": "formats.errors", "load": "formats.files",
        "Costs": "formats.costs", "clear_caches": "formats.cache", "sparsify": "formats.sparsify",
        "interchange": "formats.interchange", "patterns": "formats.patterns",
        "save": "formats.files", "huggingface": "attention.huggingface", "merge": "attention.merge",
        "linear": "primitives.linear", "sddmm": "primitives.sddmm", "softmax": "primitives.softmax",
        "spmm": "primitives.spmm", "attend": "attention.attend", "explain": "attention.explain",
        "LayoutModule": "primitives.layout_module", "SparseAttention": "attention.modules",
        "SparseLinear": "primitives.sparse_linear", "sparsify_model": "primitives.sparse_model",
        "load_model": "primitives.load_model",
    }  # fmt: skip

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module 'mixgrain' has no attribute {name!r}")
        module = import_module(f"mixgrain.{_HOMES[name]}")
        value = globals()[name] = getattr(module, name, module)  # patterns are a module
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
