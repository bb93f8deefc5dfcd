"""The fused attention on CUDA: plans, and the kernels that compute with them."""
