"""Floor 1: SDDMM, softmax, SpMM and linear on sparse matrices."""
