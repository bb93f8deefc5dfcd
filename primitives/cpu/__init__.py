"""CPU kernels: dense products on strips of a sparse matrix, chunked to stay in cache."""
