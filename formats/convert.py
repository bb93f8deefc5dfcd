"""SparseTensors from and to scipy's and torch's own sparse matrices; they live in interchange."""

from .interchange.scipy_sparse import from_scipy, to_scipy
from .interchange.torch_sparse import from_torch, to_torch

__all__ = ["from_scipy", "from_torch", "to_scipy", "to_torch"]
